"""docs/parallelism.md: its numbers are those of a step on four ranks, its tests are there and do what it says, its pictures are
what the code draws of the objects that run."""

import ast
import re
from functools import cache
from itertools import combinations

import pytest

from launch import dp_train, equal
from launch.equal import options_said, said
from launch.measure.equal import MODELS, Job
from launch.pictures import zero
from models.build import build
from parallel import residence
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.pipeline import PHASES
from parallel.schedules import plan
from parallel.shard import AXES
from plan.dry import DryAxis, dry_weights
from tests.harness import ROOT
from tests.launch.test_silent_errors import case_of
from tests.training import test_expert_training, test_pipeline_training, test_sharded_training, test_training

PAGE = (ROOT / "docs/parallelism.md").read_text()
RANKS = 4


def table(heading):
    """The rows of the table that begins with this heading, as they stand."""
    return PAGE.split(f"| {heading} |")[1].split("\n\n")[0].splitlines()[2:]


# The kinds of parallelism on four ranks.
KINDS = (
    ("data", "dense", "dp=4"),
    ("ZeRO-1", "dense", "dp=4 --zero 1"),
    ("ZeRO-2", "dense", "dp=4 --zero 2"),
    ("ZeRO-3", "dense", "dp=4 --zero 3"),
    ("tensor", "dense", "tp=4"),
    ("sequence", "dense", "tp=4 --sequence-parallel"),
    ("pipeline", "dense", "pp=4"),
    ("context", "dense", "cp=4"),
    ("data, with experts", "routed", "dp=4"),
    ("expert", "routed", "ep=4"),
)


def measured(comm, model, typed):
    """A step: the bytes that a rank sends in each phase, and holds; each the most of any rank. All ranks call it together."""
    case, control = case_of(model, typed), Control(comm)
    with Mesh(comm, **case.axes) as mesh:
        taken = Job(model, comm.size, 1, 0).taken(case, mesh)
        assert taken.right
        sent = dict.fromkeys(("forward", "backward", "step"), 0)
        for row in mesh.ledger.report([]):
            if row["phase"] in sent:
                sent[row["phase"]] += row["wire_bytes"]
    of = lambda *kinds: sum(taken.memory.get(kind, 0) for kind in kinds)  # noqa: E731
    held = [of("weights"), of("gradients"), of("optimizer"), of("gathered", "unsummed"), of("saved")]
    every = control.everyone([*sent.values(), *held])
    control.close()
    return [max(column) for column in zip(*every, strict=True)]


@pytest.mark.mpi(min_size=RANKS, max_size=RANKS)
def test_what_each_kind_sends_and_holds_is_counted(comm):
    want = []
    for kind, model, typed in KINDS:
        numbers = " | ".join(f"{round(n):,}" for n in measured(comm, model, typed))
        want.append(f"| {kind} | `{typed}` | {numbers} |")
    assert table("kind | `launch.train --mesh`") == want, "\n".join(want)


def test_the_model_is_the_one_that_is_described():
    job = Job("dense", RANKS, 1, 0)
    lengths = [len(part.ids) for part in job.batch]
    assert says(f"A batch is {len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all.")
    for model in ("dense", "routed"):
        weights = build(MODELS[model], DryAxis("tp", 1), dry_weights("float64")).parameters
        assert says(f"{sum(p.data.nbytes for p in weights):,} bytes")


def says(text):
    """Whether the page does, on however many lines."""
    return text in " ".join(PAGE.split())


