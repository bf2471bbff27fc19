"""A model's chat template, run as Transformers' apply_chat_template runs it: Jinja2 in a sandbox, with its filters and globals.

A template comes with a model, so it is somebody else's program. The sandbox lets it reach nothing but what it is given, and it
may do so much work and no more: a turn of a loop, a call and an operator are a unit each, and so are 256 characters or items
that they make. Units are not seconds, so that all ranks agree on what is too much.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import wraps

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from models.template_error import Refusal, TemplateError

# A template's work: some seconds of an empty loop. The largest number that it may pass to a function, as a width may be.
WORK, LARGEST = 1_000_000, 100_000
# The most characters of a conversation.
LONGEST = 8_000_000


def _same(text: str) -> str:
    return text


class _State:
    """One rendering: the work that is left, the time that it is made at, and what is done to each text that it makes."""

    def __init__(self, now: datetime, each: Callable[[str], str]) -> None:
        self.left, self.now, self.each = WORK, now, each

    def spend(self, made: object = None) -> object:
        """Pay for what was made."""
        size = len(made) if isinstance(made, str | list | tuple | dict) else 0
        self.left -= 1 + size // 256
        if self.left < 0 or size > LONGEST:
            raise TemplateError(f"the chat template does too much: more than {WORK:,} steps or {LONGEST:,} characters")
        return self.each(made) if type(made) is str else made


_state: ContextVar[_State] = ContextVar("state")


# Filters that make as much as a number says; so do methods of texts.
_WIDE = {"batch", "center", "format", "indent", "slice", "truncate", "wordwrap"}
_PADS = {"center", "expandtabs", "ljust", "rjust", "zfill"}
_WIDTH = re.compile(r"\d{6}")


def _checked(widths: Iterable[object], format: str = "") -> None:
    """Refuses numbers among `widths`, and in a format, that would take the memory before it could be paid for."""
    wide = [n for n in widths if isinstance(n, int) and abs(n) > LARGEST] or [format] * bool(_WIDTH.search(format))
    if wide:
        raise TemplateError(f"the chat template makes a text by {str(wide[0])[:40]!r}: use a width up to {LARGEST:,}")


def _paid(name: str, function: Callable) -> Callable:
    """A filter whose result is paid for."""

    @wraps(function)
    def paid(*args: object, **more: object) -> object:
        if name in _WIDE:
            _checked([*args[1:], *more.values()], args[0] if name == "format" else "")
        return _state.get().spend(function(*args, **more))

    return paid


class _Count(NodeTransformer):
    """Lets each turn of a loop be counted, and makes a call of each `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        turn = nodes.Call(nodes.EnvironmentAttribute("turned"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(turn))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("together"), node.nodes, [], None, None)


class _Generation(Extension):
    """{% generation %} marks for training what the assistant says. Here it is only its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        next(parser.stream)
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with _, as in Transformers."""

    def __init__(*args: object, **more: object) -> None:
        self, *given = args
        super(_Namespace, self).__init__()
        for name, value in dict(*given, **more).items():
            self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"a namespace may not have {name!r}")
        super().__setitem__(name, value)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        # Not optimised: what is constant would be computed unpaid, while it is compiled.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], optimized=False)
        self.filters |= {"tojson": _tojson, "replace": _replace}
        self.filters = {name: _paid(name, f) for name, f in self.filters.items()}
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now, "namespace": _Namespace}

    def _parse(self, *args: object) -> nodes.Template:
        return _Count().visit(super()._parse(*args))

    def concat(self, parts: Iterable[str]) -> str:
        return _state.get().spend("".join(parts))

    def turned(self) -> str:
        return ""

    def together(self, *parts: object) -> str:
        return "".join(map(str, parts))

    def call(__self, __context: jinja2.runtime.Context, __obj: object, *args: object, **more: object) -> object:  # noqa: N805
        state = _state.get()
        if isinstance(getattr(__obj, "__self__", None), str) and __obj.__name__ in _PADS:
            _checked([*args, *more.values()])
        state.spend()
        return state.spend(super().call(__context, __obj, *args, **more))

    def wrap_str_format(self, value: object) -> Callable[..., str] | None:
        made = super().wrap_str_format(value)
        if made is not None:
            _checked([], value.__self__)
        return made

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: object, right: object) -> object:
        sized = [x for x in (left, right) if isinstance(x, str | list | tuple)]
        if operator in ("*", "**"):
            times = [x for x in (left, right) if isinstance(x, int)]
            # A text repeated, or a power.
            _checked([n * len(x) for n in times for x in sized] or (times if operator == "**" else []))
        elif operator == "%" and isinstance(left, str):
            _checked(right if isinstance(right, tuple) and "*" in left else [], left)
        return _state.get().spend(super().call_binop(context, operator, left, right))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter makes."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    # Marks are not the text's: they are escaped by nobody.
    return re.sub(r"[^\x00-\x7f\U00100000-\U0010ffff]", lambda c: json.dumps(c[0])[1:-1], text) if ensure_ascii else text


def _replace(text: object, old: str, new: str, count: int = -1) -> str:
    """As Jinja's, which would forget of a text what it knows besides its characters."""
    return (text if isinstance(text, str) else str(text)).replace(old, new, count)


def _raise(message: str) -> None:
    raise Refusal(f"the chat template refuses these messages: {_line(message)}")


def _strftime_now(format: str) -> str:
    return _state.get().now.strftime(format)


class Template:
    """Compiles `source`. Raises TemplateError if it is no template."""

    def __init__(self, source: str) -> None:
        token = _state.set(_State(datetime.now(), _same))
        try:
            self._compiled = _Environment().from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise TemplateError(f"the chat template is none: {_line(error)}") from None
        finally:
            _state.reset(token)

    def render(self, now: datetime, variables: Mapping[str, object], each: Callable[[str], str] = _same) -> str:
        """The text that it makes of `variables`, such as messages. `each`: done to every text on its way.

        Raises TemplateError if it fails or does too much, and Refusal if it says no.
        """
        token = _state.set(_State(now, each))
        try:
            return "".join(_counted(self._compiled.generate(**variables), _state.get()))
        except TemplateError:
            raise
        except Exception as error:  # whatever the functions that it calls raise
            raise TemplateError(f"the chat template fails at these messages: {_line(error)}") from None
        finally:
            _state.reset(token)


def _counted(chunks: Iterator[str], state: _State) -> Iterator[str]:
    length = 0
    for chunk in chunks:
        state.spend(chunk)
        length += len(chunk)
        if length > LONGEST:
            raise TemplateError(f"the chat template makes more than {LONGEST:,} characters of these messages")
        yield chunk


def _line(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
