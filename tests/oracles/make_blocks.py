"""Make blocks.npz: transformer blocks of GPT-2 (multi-head), Llama 3.1 (grouped-query) and DeepSeek-V3 (latent), by PyTorch.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/oracles/make_blocks.py

The blocks are those of Transformers, in float64, with small random weights, run over each sequence by itself; gradients are of
sum(dy * y). Two things in them are float32 whatever the dtype and are replaced: RMS norms by torch.nn.RMSNorm, and the tables
of cos and sin by the same formulas in float64. Weights are stored by our names, (in, out) and by heads.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import DeepseekV3Config, GPT2Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

LENGTHS = (1, 4, 11)
D, F = 12, 10


def tables(config, kind, tokens):
    """cos and sin of positions 0 to tokens - 1, each frequency twice, in float64."""
    single, torch.float = torch.float, torch.float64
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    torch.float = single
    angles = torch.outer(torch.arange(tokens, dtype=torch.float64), frequencies.double()).repeat(1, 2)[None]
    return factor * angles.cos(), factor * angles.sin()


def in_float64(norm):
    other = torch.nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon)
    other.weight = norm.weight
    return other


def gpt2():
    config = GPT2Config(n_embd=D, n_head=3, n_inner=F, attn_pdrop=0.0, resid_pdrop=0.0, attn_implementation="sdpa")
    block = GPT2Block(config, layer_idx=0)
    E = D // 3
    heads = lambda n: lambda t: t[..., n * D : (n + 1) * D].reshape(*t.shape[:-1], 3, E)  # noqa: E731
    names = {f"W{c}": ("attn.c_attn.weight", heads(n)) for n, c in enumerate("qkv")}
    names |= {f"b{c}": ("attn.c_attn.bias", heads(n)) for n, c in enumerate("qkv")}
    names |= {"Wo": ("attn.c_proj.weight", lambda t: t.reshape(3, E, D)), "bo": ("attn.c_proj.bias", lambda t: t)}
    for ours, theirs in {"n1": "ln_1", "n2": "ln_2", "1": "mlp.c_fc", "2": "mlp.c_proj"}.items():
        letter = "w" if ours[0] == "n" else "W"
        names |= {f"{letter}{ours}": (f"{theirs}.weight", lambda t: t), f"b{ours}": (f"{theirs}.bias", lambda t: t)}
    return block, names, lambda tokens: {}


def gated(names):
    """The norms and the gated MLP of the other two."""
    pair = lambda t: torch.stack([t["mlp.gate_proj.weight"].T, t["mlp.up_proj.weight"].T], dim=1)  # noqa: E731
    names |= {"wn1": ("input_layernorm.weight", lambda t: t), "wn2": ("post_attention_layernorm.weight", lambda t: t)}
    return names | {"W1": (None, pair), "W2": ("mlp.down_proj.weight", lambda t: t.T)}


def llama():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        hidden_size=D,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        intermediate_size=F,
        rope_parameters=scaling | {"original_max_position_embeddings": 64, "rope_theta": 500.0},
        attn_implementation="sdpa",
    )
    block = LlamaDecoderLayer(config, layer_idx=0)
    block.input_layernorm, block.post_attention_layernorm = map(
        in_float64, (block.input_layernorm, block.post_attention_layernorm)
    )
    heads = lambda n: lambda t: t.T.reshape(D, n, 8)  # noqa: E731
    names = {f"W{c}": (f"self_attn.{c}_proj.weight", heads(n)) for c, n in {"q": 6, "k": 3, "v": 3}.items()}
    names |= {"Wo": ("self_attn.o_proj.weight", lambda t: t.T.reshape(6, 8, D))}
    return block, gated(names), lambda tokens: {"position_embeddings": tables(config, "llama3", tokens)}


def deepseek():
    scaling = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 1.0, "mscale_all_dim": 0.7}
    config = DeepseekV3Config(
        hidden_size=D,
        num_attention_heads=3,
        num_key_value_heads=3,
        kv_lora_rank=7,
        q_lora_rank=5,
        qk_nope_head_dim=4,
        qk_rope_head_dim=6,
        v_head_dim=3,
        intermediate_size=F,
        first_k_dense_replace=1,
        max_position_embeddings=64,
        rope_parameters=scaling | {"original_max_position_embeddings": 16, "rope_theta": 100.0},
        attn_implementation="sdpa",
    )
    block = DeepseekV3DecoderLayer(config, layer_idx=0)
    block.input_layernorm, block.post_attention_layernorm = map(
        in_float64, (block.input_layernorm, block.post_attention_layernorm)
    )
    inner = block.self_attn
    inner.q_a_layernorm, inner.kv_a_layernorm = in_float64(inner.q_a_layernorm), in_float64(inner.kv_a_layernorm)
    names = {
        "Wdkv": ("self_attn.kv_a_proj_with_mqa.weight", lambda t: t.T[:, :7]),
        "Wkr": ("self_attn.kv_a_proj_with_mqa.weight", lambda t: t.T[:, 7:]),
        "wckv": ("self_attn.kv_a_layernorm.weight", lambda t: t),
        "Wukv": ("self_attn.kv_b_proj.weight", lambda t: t.T.reshape(7, 3, 7)),
        "Wdq": ("self_attn.q_a_proj.weight", lambda t: t.T),
        "wcq": ("self_attn.q_a_layernorm.weight", lambda t: t),
        "Wuq": ("self_attn.q_b_proj.weight", lambda t: t.T.reshape(5, 3, 10)),
        "Wo": ("self_attn.o_proj.weight", lambda t: t.T.reshape(3, 3, D)),
    }
    return block, gated(names), lambda tokens: {"position_embeddings": tables(config, "yarn", tokens)}


def main():
    stored = {"lengths": np.array(LENGTHS)}
    for name, make in {"gpt2": gpt2, "llama": llama, "deepseek": deepseek}.items():
        torch.manual_seed(0)
        block, names, told = make()
        block = block.double().eval()
        with torch.no_grad():
            for p in block.parameters():
                p.copy_(torch.randn_like(p) * (p.shape[0] ** -0.5 if p.ndim == 2 else 0.3) + (1.0 if p.ndim == 1 else 0.0))
        x = (2 * torch.randn(sum(LENGTHS), D, dtype=torch.float64)).requires_grad_()
        dy = torch.randn(sum(LENGTHS), D, dtype=torch.float64)
        y = torch.cat([block(part[None], **told(len(part)))[0] for part in x.split(LENGTHS)])
        y.backward(dy)
        parameters = dict(block.named_parameters())
        data = {n: p.detach() for n, p in parameters.items()}
        gradients = {n: p.grad for n, p in parameters.items()}
        of = lambda all_of, theirs, turn: turn(all_of if theirs is None else all_of[theirs]).numpy()  # noqa: E731
        stored |= {f"{name}.x": x.detach().numpy(), f"{name}.dy": dy.numpy(), f"{name}.y": y.detach().numpy()}
        stored[f"{name}.dx"] = x.grad.numpy()
        for ours, (theirs, turn) in names.items():
            stored |= {f"{name}.{ours}": of(data, theirs, turn), f"{name}.d{ours}": of(gradients, theirs, turn)}
    np.savez_compressed(Path(__file__).with_name("blocks.npz"), **stored)


if __name__ == "__main__":
    main()
