"""DeepSeek-V2 (arXiv 2405.04434) and DeepSeek-V3 (arXiv 2412.19437): latent attention, and experts chosen group by group."""

from __future__ import annotations

import re
from functools import partial

from models import config_json, gguf_keys
from models.config import Config, Experts, Latent
from models.families import llama
from models.family import Family, ModelType
from models.settings import Settings

V2 = config_json.DEFAULTS | {"vocab_size": 102400, "intermediate_size": 11008, "max_position_embeddings": 2048}
V3 = config_json.DEFAULTS | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "max_position_embeddings": 4096,
}
BLOCK = llama.BLOCK | {
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_an": "self_attn.kv_a_layernorm.weight",
    "kv_b": "self_attn.kv_b_proj.weight",
    "q_a": "self_attn.q_a_proj.weight",
    "q_an": "self_attn.q_a_layernorm.weight",
    "q_b": "self_attn.q_b_proj.weight",
    "router": "mlp.gate.weight",
    "correction": "mlp.gate.e_score_correction_bias",
    "x_gate": "mlp.experts.{x}.gate_proj.weight",
    "x_up": "mlp.experts.{x}.up_proj.weight",
    "x_down": "mlp.experts.{x}.down_proj.weight",
    "s_gate": "mlp.shared_experts.gate_proj.weight",
    "s_up": "mlp.shared_experts.up_proj.weight",
    "s_down": "mlp.shared_experts.down_proj.weight",
}

# What a model without experts says of them all the same.
ROUTING = (
    *("moe_layer_freq", "scoring_func", "topk_method", "norm_topk_prob", "n_group", "topk_group", "moe_intermediate_size"),
    *("num_experts_per_tok", "n_shared_experts", "routed_scaling_factor"),
)


def _config(s: Settings, v3: bool) -> Config:
    defaults = V3 if v3 else V2
    s.only("hidden_act", *config_json.ACTIVATIONS["swiglu"])
    sizes = config_json.sizes(s, defaults)
    s.only("attention_bias", False)
    s.only("mlp_bias", False)
    heads = sizes["heads"]
    # They follow from others.
    s.pass_over("head_dim", "qk_head_dim")
    if s.size("num_key_value_heads", None) not in (None, heads):
        raise s.refuse("num_key_value_heads", f"latent attention has as many as num_attention_heads, {heads}")
    latent = Latent(
        s.size("kv_lora_rank", 512),
        s.size("qk_nope_head_dim", 128),
        s.size("qk_rope_head_dim", 64),
        s.size("v_head_dim", 128),
        config_json.optional(s, "q_lora_rank", {"q_lora_rank": 1536}) or 0,
        # Of these two norms transformers, and DeepSeek's own code, have 1e-6 whatever rms_norm_eps is.
        eps=1e-6,
    )
    pairing = "interleaved" if not v3 or s.flag("rope_interleave", True) else "half"
    rope = config_json.rope(s, latent.d_rope, sizes["context"], defaults, pairing, "qk_rope_head_dim", softmax=True)
    sizes["context"] = max(sizes["context"], rope.reach)
    return Config(**sizes, kv_heads=heads, rope=rope, latent=latent, experts=_experts(s, v3, sizes["layers"]))


def _experts(s: Settings, v3: bool, layers: int) -> Experts | None:
    count = config_json.optional(s, "n_routed_experts", {"n_routed_experts": 256 if v3 else 64})
    first = s.size("first_k_dense_replace", 3 if v3 else 0, least=0)
    if count is None or first >= layers:
        s.pass_over(*ROUTING)
        return None
    s.only("moe_layer_freq", 1)
    s.only("scoring_func", "sigmoid" if v3 else "softmax")
    method = s.only("topk_method", "noaux_tc") if v3 else s.only("topk_method", "greedy", "group_limited_greedy", None)
    if not v3 and s.flag("norm_topk_prob", False):
        # DeepSeek's code then does not scale, vLLM and llama.cpp scale all the same, transformers does not divide.
        raise s.refuse("norm_topk_prob", "not supported for deepseek_v2, whose implementations disagree on it: use false")
    grouped = v3 or method == "group_limited_greedy"
    s.pass_over("n_group", "topk_group")
    groups = s.size("n_group", 8 if v3 else ..., most=count) if grouped else 1
    if count % groups:
        raise s.refuse("n_group", f"use a divisor of n_routed_experts, {count}")
    active_groups = s.size("topk_group", 4 if v3 else ..., most=groups) if grouped else 1
    width = s.size("moe_intermediate_size", 2048 if v3 else 1407)
    return Experts(
        count,
        s.size("num_experts_per_tok", 8 if v3 else ..., most=active_groups * count // groups),
        width,
        d_shared=width * s.size("n_shared_experts", 1 if v3 else 2, least=0),
        first=first,
        scoring="sigmoid" if v3 else "softmax",
        normed=v3 and s.flag("norm_topk_prob", True),
        scale=s.number("routed_scaling_factor", 2.5 if v3 else 1.0),
        groups=groups,
        active_groups=active_groups,
        # A group is worth the sum of its two best scores in V3, its best one in V2.
        group_top=min(2, count // groups) if v3 else 1,
        correction=v3,
    )


def _harmless3(name: str, config: Config) -> bool:
    """V3's modules that predict further tokens stand behind the last layer; the model itself does without."""
    block = re.match(r"model\.layers\.(\d+)\.", name)
    return (block is not None and int(block[1]) >= config.layers) or llama.harmless(name, config)


def _latent(s: Settings) -> Latent:
    # A file with the keys of the first line has, in those of the second, the widths of the absorbed form.
    wide, value = s.size("attention.key_length_mla", None), s.size("attention.value_length_mla", None)
    absorbed = s.size("attention.key_length"), s.size("attention.value_length")
    wide, value = wide or absorbed[0], value or absorbed[1]
    C, R = s.size("attention.kv_lora_rank"), s.size("rope.dimension_count", most=wide - 1)
    return Latent(C, wide - R, R, value, s.size("attention.q_lora_rank", None) or 0)


_NAMES = partial(llama.names, block=BLOCK)
FAMILY = Family(
    {
        "deepseek_v2": ModelType(partial(_config, v3=False), _NAMES, llama.harmless),
        "deepseek_v3": ModelType(partial(_config, v3=True), _NAMES, _harmless3),
    },
    {"deepseek2": partial(gguf_keys.config_of, pairing="interleaved", latent_of=_latent)},
)
