"""config.json read as transformers reads it, and models' files that cannot be used."""

from math import log

import numpy as np
import pytest

from layers.rope import Divided, Linear, Llama3, Rope, Yarn
from models.open import open_model
from models.piece import ModelError
from tests.models.test_models import FAMILIES, add_tensor, edited, part, refused


def config_of(tmp_path, name, **changes):
    """The Config after changes of config.json, `...` for a key that goes."""
    return open_model(edited(tmp_path, name, changes)).config


def test_rope_is_read_from_new_and_old_keys(tmp_path):
    new = open_model(FAMILIES / "llama").config.rope
    assert (new.scaling, new.pairing) == (Llama3(8.0, 1.0, 4.0, 64), "half")
    np.testing.assert_array_equal(new.frequencies_P, Rope(6, 500.0, scaling=new.scaling).frequencies_P)
    old = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old |= {"original_max_position_embeddings": 64}
    read = config_of(tmp_path, "llama", rope_parameters=..., rope_scaling=old, rope_theta=500.0).rope
    np.testing.assert_array_equal(read.frequencies_P, new.frequencies_P)
    assert open_model(FAMILIES / "llama-tied-odd").config.rope.scaling == Linear(2.0)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("name", "more", "table", "scores"),
    [
        ("llama", {}, 0.1 * log(4) + 1, 1.0),
        ("llama", {"attention_factor": 1.3}, 1.3, 1.0),
        ("llama", {"mscale": 0.8, "mscale_all_dim": 0.5}, (0.08 * log(4) + 1) / (0.05 * log(4) + 1), 1.0),
        ("llama", {"mscale": 0.8}, 0.1 * log(4) + 1, 1.0),
        (
            "deepseek_v3",
            {"mscale": 0.8, "mscale_all_dim": 0.5},
            (0.08 * log(4) + 1) / (0.05 * log(4) + 1),
            (0.05 * log(4) + 1) ** 2,
        ),
        ("deepseek_v3", {"mscale_all_dim": 0.5}, 0.1 * log(4) + 1, (0.05 * log(4) + 1) ** 2),
    ],
)
def test_yarns_two_corrections(tmp_path, name, more, table, scores):
    """Those of transformers' _compute_yarn_parameters and, in DeepSeek's attention only, yarn_apply_mscale."""
    rope = config_of(tmp_path, name, rope_parameters=YARN | more).rope
    np.testing.assert_allclose([rope.scaling.table_factor, rope.softmax_factor], [table, scores], rtol=1e-15)


@pytest.mark.parametrize(
    ("truncate", "want"),
    [(True, [1, 0.8125, 0.625, 0.4375, 0.25]), (False, [1, 0.84269568, 0.55470245, 0.26670913, 0.25])],
)
def test_yarn_from_whole_pair_to_whole_pair_or_not(truncate, want):
    """Width 32, base 5000: the frequencies of transformers 5.23 over the plain ones."""
    scaled = Rope(32, 5000.0, scaling=Yarn(4.0, 16, 2.0, 0.5, truncate=truncate)).frequencies_P
    np.testing.assert_allclose((scaled / Rope(32, 5000.0).frequencies_P)[:5], want, rtol=2e-7)


def test_frequencies_divided_one_by_one():
    np.testing.assert_array_equal(Rope(4, 100.0, scaling=Divided((1.0, 8.0))).frequencies_P, [1.0, 0.0125])
    with pytest.raises(ValueError, match="cannot divide 3 frequencies by 2 factors"):
        Rope(6, scaling=Divided((1.0, 8.0)))


@pytest.mark.parametrize(
    ("name", "without", "ours", "default"),
    [
        ("gpt2", "layer_norm_epsilon", lambda c: c.eps, 1e-5),
        ("gpt2", "tie_word_embeddings", lambda c: c.tied, True),
        ("llama", "rms_norm_eps", lambda c: c.eps, 1e-6),
        ("llama", "tie_word_embeddings", lambda c: c.tied, False),
        ("llama", "max_position_embeddings", lambda c: c.context, 2048),
        ("mixtral", "rms_norm_eps", lambda c: c.eps, 1e-5),
        ("mixtral", "rope_parameters", lambda c: c.rope.frequencies_P[1], 1e-3),
        ("qwen2", "rope_parameters", lambda c: c.rope.frequencies_P[1], 1e-2),
        ("deepseek_v3", "norm_topk_prob", lambda c: c.experts.normed, True),
        ("deepseek_v3", "rope_interleave", lambda c: c.rope.pairing, "interleaved"),
        ("deepseek_v2", "routed_scaling_factor", lambda c: c.experts.scale, 1.0),
    ],
)
def test_what_is_not_said_is_as_transformers_has_it(tmp_path, name, without, ours, default):
    got = ours(config_of(tmp_path, name, **{without: ...}))
    assert got == (pytest.approx(default, rel=1e-15) if type(default) is float else default)


