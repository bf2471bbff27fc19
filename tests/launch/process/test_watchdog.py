"""The watchdog: who does not come is named, and who died; a slow run hears nothing of it."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from launch.process.watchdog import headline, in_a_circle
from parallel.slot import LEFT_MAIN, RUNNING, RecordedCall, Slot, call_key, message_key
from tests.harness import mpirun

# --- who holds up whom, from what the recorder says


def slot(rank, *verbs, waiting=None, doing=RUNNING, pid=1, begun=(), entered=0):
    """`begun`: (verb, peer, how many) of the messages on tp that it has begun to send or receive; `entered`: how many calls of
    all ranks there."""
    begun = {message_key(verb, "tp", peer): number for verb, peer, number in begun} | {call_key("tp", ALL): entered}
    return Slot(rank, pid, 0.0, 0, doing, 0.0, [*verbs, *([waiting] if waiting else [])], waiting, begun)


def at(method, number, ranks, axis="tp"):
    verb, what = method.removeprefix("start_"), f"{method} (2,) float32"
    return RecordedCall(0, number, 0.0, False, verb, what, axis, tuple(ranks), "here.py:1", "f", False)


ALL = range(3)


@pytest.mark.parametrize(
    ("slots", "circle", "said"),
    [
        # In the same verb: it goes on.
        ([slot(r, waiting=at("all_reduce", 5, ALL)) for r in ALL], False, "no rank waits for another"),
        # One computes: it may still come.
        (
            [
                slot(0, waiting=at("all_reduce", 5, ALL)),
                slot(1, at("all_reduce", 4, ALL)),
                slot(2, waiting=at("all_reduce", 5, ALL)),
            ],
            False,
            "rank 1 did not come (busy): ranks 0 and 2 have waited",
        ),
        # One is through with the verb that the others are still in.
        (
            [slot(0, waiting=at("all_reduce", 5, ALL)), slot(1, at("all_reduce", 5, ALL)), slot(2, at("all_reduce", 5, ALL))],
            False,
            "no rank waits for another",
        ),
        # The same number, another verb.
        (
            [slot(0, waiting=at("all_gather", 5, ALL)), *(slot(r, waiting=at("all_reduce", 5, ALL)) for r in (1, 2))],
            True,
            "rank 0 did not come (waiting elsewhere): ranks 1 and 2 have waited",
        ),
        # Started is the same verb as not started, and has come though nobody waits there.
        (
            [slot(0, waiting=at("all_reduce", 5, ALL)), *(slot(r, at("start_all_reduce", 5, ALL)) for r in (1, 2))],
            False,
            "no rank waits for another",
        ),
        # A receive that nobody sends to.
        (
            [
                slot(0, waiting=at("all_reduce", 5, ALL)),
                slot(1, waiting=at("receive", 0, [0])),
                slot(2, waiting=at("all_reduce", 5, ALL)),
            ],
            True,
            "rank 1 did not come (waiting elsewhere): ranks 0 and 2 have waited",
        ),
        # A send and its receive.
        (
            [
                slot(0, waiting=at("send", 3, [1]), begun=[("send", 1, 4)]),
                slot(1, waiting=at("receive", 3, [0]), begun=[("receive", 0, 4)]),
            ],
            False,
            "no rank waits for another",
        ),
        # The sender has started the message and left; both receive.
        (
            [
                slot(0, waiting=at("receive", 0, [1]), begun=[("send", 1, 4), ("receive", 1, 1)]),
                slot(1, waiting=at("receive", 3, [0]), begun=[("receive", 0, 4)]),
            ],
            False,
            "rank 1 did not come (waiting elsewhere): rank 0 has waited",
        ),
        # One message fewer was sent.
        (
            [
                slot(0, waiting=at("receive", 0, [1]), begun=[("send", 1, 3), ("receive", 1, 1)]),
                slot(1, waiting=at("receive", 3, [0]), begun=[("receive", 0, 4)]),
            ],
            True,
            "rank 1 did not come (waiting elsewhere): rank 0 has waited",
        ),
        # A rank that waits for the end of a send to one that has received it all, and then for its answer.
        (
            [
                slot(0, waiting=at("start_send", 0, [1]), begun=[("send", 1, 1)]),
                slot(1, waiting=at("receive", 1, [0]), begun=[("receive", 0, 2)]),
            ],
            False,
            "rank 0 did not come (waiting elsewhere): rank 1 has waited",
        ),
        # Two axes crosswise: 0 waits for 1 on tp, 1 for 2 on dp, 2 computes.
        (
            [slot(0, waiting=at("all_reduce", 5, [0, 1])), slot(1, waiting=at("all_reduce", 2, [1, 2], "dp")), slot(2)],
            False,
            "rank 2 did not come (busy): rank 1 has waited",
        ),
        # Two axes in a circle.
        (
            [slot(0, waiting=at("all_reduce", 5, [0, 1])), slot(1, waiting=at("all_reduce", 2, [0, 1], "dp"))],
            True,
            "rank 1 did not come (waiting elsewhere): rank 0 has waited",
        ),
        # Through with main, and so never to come.
        (
            [
                slot(0, waiting=at("all_reduce", 5, ALL)),
                slot(1, at("all_reduce", 4, ALL), waiting=at("control.everyone", 3, ALL, ""), doing=LEFT_MAIN),
                slot(2, waiting=at("all_reduce", 5, ALL)),
            ],
            True,
            "rank 1 did not come (busy): ranks 0 and 2 have waited",
        ),
        # As many exchanges as the others, but its is the last of all.
        (
            [
                slot(0, waiting=at("control.everyone", 3, ALL, "")),
                slot(1, waiting=at("control.everyone", 3, ALL, ""), doing=LEFT_MAIN),
                slot(2, waiting=at("control.everyone", 3, ALL, "")),
            ],
            True,
            "rank 1 did not come (busy): ranks 0 and 2 have waited",
        ),
        # Its ring of verbs has but messages: it has forgotten the sum that the others are in, or has not come to it.
        (
            [
                slot(0, waiting=at("all_reduce", 5, ALL)),
                slot(1, at("receive", 9, [0]), entered=5),
                slot(2, waiting=at("all_reduce", 5, ALL)),
            ],
            False,
            "rank 1 did not come (busy): ranks 0 and 2 have waited",
        ),
        (
            [
                slot(0, waiting=at("all_reduce", 5, ALL)),
                slot(1, at("receive", 9, [0]), entered=6),
                slot(2, waiting=at("all_reduce", 5, ALL)),
            ],
            False,
            "no rank waits for another",
        ),
        # At the end all wait for the slowest.
        (
            [slot(0), *(slot(r, waiting=at("control.everyone", 3, ALL, ""), doing=LEFT_MAIN) for r in (1, 2))],
            False,
            "rank 0 did not come (busy): ranks 1 and 2 have waited",
        ),
    ],
)
def test_who_holds_up_whom(slots, circle, said):
    assert in_a_circle(slots) == circle
    assert headline(slots, [("busy", "")] * len(slots), 1.0).startswith(said)


# --- real processes that hang, stop and die


def ended(kind):
    begun = time.monotonic()
    limit = {"late": "5", "long": "3", "halted": "8"}.get(kind, "1")
    done = mpirun(2 if kind == "unsent" else 3, "-m", "tests.cases.planted", kind, "--timeout", limit, timeout=40)
    return done, time.monotonic() - begun


@pytest.fixture(scope="module")
def ends():
    """What came of each fault; several at a time, as most of it is waiting."""
    kinds = ("spin", "stop", "receive", "unsent", "halted", "return", "kill", "torn", "segv", "os._exit", "late", "long")
    with ThreadPoolExecutor(3) as pool:
        return dict(zip(kinds, pool.map(ended, kinds), strict=True))


HERE = r"on tp \(ranks 0, 1 and 2\) at tests/cases/planted\.py:\d+ in main"
LAST = rf"all_reduce \(2, 3\) float32 op sum #0 {HERE}"
WAITED = rf"ranks 0 and 2 have waited \d+\.\d s in all_reduce \(1,\) float64 op sum #1 {HERE}"


@pytest.mark.parametrize(
    ("kind", "first", "row"),
    [
        ("spin", rf"rank 1 did not come \(computing\): {WAITED}", rf"at tests/cases/planted\.py:\d+ in main; last: {LAST}"),
        ("stop", rf"rank 1 did not come \(stopped \(SIGSTOP\)\): {WAITED}", rf"last: {LAST}"),
        ("return", rf"rank 1 did not come \(through with main\): {WAITED}", rf"last: {LAST}"),
        (
            "receive",
            rf"rank 1 did not come \(waiting elsewhere\): {WAITED}; rank 1 waits in receive of 2I0 .*",
            r"receive of 2I0 \(3,\) float32 from 0 #0 on tp \(rank 0\) at .*",
        ),
    ],
)
def test_a_hang_is_told_once_with_who_did_not_come_and_where_it_is(ends, kind, first, row):
    done, seconds = ends[kind]
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "Abort(" not in line]
    assert re.fullmatch(first, lines[0]), done.stderr
    assert sum("did not come" in line for line in lines) == 1
    table = lines[2:6]
    assert [line.split()[0] for line in table] == ["rank", "0", "1", "2"]
    assert re.search(row + "$", table[2]), table[2]
    assert "Python stack of ranks 0 and 2, innermost first:" in lines
    assert seconds < 15


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("kill", "was killed by SIGKILL"),
        # Another rank has an error of MPI's first.
        ("torn", "was killed by SIGKILL"),
        ("segv", "was killed by SIGSEGV"),
        ("os._exit", r"has left by os\._exit\(0\), its own or a library's,"),
    ],
)
def test_a_rank_that_cannot_tell_how_it_died_is_told_by_another(ends, kind, how):
    done, _ = ends[kind]
    assert done.returncode != 0
    causes = [line for line in done.stderr.splitlines() if line.startswith("rank")]
    assert len(causes) == 1, done.stderr
    assert re.fullmatch(rf"rank 1 of 3 {how} after {LAST}", causes[0])
    if kind == "segv":
        assert "string_at" in done.stderr, "its stack"


def test_ranks_that_wait_for_messages_which_nobody_sends_are_told_with_both(ends):
    done, seconds = ends["unsent"]
    assert done.returncode != 0
    waits = {
        r: rf"receive of {what} \(3,\) float32 from {1 - r} #{number} on tp \(rank {1 - r}\) at \S+ in main"
        for r, what, number in [(0, "2I0", 0), (1, "2F1", 1)]
    }
    told = r"rank {} did not come \(waiting elsewhere\): rank {} has waited \d\.\d s in {}; rank {} waits in {}"
    (line,) = [line for line in done.stderr.splitlines() if "did not come" in line]
    assert any(re.fullmatch(told.format(r, 1 - r, waits[1 - r], r, waits[r]), line) for r in (0, 1)), done.stderr
    assert seconds < 15


@pytest.mark.parametrize("kind", ["late", "long", "halted"])
def test_a_slow_rank_and_a_long_computation_raise_no_alarm(ends, kind):
    done, _ = ends[kind]
    assert (done.returncode, done.stderr) == (0, "")
