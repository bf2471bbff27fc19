"""The verbs that exercises are handed: over real ranks as over simulated ones, and counted alike."""

import numpy as np
import pytest

from practice.axis import Axis
from practice.exercise import load
from practice.part import Case, Part
from practice.simulate import SimulatedAxis, Stage, simulate
from practice.truth import FILE
from practice.worker import MpiAxis, State

WORDS = {"all_reduce": "sum", "all_gather": 0, "reduce_scatter": 0, "broadcast": 0}


def exchanged(axis: Axis) -> list[np.ndarray]:
    """From rank s to rank r go s rows of r + 1 numbers: rank 0 has none to send."""
    return axis.all_to_all([np.full((axis.rank, r + 1), 10.0 * axis.rank + r) for r in range(axis.size)])


def every_verb(axis: Axis) -> list:
    x = np.arange(3.0 * axis.size).reshape(-1, 3) + axis.rank
    return [*(getattr(axis, verb)(x, option) for verb, option in WORDS.items()), *exchanged(axis), dict(axis.counts)]


def simulated(size: int, work) -> list:
    stage, found = Stage(size), [None] * size
    axes = [SimulatedAxis(stage, r, [*WORDS, "all_to_all"], "") for r in range(size)]

    def body(r: int) -> None:
        try:
            found[r] = work(axes[r])
        except (TypeError, ValueError) as error:
            found[r] = str(error)

    stage.run([lambda r=r: body(r) for r in range(size)])
    return found


@pytest.mark.mpi
def test_verbs_give_on_real_ranks_what_they_give_on_simulated_ones(comm, tmp_path):
    axis = MpiAxis(comm, State(tmp_path, comm.rank), [*WORDS, "all_to_all"], "")
    for got, want in zip(every_verb(axis), simulated(comm.size, every_verb)[comm.rank], strict=True):
        np.testing.assert_equal(got, want)


def test_all_to_all_brings_each_rank_what_is_meant_for_it():
    for r, came in enumerate(simulated(3, exchanged)):
        for s, y in enumerate(came):
            assert y.shape == (s, r + 1)
            assert (y == 10 * s + r).all()


def test_all_to_all_counts_what_leaves_and_takes_an_array_a_rank():
    assert [counts["numbers sent"] for *_, counts in simulated(3, lambda a: [exchanged(a), a.counts])] == [0, 4, 6]
    assert "a list of 3 arrays, xs[r] for rank r, got 2 of them" in simulated(3, lambda a: a.all_to_all([np.ones(1)] * 2))[0]
    assert "got int" in simulated(3, lambda a: a.all_to_all(3))[0]
    mixed = [np.ones(1), np.ones(1, "f4"), np.ones(1)]
    assert "one dtype, got float64, float32, float64" in simulated(3, lambda a: a.all_to_all(mixed))[0]


def test_an_axis_of_an_earlier_run_is_an_error_and_no_wait_for_ever():
    def call(code, a, axis):
        return {"y": code.step(a["x"], axis)}

    part = Part("step", ((1,),), lambda draw, n: {"x": np.ones(n)}, call, lambda a, ref, at: {})
    source = "kept = []\ndef step(x, dp):\n    kept.append(dp)\n    return kept[0].all_reduce(x)\n"
    spaces = [load(source, FILE, {"__source__": source}) for _ in range(2)]
    first, second = (simulate(part, Case("step", (1,), "float64", 0), spaces, ["all_reduce"], FILE) for _ in range(2))
    assert [o.kind for o in first] == ["ok", "ok"]
    assert all("earlier call" in o.error["message"] for o in second)
