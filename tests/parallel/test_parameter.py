"""A parameter is made by one call, and knows what its layer says of it."""

import numpy as np
import pytest

from parallel.parameter import drawn, given
from parallel.shard import Layout, even
from plan.dry import dry_weights


def test_what_decays_multiplies_and_is_read():
    weights, layout = dry_weights("float32"), Layout((4, 6))
    made = {
        "matrix": weights.matrix("a", layout, {}, 4),
        "of experts": weights.matrix("b", layout, {}, 4, read=0.25),
        "table": weights.table("W", layout, {}, 0.02),
        "bias": weights.bias("Wb", layout, {}),
        "norm": weights.norm("Wn", 4),
        "one of two": weights.matrices({"c": layout, "d": layout}, 1, {}, 4).parameters[1],
        "bias of two": weights.biases({"c": layout, "d": layout}, 1, {}).parameters[1],
    }
    assert {kind: (p.decays, p.multiplies, p.read) for kind, p in made.items()} == {
        "matrix": (True, True, 1),
        "of experts": (True, True, 0.25),
        "table": (True, False, 0),
        "bias": (False, False, 1),
        "norm": (False, False, 1),
        "one of two": (True, True, 1),
        "bias of two": (False, False, 1),
    }


def test_names_are_led_and_weights_drawn_by_the_whole_name():
    weights = drawn(3, "float64").within("blocks.0.").within("shared.")
    p = weights.matrix("W1", Layout((4, 6)), {}, 4)
    assert p.name == "blocks.0.shared.W1"
    np.testing.assert_array_equal(p.data, drawn(3, "float64").matrix(p.name, p.layout, {}, 4).data)
    assert p.data.std() == pytest.approx(0.5, rel=0.5)


def test_what_is_added_to_the_residual_stream_starts_smaller():
    weights, layout = drawn(3, "float64"), Layout((4, 6))
    whole = weights.matrix("W", layout, {}, 4).data
    for part in (weights.within("", summed=9), weights.within("", summed=9).within("")):
        np.testing.assert_array_equal(part.matrix("W", layout, {}, 4).data, whole)
        np.testing.assert_allclose(3 * part.matrix("W", layout, {}, 4, residual=True).data, whole, rtol=1e-15)
    np.testing.assert_array_equal(weights.matrix("W", layout, {}, 4, residual=True).data, whole)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_parameters_side_by_side_are_those_made_alone(rank):
    layouts = {"q": Layout((2, 9, 4), {"tp": (1, even(9, 3))}), "k": Layout((2, 5, 4), {"tp": (1, even(5, 3))})}
    whole = {n: np.random.default_rng(1).standard_normal(layout.shape).astype("float32") for n, layout in layouts.items()}
    for weights in (drawn(2, "float32"), given(whole)):
        fused = weights.matrices(layouts, 1, {"tp": rank}, 2)
        assert fused.data.shape == (2, 3 + (1 if rank == 2 else 2), 4)
        for p, at in fused.parts:
            alone = weights.matrix(p.name, layouts[p.name], {"tp": rank}, 2)
            np.testing.assert_array_equal(p.data, alone.data)
            assert p.home is fused
            assert np.shares_memory(p.data, fused.data[at])
            assert p.data.dtype == alone.data.dtype == "float32"
    dry = dry_weights("float32").matrices(layouts, 1, {"tp": rank}, 2)
    assert [(p.name, p.data.shape) for p in dry.parameters] == [(p.name, p.data.shape) for p in fused.parameters]
    assert dry.data.shape == fused.data.shape
    assert dry.data.base.nbytes == 4
