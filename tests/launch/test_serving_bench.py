"""launch.serving_bench: the definitions of latency, closed forms, the timeline, and the command on tiny models."""

import json
from argparse import Namespace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from mpi4py import MPI

from inference import workload
from inference.engine import Engine
from inference.policies import POLICIES
from inference.scheduler import Scheduler, Step
from inference.workload import Workload
from launch import serving_bench
from launch.bench import serving as bench
from launch.bench.serving import decode_rate
from launch.measure.serving import Column, Served, alone, batches, closed_form, decode_steps, lanes, latencies, serve, spread
from launch.pictures import occupancy
from launch.pictures.occupancy import DECODE, FREE, HELD, LAST, PREEMPTED, PREFILL
from models.build import build
from models.config import llama_like
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.parameter import drawn
from tests.grids import thinned
from tests.harness import ROOT, command, mpirun
from tests.inside import inside, ran

LLAMA = str(ROOT / "tests/oracles/families/llama")
SCALED = workload.scaled()


# --- latencies


def test_latencies_are_vllms():
    # Two requests: at 1 s with tokens at 3, 4 and (two at once) 8; at 2 s with a single one at 5.
    got = latencies([1.0, 2.0], [[(3.0, 1), (4.0, 1), (8.0, 2)], [(5.0, 1)]])
    assert got["ttft"] == {"mean": 2.5, "p50": 2.5, "p95": pytest.approx(2.95), "p99": pytest.approx(2.99)}
    # (e2e 7 - TTFT 2) / (4 - 1); a request of one token has none.
    assert got["tpot"]["mean"] == got["tpot"]["p99"] == pytest.approx(5 / 3)
    # A gap a delivery: two tokens that came together are one.
    assert got["itl"] == {"mean": 2.5, "p50": 2.5, "p95": pytest.approx(3.85), "p99": pytest.approx(3.97)}
    assert latencies([0.0], [[(1.0, 1)]])["itl"] is None


def test_percentiles_are_linear_between_ranks():
    assert spread(list(range(101))) == {"mean": 50, "p50": 50, "p95": 95, "p99": 99}
    assert spread([1.0, 2.0])["p95"] == pytest.approx(1.95)


# --- closed forms


def test_lanes_and_batches():
    assert lanes([5, 1, 1, 1, 3], 2) == 6
    assert batches([5, 1, 1, 1, 3], 2) == 5 + 1 + 3
    assert lanes([4], 3) == batches([4], 3) == 4


@pytest.mark.parametrize("slots", [1, 3, 8, 64])
@pytest.mark.parametrize("policy", ["static", "continuous"])
def test_a_scheduler_with_room_counts_to_the_closed_form(policy, slots):
    random = Random(slots)
    other = Workload(
        [[random.randrange(9) for _ in range(random.randint(1, 30))] for _ in range(40)], random.choices(range(1, 50), k=40)
    )
    for load in (SCALED, other):
        scheduler = POLICIES[policy](slots=slots, max_batch_tokens=10**6, prefix_caching=False)
        columns = alone(scheduler, load)
        form = closed_form(load, policy, slots)
        assert {name: getattr(scheduler.counts, name) for name in form} == form
        assert len(columns) == form["steps"]


def test_a_count_that_is_off_is_told():
    source = Namespace(config=Namespace(context=2048))
    task = serving_bench.Task(SCALED, ("static", "continuous"), Path("t.png"), source, [0.0] * 64, 8, 72, 512, False)
    books = task.scheduler("static")
    alone(books, SCALED)
    checks = serving_bench.counted(task, "static", books)
    assert {c["by"] for c in checks} == {"scheduler alone", "closed form"}
    assert all(c["ok"] for c in checks)
    books.counts.steps += 1
    wrong = [(c["by"], c["count"]) for c in serving_bench.counted(task, "static", books) if not c["ok"]]
    assert wrong == [("scheduler alone", "steps"), ("closed form", "steps")]
    # Where prompts do not fit into a step, or requests are preempted, only the scheduler itself knows.
    for name, value in (("max_batch_tokens", 64), ("kv_blocks", 12)):
        small = task._replace(**{name: value})
        books = small.scheduler("continuous")
        alone(books, SCALED)
        checks = serving_bench.counted(small, "continuous", books)
        assert all(c["ok"] for c in checks)
        assert {c["by"] for c in checks} == {"scheduler alone"}
    assert books.counts.preemptions > 0
    for more in ({"came": workload.arrivals(64, 1.0)}, {"speculate": True}):
        assert serving_bench.counted(task._replace(**more), "static", books) == []


