"""A witness of one step on one rank: which lines of the layers ran, on arrays of what shapes, and which verbs they called.

A layer's methods are gone into, and nothing else is: a product, a softmax or a rotation is one line of the layer that calls it.
It looks at arrays and leaves them alone, and it slows the step down, so that a step that is timed has none.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FrameType

import numpy as np

from launch.explain import source
from launch.explain.source import Statement
from launch.process.traced import is_layer
from layers.batch import Batch
from layers.saved import nbytes
from parallel.call import ROOT, Call, Watched, Watcher, path_in_project, site
from parallel.ledger import wire_bytes
from parallel.mesh import Mesh
from parallel.parameter import Fused, Parameter
from parallel.verbs import VERBS


@dataclass
class _Running:
    """A method of `layer` that runs. `at`: its step. `now`: the statement under way, whose step is at `line`."""

    layer: object
    at: int
    now: Statement | None = None
    line: int = 0


class Witness(Watcher):
    """`with Witness(mesh, part) as witness: ...` fills `witness.steps`, in the order in which they began.

    A step is a dict: `kind`, `depth` (how many steps it is part of), `phase`, `site` (file:line), and by its kind
        enter  `function`, `layer` (its name in the layer that calls it, or ""), `sees`: what it is given
        line   `function`, `text`, `reads` and `makes`: arrays
        verb   `function`, `text`, and what Call has: `verb`, `axis`, `started`, `shape`, `how`, `message_bytes`; `wire_bytes`;
               `ranks`: of the mesh, those that take part
        wait   `verb`, `axis`, `of`: where in `steps` the started verb is that is waited for
    An array is `name`, `shape`, `bytes`, and `parameter` where it is one, or its gradient. `part`: this rank's part in words.
    """

    def __init__(self, mesh: Mesh, part: Callable[[Parameter], str]) -> None:
        self.steps: list[dict] = []
        self._mesh, self._part = mesh, part
        self._running: list[_Running] = []
        self._started: dict[Call, int] = {}

    def __enter__(self) -> Witness:
        self._mesh.watchers.append(self)
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        self._mesh.watchers.remove(self)

    # --- verbs

    def begin(self, axis: Watched, call: Call, x: np.ndarray | None) -> None:
        file, _, line = call.site.rpartition(":")
        self._add(
            "verb",
            call.site,
            function=call.function,
            text=source.text_at(os.path.join(ROOT, file), int(line)),
            verb=call.verb,
            axis=call.axis,
            started=call.started,
            shape=list(call.shape),
            how={name: str(value) for name, value in zip(VERBS[call.verb].how, call.how, strict=True)},
            message_bytes=call.message_bytes,
            wire_bytes=wire_bytes(call.verb, call.message_bytes, axis.size),
            ranks=[*axis.members] if call.peer is None else sorted({axis.members[axis.rank], axis.members[call.peer]}),
        )
        if call.started:
            self._started[call] = len(self.steps) - 1

    def wait(self, axis: Watched, call: Call) -> None:
        if call in self._started:
            place, function = site()
            self._add("wait", place, function=function, verb=call.verb, axis=call.axis, of=self._started.pop(call))

    # --- lines

    def _called(self, frame: FrameType, event: str, arg: object) -> Callable | None:
        """A function is entered. What this returns sees its lines; None lets it run unseen, but not what it calls."""
        code = frame.f_code
        owner, _, method = code.co_qualname.partition(".")
        cls = frame.f_globals.get(owner)
        inside = method == code.co_name and isinstance(cls, type) and is_layer(cls)
        if not inside or code.co_flags & inspect.CO_GENERATOR:
            return None
        names = frame.f_locals
        given = code.co_varnames[: code.co_argcount]
        layer = names[given[0]] if given and isinstance(names[given[0]], cls) else None
        sees = [said for name in given if (said := self._said(name, names[name])) is not None]
        called = _place(self._running[-1].layer, layer) if self._running and layer is not None else ""
        running = _Running(layer, len(self.steps))
        where = f"{path_in_project(code.co_filename)}:{frame.f_lineno}"
        self._add("enter", where, function=code.co_qualname, layer=called, sees=sees)
        self._running.append(running)
        statements = source.statements(code)

        def local(frame: FrameType, event: str, arg: object) -> Callable:
            if event == "line":
                statement = statements.get(frame.f_lineno)
                if statement is not running.now:
                    self._finish(running, frame.f_locals)
                    if statement is not None:
                        self._start(running, statement, frame)
            elif event == "return":
                self._finish(running, frame.f_locals, arg)
                self._leave(running)
            return local

        return local

    def _start(self, running: _Running, statement: Statement, frame: FrameType) -> None:
        running.line = len(self.steps)
        code = frame.f_code
        reads = self._arrays(statement.reads, frame.f_locals)
        where = f"{path_in_project(code.co_filename)}:{statement.line}"
        self._add("line", where, function=code.co_qualname, text=statement.text, reads=reads, makes=[])
        running.now = statement

    def _finish(self, running: _Running, names: Mapping[str, object], returned: object = None) -> None:
        """The statement under way has been executed: what it made. One that computed nothing leaves no step."""
        statement, running.now = running.now, None
        if statement is None:
            return
        step = self.steps[running.line]
        if statement.returns:
            given = returned if isinstance(returned, tuple) else (returned,)
            named = [".".join(chain) for chain in statement.makes]
            named = named if len(named) == len(given) else [""] * len(given)
            step["makes"] = [_array(name, v) for name, v in zip(named, given, strict=True) if isinstance(v, np.ndarray)]
            # What has a name already was told when it got it.
            told = any(not a["name"] for a in step["makes"])
        else:
            step["makes"] = self._arrays(statement.makes, names)
            told = step["makes"] or (not statement.makes and step["reads"])
        asked, of = (None, "") if statement.asks is None else source.found(statement.asks, names)[::-1]
        if isinstance(asked, Parameter | Fused):
            step["makes"] = self._gradients(asked)
            step["reads"] = [a for a in step["reads"] if a["name"] != of]
        if not told and len(self.steps) == running.line + 1:
            self.steps.pop()

    def _leave(self, running: _Running) -> None:
        """A method that did nothing, or returns a view of its arguments, is not told: the line that calls it says what came."""
        self._running.pop()
        inside = self.steps[running.at + 1 :]
        returns = len(inside) == 1 and inside[0]["kind"] == "line" and inside[0]["text"].startswith("return")
        if not inside or (returns and not any("parameter" in a for a in inside[0]["reads"])):
            del self.steps[running.at :]

    # --- what is said of them

    def _add(self, kind: str, where: str, **what: object) -> None:
        depth = sum(2 if r.now is not None else 1 for r in self._running)
        self.steps.append({"kind": kind, "depth": depth, "phase": self._mesh.ledger.now, "site": where} | what)

    def _arrays(self, chains: Iterable[source.Chain], names: Mapping[str, object]) -> list[dict]:
        """The arrays and parameters among what the chains lead to, each once."""
        said: dict[str, dict] = {}
        for chain in chains:
            name, value = source.found(chain, names)
            array = self._said(name, value)
            if array is not None and "shape" in array:
                said.setdefault(name, array)
        return [*said.values()]

    def _said(self, name: str, value: object) -> dict | None:
        """An array, a parameter, what was saved (its bytes), or the lengths of a batch; None of anything else."""
        if isinstance(value, Parameter | Fused):
            parts = [self._part(p) for p, _ in value.parts]
            return _array(name, value.data) | {"parameter": " | ".join(parts)}
        if isinstance(value, np.ndarray):
            return _array(name, value)
        if isinstance(value, tuple) and (kept := nbytes(value)):
            return {"name": name, "bytes": kept}
        if isinstance(value, Batch):
            return {"name": f"{name}.lengths", "value": [*value.lengths]}
        return None

    def _gradients(self, asked: Parameter | Fused) -> list[dict]:
        """The gradients that a parameter was told to add up."""
        return [_array("", p.grad) | {"parameter": f"d{self._part(p)}"} for p, _ in asked.parts if p.grad is not None]


def _array(name: str, a: np.ndarray) -> dict:
    return {"name": name, "shape": [*a.shape], "bytes": a.nbytes}


def _place(outer: object, layer: object) -> str:
    """What the outer layer calls this one: up, blocks[0]; "" where it is not one of its own."""
    for name, held in getattr(outer, "__dict__", {}).items():
        if held is layer:
            return name
        if isinstance(held, list | tuple):
            for n, one in enumerate(held):
                if one is layer:
                    return f"{name}[{n}]"
    return ""
