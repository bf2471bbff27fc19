"""Configurations of published models, as their authors' config.json files say, and what a cache keeps of their tokens."""

from __future__ import annotations

from dataclasses import replace

from layers.rope import Rope, Yarn
from models.config import Config, Experts, Latent, cache_entries, gpt2_like, llama_like
from parallel.shard import covering, even

BF16 = 2


def _llama3(d_model: int, layers: int, heads: int, d_ff: int) -> Config:
    return replace(llama_like(128256, d_model, layers, heads, 8, d_ff, 8192), rope=Rope(d_model // heads, 500000.0))


def _deepseek(vocabulary: int, d_model: int, layers: int, d_ff: int, mscale: float, experts: Experts) -> Config:
    rope = Rope(64, pairing="interleaved", scaling=Yarn(40.0, 4096, mscale=mscale, mscale_all_dim=mscale))
    latent = Latent(512, 128, 64, 128, 1536)
    return Config(vocabulary, d_model, layers, 128, 128, d_ff, 163840, eps=1e-6, rope=rope, latent=latent, experts=experts)


PUBLISHED = {
    "GPT-2 124M": gpt2_like(50257, 768, 12, 12, 3072, 1024),
    "SmolLM2-135M": replace(llama_like(49152, 576, 30, 9, 3, 1536, 8192, tied=True), rope=Rope(64, 100000.0)),
    "Qwen3-0.6B": replace(
        llama_like(151936, 1024, 28, 16, 8, 3072, 40960, tied=True), d_head=128, eps=1e-6, qk_norm=True, rope=Rope(128, 1e6)
    ),
    "Llama-2-7B": llama_like(32000, 4096, 32, 32, 32, 11008, 4096),
    "Llama-3-8B": _llama3(4096, 32, 32, 14336),
    "Llama-3-70B": _llama3(8192, 80, 64, 28672),
    "DeepSeek-V2": _deepseek(
        *(102400, 5120, 60, 12288, 0.707),
        Experts(160, 6, 1536, 2 * 1536, first=1, normed=False, scale=16.0, groups=8, active_groups=3),
    ),
    "DeepSeek-V3": _deepseek(
        *(129280, 7168, 61, 18432, 1.0),
        Experts(256, 8, 2048, 2048, 3, "sigmoid", scale=2.5, groups=8, active_groups=4, group_top=2, correction=True),
    ),
}


def attention_of(c: Config) -> str:
    """The kind of attention, as `launch.tp_attention` calls it."""
    if c.latent is not None:
        return "mla"
    return "mha" if c.kv_heads == c.heads else "mqa" if c.kv_heads == 1 else "gqa"


def entries_by_rank(c: Config, ranks: int) -> list[int]:
    """How many entries each rank's cache keeps of a token: the key/value heads that its query heads read, or the whole latent.

    Raises ValueError for more ranks than heads.
    """
    cut = even(c.heads, ranks, "heads")
    if c.latent is not None:
        return [cache_entries(c)] * ranks
    return [cache_entries(c) // c.kv_heads * n for n in covering(cut, c.heads // c.kv_heads).sizes]
