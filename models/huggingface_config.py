"""config.json of a Hugging Face model -> our Config, by the defaults of transformers 5. What we cannot do is refused."""

from __future__ import annotations

from math import log

from layers.rope import Linear, Llama3, Rope, Scaling, Yarn
from models.config import Config, Experts, Latent
from models.settings import Settings

# What transformers' classes have where config.json says nothing.
_DEFAULTS: dict[str, dict[str, float | int | None]] = {
    "llama": {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "qwen2": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
    },
    "qwen3": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    "mixtral": {
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
    "deepseek_v2": {"vocab_size": 102400, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "deepseek_v3": {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "max_position_embeddings": 4096,
    },
}
_COMMON = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
FAMILIES = ("gpt2", *_DEFAULTS)


def config_of(values: dict, where: str) -> tuple[str, Config]:
    """The family and the Config of a config.json at `where`. Raises ModelError for what is unknown or not supported."""
    s = Settings(values, where)
    family = s.get("model_type")
    if family not in FAMILIES:
        raise s.refuse("model_type", f"unknown family, use one of {', '.join(FAMILIES)}")
    if s.get("quantization_config") is not None:
        raise s.refuse("quantization_config", "not supported, use the weights in float32, float16 or bfloat16")
    if family == "gpt2":
        return family, _gpt2(s)
    defaults = _COMMON | _DEFAULTS[family]
    return family, (_deepseek if family.startswith("deepseek") else _llama)(s, family, defaults)


def _gpt2(s: Settings) -> Config:
    s.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    s.only("scale_attn_weights", True)
    s.only("scale_attn_by_inverse_layer_idx", False)
    s.only("add_cross_attention", False)
    D, heads, context = s.size("n_embd", 768), s.size("n_head", 12), s.size("n_positions", 1024)
    if D % heads:
        raise s.refuse("n_head", f"use a divisor of n_embd, {D}")
    return Config(
        s.size("vocab_size", 50257),
        D,
        s.size("n_layer", 12),
        heads,
        heads,
        s.size("n_inner", None) or 4 * D,
        context,
        activation="gelu",
        norm="layer",
        eps=s.number("layer_norm_epsilon", 1e-5),
        bias=True,
        bias_out=True,
        bias_mlp=True,
        tied=s.flag("tie_word_embeddings", True),
        positions=context,
    )


def _sizes(s: Settings, defaults: dict) -> dict[str, int | float | bool]:
    """What all but GPT-2 call alike."""
    s.only("hidden_act", "silu", "swish")
    sizes = {
        "vocabulary": "vocab_size",
        "d_model": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "context": "max_position_embeddings",
    }
    found: dict = {ours: s.size(theirs, defaults[theirs]) for ours, theirs in sizes.items()}
    return found | {"eps": s.number("rms_norm_eps", defaults["rms_norm_eps"]), "tied": s.flag("tie_word_embeddings", False)}


def _optional(s: Settings, key: str, defaults: dict) -> int | None:
    """A size that may also be null."""
    return None if s.get(key, defaults[key]) is None else s.size(key, defaults[key])


def _llama(s: Settings, family: str, defaults: dict) -> Config:
    sizes = _sizes(s, defaults)
    D, H = sizes["d_model"], sizes["heads"]
    K, E = _optional(s, "num_key_value_heads", defaults) or H, _optional(s, "head_dim", defaults)
    if H % K:
        raise s.refuse("num_key_value_heads", f"use a divisor of num_attention_heads, {H}")
    if E is None and D % H:
        raise s.refuse("num_attention_heads", f"use a divisor of hidden_size, {D}, or give head_dim")
    _no_sliding_window(s, family, sizes["layers"], sizes["context"])
    bias = s.flag("attention_bias", False) if family in ("llama", "qwen3") else False
    experts = None
    if family == "mixtral":
        count = s.size("num_local_experts", 8)
        experts = Experts(count, s.size("num_experts_per_tok", 2, most=count), sizes["d_ff"])
    return Config(
        **sizes,
        kv_heads=K,
        d_head=E,
        bias=bias or family == "qwen2",
        bias_out=bias,
        bias_mlp=s.flag("mlp_bias", False) if family == "llama" else False,
        qk_norm=family == "qwen3",
        rope=_rope(s, E or D // H, sizes["context"], defaults["rope_theta"], "half"),
        experts=experts,
    )


def _no_sliding_window(s: Settings, family: str, layers: int, context: int) -> None:
    """Raises ModelError where some layer sees less than the whole context."""
    if family == "mixtral":
        window, of_layers = s.size("sliding_window", None), layers
    elif family in ("qwen2", "qwen3") and s.flag("use_sliding_window", False):
        window = _optional(s, "sliding_window", {"sliding_window": 4096})
        kinds = s.get("layer_types")
        first = s.size("max_window_layers", 28, least=0)
        of_layers = layers - first if not isinstance(kinds, list) else sum(kind != "full_attention" for kind in kinds)
    else:
        return
    if window is not None and window < context and of_layers > 0:
        raise s.refuse("sliding_window", f"not supported, use one of max_position_embeddings, {context}, or more, or null")


def _deepseek(s: Settings, family: str, defaults: dict) -> Config:
    sizes = _sizes(s, defaults)
    s.only("attention_bias", False)
    s.only("mlp_bias", False)
    heads = sizes["heads"]
    if s.size("num_key_value_heads", None) not in (None, heads):
        raise s.refuse("num_key_value_heads", f"latent attention has as many as num_attention_heads, {heads}")
    latent = Latent(
        s.size("kv_lora_rank", 512),
        s.size("qk_nope_head_dim", 128),
        s.size("qk_rope_head_dim", 64),
        s.size("v_head_dim", 128),
        _optional(s, "q_lora_rank", {"q_lora_rank": 1536}) or 0,
        # Of these two norms transformers, and DeepSeek's own code, have 1e-6 whatever rms_norm_eps is.
        eps=1e-6,
    )
    pairing = "interleaved" if family == "deepseek_v2" or s.flag("rope_interleave", True) else "half"
    return Config(
        **sizes,
        kv_heads=heads,
        rope=_rope(s, latent.d_rope, sizes["context"], defaults["rope_theta"], pairing, latent=True),
        latent=latent,
        experts=_deepseek_experts(s, family, sizes["layers"]),
    )


def _deepseek_experts(s: Settings, family: str, layers: int) -> Experts | None:
    v3 = family == "deepseek_v3"
    count, first = _optional(s, "n_routed_experts", {"n_routed_experts": 256 if v3 else 64}), 3 if v3 else 0
    first = s.size("first_k_dense_replace", first, least=0)
    if count is None or first >= layers:
        return None
    s.only("moe_layer_freq", 1)
    s.only("scoring_func", "sigmoid" if v3 else "softmax")
    method = s.only("topk_method", "noaux_tc") if v3 else s.only("topk_method", "greedy", "group_limited_greedy", None)
    if not v3 and s.flag("norm_topk_prob", False):
        # DeepSeek's code then does not scale, vLLM and llama.cpp scale all the same, transformers does not divide.
        raise s.refuse("norm_topk_prob", "not supported for deepseek_v2, whose implementations disagree on it: use false")
    grouped = v3 or method == "group_limited_greedy"
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


def _rope(s: Settings, width: int, context: int, base: float, pairing: str, latent: bool = False) -> Rope:
    """What rotates, from `rope_parameters` (transformers 5) or from `rope_scaling` and `rope_theta` (before)."""
    key = "rope_scaling" if s.get("rope_scaling") else "rope_parameters"
    values = s.get(key) or {}
    if not isinstance(values, dict) or any(isinstance(v, dict) for v in values.values()):
        raise s.refuse(key, "not supported, only one set of parameters for all layers is")
    # What stands outside serves where the inside says nothing.
    outside = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    r = Settings({k: s.get(k) for k in outside if s.get(k) is not None} | values, f"{s.where}: {key}")
    kind = r.get("rope_type") or r.get("type") or "default"
    r.only("partial_rotary_factor", 1.0)
    base = r.number("rope_theta", base, least=1.0)
    original = r.size("original_max_position_embeddings", context)
    scaling: Scaling | None = None
    if kind == "linear":
        scaling = Linear(r.number("factor", least=1.0))
    elif kind == "llama3":
        factors = [r.number(k) for k in ("factor", "low_freq_factor", "high_freq_factor")]
        scaling = Llama3(*factors, original)
    elif kind == "yarn":
        scaling = _yarn(r, context, original, latent)
    elif kind != "default":
        raise r.refuse("rope_type" if r.get("rope_type") else "type", "not supported, use default, linear, llama3 or yarn")
    return Rope(s.rotated("qk_rope_head_dim" if latent else "head_dim", width), base, pairing, scaling)


def _yarn(r: Settings, context: int, original: int, latent: bool) -> Yarn:
    """Yarn's two corrections. That of cos and sin: attention_factor, or of mscale and mscale_all_dim if both are given, or 0.1
    ln(factor) + 1. That of the softmax, by mscale_all_dim, is in DeepSeek's attention only."""
    factor = r.number("factor", None, least=1.0) or max(1.0, context / original)
    mscale, everywhere = r.number("mscale", None) or 0.0, r.number("mscale_all_dim", None) or 0.0
    table = r.number("attention_factor", None)
    if table is None:
        of, by = (mscale, everywhere) if mscale and everywhere else (1.0, 0.0)
        table = (0.1 * of * log(factor) + 1) / (0.1 * by * log(factor) + 1)
    return Yarn(
        factor,
        original,
        r.number("beta_fast", None) or 32.0,
        r.number("beta_slow", None) or 1.0,
        mscale_all_dim=everywhere if latent else 0.0,
        attention_factor=table,
        truncate=r.get("truncate", True) is not False,
    )
