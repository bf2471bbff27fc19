"""Rankwise's own account: what it says adds up to what a step is; and these ranks as a machine."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from launch.planning import here as asking
from models.config import llama_like
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.shard import AXES
from plan import here, training
from plan.account import Operation
from plan.calibrate import calibrated, needs
from plan.here import Cpu
from plan.ours import Ours
from plan.ours import training as training_of
from plan.step import Planner
from plan.strategy import Strategy

CONFIG = llama_like(64, 32, 4, 4, 2, 48, 16)
LLAMA = llama_like(128_256, 16_384, 126, 128, 8, 53_248, 8192)


def strategy(config=CONFIG, S=16, batch=16, **more):
    plain = {"attention": "unfused", "dtype": "float32", "p2p": "delay", "scatter_gather": False}
    return Strategy(config, S, batch, **{**plain, **more})


LAYOUTS = [
    {"pp": 2, "tp": 2, "micro_batch": 4},
    {"dp": 2, "cp": 2, "zero": 2, "micro_batch": 8},
    {"pp": 2, "schedule": "zb-v", "chunks": 2, "micro_batch": 2, "recompute": "full"},
    {"tp": 2, "dp": 2, "zero": 3, "sequence_parallel": True, "micro_batch": 4},
    {"pp": 2, "dp": 2, "zero": 3, "micro_batch": 1},
    {"pp": 2, "dp": 2, "zero": 3, "schedule": "zb-v", "chunks": 2, "micro_batch": 1},
    {"pp": 2, "dp": 2, "zero": 2, "schedule": "zb-h1", "micro_batch": 1, "overlap": False},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parts_add_up_to_the_step(layout):
    """Products and messages of the account's parts, times the micro-batches, are those of the exact step."""
    s, account = strategy(**layout), Ours()
    told = training_of(s).told(0)
    made, sent = Counter(), Counter()
    for stage in s.stages_of(0):
        for part, n in account.parts(s, {})[stage]:
            for op in part.operations:
                if op.kind == "product":
                    made[tuple(op.shape)] += n * op.times * s.micro_batches
            for t in part.transfers:
                sent[t.verb, t.axis] += n * t.calls * s.micro_batches * t.message_bytes
    once = account.once(s, 0, {})
    for t in (*once.sums, *once.gathers, *once.between):
        sent[t.verb, t.axis] += t.calls * t.message_bytes
    assert made
    assert all(told.products[shape] >= n for shape, n in made.items())
    # Attention's, block by block, are stacks; here of one head they are not.
    assert {shape for shape in told.products - made if shape[3] == 1 and shape in made} <= {(16, 16, 8, 1), (8, 16, 16, 1)}
    # What a micro-batch has of what ZeRO sends is a share of it.
    sent = Counter({key: round(n) for key, n in sent.items()})
    for verb, axis in sent:
        exact = sum(n for (v, a, _), (_, n) in told.sent.items() if (v, a) == (verb, axis.replace(",", "*")))
        assert sent[verb, axis] == exact, (verb, axis)
    assert account.memory(s, 0, {}) == dict.fromkeys(account.memory(s, 0, {}), 0) | told.memory
    assert account.in_flight(s, 0) == told.in_flight


def within(s):
    """Of the parts of rank 0, in one micro-batch: calls over data axes, by verb and phase."""
    found = Counter()
    for stage in s.stages_of(0):
        for part, n in Ours().parts(s, {})[stage]:
            for t in part.transfers:
                if t.axis == "dp":
                    assert t.beside == "unit"
                    found[t.verb, t.phase] += n * t.calls
    return found


def test_weights_are_gathered_and_gradients_leave_where_residence_says():
    """Four blocks and the root, four micro-batches: the last block of a forward stays for its own backward, and the root from
    the first forward to the last backward that waits."""
    one = within(strategy(dp=2, zero=3, micro_batch=2))
    assert one == {("all_gather", "forward"): 5, ("all_gather", "input"): 3, ("reduce_scatter", "input"): 5}
    assert within(strategy(dp=2, zero=2, micro_batch=2)) == {("reduce_scatter", "input"): 5}
    assert not within(strategy(dp=2, zero=1, micro_batch=2))
    # In halves, gradients leave after the second.
    halves = within(strategy(dp=2, pp=2, zero=3, micro_batch=2, schedule="zb-h1"))
    assert halves["reduce_scatter", "weights"] > 0
    assert halves["reduce_scatter", "input"] == 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_seconds_add_up(layout):
    s = strategy(**layout)
    e = Planner(Ours(), asking.unmeasured({}, s.ranks)).estimate(s)
    assert e.iteration == pytest.approx(sum(e.seconds.values()) + sum(e.exposed.values()), rel=1e-9)
    assert e.iteration > 0


