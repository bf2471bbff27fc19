"""The pre-norm transformer block: y = h + mlp(norm(h)), h = x + attention(norm(x)). Weights by name, as `reference.attention`
and the MLP have them, and the norms' wn1, bn1, wn2, bn2; without biases the norms are RMS norms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reference.attention import Options, attention, layer_norm, rms_norm
from reference.mlp import gelu, swiglu


def norm(W: dict, n: int, x: np.ndarray, eps: float) -> np.ndarray:
    if f"bn{n}" in W:
        return layer_norm(x, W[f"wn{n}"], W[f"bn{n}"], eps)
    return rms_norm(x, W[f"wn{n}"], eps)


@dataclass(frozen=True)
class Routing:
    """How a token's `active` experts are chosen and weighed; the other fields as in the models' own papers: DeepSeek-V3's
    (arXiv 2412.19437) uses all of them, with group_top 2; without groups, and normed, it is Mixtral's (2401.04088)."""

    active: int
    scoring: str = "softmax"
    normed: bool = True
    scale: float = 1.0
    groups: int = 1
    active_groups: int = 1
    group_top: int = 1


def chosen(worth: np.ndarray, r: Routing) -> list[int]:
    """One token's experts, from what each is worth to the choice (X,). Of equals, the first."""
    of_group = len(worth) // r.groups
    groups = [list(range(n, n + of_group)) for n in range(0, len(worth), of_group)]
    groups.sort(key=lambda group: -sum(sorted(worth[group])[-r.group_top :]))
    experts = sorted(e for group in groups[: r.active_groups] for e in group)
    experts.sort(key=lambda e: -worth[e])
    return experts[: r.active]


def expert(W1: np.ndarray, W2: np.ndarray, x: np.ndarray) -> np.ndarray:
    """One token through one expert: W1 (D, 2, F), gate and up, and W2 (F, D)."""
    return swiglu(x @ W1[:, 0], x @ W1[:, 1]) @ W2


def routed(W: dict, x: np.ndarray, r: Routing) -> np.ndarray:
    """Token by token: W1 (X, D, 2, F) and W2 (X, F, D) of the experts, Wr (D, X) of the router, and where they are there its
    correction br (X,), which only chooses, and shared.W1, shared.W2 of the expert that serves all."""
    rows = []
    for t in range(len(x)):
        z = x[t] @ W["Wr"]
        if r.scoring == "softmax":
            score = np.exp(z - z.real.max())
            score = score / score.sum()
        else:
            score = 1 / (1 + np.exp(-z))
        experts = chosen(score.real + (W["br"].real if "br" in W else 0.0), r)
        total = sum(score[e] for e in experts) + 1e-20 if r.normed else 1.0
        y = sum(expert(W["W1"][e], W["W2"][e], x[t]) * (score[e] / total * r.scale) for e in experts)
        if "shared.W1" in W:
            y = y + expert(W["shared.W1"], W["shared.W2"], x[t])
        rows.append(y)
    return np.stack(rows)


def scores(W: dict, x: np.ndarray, r: Routing) -> np.ndarray:
    """What each token's router gives each expert (T, X)."""
    z = x @ W["Wr"]
    if r.scoring == "sigmoid":
        return 1 / (1 + np.exp(-z))
    s = np.exp(z - z.real.max(axis=1, keepdims=True))
    return s / s.sum(axis=1, keepdims=True)


def balance(W: dict, x: np.ndarray, lengths: list[int], r: Routing, alpha: float) -> np.ndarray:
    """DeepSeek-V3's loss for each sequence (arXiv 2412.19437, equations 17 to 20), weighed by its share of the tokens."""
    loss, first = 0.0, 0
    for length in lengths:
        s = scores(W, x[first : first + length], r)
        X = s.shape[1]
        chose = [chosen(row + (W["br"].real if "br" in W else 0.0), r) for row in s.real]
        f = [X / (r.active * length) * sum(e in c for c in chose) for e in range(X)]
        P = (s / s.sum(axis=1, keepdims=True)).sum(axis=0) / length
        loss = loss + length / len(x) * alpha * sum(f[e] * P[e] for e in range(X))
        first += length
    return loss


def mlp(W: dict, x: np.ndarray, routing: Routing | None = None) -> np.ndarray:
    """W1 (D, F): gelu. W1 (D, 2, F): swiglu, gate and up. With Wr: routed."""
    if "Wr" in W:
        return routed(W, x, routing)
    if len(W["W1"].shape) == 3:
        gate, up = (x @ W["W1"][:, i] + (W["b1"][i] if "b1" in W else 0.0) for i in range(2))
        z = swiglu(gate, up)
    else:
        z = gelu(x @ W["W1"] + W.get("b1", 0.0))
    return z @ W["W2"] + W.get("b2", 0.0)


def block(W: dict, o: Options, eps: float, routing: Routing | None = None) -> np.ndarray:
    """y (T, D), from W with x in it."""
    h = W["x"] + attention({**W, "x": norm(W, 1, W["x"], eps)}, o)
    return h + mlp(W, norm(W, 2, h, eps), routing)


def part(W: dict, prefix: str) -> dict:
    """The weights of one block, by the block's own names."""
    return {name.removeprefix(prefix): a for name, a in W.items() if name.startswith(prefix)}


def one_hot(at: np.ndarray, width: int) -> np.ndarray:
    return (at[:, None] == np.arange(width)).astype(float)


def logits(W: dict, ids: np.ndarray, o: Options, eps: float, routing: Routing | None = None) -> np.ndarray:
    """A language model's logits (T, V), from W: Wte, blocks.0.Wq, ..., the last norm wnf, and where they are there Wpe, bnf and
    Whead (else the head is Wte turned)."""
    x = one_hot(ids, W["Wte"].shape[0]) @ W["Wte"]
    if "Wpe" in W:
        x = x + np.concatenate([W["Wpe"][:n] for n in o.lengths])
    layers = 1 + max(int(name.split(".")[1]) for name in W if name.startswith("blocks."))
    for i in range(layers):
        x = block({**part(W, f"blocks.{i}."), "x": x}, o, eps, routing)
    h = norm({"wn1": W["wnf"]} | ({"bn1": W["bnf"]} if "bnf" in W else {}), 1, x, eps)
    return h @ (W["Whead"] if "Whead" in W else W["Wte"].T)


def cross_entropy(z: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The mean of -log softmax(z)[target] over the targets, in nats."""
    z = z - z.real.max(axis=1, keepdims=True)
    nll = np.log(np.exp(z).sum(axis=1)) - (z * one_hot(targets, z.shape[1])).sum(axis=1)
    return nll.sum() * (1 / len(targets))