# --- the timeline


def text(codes):
    return ["".join(".-DLPX"[code] for code in row) for row in codes]


def test_cells_of_a_schedule_by_hand():
    # Four tokens a step: a prompt of 6 takes two. The second request waits in its slot of a static batch, or in the queue; the
    # third takes whichever slot is free.
    load = Workload([[1] * 6, [2] * 2, [3] * 2], [2, 1, 2])
    got = {}
    for policy in ("static", "continuous"):
        scheduler = POLICIES[policy](slots=2, max_batch_tokens=4)
        got[policy] = text(occupancy.cells(alone(scheduler, load), 2))
    assert got == {"static": ["PPLPL", "-L..."], "continuous": ["PPL.", ".LPL"]}


def test_cells_agree_with_what_the_scheduler_counted():
    scheduler = Scheduler(12, slots=8, max_batch_tokens=64)
    columns = alone(scheduler, SCALED)
    codes = occupancy.cells(columns, 8)
    counts = {code: int((codes == code).sum()) for code in range(6)}
    assert counts[PREEMPTED] == scheduler.counts.preemptions > 0
    assert counts[LAST] == len(SCALED.prompts)
    assert counts[HELD] + counts[DECODE] + counts[LAST] + counts[PREFILL] == scheduler.counts.slots_used
    assert codes.shape == (8, scheduler.counts.steps)


def test_a_preempted_request_may_come_back_in_another_slot():
    def step(runs, admitted=(), preempted=()):
        return Step(0, [Namespace(id=i, prefill=p) for i, p in runs], [], [(i, 0) for i in admitted], list(preempted))

    columns = [
        Column(step([(7, True), (8, True)], admitted=[7, 8]), frozenset({7})),
        Column(step([(9, True)], admitted=[9], preempted=[8]), frozenset()),
        Column(step([(9, False), (8, True)], admitted=[8]), frozenset({8, 9})),
    ]
    assert text(occupancy.cells(columns, 2)) == ["LPL", "PXL"]


def test_several_steps_as_one_character():
    codes = np.array([[DECODE, LAST, PREFILL, DECODE, DECODE, FREE, FREE], [LAST, FREE, FREE, PREEMPTED, FREE, FREE, DECODE]])
    assert text(occupancy.shrunk(codes, 3)) == ["PD.", "LXD"]
    assert text(occupancy.shrunk(codes, 1)) == text(codes)


def test_the_terminal_picture_has_no_colours_in_a_file(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    columns = alone(Scheduler(slots=8), SCALED)
    occupancy.show({"one": occupancy.cells(columns, 8), "half": occupancy.cells(columns[:150], 8)})
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0] == "one"
    assert lines[9] == "half"
    # On the same scale.
    assert (len(lines[1]), len(lines[10])) == (2 + 105, 2 + 50)
    assert set("".join(lines[1:9])) <= set(" ·░█▓")
    assert "a character: 3 steps" in lines[18]


