"""What clients of OpenAI's API send, turned into what the engine is asked."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from inference.engine import Ask
from inference.penalties import Penalties
from inference.sampling import Sampling
from inference.server.openai_fields import FIELDS, MOST_ANSWERS, NEUTRAL
from inference.server.refused import missing, shown, wrong
from models.tokenizer import Tokenizer

# A lower temperature counts as 0: logits divided by it may overflow.
COLDEST = 1e-4


@dataclass(frozen=True)
class Call:
    """A request, checked. `prompts`: texts or token ids, or none in a chat. `top_logprobs`, `penalties`: as in Ask. `echo`: the
    prompt leads its answers. `special`: whether bos leads, and whether control tokens in a prompt's text are tokens."""

    chat: bool
    prompts: list[str | list[int]]
    messages: list[dict]
    tools: list[dict]
    template: dict
    continued: bool
    n: int
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    top_logprobs: int | None
    ignore_eos: bool
    priority: int
    token_ids: bool
    penalties: Penalties
    stop_ids: tuple[int, ...]
    echo: bool
    special: tuple[bool, bool]

    def encoded(self, tokenizer: Tokenizer | None) -> list[list[int]]:
        """The prompts as token ids, none of them empty."""
        if tokenizer is None and (self.chat or self.stop or any(isinstance(p, str) for p in self.prompts)):
            name = "messages" if self.chat else "stop" if self.stop else "prompt"
            wrong(name, f"this model has no tokenizer: use /v1/completions with token ids, and no {name} of text")
        try:
            if self.chat:
                return [tokenizer.chat(self.messages, self.tools, self.template, not self.continued)]
            (bos, special), texts = self.special, [isinstance(p, str) for p in self.prompts]
            ids = [
                tokenizer.encode(p, special, None if bos else False) if text else p
                for p, text in zip(self.prompts, texts, strict=True)
            ]
        except ValueError as error:
            wrong("messages" if self.chat else "prompt", str(error))
        if not all(ids):
            wrong("prompt", "prompt is empty: give at least one token")
        return ids

    def asks(self, prompts: Sequence[list[int]], context: int, ends: frozenset[int], owner: str = "") -> list[Ask]:
        """One for each answer: `n` of the first prompt, then of the next. What a prompt gets does not depend on the others."""
        return [
            Ask(
                prompt=prompt,
                max_tokens=self._room(len(prompt), context),
                sampling=self.sampling,
                stream=stream,
                ends=(frozenset() if self.ignore_eos else ends) | frozenset(self.stop_ids),
                top_logprobs=self.top_logprobs,
                priority=self.priority,
                owner=owner,
                penalties=self.penalties,
                prompt_logprobs=self.top_logprobs if self.echo else None,
            )
            for prompt in prompts
            for stream in range(self.n)
        ]

    def _room(self, tokens: int, context: int) -> int:
        """How many new tokens a prompt of so many gets at most."""
        where, default = ("messages", context) if self.chat else ("prompt", 16)
        wanted = min(default, max(1, context - tokens)) if self.max_tokens is None else self.max_tokens
        if tokens + wanted > context:
            wrong(
                where,
                f"This model's maximum context length is {context} tokens. However, you requested {tokens + wanted} tokens "
                f"({tokens} in the {where}, {wanted} in the completion). Please reduce the length of the {where}.",
                "context_length_exceeded",
            )
        return wanted


def decoded(body: bytes) -> dict:
    """The JSON object of a body."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    try:
        fields = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        wrong(None, f"We could not parse the JSON body of your request: {str(error) or 'nested too deeply'}")
    if not isinstance(fields, dict):
        wrong(None, f"the body must be a JSON object, not {shown(fields)}")
    return fields


def parsed(fields: dict, chat: bool, served: str, defaults: Mapping[str, float] | None = None) -> Call:
    """The fields of a request for the model `served`. A field that is null counts as left out; then one of `defaults`, those
    that the model's makers want for sampling, holds. Raises Refused."""
    f = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name in FIELDS[chat]:
            f[name] = FIELDS[chat][name](name, value)
        elif name in NEUTRAL[chat]:
            neutral = NEUTRAL[chat][name] + ([fields.get("n")] if name == "best_of" else [])
            if value not in neutral:
                wrong(name, f"{name} is not supported by this server: leave it out", "unsupported_parameter")
        else:
            wrong(name, f"Unrecognized request argument supplied: {name[:60]}", "unknown_parameter")
    if f.get("model", served) != served:
        raise missing(f["model"], served)
    what = "messages" if chat else "prompt"
    if what not in f:
        wrong(what, f"you must provide {what}")
    if any(f.get("stream_options", {}).values()) and not f.get("stream"):
        wrong("stream_options", "stream_options is only for stream: true")
    if "max_tokens" in f and "max_completion_tokens" in f:
        wrong("max_completion_tokens", "max_tokens is the old name of max_completion_tokens: give one of them")
    most = f.get("max_completion_tokens", f.get("max_tokens"))
    if most == 0 and not f.get("echo"):
        wrong("max_tokens", "max_tokens 0 must be from 1, or with echo: true")
    if f.get("min_tokens", 0) > (2**31 if most is None else most):
        wrong("min_tokens", f"min_tokens {f['min_tokens']} must be at most max_tokens, {most}")
    n, prompts = f.get("n", 1), f.get("prompt", [])
    if n * len(prompts) > MOST_ANSWERS:
        wrong("prompt", f"{n} answers to each of {len(prompts)} prompts are more than {MOST_ANSWERS}")
    return Call(
        chat=chat,
        prompts=prompts,
        messages=f.get("messages", []),
        tools=f.get("tools", []),
        template=f.get("chat_template_kwargs", {}),
        continued=not f.get("add_generation_prompt", True),
        n=n,
        max_tokens=most,
        sampling=_sampling(dict(defaults or {}) | f),
        stop=f.get("stop", ()),
        stream=f.get("stream", False),
        include_usage=bool(f.get("stream_options", {}).get("include_usage")),
        top_logprobs=_likeliest(f) if chat else f.get("logprobs"),
        ignore_eos=f.get("ignore_eos", False),
        priority=f.get("priority", 0),
        token_ids=f.get("return_token_ids", False),
        penalties=Penalties(
            f.get("repetition_penalty", 1.0),
            f.get("presence_penalty", 0.0),
            f.get("frequency_penalty", 0.0),
            f.get("min_tokens", 0),
            f.get("logit_bias", ()),
        ),
        stop_ids=f.get("stop_token_ids", ()),
        echo=f.get("echo", False),
        special=(f.get("add_special_tokens", True), f.get("parse_special", True)),
    )


def _sampling(f: Mapping[str, object]) -> Sampling:
    temperature = f.get("temperature", 1.0)
    return Sampling(
        temperature=temperature if temperature >= COLDEST else 0.0,
        top_k=max(0, f.get("top_k", 0)),
        top_p=f.get("top_p", 1.0),
        min_p=f.get("min_p", 0.0),
        seed=f["seed"] if "seed" in f else secrets.randbits(63),
    )


def _likeliest(f: Mapping[str, object]) -> int | None:
    if f.get("top_logprobs") and not f.get("logprobs"):
        wrong("top_logprobs", "top_logprobs is only for logprobs: true")
    return f.get("top_logprobs", 0) if f.get("logprobs") else None
