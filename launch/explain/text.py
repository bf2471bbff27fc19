"""The view of a rank as a page of text: what is held and by whom, and the step as an indented list of lines and verbs."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from launch.explain import boxes
from parallel.axis import Axis
from parallel.verbs import method_name

# Columns by which a step stands further in than the one that it is part of.
STEP = 2
# What is no longer than this is told again rather than referred to.
SHORT = 4
# A space at which no line is folded.
HELD = "\u00a0"


@dataclass
class Node:
    """A step and the steps that are part of it."""

    step: dict
    parts: list[Node] = field(default_factory=list)

    def all(self) -> Iterator[dict]:
        yield self.step
        for part in self.parts:
            yield from part.all()

    def same(self, shapes: bool) -> tuple:
        """Equal for steps that say the same, wherever they stand and whichever parameters they use."""
        s = self.step
        said = [s["kind"], s["site"], s.get("text"), s.get("verb"), s.get("axis")]
        if shapes:
            arrays = (a for key in ("sees", "reads", "makes") for a in s.get(key, ()))
            said += [str(s.get("shape")), *(f"{a['name']} {a.get('shape')} {a.get('bytes')}" for a in arrays)]
        return (*said, *(part.same(shapes) for part in self.parts))


def lines(view: dict, width: int) -> Iterator[str]:
    """The page, no line wider than `width`."""
    rank = view["rank"]
    mesh = " x ".join(f"{axis}={n}" for axis, n in view["mesh"].items())
    place = ", ".join(f"{axis} {n}" for axis, n in view["place"].items())
    ranks = len(view["holds"][0]["bounds"]) if view["holds"] else 1
    yield f"Rank {rank} of {ranks}: its view of one step"
    yield from _fold(
        f"The mesh is {mesh}; this rank is {place}. A small letter in a name is this rank's part: z_Tf is cut along F. The "
        "number before a line of code is where it stands in the file named above it. Below it are the shapes that it reads "
        "and, after ->, those that it makes.",
        width,
    )
    yield ""
    yield f"WHAT RANK {rank} HOLDS"
    yield from _holds(view, width)
    if boxes.cut(view):
        yield ""
        yield "WHO HOLDS WHAT: a number is a rank, # is this rank's"
        yield from boxes.drawn(view, width)
    yield from Page(view, width).all(tree(view["steps"]))
    yield ""
    yield f"WHAT RANK {rank} SENT"
    yield from _sent(view, width)
    yield ""


def _holds(view: dict, width: int) -> Iterator[str]:
    holds = view["holds"]
    rows = [(h["part"], _shape(h["shape"]), _of(h), f"{h['bytes']:,}", _also(h)) for h in holds]
    rows.append((f"{len(holds)} parameters", "", "", f"{sum(h['bytes'] for h in holds):,}", "bytes in all"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for at, period, times in repeats([row[1:] for row in rows]):
        # Fewer rows are read faster than what stands in their place.
        told = period if period > SHORT else period * (times + 1)
        for name, shape, of, size, also in rows[at : at + told]:
            line = f"  {name:<{widths[0]}}  {shape:>{widths[1]}}  {of:<{widths[2]}}  {size:>{widths[3]}}  {also}".rstrip()
            short = f"{name}: {shape} {of}, {size} bytes {also}".rstrip()
            yield from [line] if len(line) <= width else _fold(short, width, "  ", "    ")
        if told < period * (times + 1):
            inside = holds[at + period : at + period * (times + 1)]
            said = f"{_more(times)}: {inside[0]['part']} to {inside[-1]['part']}, {sum(h['bytes'] for h in inside):,} bytes"
            yield from _fold(f"... {said}", width, "  ", "    ")


def _of(h: dict) -> str:
    return "whole" if h["shape"] == h["whole"] else f"of {_shape(h['whole'])}"


def _also(h: dict) -> str:
    if not h["also_on"]:
        return ""
    return "every rank has it" if len(h["also_on"]) == len(h["bounds"]) - 1 else f"also on {_ranks(h['also_on'])}"


def _sent(view: dict, width: int) -> Iterator[str]:
    if not view["sent"]:
        yield "  nothing"
    for row in view["sent"]:
        calls = "once" if row["calls"] == 1 else f"{row['calls']} times"
        yield from _fold(
            f"{row['phase']}: {row['verb']} on {row['axis']} {calls}, {row['message_bytes']:,} bytes "
            f"({row['wire_bytes']:,.0f} from this rank over the wire)",
            width,
            "  ",
            "    ",
        )
    for method in dict.fromkeys(method_name(s["verb"], s["started"]) for s in view["steps"] if s["kind"] == "verb"):
        # What the axis itself says of it.
        yield from _fold(f"{method}: {inspect.getdoc(getattr(Axis, method)).splitlines()[0]}", width, "  ", "    ")


def tree(steps: Iterable[dict]) -> list[Node]:
    root = Node({})
    open_at = [root]
    for step in steps:
        node = Node(step)
        del open_at[step["depth"] + 1 :]
        open_at[-1].parts.append(node)
        open_at.append(node)
    return root.parts


def repeats(keys: Sequence[object]) -> Iterator[tuple[int, int, int]]:
    """The keys in stretches: where one starts, how long it is, and how many times more it follows, the most covering first."""
    at = 0
    while at < len(keys):
        period, times = 1, 0
        for p in range(1, (len(keys) - at) // 2 + 1):
            n = 0
            while at + (n + 2) * p <= len(keys) and keys[at : at + p] == keys[at + (n + 1) * p : at + (n + 2) * p]:
                n += 1
            if n * p > times * period:
                period, times = p, n
        yield at, period, times
        at += period * (times + 1)


class Page:
    """The steps as lines of text. What repeats, and what ran before on the same lines of code, is told once."""

    def __init__(self, view: dict, width: int) -> None:
        self.rank, self.steps, self.width = view["rank"], view["steps"], width
        self.phase = ""
        self.told: dict[tuple, tuple] = {}

    def all(self, nodes: Sequence[Node]) -> Iterator[str]:
        for at, period, times in repeats([node.same(shapes=False) for node in nodes]):
            for node in nodes[at : at + period]:
                yield from self.one(node)
            if times:
                yield from self._again(nodes[at : at + period], nodes[at + period : at + period * (times + 1)], times)

    def _again(self, first: Sequence[Node], more: Sequence[Node], times: int) -> Iterator[str]:
        alike = [n.same(shapes=True) for n in first] * times == [n.same(shapes=True) for n in more]
        said = f"... {_more(times)}" + ("" if alike else ", on other sizes")
        entered = [s for node in more for s in [node.step, *(part.step for part in node.parts)] if s["kind"] == "enter"]
        if named := list(dict.fromkeys(s["layer"] for s in entered if s["layer"])):
            said += f": {', '.join(named) if len(named) < 4 else f'{named[0]} to {named[-1]}'}"
        elif entered and not alike:
            said += f": sees {_things(entered[0]['sees'])}"
        yield from self._fold(first[0].step["depth"], said + _verbs(more), first="  ")

    def one(self, node: Node) -> Iterator[str]:
        s, depth = node.step, node.step["depth"]
        if not depth and s["phase"] != self.phase:
            self.phase = s["phase"]
            yield from ("", self.phase.upper())
        file, _, number = s["site"].rpartition(":")
        if s["kind"] == "enter":
            name = f"{s['layer']}: {s['function']}" if s["layer"] else s["function"]
            yield from self._fold(depth, f"{name}   {file}")
            if s["sees"]:
                yield from self._fold(depth, f"sees {_things(s['sees'])}", first="  ")
            key = (s["layer"], *node.same(shapes=False))
            before, now = self.told.get(key), node.same(shapes=True)
            if before is not None and len([*node.all()]) > SHORT:
                said = "the same as above" if before == now else "the same lines as above, on these sizes"
                yield from self._fold(depth, f"... {said}{_verbs([node])}", first="  ")
                return
            self.told[key] = now
        elif s["kind"] == "line":
            yield from self._fold(depth, f"{number}  {s['text']}", then=" " * (len(number) + 4))
            if said := _computed(node):
                inside = " " * (len(number) + 2)
                yield from self._fold(depth, said, first=f"{inside}| ", then=f"{inside}|   ")
        elif s["kind"] == "verb":
            if not depth and s["text"]:
                yield from self._fold(0, f"{s['function']}   {file}")
                yield from self._fold(0, f"{number}  {s['text']}", first="  ", then="      ")
            inside = "" if depth else "    "
            yield from self._fold(depth, f"* {_met(s, self.rank)}", first=inside, then=f"{inside}  ")
        else:
            of = self.steps[s["of"]]
            said = f"* waits for {of['verb']} of {_shape(of['shape'])} on {of['axis']}, started at {of['site']}   {s['site']}"
            yield from self._fold(depth, said, then="  ")
        yield from self.all(node.parts)

    def _fold(self, depth: int, text: str, first: str = "", then: str = "    ") -> list[str]:
        indent = " " * (STEP * depth)
        return _fold(text, self.width, indent + first, indent + then)


def _more(times: int) -> str:
    return "the same once more" if times == 1 else f"the same {times} times more"


def _verbs(nodes: Iterable[Node]) -> str:
    """How many verbs are among them, and their bytes."""
    sent = [s["message_bytes"] for node in nodes for s in node.all() if s["kind"] == "verb"]
    return f" ({len(sent)} verb{'s' * (len(sent) > 1)}, {sum(sent):,} bytes)" if sent else ""


def _met(s: dict, rank: int) -> str:
    """What is sent, and with whom."""
    others = [r for r in s["ranks"] if r != rank]
    verb = f"starts {s['verb']}" if s["started"] else s["verb"]
    how = ", ".join(f"{name} {value}" for name, value in s["how"].items() if value != "sum")
    whom = f"with {_ranks(others)}" if others else "with no other rank"
    wire = f"{s['wire_bytes']:,.0f} over the wire" if others else "none over the wire"
    return (
        f"{verb} of {_shape(s['shape'])}{f' ({how})' if how else ''} on {s['axis']} {whom}: {s['message_bytes']:,} bytes, "
        f"{wire}   {s['site']}"
    )


def _computed(node: Node) -> str:
    """What a line reads and makes: `x_TD 48 x 64, W1[:, 256:512] 64 x 256 -> z_Tf 48 x 256`."""
    s = node.step
    # A method that is gone into says itself what it sees.
    seen = [a.get("shape") for part in node.parts for a in part.step.get("sees", ())]
    passed_on = all("parameter" not in a and a["shape"] in seen for a in s["reads"])
    reads, makes = "" if passed_on else _things(s["reads"]), _things(s["makes"])
    return f"{reads} -> {makes}".strip() if makes else reads


def _things(arrays: Iterable[dict]) -> str:
    return ", ".join(_thing(a) for a in arrays)


def _thing(a: dict) -> str:
    if "value" in a:
        values = a["value"]
        return f"{a['name']} {', '.join(map(str, values[:6]))}{', ...' if len(values) > 6 else ''}"
    if "shape" not in a:
        return f"{a['name']} {a['bytes']:,} bytes"
    return f"{a.get('parameter', a['name'])} {_shape(a['shape'])}".strip().replace(" ", HELD)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "1 number"


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 4 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def _fold(text: str, width: int, first: str = "", then: str = "") -> list[str]:
    folded = textwrap.wrap(text, width, initial_indent=first, subsequent_indent=then, break_on_hyphens=False)
    return [line.replace(HELD, " ") for line in folded]
