"""launch.pipeline as a user types it: plans run on ranks and compared, plans simulated, and what is refused."""

from time import sleep

import pytest

from launch.measure import pipeline as measure
from launch.measure.small import model
from layers.stage import Stage
from layers.step import Kept
from models.stage import by_hand
from parallel import pipeline as executor
from parallel.owed import Owed
from parallel.schedule import check, read
from parallel.schedules import SCHEDULES, plan
from parallel.simulation import simulate
from tests.harness import command
from tests.inside import inside, ran
from training import trainer

SMALL = ("--sequence-length", "3", "--d-model", "8", "--d-ff", "6", "--timed", "5,8,8")
# By the number of ranks: schedule, micro-batches, what else. Among them stages and ranks without blocks, both kinds of model, a
# table on both ends, on one rank and on two.
RUNS = {
    1: [("1f1b", 3, ("--layers", "1")), ("interleaved", 2, ("--stages", "2", "--tied", "--layers", "2"))],
    2: [
        ("zb-h1", 5, ("--family", "gpt2", "--layers", "2")),
        ("zb-v", 3, ("--layers", "1,0,1,0")),
        ("dualpipe-v", 4, ("--tied", "--layers", "1,0,0,1")),
    ],
    3: [("gpipe", 1, ("--tied", "--layers", "1,0,1")), ("interleaved", 4, ("--chunks", "3", "--layers", "0,1,0,1,0,0,0,0,0"))],
    4: [("1f1b", 5, ("--layers", "2,0,0,1")), ("zb-h2", 4, ("--family", "gpt2", "--tied", "--layers", "1,1,0,1"))],
}


def small(schedule="1f1b", m=2, *more):
    return (*SMALL, "--schedule", schedule, "--micro-batches", m, "--sequences", m + 1, *more)


@pytest.mark.mpi(max_size=4)
def test_gradients_are_the_reference_s_and_messages_and_memory_as_predicted(comm):
    for schedule, m, more in RUNS[comm.size]:
        got = inside(comm, "pipeline", *small(schedule, m, *more), "--dtype", "float64", "--json")
        assert got["ok"]
        tensors = {c["tensor"].removesuffix(", all") for c in got["checks"]}
        assert {"y", "dWte", "dwnf", "dblocks.0.Wq"} <= tensors
        assert ("dWhead" in tensors) == ("--tied" not in more)
        assert all(c["ok"] and c["relative_error"] < 1e-12 for c in got["checks"])
        # Both ends of a table on one rank fill it in another order.
        assert set(got["one_by_one"]["differ"]) <= ({"Wte"} if schedule == "dualpipe-v" else set())
        made = plan(schedule, comm.size, m, 3 if "--chunks" in more else None)
        assert read("\n".join(got["plan"])) == made
        assert got["peaks"] == made.peaks()
        assert got["seconds"].keys() == {"measured", "predicted"}
        assert got["seconds"]["predicted"] == got["makespan"] > 0
        sent = got["sent"]
        assert sent["messages_per_rank"] == sent["predicted_messages_per_rank"]
        assert sent["bytes_per_rank"] == sent["predicted_bytes_per_rank"]
        assert (
            sum(sent["messages_per_rank"])
            == got["messages"]
            == sum(made.to(op) not in (None, r) for op, r in made.place.items())
        )
        assert sum(sent["bytes_per_rank"]) == got["messages"] // m * sum(got["config"]["tokens_by_micro_batch"]) * 8 * 8
        assert all(r["message_bytes"] == r["predicted_message_bytes"] for r in got["communication"])
        assert got["memory"]["saved_bytes_per_rank"] == got["memory"]["predicted_saved_bytes_per_rank"]
        assert len(got["memory"]["weights_bytes_per_rank"]) == got["ranks"] == got["mesh"]["pp"] == comm.size


