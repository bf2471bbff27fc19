"""A conversation as a model reads it: its chat template's text, where only the template's own words can be control tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING

from models.said import Marks
from models.template_error import Refusal, TemplateError

if TYPE_CHECKING:
    from models.template import Template

ROLES = ("system", "user", "assistant", "tool")
# Names that a message's reasoning goes by. Templates read the first of them, and gpt-oss' reads the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# What a conversation is to a template: nothing else may be called so.
RESERVED = ("messages", "tools", "add_generation_prompt")
Message = Mapping[str, object]


class Chat:
    """`templates`: by name; "tool_use" is for conversations with tools, "default" for all others. `words`: what a template may
    call by name, such as bos_token. `control`: the texts of the control tokens."""

    def __init__(self, templates: Mapping[str, str], words: Mapping[str, str], control: Iterable[str]) -> None:
        self.words, self.marks = dict(words), Marks(control)
        # Compiled when it is needed: a template that is none is no reason not to use the model.
        self.template = cache(lambda tools: _compiled(_chosen(templates, tools)))

    def text(self, messages: Sequence[Message], tools: Sequence[Message], more: Message, answer: bool) -> str:
        """The conversation, up to where the assistant speaks next if there is to be an `answer`. Each control token of the
        template is one private character, of `marks.signs`; all else is text. `more`: further variables of the template.

        Raises ValueError for messages that are none, and TemplateError.
        """
        given = [_checked(n, m) for n, m in enumerate(messages)]
        if not given:
            raise ValueError("there is no message to answer: give one at least")
        # Both renderings are of one moment.
        template, now, failure = self.template(bool(tools)), datetime.now(), None

        def rendered(messages: list, tools: list, more: dict, *each: Callable[[str], str]) -> str:
            own = self.words | more | {"messages": messages, "tools": tools or None, "add_generation_prompt": answer}
            return template.render(now, own, *each)

        for form in _forms(given):
            plain: list = [form, list(tools), dict(more)]
            said: list = self.marks.said(plain)
            for as_said, message in zip(said[0], form, strict=True):
                # Roles are of our list, and some templates make control tokens of them.
                as_said["role"] = message["role"]
            try:
                return self._signed(rendered(*plain), rendered(*said, self.marks.again), plain)
            except Refusal:
                raise
            except TemplateError as error:
                failure = failure or error
        raise failure

    def _signed(self, plain: str, marked: str, given: list) -> str:
        if self.marks.plain(marked) == plain:
            return self.marks.plain(self.marks.signed(marked))
        # The template has looked at what was said more closely than marks let it. If nothing of that is like a control token,
        # all control tokens are the template's.
        if found := self.marks.alike(given):
            raise TemplateError(f"the chat template cannot tell {found!r} in a message from its own: leave it out")
        return self.marks.signed(plain)


def _compiled(source: str) -> Template:
    # Only a conversation needs Jinja2.
    from models.template import Template

    return Template(source)


def _chosen(templates: Mapping[str, str], tools: bool) -> str:
    name = "tool_use" if tools and "tool_use" in templates else "default"
    if name not in templates:
        raise TemplateError(f"the model has chat templates called {', '.join(templates)}, and none called {name}")
    return templates[name]


def _checked(n: int, message: Message) -> dict[str, object]:
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise ValueError(f"message {n} has role {role!r}: use one of {', '.join(ROLES)}")
    if not isinstance(content, str) and not (content is None and calls and role == "assistant"):
        raise ValueError(f"message {n} has content {content!r}: use a text")
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    # What is null is left out: most templates would write None.
    given = {key: value for key, value in message.items() if value is not None}
    return given if reasoning is None else {"thinking": reasoning} | given | {"reasoning_content": reasoning}


def _forms(messages: list[dict]) -> Iterator[list[dict]]:
    """Ways to tell a template of the calls of tools, of which it may understand one: arguments as objects or as JSON text, and
    of a message without a text no content, null or an empty one."""
    if not any(m.get("tool_calls") for m in messages):
        yield messages
        return
    for empty in ({}, {"content": None}, {"content": ""}):
        for arguments in (_object, _json):
            yield [empty | _with_calls(m, arguments) if m.get("tool_calls") else m for m in messages]


def _with_calls(message: dict, arguments: Callable[[object], object]) -> dict:
    calls = []
    for call in message["tool_calls"]:
        function = dict(call.get("function", {}))
        calls.append({**call, "function": function | {"arguments": arguments(function.get("arguments", {}))}})
    return message | {"tool_calls": calls}


def _object(arguments: object) -> object:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _json(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
