"""GGUF's keys and tensor names, which are the same for all families, led by an architecture's own name
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import log

from layers.rope import Divided, Linear, Rope, Scaling, Yarn
from models.config import Config, Experts, Latent
from models.piece import ModelError, Tensors
from models.roles import Names, Shapes, by_role
from models.settings import Settings

BLOCK = {
    "n1": "attn_norm.weight",
    "qkv": "attn_qkv.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "qn": "attn_q_norm.weight",
    "kn": "attn_k_norm.weight",
    "o": "attn_output.weight",
    "n2": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "kv_a": "attn_kv_a_mqa.weight",
    "kv_an": "attn_kv_a_norm.weight",
    "kv_b": "attn_kv_b.weight",
    "k_b": "attn_k_b.weight",
    "v_b": "attn_v_b.weight",
    "q_a": "attn_q_a.weight",
    "q_an": "attn_q_a_norm.weight",
    "q_b": "attn_q_b.weight",
    "router": "ffn_gate_inp.weight",
    "correction": "exp_probs_b.bias",
    "x_gate": "ffn_gate_exps.weight",
    "x_up": "ffn_up_exps.weight",
    "x_down": "ffn_down_exps.weight",
    "s_gate": "ffn_gate_shexp.weight",
    "s_up": "ffn_up_shexp.weight",
    "s_down": "ffn_down_shexp.weight",
}


ENDS = {"wte": "token_embd.weight", "wpe": "position_embd.weight", "nf": "output_norm.weight", "head": "output.weight"}
# What each rotary frequency is divided by (Llama 3.1).
DIVISORS = "rope_freqs.weight"
# Keys without consequence for what a model computes: the tensors say it, or it is about training, pooling or encoders.
IDLE = (
    *("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "pooling_type", "decoder_start_token_id"),
    *("features_length", "embedding_length_out", "expert_chunk_feed_forward_length"),
)
# Keys that change nothing at these values, which some converters write.
NEUTRAL = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attention.sliding_window": 0,
    "attn_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "expert_group_scale": 1.0,
    "final_logit_softcapping": 0.0,
    "interleave_moe_layer_step": 1,
    "logit_scale": 1.0,
    "moe_every_n_layers": 1,
    "nextn_predict_layers": 0,
    "residual_scale": 1.0,
    "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "router_logit_softcapping": 0.0,
    "use_parallel_residual": True,
}


def names(there: Shapes) -> Names:
    """The tensors' names by role, in the form of those that are there."""
    qkv, kv_b = (any(name.endswith(BLOCK[role]) for name in there) for role in ("qkv", "kv_b"))
    dropped = {*(("q", "k", "v") if qkv else ("qkv",)), *(("k_b", "v_b") if kv_b else ("kv_b",))}
    return by_role("blk", {role: name for role, name in BLOCK.items() if role not in dropped}, ENDS)