@pytest.mark.mpi(min_size=2, max_size=2)
def test_a_plan_of_one_s_own_is_run_drawn_and_told(comm, shared):
    """Backwards in reverse: other last bits, and no mistake."""
    if comm.rank == 0:
        (shared / "mine.csv").write_text("0F0,0F1,0B1,0B0\n1F0, 1F1,1I1,1I0,1W1,1W0\n\n")
    comm.Barrier()
    own = (*SMALL, "--sequences", "3", "--layers", "2", "--plan", shared / "mine.csv", "--draw", shared / "new" / "p.png")
    done = ran(comm, "pipeline", *own)
    assert done.status == 0, done.err
    assert done.out.startswith("ok: ")
    assert " collectives and 4 messages, " in " ".join(done.out.split())
    assert "\nmine.csv" in done.out
    assert "\nrank 1 " in done.out
    assert done.out.endswith("all agreed\n")
    assert (shared / "new" / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.mpi(min_size=2, max_size=2)
def test_what_is_predicted_is_the_time_of_operations_that_take_theirs(comm, monkeypatch):
    """They sleep: then there is a core for everybody."""

    class Slow(measure.Work):
        def __call__(self, op, x):
            sleep({"F": 0.004, "I": 0.006, "W": 0.002, "B": 0.008}[op.kind])
            return super().__call__(op, x)

    monkeypatch.setattr(measure, "Work", Slow)
    for schedule, makespan in (("1f1b", 0.048), ("zb-h1", 0.044)):
        got = inside(comm, "pipeline", *small(schedule, 3, "--layers", "2"), "--json")
        # Neither can be shorter. How much longer the real one is, a busy machine decides.
        measured, predicted = got["seconds"].values()
        assert makespan <= predicted
        assert makespan <= measured < 4 * predicted
        told = {(n, kind): s for n, stage in enumerate(got["timed"]["seconds_by_stage"]) for kind, s in stage.items()}
        assert predicted == simulate(plan(schedule, 2, 3), measure.Times(told, got["timed"]["hop"])).makespan
        # Of what the plan does not have, from its other form.
        least = {"F": 0.004, "I": 0.006, "W": 0.002, "B": 0.008}
        assert all(stage[kind] >= least[kind] for stage in got["timed"]["seconds_by_stage"] for kind in least)


# --- the checks can fail


def stay(*given):
    pass


def without_products(later):
    """What is put off and has no arrays tells the holder of gradients."""
    for tell in (add for add, arrays in later._put if not arrays):
        tell()


SABOTAGES = {
    "a tied table whose ends are not summed": ("dWte", lambda patch: patch.setattr(Owed, "sum", stay)),
    "products that are put off and forgotten": (
        "dblocks.0.Wq",
        lambda patch: patch.setattr("parallel.later.Later.do", without_products),
    ),
    "messages that nobody predicted": (
        "communication of rank 0",
        lambda patch: patch.setattr(executor, "traffic", lambda *g: []),
    ),
    "more saved than predicted": (
        "memory of rank 0",
        lambda patch: patch.setattr(trainer, "most_kept", lambda *given: Kept(1)),
    ),
    "a stage that drops its input's gradient": (
        "dblocks.0.Wq",
        lambda patch: patch.setattr(Stage, "backward", halving(Stage.backward)),
    ),
}


def halving(real):
    def backward(self, dy, *more, **others):
        return real(self, dy / 2 if self.end is None else dy, *more, **others)

    return backward


@pytest.mark.mpi(min_size=2, max_size=2)
@pytest.mark.parametrize("name", SABOTAGES)
def test_what_is_wrong_is_named(comm, monkeypatch, name):
    what, sabotage = SABOTAGES[name]
    sabotage(monkeypatch)
    done = ran(comm, "pipeline", *small("zb-h1", 2, "--layers", "2", "--tied"))
    assert done.status == 1
    assert what in " ".join(done.out.rpartition("NOT ALL AGREED: ")[2].split())
    assert done.out.startswith("NOT OK: ")


# --- plans beside the plan


def test_one_by_one_and_in_halves_run_with_every_schedule():
    for name in SCHEDULES:
        for p in (1, 2, 3):
            made = plan(name, p, 6)
            for other in (measure.one_by_one(made), measure.halved(made)):
                check(other, made.stages, 6)
                assert other.rank_of == made.rank_of
            assert not any(op.kind == "B" for op in measure.halved(made).place)


def test_what_may_differ_in_its_last_bits():
    def job(tied, stages):
        return measure.Job(model("gpt2", stages, 8, 2, 8, 4, tied), by_hand([1] * stages), [], "float32", 0)

    def differ(made, tied=False):
        given = job(tied, made.stages)
        return [n for n in ("Wte", "Wpe", "blocks.0.Wq", "blocks.1.Wq", "wnf") if measure.may_differ(given, made, n)]

    for name in SCHEDULES:
        assert differ(plan(name, 2, 5)) == []
        assert differ(plan(name, 2, 5), tied=True) == (["Wte"] if name in ("zb-v", "dualpipe-v") else [])
    assert differ(read("0F0,0F1,0B1,0B0\n1F0,1F1,1B0,1B1")) == ["Wte", "Wpe", "blocks.0.Wq"]
    assert differ(read("0F0,0F1,0B0,0B1\n1F0,1F1,1I0,1I1,1W1,1W0"), tied=True) == ["Wte", "blocks.1.Wq", "wnf"]


def test_the_same_work_in_another_number_of_stages():
    times = measure.Times({(0, "F"): 1.0, (1, "F"): 3.0}, 0.5)
    assert times.over(2) is times
    assert times.over(4) == measure.Times({(s, "F"): 1.0 for s in range(4)}, 0.5)


# --- simulated


def simulated(comm, costs, *more):
    return inside(comm, "pipeline", "--simulate", costs, *more, "--json")


@pytest.mark.mpi(max_size=2)
def test_a_simulation_has_published_numbers_on_any_number_of_ranks(comm):
    """Zero Bubble (2401.10241), table 5; and unit costs, where the numbers are whole."""
    numbers = ("18.522,18.086,9.337,0.601", "--stages", "8", "--micro-batches", "24")
    for schedule, bubble in (("1f1b", 0.2431), ("zb-h1", 0.1585), ("zb-h2", 0.1083)):
        got = simulated(comm, *numbers, "--schedule", schedule)
        assert round(got["bubble_fraction"], 4) == bubble
        assert (got["ranks"], len(got["plan"]), len(got["peaks"]), got["stages"]) == (8, 8, 8, 8)
    unit = simulated(comm, "1,1,1,0", "--schedule", "zb-v", "--stages", "8")
    assert (unit["makespan"], unit["span"], unit["bubble_fraction"]) == (25.5, 24, 0)
    rows = {r["schedule"]: (r["makespan"], r["span"]) for r in unit["schedules"]}
    assert rows == {
        **dict.fromkeys(("gpipe", "1f1b"), (33, 33)),
        "interleaved": (28.5, 28.5),
        "zb-h1": (27, 27),
        "zb-h2": (27, 24),
        "zb-v": (25.5, 24),
        "dualpipe-v": (25.5, 25.5),
    }
    assert "seconds" not in unit
    few = simulated(comm, "1,1,1,0", "--stages", "3", "--micro-batches", "5")
    assert few["impossible"] == ["dualpipe-v needs 6 micro-batches for pp=3, got 5: use zb-v"]


def test_a_simulation_needs_no_mpirun(tmp_path):
    (tmp_path / "plan").write_text("0F0,0B0\n1F0,1B0\n")
    given = ("--plan", str(tmp_path / "plan"), "--draw", str(tmp_path / "p.png"))
    got = command("pipeline", 0, "--simulate", "1,1,1,0.5", *given, "--json")
    assert (got["schedule"], got["makespan"], got["span"], got["bubble_fraction"]) == ("plan", 7, 7, 1 - 3 / 7)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


# --- refused

PLANS = {
    "word": ("0F0,0B0\n1F0,1X0\n", "line 2: '1X0' is no operation"),
    "circle": (
        "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n",
        "rank 0 waits at 0B0 for 1B0 of rank 1, which waits at 1F1 for 0F1 of rank 0",
    ),
    "missing": ("0F0,0B0\n1F0\n", "stage 1 has F of micro-batch 0: give it one F and either B, or I and W"),
    "lines": ("0F0,0B0\n1F0,1B0\n2F0,2B0\n", "it is for 3 ranks, these are 2: write a line a rank"),
    "nothing": ("\n\n", "it has no operations: write a line a rank, such as 0F0,0B0"),
    "no text": (b"\xff\xfe", "it is no text: write a line a rank, such as 0F0,0B0"),
    "far": ("99999999F0\n0F0\n", "rank 0 has 99999999F0: use stages 0 to 1 and micro-batches 0 to 0"),
}
REFUSED = [
    ("--layers 1", "cannot put 1 layers on 2 stages: give --layers, 0 for stages without blocks"),
    ("--schedule interleaved --stages 6 --layers 4", "cannot put 4 layers on 6 stages: give --layers, 0 for stages without"),
    ("--layers 1,1,1", "--layers 1,1,1 is for 3 stages, these are 2: give the blocks of each"),
    ("--layers 0,0", "argument --layers: '0,0' is no number of layers"),
    ("--stages 6", "cannot put 6 stages on 2 ranks with 1 chunk each: use --stages 2 or --schedule interleaved"),
    ("--schedule zb-v --chunks 3", "zb-v has 2 chunks a rank, got 3: use interleaved"),
    ("--schedule dualpipe-v --micro-batches 3", "dualpipe-v needs 4 micro-batches for pp=2, got 3: use zb-v"),
    ("--micro-batches 20000", "2 stages and 20000 micro-batches are 40,000 forwards: use at most 20,000"),
    ("--micro-batches 4 --sequences 3", "cannot deal --sequences 3 to 4 micro-batches: use 4 or more"),
    ("--timed 8,3,8", "--timed D 3 does not fit 2 heads: use a multiple of 4"),
    ("--timed 8,8", "argument --timed: '8,8' is not T,D,F: use three sizes"),
    ("--d-model 9", "--heads 2 does not divide --d-model 9: use a divisor of 9"),
    ("--plan nowhere", "--plan nowhere: there is no such file"),
    ("--plan . --schedule zb-v", "--schedule does nothing with --plan: leave --schedule out"),
    ("--plan .", "--plan .: it is no file"),
    ("--simulate 1,1,1", "'1,1,1' is not F,I,W,HOP: use four times"),
    ("--simulate 0,0,0,1", "'0,0,0,1': F, I and W take no time"),
    ("--simulate 1,1,-1,1", "'-1' is not an amount"),
    ("--simulate 1,1,1,0 --layers 3", "--layers does nothing with --simulate: leave --layers out"),
    ("--simulate 1,1,1,0 --seed 3", "--seed does nothing with --simulate: leave --seed out"),
    ("--simulate 1,1,1,0 --schedule zb-v --stages 7", "cannot put 7 stages on 3 ranks with 2 chunks each: use --stages 6"),
]


@pytest.mark.mpi(min_size=2, max_size=2)
def test_bad_input_is_one_line(comm, shared):
    for options, message in REFUSED:
        assert message in inside(comm, "pipeline", *options.split(), status=2)
    for name, (content, message) in PLANS.items():
        if comm.rank == 0:
            (shared / name).write_bytes(content.encode() if isinstance(content, str) else content)
        comm.Barrier()
        said = inside(comm, "pipeline", "--plan", shared / name, status=2)
        assert said.startswith(f"error: --plan {shared / name}: ")
        assert message in said
