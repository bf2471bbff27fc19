"""What a cache keeps of a token: the closed form against caches of built models, the published numbers, and the command."""

import struct
from dataclasses import replace

import numpy as np
import pytest

from inference.generate import make_cache
from layers.attention import Attention
from layers.latent_attention import LatentAttention
from layers.rope import Rope
from models.build import build
from models.config import Latent, cache_entries, gpt2_like, llama_like
from models.published import PUBLISHED, attention_of, entries_by_rank
from parallel.mesh import Mesh
from parallel.parameter import drawn
from tests.harness import ROOT
from tests.inside import inside

TINY = {
    "mha": gpt2_like(31, 20, 3, 5, 12, 64),
    "gqa": llama_like(31, 36, 2, 9, 3, 14, 64),
    "gqa, wide heads": replace(llama_like(31, 24, 3, 6, 2, 14, 64), d_head=8, rope=Rope(8)),
    "mqa": llama_like(31, 24, 2, 6, 1, 14, 64),
    "mla": replace(llama_like(31, 20, 2, 5, 5, 14, 64), latent=Latent(6, 5, 4, 3, 7), rope=Rope(4), d_head=9),
}
# Bytes of bf16, as the papers and model cards have them.
KNOWN = {
    "GPT-2 124M": 36_864,
    "Llama-2-7B": 524_288,
    "Llama-3-70B": 327_680,
    "SmolLM2-135M": 23_040,
    "DeepSeek-V2": 69_120,
    "DeepSeek-V3": 70_272,
    "Llama-3-8B": 131_072,
    "Qwen3-0.6B": 114_688,
}