def taken(config, ranks=(0,)):
    """Bytes at the peak of asking these ranks for their steps."""
    s = strategy(config, 8192, 2048, pp=2, dp=128, tp=8)
    tracemalloc.start()
    told = [training_of(s).told(rank) for rank in ranks]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(t.memory["weights"] > 2**30 for t in told)
    return peak


def test_a_step_of_405_billion_parameters_takes_no_memory(monkeypatch):
    config = llama_like(128_256, 16_384, 4, 128, 8, 53_248, 8192)
    assert taken(config, (0, 1025)) < 32 * 2**20
    # Weights that allocate are seen.
    small = llama_like(8_256, 4_096, 2, 32, 8, 8_192, 8192)
    plain = training.dry_weights
    monkeypatch.setattr(training, "dry_weights", lambda dtype: plain(dtype).__class__(
        lambda name, shape: np.zeros(shape, dtype), lambda *asked: None))  # fmt: skip
    with pytest.raises(AssertionError):
        taken(small)
    tracemalloc.stop()


def test_what_launch_train_cannot_do_is_refused():
    for more, said in (({"recompute": "half"}, "--recompute half"), ({"tp_overlap": True, "tp": 2}, "--tp-overlap True")):
        with pytest.raises(ValueError, match=f"{said} is nothing that launch.train does"):
            training_of(strategy(**more))


# --- these ranks as a machine


@pytest.mark.mpi
@pytest.mark.limit(120)
def test_these_ranks_are_measured_alike_on_all_of_them(comm, tmp_path):
    axes = {1: {}, 2: {"tp": 2}, 3: {"cp": 3}, 4: {"pp": 2, "tp": 2}}[comm.size]
    s = strategy(S=24, **axes)
    control, account = Control(comm), Ours()
    make = lambda **sizes: Mesh(comm, check=True, **dict.fromkeys(AXES, 1) | sizes)  # noqa: E731
    wanted = needs(account, [s])
    machine = calibrated(make, control, wanted, 1.0, "float32")
    assert len({str(m) for m in control.everyone(machine)}) == 1
    assert {key[0] for key in machine.seconds} >= {"product", "attend", "pass", "adamw"}
    assert all(seconds >= 0 for seconds in machine.seconds.values())
    assert set(machine.verbs) == {key for key in wanted.verbs if comm.size % key[1] == 0}
    one = Planner(account, machine).estimate(s).iteration
    # A file of it plans the same.
    file = tmp_path / "here.toml"
    file.write_text(here.written(machine))
    assert Planner(account, here.read(file)).estimate(s).iteration == pytest.approx(one, rel=1e-12)
    control.close()


def test_what_was_not_measured_is_scaled():
    seconds = {("product", "product", "forward", (8, 8, 8, 1)): 5e-6, ("pass", "gelu", "forward", (100, 200)): 3e-6}
    machine = here.here(1, 1.0, "float32", seconds=seconds, rate=1e9, bandwidth=1e12, call=0.0, verbs={})
    cpu = Cpu(machine)
    product = lambda *shape: cpu.seconds(Operation("product", "product", "forward", shape), "float32")  # noqa: E731
    assert product(8, 8, 8, 1) == 5e-6
    assert product(100, 100, 100, 1) == pytest.approx(2e-3, rel=1e-3)
    assert cpu.seconds(Operation("gelu", "pass", "again", (1000, 2000), 2), "float32") == pytest.approx(6e-5)
    assert cpu.seconds(Operation("gelu", "pass", "forward", (100, 200)), "float32") == 3e-6


def test_between_what_was_measured_lies_a_line():
    curve = ((8, 1.0), (108, 2.0), (208, 4.0))
    assert [here.between(curve, n) for n in (1, 8, 58, 158, 308)] == [1.0, 1.0, 1.5, 3.0, 6.0]


def test_a_damaged_file_is_one_line(tmp_path):
    file = tmp_path / "here.toml"
    file.write_text('kind = "measured"\nranks = 1\n')
    with pytest.raises(ValueError, match="'operation' is missing or no number: write it anew with --write-machine"):
        here.read(file)
