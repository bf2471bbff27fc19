"""The guard: what ranks disagree on is told on all of them; who does not come is named; a healthy run hears nothing of it."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
from mpi4py import MPI

import parallel.axis
from launch.process.watchdog import headline, in_a_circle
from parallel.call import Watcher
from parallel.control import Control
from parallel.guard import Agreement, CollectiveMismatch
from parallel.mesh import Mesh
from parallel.recorder import LEFT_MAIN, RUNNING, VERBS, Recorded, Recorder, Slot
from parallel.shard import Cut, even
from parallel.text import named
from tests.harness import mpirun

SITE = r"tests/parallel/test_guard\.py:\d+ in \w+"


@pytest.fixture
def tp(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh.tp


# --- mismatches


def verb(tp, x, odd):
    return tp.broadcast(x) if odd else tp.all_reduce(x)


def shape(tp, x, odd):
    return tp.all_reduce(x.reshape(4, 2) if odd else x)


def dtype(tp, x, odd):
    return tp.all_reduce(x.astype("i8") if odd else x)


def op(tp, x, odd):
    return tp.all_reduce(x, "max" if odd else "sum")


def root(tp, x, odd):
    return tp.broadcast(x, 1 if odd else 0)


def dim(tp, x, odd):
    x = np.zeros((tp.size, tp.size))
    return tp.reduce_scatter(x, 1 if odd else 0, even(tp.size, tp.size))


def cut(tp, x, odd):
    backwards = Cut(4, tuple((min(r, 3), min(r, 3) + 1) for r in reversed(range(tp.size))))
    forwards = Cut(4, tuple((min(r, 3), min(r, 3) + 1) for r in range(tp.size)))
    return tp.reduce_scatter(np.zeros(4), 0, backwards if odd else forwards)


def started(tp, x, odd):
    return tp.start_all_reduce(x).wait() if odd else tp.all_reduce(x)


def another_function(tp, x, odd):
    return elsewhere(tp, x) if odd else tp.all_reduce(x)


def elsewhere(tp, x):
    return tp.all_reduce(x)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("difference", [verb, shape, dtype, op, root, dim, cut, started, another_function])
def test_a_difference_on_any_rank_is_told_on_all_with_the_line_of_each(tp, difference):
    called = {verb: "broadcast", shape: r"all_reduce \(4, 2\)", dtype: "all_reduce .* int64", op: "all_reduce .* op max",
              root: "broadcast .* root 1", dim: "reduce_scatter .* dim 1", cut: "reduce_scatter", started: "start_all_reduce",
              another_function: "all_reduce"}[difference]  # fmt: skip
    for odd in range(tp.size):
        with pytest.raises(CollectiveMismatch) as raised:
            difference(tp, np.zeros((2, 4)), tp.rank == odd)
        sentence, *table = str(raised.value).splitlines()
        others = named([r for r in range(tp.size) if r != odd])
        mine, theirs = rf"rank {odd} called {called}.* at {SITE}", rf"{others} called \w+ \(.*\) \w+.* at {SITE}"
        # Of two, nobody knows which one is odd.
        assert re.fullmatch(f"on tp, ({mine} where {theirs}|{theirs} where {mine})", sentence), sentence
        if tp.size > 2:
            assert sentence.startswith(f"on tp, rank {odd} called")
        assert [row.split()[0] for row in table] == ["rank", *map(str, range(tp.size))]
        assert all(re.search(rf"#\d+ .* at|#\d+ .*{SITE}", row) for row in table[1:])
    # After it has been told, the ranks can go on.
    assert tp.all_reduce(np.array([1.0])) == tp.size


@pytest.mark.mpi(min_size=2)
def test_a_call_left_out_is_seen_where_the_next_one_is_another(tp):
    def forward():
        if tp.rank:
            tp.all_reduce(np.ones(3))

    def backward():
        tp.all_reduce(np.ones(3))

    with pytest.raises(CollectiveMismatch, match=r"rank 0 called .* in test_\w+\.<locals>\.backward"):
        forward() or backward()


@pytest.mark.mpi(min_size=2)
def test_two_sums_of_one_shape_in_another_order_are_told(tp):
    def both(order):
        for which in order:
            if which == "weights":
                tp.all_reduce(np.ones(3))
            else:
                tp.all_reduce(np.zeros(3))

    for odd in range(tp.size):
        with pytest.raises(CollectiveMismatch, match=rf"rank {odd} called all_reduce .*both"):
            both(["biases", "weights"] if tp.rank == odd else ["weights", "biases"])


@pytest.mark.mpi(min_size=2)
def test_a_broadcast_may_stand_on_two_lines_and_orders_in_memory_may_differ(tp):
    x = np.arange(6.0).reshape(2, 3)
    if tp.rank == 0:
        tp.broadcast(x)
    else:
        assert (tp.broadcast(np.empty_like(x)) == x).all()
    assert (tp.all_reduce(np.asfortranarray(x) if tp.rank == 0 else x) == tp.size * x).all()


@pytest.mark.mpi(min_size=2)
def test_ranks_that_lay_out_different_meshes_are_told(comm):
    axes = {"tp": comm.size, "dp": 1} if comm.rank else {"tp": 1, "dp": comm.size}
    with pytest.raises(CollectiveMismatch, match=f"rank 0 as tp=1 x dp={comm.size}"):
        Mesh(comm, **axes)


@pytest.mark.mpi(min_size=2)
def test_auto_checks_the_first_bytes_of_each_axis_on_all_ranks_alike(comm):
    x = np.zeros(8)
    for calls in range(4):
        with Mesh(comm, watchers=[Agreement(3 * x.nbytes)], dp=1, tp=comm.size) as mesh:
            for _ in range(calls):
                mesh.tp.all_reduce(x)
            mesh.dp.all_reduce(x)
            if calls < 3:
                with pytest.raises(CollectiveMismatch):
                    another_function(mesh.tp, x, comm.rank == 0)
            else:
                # Past the limit nobody looks; MPI itself has nothing against this one.
                another_function(mesh.tp, x, comm.rank == 0)


# --- watching


class Listening(Watcher):
    def __init__(self):
        self.told = []

    def begin(self, axis, call, x):
        self.told.append(("begin", str(call), None if x is None else x.copy()))

    def wait(self, axis, call):
        self.told.append(("wait", str(call), None))

    def end(self, axis, call, y, entered, left):
        assert entered <= left <= time.perf_counter()
        self.told.append(("end", str(call), None if y is None else y.copy()))


@pytest.mark.mpi
def test_a_watcher_is_told_of_every_verb_in_the_order_in_which_it_happens(comm):
    heard = Listening()
    with Mesh(comm, watchers=[heard], tp=comm.size) as mesh:
        tp, p, x = mesh.tp, comm.size, np.arange(3.0)
        going = tp.start_all_reduce(x.copy())
        tp.broadcast(x, p - 1)
        going.wait()
        going.wait()
        if p > 1:
            if tp.rank == 0:
                tp.send(np.zeros(4), 1)
            if tp.rank == 1:
                with pytest.raises(ValueError, match="receive expected"):
                    tp.receive((3,), "f4", 0)
    verbs = [(what, call.split(" (")[0]) for what, call, _ in heard.told]
    started = [("begin", "start_all_reduce"), ("begin", "broadcast"), ("end", "broadcast"), ("wait", "start_all_reduce")]
    assert verbs[:5] == [*started, ("end", "start_all_reduce")]
    assert (heard.told[4][2] == p * x).all()
    assert (heard.told[1][2] is None) == (tp.rank != p - 1), "what a broadcast sends is root's"
    if p > 1 and tp.rank < 2:
        both = [("begin", "send"), ("end", "send")] if tp.rank == 0 else [("begin", "receive"), ("end", "receive")]
        assert verbs[5:] == both
        assert heard.told[-1][2] is None, "nothing came of it"


def test_without_watchers_no_call_is_described(monkeypatch):
    monkeypatch.setattr(parallel.axis, "site", lambda: pytest.fail("described"))
    with Mesh(MPI.COMM_SELF, tp=1) as mesh:
        assert mesh.watchers == []
        mesh.tp.all_reduce(np.zeros(2))
        mesh.tp.start_all_reduce(np.zeros(2)).wait()
        mesh.watchers.append(Watcher())
        with pytest.raises(pytest.fail.Exception):
            mesh.tp.all_reduce(np.zeros(2))


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_watching_changes_no_bit(comm, dtype):
    x = np.random.default_rng(comm.rank).standard_normal((7, 5)).astype(dtype)
    rows = even(7, comm.size) if comm.size <= 7 else None
    seen = []
    for watchers in ([], [Agreement()], [Agreement(100), Listening()]):
        with Mesh(comm, watchers=watchers, tp=comm.size) as mesh:
            tp = mesh.tp
            part = tp.reduce_scatter(x, 0, rows)
            results = (
                tp.all_reduce(x),
                part,
                tp.all_gather(part, 0, rows),
                tp.broadcast(x),
                tp.start_all_reduce(x.copy()).wait(),
            )
            seen.append([r.tobytes() for r in results])
    assert seen[0] == seen[1] == seen[2]


# --- the flight recorder


@pytest.mark.mpi
def test_every_rank_can_read_what_every_rank_did(comm):
    control, recorder = Control(comm), Recorder.of(comm)
    with Mesh(comm, tp=comm.size) as mesh:
        x = np.zeros((3, 2))
        for _ in range(VERBS + 3):
            mesh.tp.all_reduce(x)
        assert recorder.slot(comm.rank).waiting is None
        going = mesh.tp.start_all_reduce(x)
        control.wait()
        for rank in range(comm.size):
            slot = recorder.slot(rank)
            flying = [v for v in slot.verbs if not v.done]
            assert [v.what for v in flying if v.axis] == ["start_all_reduce (3, 2) float64 op sum"]
            assert (flying[0].number, flying[0].ranks) == (VERBS + 3, tuple(range(comm.size)))
            before = [v for v in slot.verbs if v.axis and v.done][-1]
            assert before.what == "all_reduce (3, 2) float64 op sum"
            assert re.fullmatch(SITE, f"{before.site} in {before.function}")
            assert len(slot.verbs) == VERBS
            assert slot.waiting is None or slot.waiting.what == "control.wait"
        control.wait()
        going.wait()
        control.wait()
        assert all(v.done for r in range(comm.size) for v in recorder.slot(r).verbs if v.axis)
    control.close()


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_waits_is_seen_where_it_waits(comm):
    recorder, world = Recorder.of(comm), comm.rank

    def waiting():
        """The verb of a mesh that rank 1 waits in, read once: it goes on meanwhile."""
        found = recorder.slot(1).waiting
        return found if found and found.axis else None

    with Mesh(comm, tp=comm.size) as mesh, closing(Control(comm)) as control:
        if world == 0:
            deadline = time.monotonic() + 10
            while waiting() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert str(waiting()).startswith("receive (3,) float32 from 0 #0 on tp (rank 0) at tests/parallel/test_guard.py:")
            mesh.tp.send(np.zeros(3, "f4"), 1)
        if world == 1:
            mesh.tp.receive((3,), "f4", 0)
        control.wait()
        assert waiting() is None
        control.wait()


# --- who holds up whom, from what the recorder says


def slot(rank, *verbs, waiting=None, doing=RUNNING, pid=1):
    return Slot(rank, pid, 0.0, 0, doing, 0.0, [*verbs, *([waiting] if waiting else [])], waiting)


def at(method, number, ranks, axis="tp"):
    verb, what = method.removeprefix("start_"), f"{method} (2,) float32"
    return Recorded(0, number, 0.0, False, verb, what, axis, tuple(ranks), "here.py:1", "f")


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
        ([slot(0, waiting=at("send", 0, [1])), slot(1, waiting=at("receive", 3, [0]))], False, "no rank waits for another"),
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


def test_ranks_are_named():
    assert named([2]) == "rank 2"
    assert named([0, 1, 3]) == "ranks 0, 1 and 3"
    assert named(range(8)) == "ranks 0..7"


# --- real processes that hang, stop and die


def ended(kind, ranks=3):
    begun = time.monotonic()
    limit = {"late": "5", "long": "3"}.get(kind, "1")
    done = mpirun(ranks, "-m", "tests.cases.planted", kind, "--timeout", limit, timeout=40)
    return done, time.monotonic() - begun


@pytest.fixture(scope="module")
def ends():
    """What came of each fault; several at a time, as most of it is waiting."""
    kinds = ("spin", "stop", "receive", "return", "kill", "segv", "os._exit", "late", "long")
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
            rf"rank 1 did not come \(waiting elsewhere\): {WAITED}; rank 1 waits in receive .*",
            r"receive \(3,\) float32 .*",
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
        ("segv", "was killed by SIGSEGV"),
        ("os._exit", r"has left by os\._exit\(0\), its own or a library's,"),
    ],
)
def test_a_rank_that_cannot_tell_how_it_died_is_told_by_another(ends, kind, how):
    done, _ = ends[kind]
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("rank")]
    assert len(told) == 1, done.stderr
    assert re.fullmatch(rf"rank 1 of 3 {how} after {LAST}", told[0])
    if kind == "segv":
        assert "string_at" in done.stderr, "its stack"


@pytest.mark.parametrize("kind", ["late", "long"])
def test_a_slow_rank_and_a_long_computation_raise_no_alarm(ends, kind):
    done, _ = ends[kind]
    assert (done.returncode, done.stderr) == (0, "")
