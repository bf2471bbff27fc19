"""A trace written and read back, from records made by hand: waiting is told from transfer, and what is no trace is refused."""

import json

import pytest

from launch import trace
from launch.measure import timeline
from parallel.watch.clock import Clock, Reading
from parallel.watch.trace import Record, Span, TracedCall
from parallel.watch.trace_file import write
from tests.parallel.watch.trace_format import events_of

HERE = Clock(Reading(0.0, 0.0, 0.0))


def verb(entered, left, ranks=(0, 1), number=0, verb="all_reduce", started=False, peer=None, waited=None, message_bytes=8000):
    what = (number, verb, started, (1000,), "float64", "sum", peer, message_bytes, "forward", "here.py:1", "")
    return TracedCall("tp", ranks, 0, *what, entered, left, waited)


def written(path, *verbs, spans=(), clocks=None):
    of_ranks = zip(verbs, clocks or [HERE] * len(verbs), strict=True)
    records = [Record(n, len(verbs), "host", c, list(spans), list(v), []) for n, (v, c) in enumerate(of_ranks)]
    write(path, records, {"command": ["made", "by", "hand"]})
    events_of(path)
    return timeline.read(path)


def times(slices):
    return [(round(s.wait, 9), round(s.transfer, 9)) for s in slices]


def test_waiting_is_until_the_last_has_entered(tmp_path):
    line = written(tmp_path / "t", [verb(1.0, 4.0)], [verb(3.0, 4.5)])
    assert [times(r.verbs) for r in line.ranks.values()] == [[(2.0, 1.0)], [(0.0, 1.5)]]
    (cost,) = timeline.costs(line)
    # A ring of two sends 8000 bytes a rank for 8000: in 1.25 s on average.
    assert (cost.calls, cost.wait, cost.transfer, cost.bandwidth) == (1, 1.0, 1.25, 2 * 8000 / 2.5)
    assert timeline.kept_waiting(line) == {0: 0.0, 1: 2.0}
    assert timeline.straggler(timeline.kept_waiting(line), 2.0) == 1
    assert timeline.straggler({0: 1.0, 1: 1.5}, 2.5) is None
    states = timeline.shares(line)
    assert [round(states[0][s], 9) for s in (timeline.WAITING, timeline.TRANSFERRING, timeline.OUTSIDE)] == [2.0, 1.0, 0.5]


def test_a_rank_that_left_before_the_last_entered_only_waited(tmp_path):
    """As broadcast's root may; and clocks are never quite one."""
    line = written(tmp_path / "t", [verb(1.0, 2.0)], [verb(3.0, 4.0)])
    assert times(line.ranks[0].verbs) == [(1.0, 0.0)]


def test_clocks_are_brought_together(tmp_path):
    ahead = Clock(Reading(0.0, 100.0, 1e-6), Reading(1000.0, 100.0, 2e-6))
    line = written(tmp_path / "t", [verb(1.0, 4.0)], [verb(103.0, 104.5)], clocks=[HERE, ahead])
    assert times(line.ranks[0].verbs) == [(2.0, 1.0)]
    assert line.about["uncertainty_us"] == 2.0


def test_a_message_is_linked_to_its_own_receive(tmp_path):
    """By their numbers, though another was complete first."""
    sends = [verb(1.0, 1.1, verb="send", peer=1, number=n) for n in (0, 1)]
    receives = [verb(0.5, 1.5, verb="receive", peer=0, number=n) for n in (0, 1)]
    sends[1] = sends[1]._replace(entered=5.0, left=5.1)
    receives[1] = receives[1]._replace(entered=2.0, left=5.2)
    line = written(tmp_path / "t", sends[::-1], receives)
    assert times(line.ranks[1].verbs) == [(0.5, 0.5), (3.0, 0.2)]
    assert timeline.kept_waiting(line) == {0: 3.5, 1: 0.0}


def test_a_send_that_is_started_is_linked_and_hidden(tmp_path):
    """On its way from 1 to 3, seen to be complete by a poke; another, waited for from 4, whose receiver comes at 5."""
    sends = [verb(1.0, 3.0, verb="send", peer=1, started=True), verb(2.0, 6.0, verb="send", peer=1, started=True, number=1)]
    sends[1] = sends[1]._replace(waited=4.0, what="1F0")
    receives = [verb(2.5, 2.75, verb="receive", peer=0), verb(5.0, 5.5, verb="receive", peer=0, number=1)]
    line = written(tmp_path / "t", sends, receives)
    assert times(line.ranks[0].started) == [(0.0, 0.0), (1.0, 1.0)]
    assert [s.args["hidden_us"] for s in line.ranks[0].started] == [2e6, 2e6]
    assert times(line.ranks[1].verbs) == [(0.0, 0.25), (0.0, 0.5)]
    assert [s.link for s in line.ranks[0].started] == [s.link for s in line.ranks[1].verbs]
    assert [s.args.get("what") for s in line.ranks[0].started] == [None, "1F0"]