def test_a_window_that_sees_the_whole_context_is_none(tmp_path):
    config_of(tmp_path, "qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=0)


@pytest.mark.parametrize(
    ("name", "changes", "windows"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": ...}, (0, 8)),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}, (8, 8)),
        ("qwen3", {"sliding_window": 8}, ()),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, (8, 8)),
        ("mixtral", {"sliding_window": 8}, (8, 8)),
        ("mistral", {"sliding_window": None}, ()),
        ("mistral", {"sliding_window": ...}, ()),
        ("mistral", {"sliding_window": ..., "max_position_embeddings": 8192}, (4096, 4096)),
        ("smollm3", {"sliding_window": 8, "use_sliding_window": True, "layer_types": ...}, (0, 0, 0, 8)),
    ],
)
def test_which_layers_have_a_window(tmp_path, name, changes, windows):
    assert config_of(tmp_path, name, **changes).windows == windows


def test_which_layers_rotate_nothing(tmp_path):
    assert config_of(tmp_path / "a", "smollm3", no_rope_layers=..., no_rope_layer_interval=2).unrotated == (1, 3)
    assert config_of(tmp_path / "b", "smollm3", no_rope_layers=...).unrotated == (3,)


def test_half_pairs_of_deepseek_v3(tmp_path):
    assert config_of(tmp_path, "deepseek_v3", rope_interleave=False).rope.pairing == "half"


