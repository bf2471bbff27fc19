"""What clients of OpenAI's API send, checked field by field and turned into what the engine is asked.

After https://platform.openai.com/docs/api-reference (completions, chat); `top_k`, `min_p`, `ignore_eos`, `priority` and
`return_token_ids` are vLLM's. We refuse a field of the API that we have not, unless its value changes nothing.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from inference.engine import Ask
from inference.sampling import Sampling
from models.tokenizer import Tokenizer

# The most answers of one request, over all its prompts; the most likeliest tokens of a position; the most stop texts.
MOST_ANSWERS, MOST_LIKELIEST, MOST_STOPS = 128, 20, 4
# A lower temperature counts as 0: logits divided by it may overflow.
COLDEST = 1e-4


class Refused(Exception):
    """Answers a request with an HTTP status and an error in OpenAI's shape. `param`: the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> dict:
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def wrong(name: str | None, message: str, code: str | None = None) -> NoReturn:
    raise Refused(400, message, name, code)


def missing(model: str, served: str) -> Refused:
    return Refused(404, f"The model {_shown(model)} does not exist: this server has {served}", "model", "model_not_found")


# --- kinds of fields: each takes a name and a value that is not null, and returns the value or raises Refused

Check = Callable[[str, object], object]


def _whole(low: int, high: int) -> Check:
    def check(name: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            wrong(name, f"{name} must be a whole number, not {_shown(value)}")
        if not low <= value <= high:
            wrong(name, f"{name} {_shown(value)} must be from {low} to {high}")
        return value

    return check


def _number(low: float, high: float, above: bool = False) -> Check:
    """`above`: `low` itself is not allowed."""

    def check(name: str, value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            wrong(name, f"{name} must be a number, not {_shown(value)}")
        if not low <= value <= high or (above and value == low):
            wrong(name, f"{name} {_shown(value)} must be {f'above {low} and at most' if above else f'from {low} to'} {high}")
        return float(value)

    return check


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        wrong(name, f"{name} must be true or false, not {_shown(value)}")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        wrong(name, f"{name} must be a text, not {_shown(value)}")
    return value


def _anything(name: str, value: object) -> object:
    return value


def _stops(name: str, value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        wrong(name, f"{name} must be a text or a list of texts, not {_shown(value)}")
    if len(stops) > MOST_STOPS:
        wrong(name, f"{name} has {len(stops)} texts: at most {MOST_STOPS} are allowed")
    if "" in stops:
        wrong(name, f"{name} has an empty text, which would end everything before it begins")
    return tuple(stops)


def _stream_options(name: str, value: object) -> dict:
    if not isinstance(value, dict):
        wrong(name, f"{name} must be an object, not {_shown(value)}")
    for key in value:
        if key not in ("include_usage", "include_obfuscation"):
            wrong(f"{name}.{key}", f"Unrecognized request argument supplied: {name}.{key}")
        if value[key] is not None:
            _flag(f"{name}.{key}", value[key])
    return value


def _prompt(name: str, value: object) -> list[str | list[int]]:
    """One prompt or several, each a text or token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _are_ids(value):
            return [value]
        if all(isinstance(p, str) or (isinstance(p, list) and p and _are_ids(p)) for p in value):
            return value
    wrong(name, f"{name} must be a text, a list of texts, token ids, or a list of lists of token ids, none of them empty")


def _are_ids(value: list) -> bool:
    return all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)


def _messages(name: str, value: object) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        wrong(name, f"{name} must be a list with at least one message")
    return [_message(f"{name}[{n}]", m) for n, m in enumerate(value)]


def _message(name: str, message: object) -> dict[str, str]:
    if not isinstance(message, dict):
        wrong(name, f"{name} must be an object with role and content, not {_shown(message)}")
    for key in ("tool_calls", "tool_call_id", "function_call", "audio"):
        if message.get(key):
            wrong(f"{name}.{key}", f"{name}.{key} is not supported")
    role, content = message.get("role"), message.get("content")
    # Newer models call the system role so.
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        wrong(f"{name}.role", f"{name}.role {_shown(role)} must be system, user or assistant")
    if isinstance(content, list):
        content = "".join(_text_part(f"{name}.content[{n}]", part) for n, part in enumerate(content))
    if not isinstance(content, str):
        wrong(f"{name}.content", f"{name}.content must be a text or a list of text parts, not {_shown(content)}")
    return {"role": role, "content": content}


def _text_part(name: str, part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        wrong(name, f'{name} must be {{"type": "text", "text": ...}}: nothing but text is supported')
    return part["text"]


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- which fields there are

_SAMPLING: dict[str, Check] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1, above=True),
    "top_k": _whole(-1, 2**31),
    "min_p": _number(0, 1),
    "seed": _whole(-(2**63), 2**63 - 1),
}
_COMMON: dict[str, Check] = _SAMPLING | {
    "model": _text,
    "stream": _flag,
    "stream_options": _stream_options,
    "stop": _stops,
    "n": _whole(1, MOST_ANSWERS),
    "max_tokens": _whole(1, 2**31),
    "ignore_eos": _flag,
    "priority": _whole(-100, 100),
    "return_token_ids": _flag,
    # They say who asks and how a service may keep and bill it, and nothing about the answer.
    **dict.fromkeys(("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"), _anything),
}
FIELDS: dict[bool, dict[str, Check]] = {
    False: _COMMON | {"prompt": _prompt, "logprobs": _whole(0, MOST_LIKELIEST)},
    True: _COMMON
    | {
        "messages": _messages,
        "max_completion_tokens": _whole(1, 2**31),
        "logprobs": _flag,
        "top_logprobs": _whole(0, MOST_LIKELIEST),
    },
}
# Fields that we have not, with the values that change nothing.
_NEUTRAL: dict[str, list[object]] = {"presence_penalty": [0], "frequency_penalty": [0], "logit_bias": [{}]}
NEUTRAL: dict[bool, dict[str, list[object]]] = {
    False: _NEUTRAL | {"echo": [False], "best_of": [1], "suffix": [""]},
    True: _NEUTRAL
    | {
        "tools": [[]],
        "tool_choice": ["none", "auto"],
        "parallel_tool_calls": [True, False],
        "functions": [[]],
        "function_call": ["none", "auto"],
        "response_format": [{"type": "text"}],
        "modalities": [["text"]],
        "audio": [],
        "prediction": [],
        "reasoning_effort": ["none"],
        "verbosity": ["medium"],
        "web_search_options": [],
        "store": [False],
    },
}


@dataclass(frozen=True)
class Call:
    """A request, checked. `prompts`: texts or token ids, or the messages of a chat. `top_logprobs`: as in Ask."""

    chat: bool
    prompts: list[str | list[int]]
    messages: list[dict[str, str]]
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

    def encoded(self, tokenizer: Tokenizer | None) -> list[list[int]]:
        """The prompts as token ids, none of them empty."""
        if tokenizer is None and (self.chat or self.stop or any(isinstance(p, str) for p in self.prompts)):
            name = "messages" if self.chat else "stop" if self.stop else "prompt"
            wrong(name, f"this model has no tokenizer: use /v1/completions with token ids, and no {name} of text")
        try:
            if self.chat:
                return [tokenizer.chat(self.messages)]
            ids = [tokenizer.encode(p) if isinstance(p, str) else p for p in self.prompts]
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
                ends=frozenset() if self.ignore_eos else ends,
                top_logprobs=self.top_logprobs,
                priority=self.priority,
                owner=owner,
            )
            for prompt in prompts
            for stream in range(self.n)
        ]

    def _room(self, tokens: int, context: int) -> int:
        """How many new tokens a prompt of so many gets at most."""
        where, default = ("messages", context) if self.chat else ("prompt", 16)
        wanted = self.max_tokens or min(default, max(1, context - tokens))
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
        wrong(None, f"the body must be a JSON object, not {_shown(fields)}")
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
    if "stream_options" in f and not f.get("stream"):
        wrong("stream_options", "stream_options is only for stream: true")
    if "max_tokens" in f and "max_completion_tokens" in f:
        wrong("max_completion_tokens", "max_tokens is the old name of max_completion_tokens: give one of them")
    n, prompts = f.get("n", 1), f.get("prompt", [])
    if n * len(prompts) > MOST_ANSWERS:
        wrong("prompt", f"{n} answers to each of {len(prompts)} prompts are more than {MOST_ANSWERS}")
    return Call(
        chat=chat,
        prompts=prompts,
        messages=f.get("messages", []),
        n=n,
        max_tokens=f.get("max_completion_tokens", f.get("max_tokens")),
        sampling=_sampling(dict(defaults or {}) | f),
        stop=f.get("stop", ()),
        stream=f.get("stream", False),
        include_usage=bool(f.get("stream_options", {}).get("include_usage")),
        top_logprobs=_likeliest(f) if chat else f.get("logprobs"),
        ignore_eos=f.get("ignore_eos", False),
        priority=f.get("priority", 0),
        token_ids=f.get("return_token_ids", False),
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
    if f.get("top_logprobs") is not None and not f.get("logprobs"):
        wrong("top_logprobs", "top_logprobs is only for logprobs: true")
    return f.get("top_logprobs", 0) if f.get("logprobs") else None
