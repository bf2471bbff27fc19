"""Which parts of which tensors our parameters are, for every family and both formats.

D model width   V vocabulary   P positions   H heads   K key/value heads   E head width   F hidden width
C latent width   Q query latent width   N, R width of a query without position, and rotated   U value width
X experts   F their hidden width   S the shared expert's

A format's names say how it stores things: `qkv` instead of `q`, `k`, `v` where the three stand in one tensor, `gate_up` where
the two do, `{x}` in a name where every expert has a tensor of its own, `k_b` (the keys', turned round) and `v_b` instead of
`kv_b` where the up-projection of a latent stands in two.
"""

from __future__ import annotations

from models.config import Config
from models.piece import Piece

Names = dict[str, str]


def _names(block: str, inside: Names, **outside: str) -> Names:
    """Names by role, those of a block led by it and its number."""
    return outside | {role: f"{block}.{{i}}.{name}" for role, name in inside.items()}


_LLAMA_BLOCK = {
    "n1": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "qn": "self_attn.q_norm.weight",
    "kn": "self_attn.k_norm.weight",
    "o": "self_attn.o_proj.weight",
    "n2": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_MIXTRAL_BLOCK = _LLAMA_BLOCK | {
    "router": "block_sparse_moe.gate.weight",
    "x_gate": "block_sparse_moe.experts.{x}.w1.weight",
    "x_up": "block_sparse_moe.experts.{x}.w3.weight",
    "x_down": "block_sparse_moe.experts.{x}.w2.weight",
}
_DEEPSEEK_BLOCK = _LLAMA_BLOCK | {
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
# How transformers 5 holds experts in memory, and writes them if asked not to keep the original format.
_STACKED = {
    "router": "mlp.gate.weight",
    "x_gate_up": "mlp.experts.gate_up_proj",
    "x_down": "mlp.experts.down_proj",
}
_GPT2_BLOCK = {
    "n1": "ln_1.weight",
    "qkv": "attn.c_attn.weight",
    "o": "attn.c_proj.weight",
    "n2": "ln_2.weight",
    "up": "mlp.c_fc.weight",
    "down": "mlp.c_proj.weight",
}
_GGUF_BLOCK = {
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


def huggingface_names(family: str, present: dict[str, tuple[int, ...]]) -> Names:
    """A family's names in safetensors files, in the form of those that are `present`."""
    if family == "gpt2":
        # The base model was saved with and without its name.
        base = "" if "wte.weight" in present else "transformer."
        ends = {"wte": f"{base}wte.weight", "wpe": f"{base}wpe.weight", "nf": f"{base}ln_f.weight"}
        return _names(f"{base}h", _GPT2_BLOCK, **ends, head="lm_head.weight")
    blocks = {"mixtral": _MIXTRAL_BLOCK, "deepseek_v2": _DEEPSEEK_BLOCK, "deepseek_v3": _DEEPSEEK_BLOCK}
    block = blocks.get(family, _LLAMA_BLOCK)
    if any(name.endswith(_STACKED["x_gate_up"]) for name in present):
        block = {role: name for role, name in block.items() if role not in ("x_gate", "x_up")} | _STACKED
    ends = {"wte": "model.embed_tokens.weight", "nf": "model.norm.weight", "head": "lm_head.weight"}
    return _names("model.layers", block, **ends)


def gguf_names(present: dict[str, tuple[int, ...]]) -> Names:
    """GGUF's names, which are the same for all families, in the form of those that are `present`."""
    qkv, kv_b = (any(name.endswith(_GGUF_BLOCK[role]) for name in present) for role in ("qkv", "kv_b"))
    dropped = {*(("q", "k", "v") if qkv else ("qkv",)), *(("k_b", "v_b") if kv_b else ("kv_b",))}
    block = {role: name for role, name in _GGUF_BLOCK.items() if role not in dropped}
    ends = {"wte": "token_embd.weight", "wpe": "position_embd.weight", "nf": "output_norm.weight", "head": "output.weight"}
    return _names("blk", block, **ends)


class _Pieces:
    """Gathers the pieces of a model's parameters. `turned`: whether matrices are stored (out, in), as linear layers are."""

    def __init__(self, names: Names, there: int, turned: bool) -> None:
        self.names, self.there, self.turned = names, there, turned
        self.of: dict[str, list[Piece]] = {}

    def name(self, role: str, **which: int) -> str:
        return self.names[role].format(**which)

    def add(self, ours: str, piece: Piece) -> None:
        self.of.setdefault(ours, []).append(piece)

    def array(self, ours: str, tensor: str, *dims: int) -> None:
        """Stored as we have it."""
        self.add(ours, Piece(tensor, tuple((n,) for n in dims), tuple(range(len(dims)))))

    def matrix(
        self, ours: str, tensor: str, ins: tuple[int, ...], outs: tuple[int, ...], at: tuple = (), within: tuple | None = None
    ) -> None:
        """Ours is (*ins, *outs). `within`: where among the tensor's outputs these begin, and how many it has."""
        dims, order, dim = (ins, outs), tuple(range(len(ins) + len(outs))), 1
        if self.turned:
            dims, order, dim = (outs, ins), (*order[len(outs) :], *order[: len(outs)]), 0
        self.add(ours, Piece(tensor, dims, order, at, within and (dim, *within)))

    def linear(self, ours: str, tensor: str, ins: tuple[int, ...], outs: tuple[int, ...], bias: bool, **where: tuple) -> None:
        """A matrix W{ours}, and beside it a bias b{ours}."""
        lead, _, last = ours.rpartition(".")
        lead += "." if lead else ""
        self.matrix(f"{lead}W{last}", tensor, ins, outs, **where)
        if bias:
            # Where a matrix is put in some place of ours, (ins, place, outs), its bias is put there too.
            at, within = where.get("at", ())[len(ins) :], where.get("within")
            name = tensor.removesuffix("weight") + "bias"
            self.add(f"{lead}b{last}", Piece(name, (outs,), tuple(range(len(outs))), at, within and (0, *within)))


def pieces(c: Config, names: Names, there: int, turned: bool = True) -> dict[str, list[Piece]]:
    """All parameters of a model of configuration `c`, by our names, in tensors of these names.

    `there`: how many tensors there are. Of layers, and of experts, one more than that is looked for at most: it is missing.
    """
    p = _Pieces(names, there, turned)
    p.array("Wte", p.name("wte"), c.vocabulary, c.d_model)
    if c.positions:
        p.array("Wpe", p.name("wpe"), c.positions, c.d_model)
    for i in range(min(c.layers, there + 1)):
        _norm(p, c, f"blocks.{i}.", "n1", i)
        (_latent_attention if c.latent is not None else _attention)(p, c, i)
        _norm(p, c, f"blocks.{i}.", "n2", i)
        (_mlp if c.experts is None or i < c.experts.first else _experts)(p, c, i)
    _norm(p, c, "", "nf", 0)
    if not c.tied:
        # A linear layer even where the others are not.
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
        for x in range(min(X, p.there + 1)):
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