def config_of(
    s: Settings,
    tensors: Tensors,
    pairing: str | None = "half",
    norm: str = "rms",
    latent_of: Callable[[Settings], Latent] | None = None,
    **own: object,
) -> Config:
    """The Config that the keys and the tensors' shapes describe, with a bias wherever there is a tensor of one.

    `pairing`: how the file's weights are rotated, or None for a family that does not rotate. `norm`: the family's kind.
    `latent_of`: reads the sizes of latent attention, which is stored as one key/value head, the latent itself. `own`: fields of
    Config that the family has whatever the file says.
    """
    there = tensors.shapes
    D, H, context = s.size("embedding_length"), s.size("attention.head_count"), s.size("context_length")
    layers, d_ff = s.size("block_count"), s.size("feed_forward_length")
    if D % H and s.get("attention.key_length") is None:
        raise s.refuse("attention.head_count", f"use a divisor of embedding_length, {D}, or give attention.key_length")
    latent = None if latent_of is None else latent_of(s)
    if latent is None:
        E = width = s.size("attention.key_length", D // H)
        s.only("attention.value_length", E)
    else:
        E, width = None, latent.d_rope
    K = s.size("attention.head_count_kv", H)
    K = K if latent is None else H
    if H % K:
        raise s.refuse("attention.head_count_kv", f"use a divisor of attention.head_count, {H}")
    rope = None if pairing is None else _rope(s, tensors, width, pairing, latent is not None)
    c = Config(
        *(there[ENDS["wte"]][0], D, layers, H, K, d_ff, context if rope is None else max(context, rope.reach), E),
        norm=norm,
        eps=s.number("attention.layer_norm_rms_epsilon" if norm == "rms" else "attention.layer_norm_epsilon"),
        bias="blk.0.attn_q.bias" in there,
        bias_out="blk.0.attn_output.bias" in there,
        bias_mlp="blk.0.ffn_down.bias" in there,
        tied=ENDS["head"] not in there,
        rope=rope,
        latent=latent,
        experts=_experts(s, there, d_ff, layers, latent is not None),
    )
    return replace(c, **own)


def _experts(s: Settings, there: Shapes, d_ff: int, layers: int, latent: bool) -> Experts | None:
    count, first = s.size("expert_count", 0, least=0), s.size("leading_dense_block_count", 0, least=0)
    width = s.size("expert_feed_forward_length", d_ff)
    shared = width * s.size("expert_shared_count", 0, least=0)
    s.only("nextn_predict_layers", 0)
    if not count or first >= layers:
        s.get("expert_used_count")
        return None
    groups = s.size("expert_group_count", 1, most=count)
    if count % groups:
        raise s.refuse("expert_group_count", f"use a divisor of expert_count, {count}")
    active_groups = s.size("expert_group_used_count", 1, most=groups)
    active = s.size("expert_used_count", most=active_groups * count // groups)
    # 1 is softmax, also where nothing is said; 2 is sigmoid.
    sigmoid = s.only("expert_gating_func", 1, 2) == 2
    return Experts(
        count,
        active,
        width,
        shared,
        first,
        scoring="sigmoid" if sigmoid else "softmax",
        normed=s.flag("expert_weights_norm", not latent),
        scale=s.number("expert_weights_scale", 1.0) or 1.0,
        groups=groups,
        active_groups=active_groups,
        group_top=min(2, count // groups) if sigmoid else 1,
        correction=f"blk.{first}.exp_probs_b.bias" in there,
    )


def _rope(s: Settings, tensors: Tensors, width: int, pairing: str, latent: bool) -> Rope:
    s.only("rope.dimension_count", width)
    base, kind = s.number("rope.freq_base", 10000.0, least=1.0), s.only("rope.scaling.type", "none", "linear", "yarn")
    factor = s.number("rope.scaling.factor", 1.0, least=1.0)
    scaling: Scaling | None = None
    if kind == "linear":
        scaling = Linear(factor)
    elif kind == "yarn":
        scaling = _yarn(s, factor, latent)
    if DIVISORS in tensors.shapes:
        shape = tensors.shapes[DIVISORS]
        if kind != "none" or shape != (width // 2,):
            raise ModelError(
                f"{tensors.file(DIVISORS)}: tensor {DIVISORS!r} has shape {shape} beside rope.scaling.type {kind!r}, "
                f"use ({width // 2},) and 'none'"
            )
        scaling = Divided(tuple(tensors.read(DIVISORS, (slice(0, width // 2),)).tolist()))
    return Rope(s.rotated("rope.dimension_count", width), base, pairing, scaling)


def _yarn(s: Settings, factor: float, latent: bool) -> Yarn:
    """As llama.cpp has it: cos and sin times 0.1 ln(factor) + 1; in latent attention, the scores' scale times the square of
    yarn_log_multiplier ln(factor) + 1 instead, that multiplier being 0.1 mscale_all_dim."""
    original = s.size("rope.scaling.original_context_length")
    turns = s.number("rope.scaling.yarn_beta_fast", 32.0), s.number("rope.scaling.yarn_beta_slow", 1.0)
    if not latent:
        by = s.number("rope.scaling.attn_factor", 1.0)
        return Yarn(factor, original, *turns, attention_factor=None if by == 1 else by * (0.1 * log(factor) + 1))
    everywhere = 10 * s.number("rope.scaling.yarn_log_multiplier", 0.0)
    return Yarn(factor, original, *turns, mscale_all_dim=everywhere, attention_factor=1.0)