def test_what_a_started_verb_hides(tmp_path):
    """On its way from 1 to 5, waited for from 4; two at once have tracks of their own; nothing else was computed."""
    calls = [verb(1.0, 5.0, started=True, waited=4.0), verb(2.0, 6.0, started=True, number=1, waited=5.5)]
    late = [calls[0]._replace(entered=4.2, waited=4.5), calls[1]]
    line = written(tmp_path / "t", calls, late, spans=[Span("step", "phase", 0.0, 7.0)])
    assert times(line.ranks[0].started) == [(0.2, 0.8), (0.0, 0.5)]
    over = timeline.overlap(line)
    assert (over.calls, over.seconds, over.exposed) == (4, pytest.approx(12.8), pytest.approx(2.5))
    tracks = {e["tid"] for e in json.loads((tmp_path / "t").read_text())["traceEvents"] if e.get("cat") == "started"}
    assert tracks == {1001, 1002, 2001, 2002}
    states = timeline.shares(line)[0]
    assert [round(states[s], 9) for s in ("step", timeline.WAITING, timeline.TRANSFERRING)] == [5.5, 0.2, 1.3]


def test_the_strip_shows_what_took_most_of_a_column(tmp_path):
    spans = [Span("forward", "phase", 0.0, 4.0), Span("backward", "phase", 4.0, 8.0), Span("mlp forward", "forward", 5.0, 6.0)]
    line = written(tmp_path / "t", [verb(1.0, 3.0)], [verb(2.0, 3.0)], spans=spans)
    letters = ["".join(trace.LETTERS[s] for s in timeline.strip(r, 0.0, 10.0, 10)) for r in line.ranks.values()]
    assert letters == ["F~=FBBBB..", "FF=FBBBB.."]
    part = line.between(1.0, 3.0)
    assert [timeline.strip(part.ranks[0], 1.0, 3.0, 4)] == [[timeline.WAITING] * 2 + [timeline.TRANSFERRING] * 2]


def test_two_traces_lie_side_by_side(tmp_path, capsys):
    """Row by row, what one of them lacks as 0; what both lack is left out."""
    spans = [Span("forward", "phase", 0.0, 4.0)]
    lines = {
        "a": written(tmp_path / "a", [verb(1.0, 3.0)], [verb(2.0, 3.0)], spans=spans),
        "b": written(tmp_path / "b", [], [], spans=[*spans, Span("training step", "step", 4.0, 6.0)]),
    }
    a, b = (trace.summary(tmp_path / name, line) for name, line in lines.items())
    rows = {name: (x, y) for name, x, y in trace.compared(a, b)}
    assert rows["the whole"] == (4.0, 6.0)
    # Of the 4 s of a, rank 0 passed 2 in the sum, one of them waiting, and rank 1 passed 1.
    assert rows["computing"] == (2.5, 6.0)
    assert rows["waiting"] == (0.5, 0.0)
    assert rows["all_reduce tp 1000"] == (1.5, 0.0)
    assert rows["training step (median)"] == (0.0, 2.0)
    assert "backward" not in rows
    trace.show_compared(a, b)
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["waiting", "500.00", "0.00", "-500.00", "0.00"] in said
    assert ["training", "step", "(median)", "0.00", "2000.00", "+2000.00", "-"] in said


# --- what cannot be read


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[" * 10**5, "is not JSON"),
        ("[]", "is no 'rankwise trace 1'"),
        ('{"traceEvents": []}', "is no 'rankwise trace 1'"),
        ('{"otherData": {"format": "rankwise trace 1"}, "traceEvents": []}', "has no spans"),
        ('{"otherData": {"format": "rankwise trace 1"}}', "is damaged"),
        ('{"otherData": {"format": "rankwise trace 1"}, "traceEvents": [{"ph": "X", "pid": 1}]}', "is damaged"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_in_a_line(tmp_path, content, said):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(timeline.TraceError, match=said):
        timeline.read(path)