def test_what_zero_sends_is_read_off_a_plan():
    sizes, parts = [200, 250, 250, 200, 100], {0: (residence.ROOT, 1, 2, 3, 4, residence.ROOT)}
    sent = {1: [], 2: [], 3: []}
    for m in (1, 4):
        ops = plan("1f1b", 1, m).ranks[0]
        gathered = sum(sizes[use.unit] for use in residence.uses(ops, parts, PHASES) if use.gathers)
        split = sum(sizes[fill.unit] for fill in residence.fills(ops, parts, PHASES) if fill.sends)
        for stage, whole in {1: 2 * sum(sizes), 2: split + sum(sizes), 3: gathered + split}.items():
            sent[stage].append(whole * 3 // 4)
    forms = {1: "2 P", 2: "(m + 1) P", 3: "m (root + 2 (P - root) - last + P)"}
    want = [f"| ZeRO-{stage} | (n-1)/n · {form} | {sent[stage][0]:,} | {sent[stage][1]:,} |" for stage, form in forms.items()]
    rows = PAGE.split("| wire bytes of a step |")[1].split("\n\n")[0].splitlines()[2:]
    assert rows == want, "\n".join(want)


# --- what was printed


def block(command):
    """What the page shows of a command's report."""
    return PAGE.split(f"$ {command}\n")[1].split("\n```")[0]


@pytest.mark.mpi(min_size=RANKS, max_size=RANKS)
def test_dp_train_sends_what_the_page_shows(comm):
    args = dp_train.options().parse_args(["--zero", "3", "--steps", "1"])
    control = Control(comm)
    with Mesh(comm, dp=RANKS, tp=1) as mesh:
        steps = dp_train.Steps(args, dp_train.check(args, RANKS), mesh, control, 1)
        memory = steps.trainer.memory(steps.parts)
        rows = [row for row in mesh.ledger.report(steps.trainer.traffic(steps.parts)) if row["phase"] != "compare"]
    control.close()
    text = block("mpirun -n 4 python -m launch.dp_train --zero 3")
    row = r"^(\w+) +(\w+) +(forward|backward|step) +(\d+) +([\d,]+) +[\d,]+ +([\d,]+) +[\d.]+$"
    if comm.rank == 0:
        want = [(r["verb"], r["axis"], r["phase"], *(5 * r[k] for k in ("calls", "message_bytes", "wire_bytes"))) for r in rows]
        assert [(v, a, p, *(int(n.replace(",", "")) for n in more)) for v, a, p, *more in re.findall(row, text, re.M)] == want
        kib = [memory[kind] / 1024 for kind in ("weights", "gradients", "optimizer", "gathered", "predicted_gathered")]
        assert re.search(r"^0 +" + " +".join(f"{n:.1f}" for n in kib), text, re.MULTILINE)


def test_launch_equal_has_the_rows_that_the_page_shows():
    task = equal.check(equal.options().parse_args([]), RANKS)
    text = block("mpirun -n 4 python -m launch.equal")
    ways = {f"{said(case.axes)} {options_said(case.options)}".strip() for case in task.cases}
    rows = re.findall(r"^((?:\w+=\d,?)+)( .*?)?  +\d+e[+-]\d+ .* right +[\d.]+ +[\d.,]+  ok$", text, re.MULTILINE)
    assert len(rows) > 8
    assert {" ".join(f"{mesh}{more}".split()) for mesh, more in rows} <= ways
    assert f"\n{len(task.cases)} ways, worst differences " in text
    routed = equal.check(equal.options().parse_args(["--model", "routed"]), RANKS)
    assert says(f"{len(routed.cases)} ways on four ranks")
    pairs = [{axis for axis, n in case.axes.items() if n > 1} for case in routed.cases]
    assert all({*pair} in pairs for pair in combinations(AXES, 2))


# --- tests and pictures


@cache
def defined(path):
    """The names of a file's tests."""
    return {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_is_named_is_there():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len({*named}) >= 12
    assert [f"{path}::{name}" for path, name in named if name not in defined(path)] == []


# Of each grid of four ranks: its test, and of each case the axes, the stage of ZeRO, whether rows are cut.
GRIDS = {
    test_training: {
        "test_all_steps_are_the_same_on_every_mesh": [
            ({"dp": dp, "tp": tp}, int(zero), False)
            for dp, tp in test_training.MESHES[RANKS]
            for zero, *_ in test_training.OPTIONS
        ],
        "test_all_steps_with_tokens_cut_over_tp_are_the_same": [
            ({"dp": dp, "tp": tp}, int(zero), True)
            for dp, tp in test_training.MESHES[RANKS]
            for zero, *_ in test_training.OPTIONS[1:3]
        ],
    },
    test_pipeline_training: {
        "test_all_steps_in_stages_are_the_same": [
            (axes, int(zero), rows) for axes, _, _, rows, zero, *_ in test_pipeline_training.CASES[RANKS]
        ]
    },
    test_expert_training: {
        "test_all_steps_are_the_same": [(axes, int(zero), rows) for axes, _, rows, _, zero in test_expert_training.CASES[RANKS]]
    },
    test_sharded_training: {
        "test_all_steps_are_the_same": [
            (axes, zero, more.get("cuts_rows", False)) for axes, _, zero, more in test_sharded_training.EVERY[RANKS]
        ]
    },
}


def test_every_pair_of_axes_is_covered_as_the_table_says():
    want = []
    for pair in combinations(AXES, 2):
        found = {
            f"`tests/training/{module.__name__.rpartition('.')[2]}.py::{test}`": runs
            for module, tests in GRIDS.items()
            for test, cases in tests.items()
            if (runs := [run for run in cases if {axis for axis, n in run[0].items() if n > 1} == {*pair}])
        }
        every = [run for runs in found.values() for run in runs]
        assert every, f"no test trains on {pair}"
        stages = sorted({zero for _, zero, _ in every} - {0})
        rows = any(rows for *_, rows in every)
        want.append(
            f"| {', '.join(pair)} | {', '.join(map(str, stages)) or '-'} | {'yes' if rows else '-'} | {', '.join(found)} |"
        )
        assert rows == ("tp" in pair)
    assert table("axes") == want, "\n".join(want)
    for module, tests in GRIDS.items():
        assert {*tests} <= set(dir(module))


def test_the_pictures_are_what_the_code_draws(tmp_path):
    for again in zero.pictures(tmp_path):
        kept = ROOT / "docs" / again.name
        assert again.read_bytes() == kept.read_bytes(), "python -m launch.pictures.zero draws them again"
        assert kept.stat().st_size < 60_000
        assert PAGE.count(f"]({again.name})") == 1


@pytest.mark.parametrize("stage", range(4))
def test_shares_that_are_drawn_are_what_is_held_and_are_all_there_is(stage):
    made = [zero.trainer(stage, rank) for rank in range(zero.DP)]
    for what, bytes_of in (("weights", "weights"), ("gradients", "gradients"), ("m, v", None)):
        every = [zero.held(of)[what] for of in made]
        for of, spans in zip(made, every, strict=True):
            kept = of.optimizer.m.nbytes if bytes_of is None else of.holder.memory[bytes_of]
            assert sum(at.stop - at.start for at in spans) * of.numbering.dtype.itemsize == kept
        own = sorted((at.start, at.stop) for spans in every for at in spans)
        size = made[0].numbering.size
        if stage < {"weights": 3, "gradients": 2, "m, v": 1}[what]:
            assert own == zero.DP * [(0, size)]
        else:
            assert [*own, (size, size)][1:] == [
                (stop, after) for (_, stop), (_, after) in zip(own, [*own[1:], (0, size)], strict=True)
            ]
    assert zero.ends(made[0])[-1] == made[0].numbering.size


@pytest.mark.parametrize("m", [1, 3])
def test_the_bytes_that_are_drawn_are_those_that_are_predicted(m):
    of = zero.trainer(3)
    ops = plan("1f1b", 1, m).ranks[0]
    size = [sum(shard.numbering.nbytes for shard in unit) for unit in of.holder.units]
    every = [*zero.moments(ops, of.holder.parts)]
    for kind, predicted in (("weights", "gathered"), ("gradients", "unsummed")):
        most = max(sum(size[unit] for unit, _ in getattr(moment, kind)) for moment in every)
        assert most == of.holder.most(ops)[predicted]
    coming = sum(state == zero.MOVES for moment in every for _, state in moment.weights)
    gathered = of.holder.gathered(ops, PHASES)
    # All but the root is gathered beside computation; each is on its way for the time of one part.
    assert coming == len(gathered) - sum(t.message_bytes == size[residence.ROOT] for t in gathered)
