"""The roles of a model's tensors, which families name, and which parts of these tensors our parameters are.

D model width   V vocabulary   P positions   H heads   K key/value heads   E head width   F hidden width
C latent width   Q query latent width   N, R width of a query without position, and rotated   U value width
X experts   F their hidden width   S the shared expert's

Roles outside of blocks, and shapes where matrices are (out, in), as PyTorch's linear layers have them:
    wte (V, D)   wpe (P, D)   nf (D): the last norm   head (V, D)
Roles inside of a block:
    n1, n2 (D): the norms before attention and MLP
    q (H E, D)   k, v (K E, D)   o (D, H E)   or qkv instead of q, k and v   qn, kn (E): norms of each head
    gate, up (F, D)   down (D, F)
    kv_a (C + R, D)   kv_an (C)   kv_b (H (N + U), C)   or k_b (H, C, N) and v_b (H, U, C) instead of kv_b
    q_a (Q, D)   q_an (Q)   q_b (H (N + R), Q)
    router (X, D)   correction (X)   s_gate, s_up (S, D)   s_down (D, S)
    x_gate, x_up (X, F, D)   x_down (X, D, F)   or x_gate_up (X, 2 F, D) instead of x_gate and x_up
        or, with {x} in their names, a matrix for each expert
A bias is called as its weight, with `bias` instead of `weight` at the end.
"""

from __future__ import annotations

from models.config import Config
from models.piece import Piece

Names = dict[str, str]
Shapes = dict[str, tuple[int, ...]]


def by_role(block: str, inside: Names, outside: Names) -> Names:
    """Names by role, those inside of a block led by its name and its number, {i}."""
    return outside | {role: f"{block}.{{i}}.{name}" for role, name in inside.items()}


class _Pieces:
    """Gathers the pieces of a model's parameters. `most`: the most layers, and experts, to look for. `turned`: whether matrices
    are stored (out, in)."""

    def __init__(self, names: Names, most: int, turned: bool) -> None:
        self.names, self.most, self.turned = names, most, turned
        self.of: dict[str, list[Piece]] = {}

    def name(self, role: str, **which: int) -> str:
        return self.names[role].format(**which)

    def add(self, ours: str, piece: Piece) -> None:
        self.of.setdefault(ours, []).append(piece)

    def array(self, ours: str, tensor: str, *dims: int) -> None:
        """An array that is stored as we have it."""
        self.add(ours, Piece(tensor, tuple((n,) for n in dims), tuple(range(len(dims)))))

    def matrix(
        self, ours: str, tensor: str, ins: tuple[int, ...], outs: tuple[int, ...], at: tuple = (), within: tuple | None = None
    ) -> None:
        """A matrix (*ins, *outs). `within`: which of the tensor's outputs is the first of these, and how many it has."""
        dims, order, dim = (ins, outs), tuple(range(len(ins) + len(outs))), 1
        if self.turned:
            dims, order, dim = (outs, ins), (*order[len(outs) :], *order[: len(outs)]), 0
        self.add(ours, Piece(tensor, dims, order, at, within and (dim, *within)))

    def linear(self, ours: str, tensor: str, ins: tuple[int, ...], outs: tuple[int, ...], bias: bool, **where: tuple) -> None:
        """A matrix W{ours} and, with `bias`, a b{ours}."""
        lead, _, last = ours.rpartition(".")
        lead += "." if lead else ""
        self.matrix(f"{lead}W{last}", tensor, ins, outs, **where)
        if bias:
            # A matrix may fill one place of ours, (ins, place, outs); its bias then fills that place of ours, too.
            at, within = where.get("at", ())[len(ins) :], where.get("within")
            name = tensor.removesuffix("weight") + "bias"
            self.add(f"{lead}b{last}", Piece(name, (outs,), tuple(range(len(outs))), at, within and (0, *within)))


def pieces(c: Config, names: Names, tensors: int, turned: bool = True) -> dict[str, list[Piece]]:
    """The pieces of all parameters of a model of configuration `c`, by our names, in tensors of these `names` by role.

    `tensors`: how many the files have. A configuration with more layers or experts lacks one of the first `tensors + 1`, so
    these are enough to tell.
    """
    p = _Pieces(names, tensors + 1, turned)
    p.array("Wte", p.name("wte"), c.vocabulary, c.d_model)
    if c.positions:
        p.array("Wpe", p.name("wpe"), c.positions, c.d_model)
    for i in range(min(c.layers, p.most)):
        _norm(p, c, f"blocks.{i}.", "n1", i)
        (_latent_attention if c.latent is not None else _attention)(p, c, i)
        _norm(p, c, f"blocks.{i}.", "n2", i)
        (_mlp if c.experts is None or i < c.experts.first else _experts)(p, c, i)
    _norm(p, c, "", "nf", 0)
    if not c.tied:
        # The head is stored (out, in) even where the other matrices are not.
        p.turned = True
        p.matrix("Whead", p.name("head"), (c.d_model,), (c.vocabulary,))
    return p.of


