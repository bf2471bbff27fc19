"""The fields of OpenAI's API, each with what it may be.

After https://platform.openai.com/docs/api-reference (completions, chat). `top_k`, `min_p`, `repetition_penalty`, `min_tokens`,
`stop_token_ids`, `ignore_eos`, `priority`, `return_token_ids`, `add_special_tokens`, `add_generation_prompt` and
`chat_template_kwargs` are vLLM's, `parse_special` is llama.cpp's. A field of theirs that we have not is refused, unless its
value changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from inference.server.openai_messages import messages, template_kwargs, tool_choice, tools
from inference.server.refused import shown, wrong

# The most answers of one request, over all its prompts; the most likeliest tokens of a position; the most stop texts; the most
# tokens with a bias.
MOST_ANSWERS, MOST_LIKELIEST, MOST_STOPS, MOST_BIASES = 128, 20, 4, 1024


# --- kinds of fields: each takes a name and a value that is not null, and returns the value or raises Refused

Check = Callable[[str, object], object]


def _whole(low: int, high: int) -> Check:
    def check(name: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            wrong(name, f"{name} must be a whole number, not {shown(value)}")
        if not low <= value <= high:
            wrong(name, f"{name} {shown(value)} must be from {low} to {high}")
        return value

    return check


def _number(low: float, high: float, above: bool = False) -> Check:
    """`above`: `low` itself is not allowed."""

    def check(name: str, value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            wrong(name, f"{name} must be a number, not {shown(value)}")
        if not low <= value <= high or (above and value == low):
            wrong(name, f"{name} {shown(value)} must be {f'above {low} and at most' if above else f'from {low} to'} {high}")
        return float(value)

    return check


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        wrong(name, f"{name} must be true or false, not {shown(value)}")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        wrong(name, f"{name} must be a text, not {shown(value)}")
    return value


def _anything(name: str, value: object) -> object:
    return value


def _stops(name: str, value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        wrong(name, f"{name} must be a text or a list of texts, not {shown(value)}")
    if len(stops) > MOST_STOPS:
        wrong(name, f"{name} has {len(stops)} texts: at most {MOST_STOPS} are allowed")
    if "" in stops:
        wrong(name, f"{name} has an empty text, which would end everything before it begins")
    return tuple(stops)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not _are_ids(value):
        wrong(name, f"{name} must be a list of token ids, not {shown(value)}")
    return tuple(value)


def _bias(name: str, value: object) -> tuple[tuple[int, float], ...]:
    """What is added to the logits of tokens, by their ids, which JSON has as texts."""
    if not isinstance(value, dict) or not all(key.isdecimal() and len(key) < 12 for key in value):
        wrong(name, f"{name} must be an object of numbers by token ids, not {shown(value)}")
    if len(value) > MOST_BIASES:
        wrong(name, f"{name} has {len(value)} tokens: at most {MOST_BIASES} are allowed")
    number = _number(-100, 100)
    return tuple((int(key), number(f"{name}[{key}]", bias)) for key, bias in sorted(value.items()) if bias)


def _stream_options(name: str, value: object) -> dict:
    if not isinstance(value, dict):
        wrong(name, f"{name} must be an object, not {shown(value)}")
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


# --- which fields there are

_SAMPLING: dict[str, Check] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _whole(-1, 2**31),
    "min_p": _number(0, 1),
    "seed": _whole(-(2**63), 2**63 - 1),
    "repetition_penalty": _number(0, 100, above=True),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _bias,
    "min_tokens": _whole(0, 2**31),
}
_COMMON: dict[str, Check] = _SAMPLING | {
    "model": _text,
    "stream": _flag,
    "stream_options": _stream_options,
    "stop": _stops,
    "stop_token_ids": _token_ids,
    "n": _whole(1, MOST_ANSWERS),
    "max_tokens": _whole(0, 2**31),
    "ignore_eos": _flag,
    "priority": _whole(-100, 100),
    "return_token_ids": _flag,
    # They say who asks and how a service may keep and bill it, and nothing about the answer.
    **dict.fromkeys(("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"), _anything),
}
FIELDS: dict[bool, dict[str, Check]] = {
    False: _COMMON
    | {
        "prompt": _prompt,
        "logprobs": _whole(0, MOST_LIKELIEST),
        "echo": _flag,
        "add_special_tokens": _flag,
        "parse_special": _flag,
    },
    True: _COMMON
    | {
        "messages": messages,
        "max_completion_tokens": _whole(1, 2**31),
        "logprobs": _flag,
        "top_logprobs": _whole(0, MOST_LIKELIEST),
        "tools": tools,
        "tool_choice": tool_choice,
        "chat_template_kwargs": template_kwargs,
        "add_generation_prompt": _flag,
    },
}
# Fields that we have not, with the values that change nothing.
_NEUTRAL: dict[str, list[object]] = {
    "response_format": [{"type": "text"}],
    "use_beam_search": [False],
    "length_penalty": [1],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True],
    "include_stop_str_in_output": [False],
    "bad_words": [[]],
    "typical_p": [1],
    "mirostat": [0],
    "cache_prompt": [True],
    # Nothing but null.
    "prompt_logprobs": [],
    "truncate_prompt_tokens": [],
    "allowed_token_ids": [],
    "structured_outputs": [],
    "guided_json": [],
    "guided_regex": [],
    "guided_choice": [],
    "guided_grammar": [],
}
NEUTRAL: dict[bool, dict[str, list[object]]] = {
    False: _NEUTRAL | {"best_of": [1], "suffix": [""]},
    True: _NEUTRAL
    | {
        "parallel_tool_calls": [True, False],
        "functions": [[]],
        "function_call": ["none", "auto"],
        "modalities": [["text"]],
        "audio": [],
        "prediction": [],
        "reasoning_effort": ["none"],
        "verbosity": ["medium"],
        "web_search_options": [],
        "store": [False],
        "add_special_tokens": [False],
        "continue_final_message": [False],
        "chat_template": [],
        "documents": [[]],
        "echo": [False],
        "include_reasoning": [True],
    },
}
