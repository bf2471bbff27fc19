"""The pre-norm transformer block: y = h + mlp(norm(h)), h = x + attention(norm(x)). Weights by name, as `reference.attention`
and the MLP have them, and the norms' wn1, bn1, wn2, bn2; without biases the norms are RMS norms."""

from __future__ import annotations

import numpy as np

from reference.attention import Options, attention, layer_norm, rms_norm
from reference.mlp import gelu, swiglu


def norm(W: dict, n: int, x: np.ndarray, eps: float) -> np.ndarray:
    if f"bn{n}" in W:
        return layer_norm(x, W[f"wn{n}"], W[f"bn{n}"], eps)
    return rms_norm(x, W[f"wn{n}"], eps)


def mlp(W: dict, x: np.ndarray) -> np.ndarray:
    """W1 (D, F): gelu. W1 (D, 2, F): swiglu, gate and up."""
    if len(W["W1"].shape) == 3:
        gate, up = (x @ W["W1"][:, i] + (W["b1"][i] if "b1" in W else 0.0) for i in range(2))
        z = swiglu(gate, up)
    else:
        z = gelu(x @ W["W1"] + W.get("b1", 0.0))
    return z @ W["W2"] + W.get("b2", 0.0)


def block(W: dict, o: Options, eps: float) -> np.ndarray:
    """y (T, D), from W with x in it."""
    h = W["x"] + attention({**W, "x": norm(W, 1, W["x"], eps)}, o)
    return h + mlp(W, norm(W, 2, h, eps))


def part(W: dict, prefix: str) -> dict:
    """The weights of one block, by the block's own names."""
    return {name.removeprefix(prefix): a for name, a in W.items() if name.startswith(prefix)}


def one_hot(at: np.ndarray, width: int) -> np.ndarray:
    return (at[:, None] == np.arange(width)).astype(float)


def logits(W: dict, ids: np.ndarray, o: Options, eps: float) -> np.ndarray:
    """A language model's logits (T, V), from W: Wte, blocks.0.Wq, ..., the last norm wnf, and where they are there Wpe, bnf and
    Whead (else the head is Wte turned)."""
    x = one_hot(ids, W["Wte"].shape[0]) @ W["Wte"]
    if "Wpe" in W:
        x = x + np.concatenate([W["Wpe"][:n] for n in o.lengths])
    layers = 1 + max(int(name.split(".")[1]) for name in W if name.startswith("blocks."))
    for i in range(layers):
        x = block({**part(W, f"blocks.{i}."), "x": x}, o, eps)
    h = norm({"wn1": W["wnf"]} | ({"bn1": W["bnf"]} if "bnf" in W else {}), 1, x, eps)
    return h @ (W["Whead"] if "Whead" in W else W["Wte"].T)


def cross_entropy(z: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The mean of -log softmax(z)[target] over the targets, in nats."""
    z = z - z.real.max(axis=1, keepdims=True)
    nll = np.log(np.exp(z).sum(axis=1)) - (z * one_hot(targets, z.shape[1])).sum(axis=1)
    return nll.sum() * (1 / len(targets))
