"""Models on axes without MPI, their weights without memory: they know what real ones know."""

import tracemalloc
from dataclasses import replace
from fractions import Fraction
from math import prod
from time import process_time

import numpy as np
import pytest

from layers.batch import Batch
from models.build import build
from models.config import Experts, Latent, gpt2_like, llama_like
from models.published import PUBLISHED
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.shard import AXES
from plan.dry import DryAxis, DryMesh, dry_weights

LLAMA = llama_like(31, 24, 2, 9, 3, 14, 40)
ROUTED = Experts(8, 3, 6, 6, 1, "sigmoid", scale=2.5, groups=4, active_groups=2, group_top=2, correction=True)
CONFIGS = {
    "gpt2": gpt2_like(29, 24, 2, 6, 14, 16),
    "llama": replace(LLAMA, d_head=8, qk_norm=True),
    "deepseek": replace(LLAMA, kv_heads=9, latent=Latent(8, 4, 2, 4, 6), experts=ROUTED),
}


@pytest.mark.mpi
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_dry_model_says_of_itself_what_one_on_real_ranks_says(comm, kind):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        real = build(CONFIGS[kind], mesh.tp, drawn(1, "float32"))
        dry = build(CONFIGS[kind], DryAxis("tp", comm.size, comm.rank), dry_weights("float32"))
        for a, b in zip(real.parameters, dry.parameters, strict=True):
            assert (a.name, a.layout, a.data.shape, a.data.dtype) == (b.name, b.layout, b.data.shape, b.data.dtype)
            assert (a.decays, a.multiplies, a.read) == (b.decays, b.multiplies, b.read)
        asks = (
            lambda m: m.traffic(Batch([9])),
            lambda m: m.saved_bytes(Batch([9])),
            lambda m: m.flops(17),
            lambda m: m.read_bytes,
        )
        assert [ask(real) for ask in asks] == [ask(dry) for ask in asks]
        # 9 query heads on 2 or 4 ranks share key/value heads: these ranks are an axis of their own.
        for a, b in zip(real.blocks, dry.blocks, strict=True):
            groups = [
                [(g.name, g.size, g.rank, g.members) for g, _ in getattr(block.attention, "shared", [])] for block in (a, b)
            ]
            assert groups[0] == groups[1]


# By number of ranks.
GRIDS = {
    1: ({"tp": 1},),
    2: ({"tp": 2}, {"pp": 2, "tp": 1}),
    3: ({"dp": 3}, {"cp": 3, "tp": 1}),
    4: ({"pp": 2, "tp": 2}, {"dp": 2, "cp": 2}, {"ep": 4}),
}
JOINED = ((), ("dp", "ep", "cp"), ("tp",), ("pp", "dp"), ("cp", "pp"), ("dp", "cp"))


@pytest.mark.mpi
def test_a_dry_mesh_has_the_axes_of_a_real_one(comm):
    of = lambda axis: (axis.name, axis.size, axis.rank, axis.members, axis.place)  # noqa: E731
    for sizes in GRIDS.get(comm.size, ({"dp": comm.size},)):
        dry = DryMesh(sizes, comm.rank)
        with Mesh(comm, check=True, **sizes) as real:
            assert (dry.sizes, dry.place) == (real.sizes, real.place)
            assert [of(getattr(dry, name)) for name in AXES] == [of(getattr(real, name)) for name in AXES]
            for names in (*JOINED, tuple(sizes)):
                assert of(dry.over(*names)) == of(real.over(*names))
            assert [dry.place_of(r) for r in range(comm.size)] == [real.place_of(r) for r in range(comm.size)]
            assert [dry.rank_at(dry.place_of(r)) for r in range(comm.size)] == [*range(comm.size)]


