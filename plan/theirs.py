"""The second account: what Megatron-LM and FSDP compute, send and keep on GPUs, by the formulas of papers.

Sources: tensor parallelism 1909.08053, its volume and pipelines 2104.04473, sequence parallelism, recomputation and what
is saved 2205.05198, ZeRO 1910.02054, ring attention 2310.01889. Bytes of passes over memory: counted operand by operand for
fused kernels on 2-byte activations (docs/planning.md has the table). Routed experts get equal shares of tokens, times `skew`.

T rows of a micro-batch on a rank   D model width   F hidden width   H, K heads   E, V widths of a head   t = tp
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from math import ceil

from models.config import Config
from plan import memory
from plan.account import AGAIN, FORWARD, INPUT, WEIGHTS, Facts, Once, Operation, Part, Place, Transfer
from plan.sizes import Sizes, head_widths
from plan.strategy import ATTENTION, DTYPES, GRAD_DTYPES, Strategy, V, kinds_of

# Kernels that are launched for a block: forward, backward, where norms and the like are one kernel each; else so many times.
BLOCK, EAGER = (15, 30), 1.7
HEAD, LOSS, EMBEDDING = 25, 12, 3
# Parts that are kept.
KEPT = 4096
Operations = Iterator[Operation]


class Theirs:
    """Megatron's where weights are whole on every data rank or shared out by ZeRO, FSDP's with zero=3."""

    name = "theirs"

    def __init__(self) -> None:
        self._parts: dict[tuple, Part] = {}
        # The config is held with its number, so that no other gets its identity.
        self._configs: dict[int, tuple[int, Config]] = {}

    def places(self, s: Strategy) -> list[Place]:
        return [{}]

    def fullest(self, s: Strategy) -> list[int]:
        """Later ranks have no more in flight and no larger stages, but for the last with its logits, and the first with
        experts; where blocks differ otherwise, all are asked."""
        if s.pp <= 4 or s.stage_layers is not None or s.recomputed_every > 1:
            return list(range(s.pp))
        first = s.sizes.first
        routed = (
            [s.rank_of[n] for n, blocks in enumerate(s.blocks) if blocks.stop > first][:2] if first < s.config.layers else []
        )
        return sorted({0, 1, *routed, s.pp - 1})

    def alike(self, s: Strategy) -> Hashable:
        return self._key(s), _unit(s), s.pp, s.chunks, s.stage_layers, s.schedule in V, s.halved

    def _key(self, s: Strategy) -> tuple:
        """What parts depend on. A config by its number here, as comparing it takes longer than all the rest."""
        if (known := self._configs.get(id(s.config))) is None:
            known = self._configs[id(s.config)] = len(self._configs), s.config
        return (known[0], s.sequence_length, s.micro_batch, s.ep, s.cp, s.tp, s.recompute, s.sequence_parallel,
                s.attention, s.fused, s.tp_overlap, s.dtype, s.grad_dtype, s.skew)  # fmt: skip

    def parts(self, s: Strategy, place: Place) -> list[tuple[tuple[Part, int], ...]]:
        key, unit = self._key(s), _unit(s)
        kinds = _of_stages(s.blocks, s.sizes.first, s.recomputed_every)
        found = {kind: self._of_stage(s, key, unit, *kind) for kind in set(kinds)}
        return [found[kind] for kind in kinds]

    def _of_stage(
        self, s: Strategy, key: tuple, unit: tuple, first: bool, last: bool, counts: tuple
    ) -> tuple[tuple[Part, int], ...]:
        """The parts of one stage. `counts`: of its blocks, as `kinds_of` has them."""
        found = [("embedding", False, 1)] * first
        found += [("routed" if routed else "dense", again, n) for routed, again, n in counts]
        found += [("head", False, 1)] * last
        return tuple((self._part(kind, key, unit, again, s), n) for kind, again, n in found)

    def _part(self, kind: str, key: tuple, unit: tuple, again: bool, s: Strategy) -> Part:
        name = kind, key, unit, again
        if (part := self._parts.get(name)) is None:
            if len(self._parts) >= KEPT:
                self._parts.clear()
            made = _Block(s, s.sizes)
            if unit == ALONE:
                part = made.plain(kind, again)
            else:
                # What it computes is the very same, however it is shared out.
                alone, sends = self._part(kind, key, ALONE, again, s), tuple(made.shared(kind, unit))
                kernels = _counted(dict(alone.kernels), sends)
                part = Part(alone.name, alone.operations, alone.dtype, (*alone.transfers, *sends), kernels)
            self._parts[name] = part
        return part

    def hop_bytes(self, s: Strategy) -> float:
        cut = s.tp if s.sequence_parallel or s.scatter_gather else 1
        return s.tokens * s.config.d_model * DTYPES[s.dtype] / cut

    def once(self, s: Strategy, rank: int, place: Place) -> Once:
        """Where gradients are scattered after each micro-batch, that is its parts'."""
        b, g = DTYPES[s.dtype], GRAD_DTYPES[s.grad_dtype]
        dense, experts = memory.held(s, rank)
        sums, gathers = [], []
        for axes, entries in (("dp,ep,cp", dense), ("dp,cp", experts)):
            if not entries:
                continue
            if s.zero == 0:
                sums.append(Transfer("all_reduce", axes, "step", 1, g * entries))
            elif s.zero == 1:
                sums.append(Transfer("reduce_scatter", axes, "step", 1, g * entries))
            if s.zero in (1, 2):
                gathers.append(Transfer("all_gather", axes, "step", 1, b * entries))
            if s.zero_over:
                sums.append(Transfer("all_reduce", "dp", "step", 1, g * entries / s.shards))
        between, c = [], s.config
        if c.tied and s.pp > 1 and rank in (s.rank_of[0], s.rank_of[-1]) and s.rank_of[0] != s.rank_of[-1]:
            between.append(Transfer("all_reduce", "pp", "step", 1, g * memory.padded(s) * c.d_model / s.tp))
        entries = dense + experts
        looked_at = 2 * g * entries / (s.shards if s.zero >= 2 else 1)
        update = (Operation("AdamW", "pass", "step", ((28 + 3 * g) * entries / s.shards,)),
                  Operation("norm and scale", "pass", "step", (looked_at,)))  # fmt: skip
        return Once(sums, gathers, between, update, kernels=len(sums) + len(gathers) + len(between) + 10)

    def in_flight(self, s: Strategy, rank: int) -> int:
        return memory.in_flight(s.schedule, s.pp, s.micro_batches, s.chunks, rank)

    def memory(self, s: Strategy, rank: int, place: Place) -> dict[str, float]:
        return memory.by_kind(s, rank)

    def model(self, s: Strategy, causal: bool = True) -> Facts:
        size = s.sizes
        model, hardware = _flops(s, causal)
        return Facts(size.parameters, size.met, model, hardware, _flops(s, False)[1])


