"""Every mesh and every way to make a step beside one process: what the table says, and that it can say otherwise."""

import pytest

from launch.measure.equal import LAYERS, MODELS, Case, Unfit, meshes, ways
from parallel.owed import Owed
from parallel.sharded import Units
from tests.inside import inside

# By ranks: the mesh and the model that `make test` takes.
CASES = {1: ("dp=1", "routed"), 2: ("pp=2", "tied"), 3: ("cp=3", "mla"), 4: ("dp=2,ep=2", "routed")}


@pytest.mark.mpi
@pytest.mark.limit(120)
def test_every_way_gives_the_same_numbers(comm):
    mesh, model = CASES[comm.size]
    got = inside(comm, "equal", "--mesh", mesh, "--model", model, "--steps", 2, "--json")
    assert got["ok"]
    assert got["ranks"] == comm.size
    assert len(got["rows"]) >= 6
    for row in got["rows"]:
        assert row["ok"]
        assert row["bytes_ok"]
        assert max(row[f"{what}_difference"] for what in ("loss", "gradient", "weight")) < 1e-10
        assert len(row["memory_bytes_per_rank"]) == comm.size
    held = {str(row["options"]): max(row["memory_bytes_per_rank"]) for row in got["rows"]}
    if comm.size == 4:
        assert held["{'zero': 3}"] < held["{'zero': 2}"] < held["{}"]


@pytest.mark.mpi(min_size=2)
def test_a_sum_that_is_left_out_is_told(comm, monkeypatch):
    monkeypatch.setattr(Owed, "sum", lambda self: None)
    got = inside(comm, "equal", "--mesh", f"tp={comm.size}", "--steps", 1, "--json", status=1)
    assert not got["ok"]
    cut = [row for row in got["rows"] if row["options"].get("sequence_parallel")]
    assert cut
    assert not any(row["ok"] or row["bytes_ok"] for row in cut)


@pytest.mark.mpi(min_size=2)
def test_a_table_says_which_way_is_wrong(comm, monkeypatch):
    plain = Units._settle

    def twice(self, left):
        for unit, *_ in [*self._leaving][: len(self._leaving) - left]:
            for shard in unit:
                shard.grad *= 2
        plain(self, left)

    monkeypatch.setattr(Units, "_settle", twice)
    said = inside(comm, "equal", "--mesh", f"dp={comm.size}", "--steps", 1, status=1)
    assert f"NOT ALL AGREED: dp={comm.size} --zero 2, dp={comm.size} --zero 3" in " ".join(said.split())


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("model", MODELS)
def test_every_mesh_is_there_or_is_left_out_for_a_reason(ranks, model):
    every = meshes(ranks)
    assert len({tuple(axes.values()) for axes in every}) == len(every) == {1: 1, 2: 5, 3: 5, 4: 15, 6: 25, 8: 35}[ranks]
    for axes in every:
        found = [dict(way) for way in ways(axes)]
        assert len({str(way) for way in found}) == len(found)
        for way in found:
            if axes["ep"] == 1 or model == "routed":
                assert Case(model, axes, way).micro_batches == 2 * axes["pp"]
            else:
                with pytest.raises(Unfit, match="without experts ep is dp"):
                    Case(model, axes, way)
    # Some stages have no blocks.
    assert LAYERS < 8