def test_a_dry_mesh_of_thousands_sends_nothing():
    mesh = DryMesh({"pp": 16, "dp": 128, "tp": 8}, 9_001)
    assert mesh.place == {"pp": 8, "dp": 101, "ep": 0, "cp": 0, "tp": 1}
    assert mesh.tp.members == tuple(range(9_000, 9_008))
    data = mesh.over("dp", "ep", "cp")
    assert (data.name, data.size, data.rank, data.members[:2]) == ("dp", 128, 101, (8 * 128 * 8 + 1, 8 * 128 * 8 + 9))
    both = mesh.over("pp", "dp")
    assert (both.name, both.size, both.rank) == ("pp*dp", 2048, 8 * 128 + 101)
    for axis in (mesh.tp, mesh.cp, both):
        with pytest.raises(AttributeError, match=f"all_reduce: nothing can be sent along .*{axis.name[:2]}"):
            axis.all_reduce(np.zeros(1))
    with pytest.raises(AttributeError, match="no axis 'zz', only pp, dp, tp"):
        _ = mesh.zz


def test_a_rank_is_in_its_own_groups_only():
    assert DryAxis("tp", 8, 5, tuple(range(40, 48))).group(range(4, 7)).members == (44, 45, 46)
    with pytest.raises(ValueError, match="5 is not in range"):
        DryAxis("tp", 8, 5).group(range(0, 4))


# What the authors' config.json of DeepSeek-V3 says, again.
V, D, LAYERS, DENSE = 129280, 7168, 61, 3
H, C, Q, NOPE, ROPE, VALUE = 128, 512, 1536, 128, 64, 128
F, X, ACTIVE, F_EXPERT = 18432, 256, 8, 2048


def deepseek_v3(experts):
    """Entries of all weights, with so many experts a block, but the scores' correction."""
    attention = D * Q + Q + Q * H * (NOPE + ROPE) + D * (C + ROPE) + C + C * H * (NOPE + VALUE) + H * VALUE * D
    routed = (experts + 1) * 3 * D * F_EXPERT + D * X
    return 2 * V * D + D + LAYERS * (attention + 2 * D) + DENSE * 3 * D * F + (LAYERS - DENSE) * routed


def test_deepseek_v3_is_built_at_once_and_without_memory():
    tracemalloc.start()
    begun = process_time()
    model = build(PUBLISHED["DeepSeek-V3"], DryAxis("tp", 8, 3), dry_weights("float16"))
    seconds, (_, peak) = process_time() - begun, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 2
    assert peak < 4 * 2**20
    # 671 billion, without the 14 that predict further tokens.
    corrections = [b for block in model.blocks[DENSE:] for b in block.mlp.buffers]
    assert sum(b.data.size for b in corrections) == (LAYERS - DENSE) * X
    assert sum(prod(p.layout.shape) for p in model.parameters) == deepseek_v3(X) == 671_026_404_352
    # Of these 37 billion serve a token; of the embedding it reads a row.
    read = sum(Fraction(prod(p.layout.shape)) * p.read for p in model.parameters)
    assert read == deepseek_v3(ACTIVE) - V * D
    assert 36e9 < read < 38e9


# Llama 3 405B (arXiv 2407.21783, table 3) and GPT-3 (2005.14165, table 2.1), its vocabulary as 2104.04473 pads it.
LARGE = {
    "Llama 3 405B": (llama_like(128_256, 16_384, 126, 128, 8, 53_248, 8192), 405_853_388_800),
    "GPT-3 175B": (gpt2_like(51_200, 12_288, 96, 96, 4 * 12_288, 2048), 174_615_846_912),
}


@pytest.mark.parametrize("name", LARGE)
def test_the_largest_models_are_built_without_memory(name):
    config, parameters = LARGE[name]
    tracemalloc.start()
    mesh = DryMesh({"pp": 16, "dp": 128, "tp": 8}, 16_383)
    model = build(config, mesh.tp, dry_weights("float16"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20
    assert sum(prod(p.layout.shape) for p in model.parameters) == parameters
    assert {p.data.base.nbytes for p in model.parameters if p.data.base is not None} == {2}


def test_what_eight_ranks_hold_of_deepseek_v3_is_all_of_it():
    models = [build(PUBLISHED["DeepSeek-V3"], DryAxis("tp", 8, r), dry_weights("float16")) for r in range(8)]
    held = 0
    for parts in zip(*(m.parameters for m in models), strict=True):
        whole = not parts[0].layout.cuts
        assert len({p.name for p in parts}) == 1
        held += parts[0].data.size if whole else sum(p.data.size for p in parts)
    assert held == deepseek_v3(X)
    assert {np.dtype("float16")} == {p.data.dtype for m in models for p in m.parameters}