def _norm(p: _Pieces, c: Config, lead: str, role: str, i: int) -> None:
    weight = p.name(role, i=i)
    p.array(f"{lead}w{role}", weight, c.d_model)
    if c.norm == "layer":
        p.array(f"{lead}b{role}", weight.removesuffix("weight") + "bias", c.d_model)


def _attention(p: _Pieces, c: Config, i: int) -> None:
    D, E, lead = (c.d_model,), c.d_head or c.d_model // c.heads, f"blocks.{i}."
    counts = {"q": c.heads, "k": c.kv_heads, "v": c.kv_heads}
    begin, length = 0, sum(counts.values()) * E
    for role, n in counts.items():
        if "qkv" in p.names:
            p.linear(lead + role, p.name("qkv", i=i), D, (n, E), c.bias, within=(begin, length))
            begin += n * E
        else:
            p.linear(lead + role, p.name(role, i=i), D, (n, E), c.bias)
    if c.qk_norm:
        p.array(f"{lead}wqn", p.name("qn", i=i), E)
        p.array(f"{lead}wkn", p.name("kn", i=i), E)
    p.linear(f"{lead}o", p.name("o", i=i), (c.heads, E), D, c.bias_out)


def _latent_attention(p: _Pieces, c: Config, i: int) -> None:
    D, m, lead = (c.d_model,), c.latent, f"blocks.{i}."
    down = m.d_latent + m.d_rope
    p.matrix(f"{lead}Wdkv", p.name("kv_a", i=i), D, (m.d_latent,), within=(0, down))
    p.matrix(f"{lead}Wkr", p.name("kv_a", i=i), D, (m.d_rope,), within=(m.d_latent, down))
    p.array(f"{lead}wckv", p.name("kv_an", i=i), m.d_latent)
    if "kv_b" in p.names:
        p.matrix(f"{lead}Wukv", p.name("kv_b", i=i), (m.d_latent,), (c.heads, m.d_nope + m.d_value))
    else:
        C, H, N, U = m.d_latent, c.heads, m.d_nope, m.d_value
        at = slice(None), slice(None)
        p.add(f"{lead}Wukv", Piece(p.name("k_b", i=i), ((H,), (C,), (N,)), (1, 0, 2), (*at, slice(0, N))))
        p.add(f"{lead}Wukv", Piece(p.name("v_b", i=i), ((H,), (U,), (C,)), (2, 0, 1), (*at, slice(N, N + U))))
    query = c.heads, m.d_nope + m.d_rope
    if m.d_query_latent:
        p.matrix(f"{lead}Wdq", p.name("q_a", i=i), D, (m.d_query_latent,))
        p.array(f"{lead}wcq", p.name("q_an", i=i), m.d_query_latent)
        p.matrix(f"{lead}Wuq", p.name("q_b", i=i), (m.d_query_latent,), query)
    else:
        p.matrix(f"{lead}Wq", p.name("q", i=i), D, query)
    p.matrix(f"{lead}Wo", p.name("o", i=i), (c.heads, m.d_value), D)


def _mlp(p: _Pieces, c: Config, i: int) -> None:
    D, F, lead = (c.d_model,), (c.d_ff,), f"blocks.{i}."
    if c.activation == "swiglu":
        for j, role in enumerate(("gate", "up")):
            p.linear(f"{lead}1", p.name(role, i=i), D, F, c.bias_mlp, at=(slice(None), j))
    else:
        p.linear(f"{lead}1", p.name("up", i=i), D, F, c.bias_mlp)
    p.linear(f"{lead}2", p.name("down", i=i), F, D, c.bias_mlp)


def _experts(p: _Pieces, c: Config, i: int) -> None:
    D, e, lead = c.d_model, c.experts, f"blocks.{i}."
    X, F, every = e.count, e.d_ff, slice(None)
    p.matrix(f"{lead}Wr", p.name("router", i=i), (D,), (X,))
    if e.correction:
        p.array(f"{lead}br", p.name("correction", i=i), X)
    if "{x}" in p.names["x_down"]:
        for x in range(min(X, p.most)):
            p.matrix(f"{lead}W1", p.name("x_gate", i=i, x=x), (D,), (F,), at=(x, every, 0))
            p.matrix(f"{lead}W1", p.name("x_up", i=i, x=x), (D,), (F,), at=(x, every, 1))
            p.matrix(f"{lead}W2", p.name("x_down", i=i, x=x), (F,), (D,), at=(x,))
    else:
        for j, role in enumerate(("x_gate", "x_up")):
            tensor, within = (p.name("x_gate_up", i=i), (1, j * F, 2 * F)) if role not in p.names else (p.name(role, i=i), None)
            p.add(f"{lead}W1", Piece(tensor, ((X,), (F,), (D,)), (0, 2, 1), (every, every, j), within))
        p.add(f"{lead}W2", Piece(p.name("x_down", i=i), ((X,), (D,), (F,)), (0, 2, 1)))
    if e.d_shared:
        for j, role in enumerate(("s_gate", "s_up")):
            p.matrix(f"{lead}shared.W1", p.name(role, i=i), (D,), (e.d_shared,), at=(every, j))
        p.matrix(f"{lead}shared.W2", p.name("s_down", i=i), (e.d_shared,), (D,))