@pytest.fixture
def mesh(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh


@pytest.mark.mpi
@pytest.mark.parametrize("cache", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", TINY)
def test_the_closed_form_is_what_built_models_keep(mesh, kind, dtype, cache):
    config, b = TINY[kind], np.dtype(dtype).itemsize
    model = build(config, mesh.tp, drawn(0, dtype))
    by_rank = entries_by_rank(config, mesh.tp.size)
    empty = make_cache(model, cache)
    assert empty.bytes_per_token == b * by_rank[mesh.tp.rank]
    assert mesh.tp.size > 1 or empty.bytes_per_token == b * cache_entries(config)
    # And counted, once there is something in it.
    empty.open(0)
    empty.extend(0, 7)
    assert empty.bytes_of(0) == 7 * empty.bytes_per_token
    if kind == "mla":
        assert make_cache(model, cache, striped=True).bytes_per_token == b * cache_entries(config) / mesh.tp.size


@pytest.mark.mpi
@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_of_the_published_sizes_keep_as_much(mesh, name):
    """Their attention with a model width of 1, as what a cache keeps does not depend on that, and the weights then fit."""
    c = PUBLISHED[name]
    if c.latent is not None:
        sizes = (c.latent.d_latent, 1, c.latent.d_rope, 1)
        layer = LatentAttention(mesh.tp, drawn(0, "float32"), 1, c.heads, *sizes)
    else:
        layer = Attention(mesh.tp, drawn(0, "float32"), 1, c.heads, c.kv_heads, c.d_head or c.d_model // c.heads)
    kept = sum(int(np.prod(shape)) for shape in layer.cache_shapes)
    assert entries_by_rank(c, mesh.tp.size)[mesh.tp.rank] == c.layers * kept


def test_the_published_numbers(comm):
    got = inside(comm, "kv_cache", "--json")
    assert got["ok"]
    assert {m["model"]: m["bytes_per_token"]["bfloat16"] for m in got["models"]} == KNOWN
    assert {m["model"]: m["bytes_per_token"]["float32"] for m in got["models"]} == {k: 2 * n for k, n in KNOWN.items()}
    assert {m["model"]: m["context_bytes"] and m["context_bytes"]["bfloat16"] for m in got["models"]} == {
        name: n * 4096 if name != "GPT-2 124M" else None for name, n in KNOWN.items()
    }
    kinds = {m["model"]: m["attention"] for m in got["models"]}
    assert [name for name, kind in kinds.items() if kind == "mha"] == ["GPT-2 124M", "Llama-2-7B"]
    assert [name for name, kind in kinds.items() if kind == "mla"] == ["DeepSeek-V2", "DeepSeek-V3"]
    assert attention_of(TINY["mqa"]) == "mqa"


def test_by_rank(comm):
    by = {m["model"]: m for m in inside(comm, "kv_cache", "--json", "--ranks", "4", "--dtype", "float64")["models"]}
    smol, llama, deepseek = by["SmolLM2-135M"], by["Llama-3-70B"], by["DeepSeek-V2"]
    # 9 query heads on 4 ranks, 3 to 2 each, read 1, 1, 2 and 1 of 3 key/value heads.
    head = 30 * 2 * 64
    assert [n["bfloat16"] for n in smol["bytes_per_token_per_rank"]] == [2 * head * n for n in (1, 1, 2, 1)]
    assert [n["float64"] for n in smol["bytes_per_token_per_rank"]] == [8 * head * n for n in (1, 1, 2, 1)]
    assert smol["copies"] == pytest.approx(5 / 3)
    assert [n["bfloat16"] for n in llama["bytes_per_token_per_rank"]] == [327_680 // 4] * 4
    assert (llama["copies"], llama["striped_bytes_per_token_per_rank"]) == (1, None)
    assert (deepseek["copies"], deepseek["striped_bytes_per_token_per_rank"]["bfloat16"]) == (4, 69_120 / 4)


def test_more_ranks_than_heads_and_more_tokens_than_the_context(comm):
    beyond = ("--ranks", "16", "--tokens", "8192")
    by = {m["model"]: m for m in inside(comm, "kv_cache", "--json", *beyond)["models"]}
    assert by["Llama-3-70B"]["copies"] == 2
    assert by["GPT-2 124M"]["bytes_per_token_per_rank"] is by["SmolLM2-135M"]["copies"] is None
    assert by["Llama-2-7B"]["context_bytes"] is None
    assert by["Llama-3-8B"]["context_bytes"]["bfloat16"] == 2**30
    lines = inside(comm, "kv_cache", *beyond).splitlines()
    assert "SmolLM2-135M: its 9 heads cannot be cut over 16 ranks." in lines
    assert "Llama-2-7B: its context is 4,096 tokens." in lines


@pytest.mark.mpi
def test_the_page_has_what_the_command_prints(comm):
    assert f"```\n{inside(comm, 'kv_cache')}```\n" in (ROOT / "docs/kv-cache.md").read_text()


def test_pictures(comm, tmp_path):
    folder = tmp_path / "new"
    written = inside(comm, "kv_cache", "--json", "--pictures", folder)["pictures"]
    assert sorted(written) == sorted(str(path) for path in folder.iterdir())
    page = (ROOT / "docs/kv-cache.md").read_text()
    for path in folder.iterdir():
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", data[16:24])
        assert width == 1400
        assert 500 < height < 1500
        assert 20_000 < len(data) < 300_000
        assert page.count(f"]({path.name})") == 1
        assert (ROOT / "docs" / path.name).is_file()


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ranks", "0"], "argument --ranks: '0' is not a size: use a whole number of 1 or more"),
        (["--ranks", "129"], "--ranks 129 is more than the heads of any of these models: use at most 128"),
        (["--tokens", "x"], "argument --tokens: 'x' is not a size: use a whole number of 1 or more"),
        (["--pictures", "/nowhere/there"], "cannot write --pictures /nowhere/there: there is no folder /nowhere"),
        (["--pictures", "README.md"], "cannot write --pictures README.md: it is a file: use a folder"),
    ],
)
def test_bad_input_is_one_line_and_status_two(comm, args, message):
    assert inside(comm, "kv_cache", *args, status=2) == f"error: {message}"
