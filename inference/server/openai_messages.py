"""What a chat is made of, checked: messages, tools that the model is told of, and what its template is to know besides."""

from __future__ import annotations

import json

from inference.server.refused import shown, wrong
from models.chat import RESERVED, ROLES


def messages(name: str, value: object) -> list[dict]:
    if not isinstance(value, list) or not value:
        wrong(name, f"{name} must be a list with at least one message")
    return [_message(f"{name}[{n}]", m) for n, m in enumerate(value)]


def _message(name: str, message: object) -> dict:
    if not isinstance(message, dict):
        wrong(name, f"{name} must be an object with role and content, not {shown(message)}")
    for key in ("function_call", "audio"):
        if message.get(key):
            wrong(f"{name}.{key}", f"{name}.{key} is not supported")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    # Newer models call the system role so.
    role = "system" if role == "developer" else role
    if role not in ROLES:
        wrong(f"{name}.role", f"{name}.role {shown(role)} must be {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    if calls:
        _check_calls(f"{name}.tool_calls", role, calls)
    if isinstance(content, list):
        content = "".join(_text_part(f"{name}.content[{n}]", part) for n, part in enumerate(content))
    if not isinstance(content, str) and not (content is None and calls):
        wrong(f"{name}.content", f"{name}.content must be a text or a list of text parts, not {shown(content)}")
    # The template may read more of it, such as reasoning_content.
    return {key: of for key, of in message.items() if of is not None} | {"role": role, "content": content}


def _text_part(name: str, part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        wrong(name, f'{name} must be {{"type": "text", "text": ...}}: nothing but text is supported')
    return part["text"]


def _check_calls(name: str, role: str, calls: object) -> None:
    if role != "assistant" or not isinstance(calls, list):
        wrong(name, f"{name} must be a list, of a message of the assistant")
    for n, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            wrong(f"{name}[{n}]", f'{name}[{n}] must be {{"function": {{"name": ..., "arguments": ...}}}}')
        try:
            arguments = json.loads(function.get("arguments") or "{}")
        except (TypeError, ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            wrong(f"{name}[{n}].function.arguments", f"{name}[{n}].function.arguments must be a JSON object, as a text")


def tools(name: str, value: object) -> list[dict]:
    if not isinstance(value, list):
        wrong(name, f"{name} must be a list, not {shown(value)}")
    for n, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or tool.get("type") != "function":
            wrong(f"{name}[{n}]", f'{name}[{n}] must be {{"type": "function", "function": {{"name": ..., ...}}}}')
    return value


def tool_choice(name: str, value: object) -> object:
    """The answer is text, and whether it is a call is the model's choice: nothing can be forced."""
    if value not in ("none", "auto"):
        wrong(name, f"{name} {shown(value)} is not supported: use auto, and read calls from the answer's text")
    return value


def template_kwargs(name: str, value: object) -> dict:
    if not isinstance(value, dict):
        wrong(name, f"{name} must be an object of what the chat template is to know, not {shown(value)}")
    for key in value:
        if key in RESERVED or not key.isidentifier():
            wrong(f"{name}.{key}"[:80], f"{name} may not have {shown(key)}")
    return value