def _flops(s: Strategy, causal: bool) -> tuple[float, float]:
    """Operations of a step: of the model, 6 a weight that multiplies a token and 6 (E + V) a head and key; and with those that
    recomputation does again."""
    c, size = s.config, s.sizes
    tokens, keys = s.batch * s.sequence_length, (s.sequence_length + 1) / 2 if causal else s.sequence_length
    attention = 2.0 * tokens * keys * sum(head_widths(c)) * c.heads * c.layers
    blocks, head = 2.0 * tokens * (size.multiplied - size.head.active), 2.0 * tokens * size.head.active
    again = {"selective": attention, "half": blocks / 2}.get(s.recompute, 0.0)
    if every := s.recomputed_every:
        again = len(range(0, c.layers, every)) / c.layers * (attention + blocks)
    model = 3 * (attention + blocks + head)
    return model, model + again


@lru_cache(4096)
def _of_stages(blocks: tuple[range, ...], first: int, every: int) -> list[tuple[bool, bool, tuple]]:
    """Of each stage whether it is the first and the last one, and the kinds of its blocks."""
    last = len(blocks) - 1
    return [(stage == 0, stage == last, kinds_of(of, first, every)) for stage, of in enumerate(blocks)]


def has_dropout(c: Config, attention: str) -> bool:
    """The GPT-2 family was trained with dropout, until flash attention came."""
    return c.norm == "layer" and attention == "unfused"


# A unit that nobody shares.
ALONE = (0, 1, False)