# --- what cannot be used


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        (
            "llama",
            {"model_type": "gemma"},
            "config.json: model_type is 'gemma': unknown family, use one of gpt2, llama, mistral, qwen2",
        ),
        ("llama", {"model_type": ...}, "model_type is not given: unknown family"),
        ("llama", {"model_type": ["llama"]}, "model_type is ['llama']: unknown family"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu': not supported: only 'silu' or 'swish' is"),
        ("llama", {"hidden_size": "12"}, "hidden_size is '12': use a whole number, 1 or more"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers is True: use a whole number"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads is 4: use a divisor of num_attention_heads, 6"),
        ("llama", {"head_dim": None, "hidden_size": 13}, "num_attention_heads is 6: use a divisor of hidden_size, 13"),
        ("llama", {"head_dim": 5}, "head_dim is 5: cannot rotate a width of 5, use an even one"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps is None: use a number"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no': use true or false"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}: not supported"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic"}},
            "rope_scaling: rope_type is 'dynamic': not supported, use default",
        ),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling is 'linear': not supported"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is not given: it has no default"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "rope_parameters is {'full_attention': {}}: not supported"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: not supported: only 1.0 is"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu': not supported: only 'gelu_new' or"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True: not supported"),
        ("gpt2", {"n_head": 5}, "n_head is 5: use a divisor of n_embd, 12"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types is ['full_attention']: use full_attention or"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2: not supported: only 1 is"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers is [1]: not supported, use only the first layers"),
        ("smollm3", {"no_rope_layers": [0, 1]}, "no_rope_layers is [0, 1]: use 1 (rotates) or 0 for each of 4 layers"),
        ("smollm3", {"layer_types": ["chunked_attention"] * 4}, "use full_attention or sliding_attention for each of 4 layers"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5: use a whole number, 1 to 4"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True: not supported for deepseek_v2"),
        ("deepseek_v2", {"topk_method": "other"}, "topk_method is 'other': not supported"),
        ("deepseek_v2", {"topk_group": 3}, "topk_group is 3: use a whole number, 1 to 2"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias is True: not supported"),
        ("deepseek_v3", {"n_group": 3}, "n_group is 3: use a divisor of n_routed_experts, 8"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5: use a whole number, 1 to 4"),
        ("deepseek_v3", {"num_key_value_heads": 1}, "latent attention has as many as num_attention_heads, 5"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2: not supported: only 1 is"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax': not supported: only 'sigmoid' is"),
    ],
)
def test_a_setting_that_we_do_not_have_is_refused(tmp_path, name, changes, text):
    assert text in refused(edited(tmp_path, name, changes))


def test_a_missing_a_surplus_and_a_misshapen_tensor_are_refused(tmp_path):
    down, q = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    text = refused(edited(tmp_path / "missing", "llama", drop=[down, q]))
    assert f"model: tensor {q!r} of shape (36, 12) is missing (and 1 more): a llama of 2 layers needs it" in text
    text = refused(edited(tmp_path / "surplus", "llama", tensors={"model.layers.2.mlp.up_proj.weight": np.ones((7, 12), "f4")}))
    assert "model.safetensors: tensor 'model.layers.2.mlp.up_proj.weight' has no place in a llama of 2 layers" in text
    text = refused(edited(tmp_path / "bias", "llama", tensors={"model.layers.0.self_attn.q_proj.bias": np.ones(36, "f4")}))
    assert "tensor 'model.layers.0.self_attn.q_proj.bias' has no place" in text
    text = refused(edited(tmp_path / "misshapen", "llama", tensors={down: np.ones((7, 12), "f4")}))
    assert f"model.safetensors: tensor {down!r} has shape (7, 12), the configuration wants (12, 7)" in text
    tied = {"lm_head.weight": np.ones((23, 15), "f4")}
    assert "'lm_head.weight' has shape (23, 15)" in refused(edited(tmp_path / "tied", "qwen2", tensors=tied))


@pytest.mark.parametrize(("family", "key"), [("llama", "num_hidden_layers"), ("mixtral", "num_local_experts")])
def test_far_more_than_there_is_is_missing(tmp_path, family, key):
    """And it is seen at once."""
    assert "is missing (and " in refused(edited(tmp_path, family, {key: 10**30}))


def test_a_stored_type_that_is_not_a_float_is_refused(tmp_path):
    folder = edited(tmp_path, "llama")
    add_tensor(folder, "model.norm.weight", "F8_E4M3", [12], bytes(12))
    assert "b.safetensors: tensor 'model.norm.weight' is stored as F8_E4M3, use one of F64, F32, F16, BF16" in refused(folder)


def test_files_that_are_not_there_or_broken_are_refused(tmp_path):
    assert "nowhere: no such file or folder" in refused(tmp_path / "nowhere")
    assert "no config.json and no .gguf file" in refused(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"x")
    assert "neither a folder nor a GGUF file" in refused(tmp_path / "a.bin")
    folder = edited(tmp_path, "llama")
    weights = folder / "model.safetensors"
    for cut in (0, 5, 100, -1):
        data = weights.read_bytes()
        weights.write_bytes(data[:cut])
        assert "model.safetensors: not a whole safetensors file: " in refused(folder)
        weights.write_bytes(data)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "b.safetensors"}}')
    assert "b.safetensors: no such file: model.safetensors.index.json names it" in refused(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"other": "model.safetensors"}}')
    assert "model.safetensors: tensor 'other' is missing, model.safetensors.index.json says that it is there" in refused(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    assert "weight_map is not the tensors' files by their names" in refused(folder)
    (folder / "model.safetensors.index.json").unlink()
    weights.unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refused(folder)
    for text, why in (("{", "config.json: not JSON: "), ("[]", "config.json: holds list, use an object")):
        (folder / "config.json").write_text(text)
        assert why in refused(folder)


def test_names_and_arrays_that_do_not_fit_are_refused():
    source = open_model(FAMILIES / "gpt2")
    with pytest.raises(ModelError, match=r"has no blocks\.0\.Wr of shape \(12, 4\)"):
        part(source, "blocks.0.Wr", (12, 4))
    with pytest.raises(ModelError, match=r"has no Wte of shape \(24, 12\)"):
        part(source, "Wte", (24, 12))
    with pytest.raises(ModelError, match="has no Whead"):
        source.exported({"Whead": np.ones(3)})
    with pytest.raises(
        ModelError, match=r"'transformer.h.0.attn.c_attn.weight' cannot be put together without blocks.0.Wk \(and 1"
    ):
        source.exported({"blocks.0.Wq": np.ones((12, 4, 3))})
