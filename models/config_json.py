"""What families have in common in config.json, by the defaults of transformers 5. What we cannot do is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import log

from layers.rope import Linear, Llama3, Rope, Scaling, Yarn
from models.config import Config
from models.settings import Settings

Defaults = dict[str, float | int | None]
# What transformers' classes have where config.json says nothing. A family adds its own.
DEFAULTS: Defaults = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
# Keys that say how a model was trained, made or saved, what it is called, or what a tokenizer or a task does with it.
IDLE = frozenset(
    [
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_pdrop",
        "auto_map",
        "aux_loss_alpha",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "dtype",
        "embd_pdrop",
        "embedding_dropout",
        "eos_token_id",
        "ep_size",
        "finetuning_task",
        "gradient_checkpointing",
        "hidden_dropout",
        "hidden_dropout_prob",
        "id2label",
        "initializer_range",
        "label2id",
        "language",
        "max_length",
        "mlp_dropout",
        "model_type",
        "n_ctx",
        "num_labels",
        "num_nextn_predict_layers",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "reorder_and_upcast_attn",
        "resid_pdrop",
        "residual_dropout",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "seq_aux",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    ]
)
# What transformers calls our activations; the first is the default.
ACTIVATIONS = {"swiglu": ("silu", "swish"), "gelu": ("gelu_new", "gelu_pytorch_tanh")}


def sizes(s: Settings, defaults: Defaults) -> dict[str, int | float | bool]:
    """The settings that all but GPT-2 call alike, by their names in Config."""
    names = {
        "vocabulary": "vocab_size",
        "d_model": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "context": "max_position_embeddings",
    }
    values: dict = {ours: s.size(theirs, defaults[theirs]) for ours, theirs in names.items()}
    return values | {
        "eps": s.number("rms_norm_eps", defaults["rms_norm_eps"]),
        "tied": s.flag("tie_word_embeddings", bool(defaults.get("tie_word_embeddings"))),
    }


def settings_of(c: Config) -> dict:
    """What config.json says of a model with Llama's settings; the other way round than `config_of`."""
    rotated = c.rope or Rope(2)
    return {
        "vocab_size": c.vocabulary,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.d_head or c.d_model // c.heads,
        "intermediate_size": c.d_ff,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.eps,
        "hidden_act": ACTIVATIONS["swiglu"][0],
        "tie_word_embeddings": c.tied,
        "rope_parameters": {"rope_theta": rotated.base} | _scaling(rotated.scaling),
    }


def _scaling(scaling: Scaling | None) -> dict:
    """The parameters of a scaling of rotary frequencies; the plain ones where no parameters say it."""
    if isinstance(scaling, Linear):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3):
        factors = {name: getattr(scaling, name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        return {"rope_type": "llama3", **factors, "original_max_position_embeddings": scaling.original}
    if isinstance(scaling, Yarn):
        names = ("factor", "beta_fast", "beta_slow", "truncate")
        more = {"original_max_position_embeddings": scaling.original, "attention_factor": scaling.table_factor}
        return {"rope_type": "yarn", **{name: getattr(scaling, name) for name in names}, **more}
    return {"rope_type": "default"}


def optional(s: Settings, key: str, defaults: Defaults) -> int | None:
    """A size that may also be null."""
    return None if s.get(key, defaults[key]) is None else s.size(key, defaults[key])


def config_of(s: Settings, defaults: Defaults, activation: str = "swiglu") -> Config:
    """The Config of a model with Llama's settings, and no biases: key/value heads, RMS norms, rotation of halves of a head."""
    s.only("hidden_act", *ACTIVATIONS[activation])
    own = sizes(s, defaults)
    D, H = own["d_model"], own["heads"]
    K, E = optional(s, "num_key_value_heads", defaults) or H, optional(s, "head_dim", defaults)
    if H % K:
        raise s.refuse("num_key_value_heads", f"use a divisor of num_attention_heads, {H}")
    if E is None and D % H:
        raise s.refuse("num_attention_heads", f"use a divisor of hidden_size, {D}, or give head_dim")
    turned = rope(s, E or D // H, own["context"], defaults)
    return Config(
        **own | {"context": max(own["context"], turned.reach)}, kv_heads=K, d_head=E, activation=activation, rope=turned
    )


def windowed(c: Config, window: int | None, layers: Iterable[bool] = ()) -> Config:
    """With a window of attention in those of the layers that have one, by default all. One of the whole context is none."""
    if window is None or window >= c.context:
        return c
    which = list(layers) or [True] * c.layers
    return replace(c, windows=tuple(window if has else 0 for has in which)) if any(which) else c


def layer_types(s: Settings, layers: int, otherwise: Callable[[int], bool]) -> list[bool]:
    """Which layers attend within a window, by `layer_types`, or where that is not given by `otherwise`."""
    kinds = s.get("layer_types")
    if kinds is None:
        return [otherwise(i) for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) < layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise s.refuse("layer_types", f"use full_attention or sliding_attention for each of {layers} layers")
    return [kind == "sliding_attention" for kind in kinds[:layers]]


def rope(
    s: Settings,
    width: int,
    context: int,
    defaults: Defaults,
    pairing: str = "half",
    width_key: str = "head_dim",
    softmax: bool = False,
) -> Rope:
    """What rotates, from `rope_parameters` (transformers 5) or from `rope_scaling` and `rope_theta` (before).

    `width_key`: the setting that `width` is from. `softmax`: whether yarn corrects the scale of the scores as well.
    """
    key = "rope_scaling" if s.get("rope_scaling") else "rope_parameters"
    values = s.get(key) or {}
    if not isinstance(values, dict) or any(isinstance(v, dict) for v in values.values()):
        raise s.refuse(key, "not supported, only one set of parameters for all layers is")
    # What stands outside serves where the inside says nothing.
    outside = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    r = s.part({k: s.get(k) for k in outside if s.get(k) is not None} | values, key)
    r.get("type")
    kind = r.get("rope_type") or r.get("type") or "default"
    r.only("partial_rotary_factor", 1.0)
    base = r.number("rope_theta", defaults["rope_theta"], least=1.0)
    original = r.size("original_max_position_embeddings", context)
    scaling: Scaling | None = None
    if kind == "linear":
        scaling = Linear(r.number("factor", least=1.0))
    elif kind == "llama3":
        factors = [r.number(k, least=1e-6) for k in ("factor", "low_freq_factor", "high_freq_factor")]
        if factors[1] >= factors[2]:
            raise r.refuse("low_freq_factor", f"use less than high_freq_factor, {factors[2]:g}")
        scaling = Llama3(*factors, original)
    elif kind == "yarn":
        scaling = _yarn(r, context, original, softmax)
    elif kind != "default":
        raise r.refuse("rope_type" if r.get("rope_type") else "type", "not supported, use default, linear, llama3 or yarn")
    return Rope(s.rotated(width_key, width), base, pairing, scaling)


def _yarn(r: Settings, context: int, original: int, softmax: bool) -> Yarn:
    """Yarn with its two corrections. That of cos and sin is attention_factor; without it, what mscale and mscale_all_dim say
    together; without both of them, 0.1 ln(factor) + 1. That of the softmax is what mscale_all_dim says."""
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
        mscale_all_dim=everywhere if softmax else 0.0,
        attention_factor=table,
        truncate=r.get("truncate", True) is not False,
    )
