"""Transformers' own generate on the same weights, for `launch.bench decode --peer torch`; only this needs both."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import torch
from mpi4py import MPI
from transformers import LlamaConfig, LlamaForCausalLM

from models.build import build
from models.source import Source
from parallel.mesh import Mesh


class Peer:
    """A Llama with the weights of `source`, on `threads` threads."""

    def __init__(self, source: Source, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        c = source.config
        config = LlamaConfig(
            vocab_size=c.vocabulary,
            hidden_size=c.d_model,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            intermediate_size=c.d_ff,
            max_position_embeddings=c.context,
            rms_norm_eps=c.eps,
            tie_word_embeddings=c.tied,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope.base},
            attn_implementation="sdpa",
            eos_token_id=None,
            pad_token_id=0,
        )
        self.model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
        tp = Mesh(MPI.COMM_SELF, tp=1).tp
        ours = {p.name: p.data for p in build(c, tp, source.weights(dtype)).parameters}
        self.model.load_state_dict(self._named(ours, c.rope.pairing == "interleaved"), strict=False)
        self.model.tie_weights()

    @staticmethod
    def _named(ours: dict[str, np.ndarray], interleaved: bool) -> dict[str, torch.Tensor]:
        """By Transformers' names, queries and keys in half-split order."""

        def heads(W: np.ndarray, turn: bool) -> np.ndarray:
            E = W.shape[-1]
            order = np.concatenate([np.arange(0, E, 2), np.arange(1, E, 2)]) if turn else np.arange(E)
            return W[..., order].reshape(len(W), -1).T

        named = {"model.embed_tokens.weight": ours["Wte"], "model.norm.weight": ours["wnf"]}
        if "Whead" in ours:
            named["lm_head.weight"] = ours["Whead"].T
        i = 0
        while f"blocks.{i}.Wq" in ours:
            W = {name: ours[f"blocks.{i}.{name}"] for name in ("wn1", "wn2", "Wq", "Wk", "Wv", "Wo", "W1", "W2")}
            named |= {
                f"model.layers.{i}.{name}.weight": a
                for name, a in {
                    "input_layernorm": W["wn1"],
                    "post_attention_layernorm": W["wn2"],
                    "self_attn.q_proj": heads(W["Wq"], interleaved),
                    "self_attn.k_proj": heads(W["Wk"], interleaved),
                    "self_attn.v_proj": heads(W["Wv"], False),
                    "self_attn.o_proj": W["Wo"].reshape(-1, W["Wo"].shape[-1]).T,
                    "mlp.gate_proj": W["W1"][:, 0].T,
                    "mlp.up_proj": W["W1"][:, 1].T,
                    "mlp.down_proj": W["W2"].T,
                }.items()
            }
            i += 1
        return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in named.items()}

    def seconds_per_token(self, prompt: list[int], expected: list[int]) -> float:
        """Of greedy decoding with its cache, without prefill. Raises AssertionError if its tokens are not `expected`: a ratio
        would mean nothing then."""
        times = []
        for many in (1, len(expected)):
            begun = perf_counter()
            with torch.inference_mode():
                ids = torch.tensor([prompt])
                out = self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=many, min_new_tokens=many, do_sample=False
                )
            times.append(perf_counter() - begun)
        got = out[0, len(prompt) :].tolist()
        assert got == expected, f"Transformers makes {got[:8]}..., we {expected[:8]}..."
        return (times[1] - times[0]) / (len(expected) - 1)