def _unit(s: Strategy) -> tuple[int, int, bool]:
    """ZeRO's stage where it works in each micro-batch, its shards, and whether there are stages: then a scatter goes on beside
    other micro-batches."""
    return (s.zero, s.shards, s.pp > 1) if s.zero >= 2 else ALONE


class _Block:
    """Makes parts from what of a strategy they depend on."""

    def __init__(self, s: Strategy, size: Sizes) -> None:
        self.s, self.size, self.c = s, size, s.config
        self.T = s.tokens
        self.t, self.b, self.g = s.tp, DTYPES[s.dtype], GRAD_DTYPES[s.grad_dtype]
        self.rows = self.T / (self.t if s.sequence_parallel else 1)
        self.wide = self.b / 2
        self.dropout = has_dropout(self.c, s.attention)

    def plain(self, kind: str, again: bool) -> Part:
        """The part of this kind, which nobody shares."""
        if kind == "embedding":
            return self.embedding()
        return self.head() if kind == "head" else self.block(kind == "routed", again)

    def shared(self, kind: str, unit: tuple[int, int, bool]) -> Iterator[Transfer]:
        """What ZeRO sends for it. With the embedding goes what of the root unit is gathered at the begin, and scattered at the
        end."""
        if kind == "embedding":
            root = self.size.table.weights / self.t * (1 + self.size.held)
            yield from (t for t in self._unit(root, unit) if t.verb != "all_gather" or t.phase == FORWARD)
        elif kind != "head":
            yield from self._unit(self._entries(kind == "routed"), unit)

    def _entries(self, routed: bool) -> float:
        """Of a block, on this rank."""
        size = self.size.routed if routed else self.size.dense
        return size.on_rank(self.t, self.s.ep)

    def block(self, routed: bool, again: bool) -> Part:
        s, recompute = self.s, "full" if again else self.s.recompute
        forward = [*self._products(routed), *self._attention(), *self._passes(routed)]
        operations = [*forward, *(op for f in forward for op in _backward(f))]
        fused = self.g if s.fused else 4 + 2 * self.g
        operations.append(Operation("adding gradients", "pass", WEIGHTS, (fused * self._entries(routed),)))
        attends = ("unfused", *ATTENTION)
        kinds = {"full": ("product", "pass", *attends), "selective": attends, "half": ("product",)}
        linear, softmax = [f for f in forward if f.kind == "product"], ("softmax", "dropout of attention")
        for f in forward:
            if f.kind in kinds.get(recompute, ()) or (recompute == "selective" and f.name in softmax):
                times = 0.5 if recompute == "half" else 1
                operations.append(f._replace(phase=AGAIN, times=f.times * times))
        sends = [*self._tp_sums(recompute == "full"), *self._cp_ring(recompute), *self._dispatch(routed, recompute == "full")]
        more = 1 if s.fused else EAGER
        kernels = {FORWARD: BLOCK[0] * more, INPUT: BLOCK[1] * more - len(linear), WEIGHTS: len(linear)}
        kernels[AGAIN] = {"full": BLOCK[0] * more, "selective": 4, "half": len(linear) / 2}.get(recompute, 0)
        return Part("routed block" if routed else "block", tuple(operations), s.dtype, tuple(sends), _counted(kernels, sends))

    def embedding(self) -> Part:
        D, T = self.c.d_model, self.T
        operations = (Operation("embedding", "pass", FORWARD, (self.wide * 13 * T * D,)),
                      Operation("embedding", "pass", INPUT, (self.wide * 8 * T * D,)))  # fmt: skip
        sends = [self._sum(FORWARD)] * (self.t > 1)
        return Part(
            "embedding", operations, self.s.dtype, tuple(sends), _counted({FORWARD: EMBEDDING, INPUT: EMBEDDING}, sends)
        )

    def head(self) -> Part:
        D, T, b = self.c.d_model, self.T, self.b
        v = ceil(self.c.vocabulary / (128 * self.t)) * 128
        product = Operation("head", "product", FORWARD, (T, v, D, 1))
        norm = Operation("norm", "pass", FORWARD, (self.wide * 4 * self.rows * D,))
        passes = [norm, Operation("loss", "pass", FORWARD, (38 * T * v,)), Operation("loss", "pass", INPUT, (14 * T * v,))]
        operations = (product, *_backward(product), *passes, *(op for op in _backward(norm)))
        sends = []
        if self.t > 1:
            sends = [Transfer("all_reduce", "tp", FORWARD, 3, 4 * T), self._sum(INPUT)]
            if self.s.sequence_parallel:
                sends.append(Transfer("all_gather", "tp", FORWARD, 1, T * D * b))
        return Part("head", operations, self.s.dtype, tuple(sends), _counted({FORWARD: HEAD + LOSS, INPUT: HEAD}, sends))

    # --- what a block computes forward

    def _products(self, routed: bool) -> Operations:
        c, T, t, D = self.c, self.T, self.t, self.c.d_model
        E, V = head_widths(c)
        if (m := c.latent) is not None:
            if m.d_query_latent:
                yield Operation("queries down", "product", FORWARD, (self.rows, m.d_query_latent, D, 1))
            yield Operation("queries", "product", FORWARD, (T, c.heads * E / t, m.d_query_latent or D, 1))
            yield Operation("latent", "product", FORWARD, (self.rows, m.d_latent + m.d_rope, D, 1))
            yield Operation("keys, values", "product", FORWARD, (T, c.heads * (m.d_nope + V) / t, m.d_latent, 1))
        else:
            yield Operation("queries, keys, values", "product", FORWARD, (T, (c.heads + 2 * self._kv) * E / t, D, 1))
        yield Operation("attention's output", "product", FORWARD, (T, D, c.heads * V / t, 1))
        gates = 2 if c.activation == "swiglu" else 1
        if not routed:
            yield from self._mlp("MLP", T, 1, c.d_ff / t, gates)
            return
        e, ep = c.experts, self.s.ep
        yield Operation("router", "product", FORWARD, (self.rows, e.count, D, 1))
        rows = T * e.active * ep / e.count * self.s.skew
        yield from self._mlp("experts", rows, e.count / ep, e.d_ff / t, gates)
        if e.d_shared:
            yield from self._mlp("shared expert", T, 1, e.d_shared / t, gates)

    def _mlp(self, name: str, rows: float, count: float, f: float, gates: int) -> Operations:
        yield Operation(f"{name} up", "product", FORWARD, (rows, gates * f, self.c.d_model, count))
        yield Operation(f"{name} down", "product", FORWARD, (rows, self.c.d_model, f, count))

    @property
    def _kv(self) -> float:
        """Key/value heads of all ranks of tp together: with more ranks than there are, some are held twice."""
        return max(self.c.kv_heads, self.t)

    def _attention(self) -> Operations:
        s, S, cp = self.s, self.s.sequence_length, self.s.cp
        E, V = head_widths(self.c)
        heads = s.micro_batch * self.c.heads / self.t
        if s.attention == "unfused":
            yield Operation("scores", "unfused", FORWARD, (S / cp, S, E, heads))
            yield Operation("attend", "unfused", FORWARD, (S / cp, V, S, heads))
        else:
            yield Operation("attention", s.attention, FORWARD, (heads, S / cp, S * S / (2 * cp), E + V))

    def _passes(self, routed: bool) -> Operations:
        """Norms, biases, dropout, residuals, turning heads, softmax, activation, rotation."""
        c, s, T, t, D = self.c, self.s, self.T, self.t, self.c.d_model
        E, V = head_widths(c)
        flash, eager = s.attention != "unfused", 1 if s.fused else 2
        qkv = (c.heads * (E + V) + self._kv * E if c.latent else (c.heads + 2 * self._kv) * E) * T / t
        scores = s.micro_batch * s.sequence_length**2 / s.cp * c.heads / t
        gated = c.activation == "swiglu"
        hidden = T * c.d_ff / t
        if routed:
            hidden = T / t * (c.experts.active * c.experts.d_ff + c.experts.d_shared)
        residual = (7, 5) if self.dropout else (6, 2)
        found = [
            ("norms", 2 * self.rows * D * eager, 4, 6),
            ("bias, dropout, residual" if self.dropout else "bias, residual", 2 * self.rows * D, *residual),
            ("turning heads", qkv, *((4, 4) if flash else (6, 4))),
            ("softmax", 0 if flash else scores, 4, 6),
            ("dropout of attention", scores if self.dropout and not flash else 0, 5, 5),
            ("SwiGLU" if gated else "GELU", hidden * eager, *((6, 10) if gated else (4, 6))),
            ("rotation", (c.heads + self._kv) * (c.latent.d_rope if c.latent else E) * T / t if c.rope else 0, 4, 4),
            ("rows to experts and back", 2 * T * c.experts.active * D if routed else 0, 4, 4),
        ]
        for name, entries, forward, backward in found:
            if entries:
                yield Operation(name, "pass", FORWARD, (self.wide * forward * entries, self.wide * backward * entries))

    # --- what it sends

    def _sum(self, phase: str, beside: str = "") -> Transfer:
        """A partial sum of rows, or under sequence parallelism their scattered sum."""
        verb = "reduce_scatter" if self.s.sequence_parallel else "all_reduce"
        return Transfer(verb, "tp", phase, 1, self.T * self.c.d_model * self.b, beside)

    def _tp_sums(self, again: bool) -> Iterator[Transfer]:
        """Two sums forward and two backward; under sequence parallelism a gather before each product too, and one more in
        backward, beside the products of weights."""
        if self.t == 1:
            return
        beside, n = "half" if self.s.tp_overlap else "", self.T * self.c.d_model * self.b
        for phase in (FORWARD, *([AGAIN] if again else []), INPUT):
            yield self._sum(phase, beside)._replace(calls=2)
            if self.s.sequence_parallel:
                yield Transfer("all_gather", "tp", phase, 2, n, beside)
        if self.s.sequence_parallel:
            yield Transfer("all_gather", "tp", WEIGHTS, 2, n, "products")

    def _cp_ring(self, recompute: str) -> Iterator[Transfer]:
        """Keys and values go round; backward they go again, with their gradients."""
        if (cp := self.s.cp) == 1:
            return
        E, V = head_widths(self.c)
        entries = self.T * self._kv * (E + V) / self.t
        if (m := self.c.latent) is not None:
            entries = self.T * (m.d_latent + m.d_rope)
        ahead = (FORWARD, AGAIN) if recompute in ("full", "selective") else (FORWARD,)
        for phase in ahead:
            yield Transfer("shift", "cp", phase, cp - 1, entries * self.b, "attend")
        yield Transfer("shift", "cp", INPUT, cp - 1, 2 * entries * self.b, "attend")

    def _dispatch(self, routed: bool, again: bool) -> Iterator[Transfer]:
        if not routed or self.s.ep == 1:
            return
        n = self.rows * self.c.experts.active * self.c.d_model * self.b * self.s.skew
        for phase in (FORWARD, *([AGAIN] if again else []), INPUT):
            yield Transfer("all_to_all", "ep", phase, 2, n)

    def _unit(self, entries: float, unit: tuple[int, int, bool]) -> Iterator[Transfer]:
        """ZeRO-3 gathers a unit's weights before each use; it and ZeRO-2 scatter the sum of its gradients each micro-batch."""
        zero, shards, staged = unit
        if shards == 1:
            return
        if zero == 3:
            for phase in (FORWARD, INPUT):
                yield Transfer("all_gather", "shards", phase, 1, self.b * entries, "unit")
        yield Transfer("reduce_scatter", "shards", INPUT, 1, self.g * entries, "step" if staged else "unit")


def _backward(f: Operation) -> Operations:
    """What belongs to an operation of forward in the backward: the gradients of both factors, or of the pass."""
    if f.kind == "product":
        M, N, K, batch = f.shape
        yield f._replace(phase=INPUT, shape=(M, K, N, batch))
        yield f._replace(phase=WEIGHTS, shape=(N, K, M, batch))
    elif f.kind == "unfused":
        M, N, K, batch = f.shape
        yield f._replace(phase=INPUT, shape=(M, K, N, batch))
        yield f._replace(phase=INPUT, shape=(N, K, M, batch))
    elif f.kind.startswith("flash"):
        yield f._replace(phase=INPUT)
    else:
        yield f._replace(phase=INPUT, shape=f.shape[1:] or (1.5 * f.shape[0],))


def _counted(kernels: dict[str, float], sends: Sequence[Transfer]) -> dict[str, float]:
    """Each verb is a kernel as well."""
    for sent in sends:
        kernels[sent.phase] = kernels.get(sent.phase, 0) + sent.calls
    return kernels