def test_the_picture_is_a_png_of_two_panels(tmp_path):
    columns = alone(Scheduler(slots=8), SCALED)
    path = tmp_path / "timeline.png"
    occupancy.picture(path, {"static": occupancy.cells(columns, 8), "continuous": occupancy.cells(columns, 8)})
    from matplotlib.image import imread

    height, width, _ = imread(path).shape
    assert width == 1080
    assert height > 400
    # Both hold the colour of decodes, and much of it.
    pixels = imread(path)[..., :3]
    blue = (np.abs(pixels - np.array([0x56, 0xB4, 0xE9]) / 255) < 0.01).all(axis=2)
    assert blue[: height // 2].mean() > 0.3
    assert blue[height // 2 :].mean() > 0.3


# --- an engine driven


def engine(policy="continuous", slots=2):
    mesh = Mesh(MPI.COMM_SELF, tp=1)
    model = build(llama_like(31, 24, 3, 6, 3, 14, 80), mesh.tp, drawn(1, "float64", 0.25))
    return Engine(model, mesh, Control(MPI.COMM_SELF), POLICIES[policy](slots=slots, max_batch_tokens=64))


LOAD = Workload([[1, 2, 3], [4, 5], [6]], [3, 5, 1])


def test_an_engine_serves_a_workload():
    served = Served([0.0] * 3)
    assert list(serve(engine(), LOAD, served)) == [0, 2, 1]
    assert [len(t) for t in served.tokens] == [sum(n for _, n in d) for d in served.deliveries] == LOAD.max_tokens
    assert len(served.columns) == len(served.step_seconds) == 5
    assert sum(served.step_tokens) == served.output_tokens == 9
    assert served.seconds == served.deliveries[1][-1][0]
    # The first and the fourth step run prompts.
    first, second, last = (served.step_seconds[n] for n in (1, 2, 4))
    assert decode_steps(served) == {"1": last, "2": pytest.approx((first + second) / 2)}
    assert decode_rate(served) == pytest.approx(5 / (first + second + last))
    static = Served([0.0] * 3)
    assert list(serve(engine("static"), LOAD, static)) == [0, 1, 2]
    assert static.tokens == served.tokens


def test_requests_come_when_they_come():
    served = Served([0.0, 0.0, 0.2])
    list(serve(engine(), LOAD, served))
    assert served.deliveries[2][0][0] >= 0.2
    assert [len(t) for t in served.tokens] == LOAD.max_tokens


# --- the command

TINY = ("--model", LLAMA, "--requests", "10", "--slots", "3")


@pytest.mark.mpi(min_size=2, max_size=thinned(4, 2))
@pytest.mark.limit(180)
def test_both_policies(comm, shared):
    png = shared / "t.png"
    got = inside(comm, "serving_bench", *TINY, "--json", "--png", png)
    assert got["ok"]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert got["differences"] == []
    load = workload.drawn(10, (8, 64), 16, 0)
    assert got["load"] == {"input_tokens": sum(map(len, load.prompts)), "output_tokens": sum(load.max_tokens)}
    assert {(c["policy"], c["by"]) for c in got["checks"]} == {
        (p, by) for p in ("static", "continuous") for by in ("closed form", "scheduler alone")
    }
    for policy, p in got["policies"].items():
        assert p["steps"] == {"static": batches, "continuous": lanes}[policy](load.max_tokens, 3)
        assert p["output_tokens"] == sum(load.max_tokens)
        assert p["output_tokens_per_second"] == pytest.approx(p["output_tokens"] / p["seconds"])
        assert p["slot_use"] == pytest.approx(sum(load.max_tokens) / (3 * p["steps"]))
        assert 0 < p["kv_waste"] < 0.5
        assert p["preemptions"] == 0
        for kind in ("ttft", "tpot", "itl"):
            s = p[f"{kind}_seconds"]
            assert 0 < s["p50"] <= s["p95"] <= s["p99"] <= p["seconds"]
        assert {"1", "2", "3"} >= set(p["decode_step_seconds"])
    s, c = got["policies"]["static"], got["policies"]["continuous"]
    assert got["ratios"]["steps"] == s["steps"] / c["steps"] > 1
    assert got["ratios"]["output_tokens_per_second"] == c["output_tokens_per_second"] / s["output_tokens_per_second"]


def test_little_room(comm, tmp_path):
    room = ("--kv-blocks", "9", "--max-batch-tokens", "24")
    small = inside(comm, "serving_bench", *TINY, *room, "--json", "--png", tmp_path / "t.png")
    assert small["ok"]
    assert {c["by"] for c in small["checks"]} == {"scheduler alone"}
    assert all(p["preemptions"] > 0 for p in small["policies"].values())


@pytest.mark.mpi(min_size=2, max_size=thinned(4, 2))
def test_drafts_and_arrivals(comm, shared):
    rate = ("--rate", "40", "--speculate", "--policy", "continuous", "--dtype", "float64")
    drafted = inside(comm, "serving_bench", *TINY, *rate, "--json", "--png", shared / "t.png")
    assert drafted["checks"] == []
    assert drafted["ratios"] == {}
    (p,) = drafted["policies"].values()
    assert p["finished"] == {"length": 10}
    # The last of them came after so long.
    assert p["seconds"] > workload.arrivals(10, 40.0)[-1]


def test_people_get_tables_and_a_timeline(comm, shared):
    done = ran(comm, "serving_bench", *TINY, "--png", shared / "t.png")
    assert done.status == 0, done.err
    assert done.err == ""
    assert "\x1b" not in done.out
    assert "time per output token" in done.out
    assert "░" in done.out
    last = " ".join(done.out.splitlines()[-2:])
    assert last.endswith("all agreed: counts are those of the closed form; both policies gave the same tokens")


@pytest.mark.mpi(min_size=3, max_size=thinned(4, 3))
def test_other_tokens_under_one_policy_are_status_one(comm, shared, monkeypatch):
    true = Engine._run

    def wrong(self, message):
        made = true(self, message)
        static = self.control.from_first(type(self.scheduler).__name__ == "Static")
        return {i: [t._replace(id=(t.id + static) % 17) for t in ts] for i, ts in made.items()}

    monkeypatch.setattr(Engine, "_run", wrong)
    out = inside(comm, "serving_bench", *TINY, "--png", shared / "t.png", status=1)
    assert "NOT ALL AGREED: tokens of request 0; tokens of request 1;" in " ".join(out.split())
    assert ": WRONG" in out


@pytest.mark.limit(180)
def test_the_scheduler_alone(comm, tmp_path):
    got = inside(comm, "serving_bench", "--scheduler-only", "--json", "--png", tmp_path / "t.png")
    assert got["ok"]
    steps = [(r["slots"], r["static"]["decode_steps"], r["continuous"]["decode_steps"]) for r in got["rows"]]
    assert steps == [(4, 808, 586), (8, 429, 305), (16, 238, 179)]
    assert got["load"] == {"input_tokens": 2109, "output_tokens": 2315}
    full = ("--scheduler-only", "--full", "--policy", "static", "--slots", "64")
    full = inside(comm, "serving_bench", *full, "--json", "--png", tmp_path / "f.png")
    assert [r["static"]["decode_steps"] for r in full["rows"]] == [4008]
    assert full["load"] == {"input_tokens": 142_827, "output_tokens": 133_966}
    assert full["blocks"]["count"] == 17422
    assert full["blocks"]["waste"] == pytest.approx(0.0070, abs=5e-5)
    assert serving_bench.padding(workload.full().prompts, 8) == pytest.approx(0.402, abs=5e-4)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((*TINY, "--kv-blocks", "2"), "62 + 11 tokens needs 5 blocks of 16, the pool has 2: shorten it or add some"),
        ((*TINY, "--max-batch-tokens", "2"), "max_batch_tokens 2 must be 3 or more: each of 3 slots may need one"),
        ((*TINY, "--rate", "0"), "0.0 requests per second must be more than 0"),
        ((*TINY, "--full"), "is longer than the context of 512: shorten it by"),
        ((*TINY, "--policy", "dynamic"), "invalid choice: 'dynamic'"),
        (("--scheduler-only", "--rate", "3"), "--rate does nothing with --scheduler-only: leave --rate out"),
        (("--scheduler-only", "--speculate"), "leave --speculate out"),
        ((*TINY, "--png", "/no/such/t.png"), "cannot write --png /no/such/t.png: there is no folder /no"),
    ],
)
def test_bad_input_is_one_line_and_status_two(comm, args, message):
    assert message in inside(comm, "serving_bench", *args, status=2)


@pytest.mark.limit(180)
def test_bench_serving(capsys, monkeypatch):
    done = mpirun(0, "-m", "launch.bench", "serving", "--model", LLAMA, "--rounds", "1", "--tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["ranks"] == 2
    assert set(got["turns"]) == {"static", "continuous", "batch_8", "batch_1"}
    assert got["same_tokens"] == {"static": 64, "continuous": 64}
    rates = got["tokens_per_second"]
    assert got["ratios"]["continuous_to_static"] == pytest.approx(rates["continuous"] / rates["static"])
    assert got["ratios"]["batch_8_to_batch_1"] == pytest.approx(rates["batch_8"] / rates["batch_1"])
    for columns in (80, 120, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        bench.show(got)
        assert max(map(len, capsys.readouterr().out.splitlines())) <= columns
    assert "--tokens 1 leaves nothing to decode" in command("bench", 0, "serving", "--model", LLAMA, "--tokens", "1", status=2)
