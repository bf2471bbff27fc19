"""Context parallelism: attention over sequences whose tokens are cut over the ranks of cp.

T this rank's tokens   S all tokens   H query heads   K key/value heads   E head width   V value width, of this rank of tp
h, j this rank's share over cp of H and of the key/value heads that these read
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import numpy as np

from layers import pieces
from layers.attend import attend, attend_backward
from layers.batch import Batch
from layers.pieces import Span, own_spans, seen_spans
from layers.work import Work, attended
from parallel.alone import Alone
from parallel.axis import Axis
from parallel.ledger import Traffic, message
from parallel.pending import Pending
from parallel.rows import is_whole
from parallel.shard import Cut, even

# Spans that are attended to at once, and whether the queries of each are the last of its keys, so that some are hidden.
Block = tuple[list[Span], bool]


class Run(NamedTuple):
    """Where on this rank key/value heads `kv` and query heads `q` are, of which `group` (g) read each of the former."""

    q: slice
    kv: slice
    group: int

    def queries(self, a_Th: np.ndarray) -> np.ndarray:
        """A view of this run's query heads in (T, h, ...), by the key/value head that they read: (T, k, g, ...)."""
        return a_Th[:, self.q].reshape(len(a_Th), self.kv.stop - self.kv.start, self.group, *a_Th.shape[2:])


def runs_of(groups: Sequence[int]) -> list[Run]:
    """The runs of key/value heads that are read by so many query heads each."""
    runs: list[Run] = []
    q = kv = 0
    for group, same in groupby(groups):
        n = len(list(same))
        runs.append(Run(slice(q, q + n * group), slice(kv, kv + n), group))
        q, kv = q + n * group, kv + n
    return runs


class Core(NamedTuple):
    """What softmax attention is told: the runs of heads, the scale of scores, whether keys behind a query are hidden, and how
    many keys it sees at most, its own among them (0: all)."""

    runs: list[Run]
    scale: float
    causal: bool
    window: int = 0

    @property
    def heads(self) -> int:
        return self.runs[-1].q.stop

    @property
    def kv_heads(self) -> int:
        return self.runs[-1].kv.stop

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, spans: list[Span]) -> tuple[np.ndarray, np.ndarray]:
        """o (T, H, V) and lse (T, H) of q (T, H, E), k and v (S, K, ...)."""
        o, lse = np.empty((*q.shape[:2], v.shape[-1]), q.dtype), np.empty(q.shape[:2], q.dtype)
        for run in self.runs:
            of = run.queries(q), k[:, run.kv], v[:, run.kv], run.queries(o), run.queries(lse)
            attend(*of, spans, self.scale, self.causal, window=self.window)
        return o, lse

    def attend_more(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, o: np.ndarray, lse: np.ndarray, spans: list[Span]
    ) -> None:
        """Add to o and lse what these keys give, of which every query of a span sees all."""
        for run in self.runs:
            of = run.queries(q), k[:, run.kv], v[:, run.kv], run.queries(o), run.queries(lse)
            attend(*of, spans, self.scale, causal=False, more=True)

    def backward(self, do_o_lse: tuple, qkv: tuple, into: tuple, spans: list[Span], causal: bool) -> None:
        """Add into dq, dk, dv."""
        (do, o, lse), (q, k, v), (dq, dk, dv) = do_o_lse, qkv, into
        for run in self.runs:
            of = run.queries(do), run.queries(q), k[:, run.kv], v[:, run.kv], run.queries(o), run.queries(lse)
            attend_backward(*of, run.queries(dq), dk[:, run.kv], dv[:, run.kv], spans, self.scale, causal, self.window)


class Local:
    """Every rank has whole sequences of its own: nothing travels. Kept for backward: the log-sum-exp."""

    cp: Axis | Alone = Alone("cp")

    def forward(
        self, q_THE: np.ndarray, k_TKE: np.ndarray, v_TKV: np.ndarray, core: Core, batch: Batch
    ) -> tuple[np.ndarray, tuple]:
        """q, k, v of this rank's tokens -> o (T, H, V), kept."""
        o_THV, lse_TH = core.attend(q_THE, k_TKE, v_TKV, own_spans(batch.mine, core.causal))
        return o_THV, (lse_TH,)

    def backward(
        self, do_THV: np.ndarray, o_THV: np.ndarray, qkv: tuple, into: tuple, core: Core, batch: Batch, kept: tuple
    ) -> None:
        """do, o, (q, k, v), kept. Adds into (dq, dk, dv)."""
        core.backward((do_THV, o_THV, *kept), qkv, into, own_spans(batch.mine, core.causal), core.causal)

    def inside(self, core: Core) -> Core:
        """The heads that this rank attends with."""
        return core

    def blocks(self, core: Core, batch: Batch) -> list[Block]:
        """What it attends to, one after another."""
        return [(own_spans(batch.mine, core.causal), core.causal)]

    def held(self, core: Core, batch: Batch) -> int:
        """How many keys of heads, each with its value, forward has in memory at a time."""
        return batch.tokens * core.kv_heads

    def gathered(self, x_T: np.ndarray, batch: Batch) -> np.ndarray:
        """x of all tokens, sequences one after another, from this rank's."""
        return x_T

    def summed(self, dx_S: np.ndarray, batch: Batch) -> np.ndarray:
        """This rank's tokens of the sum over cp: the backward of `gathered`."""
        return dx_S

    def traffic(self, core: Core, batch: Batch, widths: tuple[int, int], b: int) -> list[Traffic]:
        """What forward and backward send. `widths`: of a head's key and value; b: bytes of an entry."""
        return []

    def work(self, core: Core, batch: Batch, widths: tuple[int, int]) -> list[Work]:
        """What forward and backward compute."""
        heads = [(run.kv.stop - run.kv.start, run.group) for run in self.inside(core).runs]
        return attended(self.blocks(core, batch), heads, *widths, core.window)

    def traffic_gathered(self, batch: Batch, width: int, b: int) -> list[Traffic]:
        """What `gathered`, of `width` numbers a token, and its backward send."""
        return []

    def saved_bytes(self, core: Core, batch: Batch, widths: tuple[int, int], b: int) -> int:
        """What is kept for backward."""
        return message((batch.tokens, core.heads), b)

    def require(self, heads: int, window: int = 0) -> None:
        """Raises ValueError for heads, or a window of theirs, that it cannot serve."""


class Gather(Local):
    """Every rank gets all keys and values, again in backward.

        k_SKE, v_SKV = all_gather(k_TKE), all_gather(v_TKV)
        o_THV        = attend(q_THE, k_SKE, v_SKV)
        dk_TKE, ...  = reduce_scatter(dk_SKE), ...

    The simplest kind, and the check of the others: it keeps nothing more, but has S keys in memory at a time.
    """

    def __init__(self, cp: Axis) -> None:
        self.cp = cp

    def forward(
        self, q_THE: np.ndarray, k_TKE: np.ndarray, v_TKV: np.ndarray, core: Core, batch: Batch
    ) -> tuple[np.ndarray, tuple]:
        o_THV, lse_TH = core.attend(q_THE, *self._both(k_TKE, v_TKV, batch), all_spans(batch, core.causal))
        return o_THV, (lse_TH,)

    def backward(
        self, do_THV: np.ndarray, o_THV: np.ndarray, qkv: tuple, into: tuple, core: Core, batch: Batch, kept: tuple
    ) -> None:
        q_THE, k_TKE, v_TKV = qkv
        k_SKE, v_SKV = self._both(k_TKE, v_TKV, batch)
        d_SKn = np.zeros((len(k_SKE), k_SKE.shape[1], k_SKE.shape[2] + v_SKV.shape[2]), k_SKE.dtype)
        dk_SKE, dv_SKV = np.split(d_SKn, [k_SKE.shape[2]], axis=2)
        of = (do_THV, o_THV, *kept), (q_THE, k_SKE, v_SKV), (into[0], dk_SKE, dv_SKV)
        core.backward(*of, all_spans(batch, core.causal), core.causal)
        _add_both(into[1:], self.summed(d_SKn, batch))

    def blocks(self, core: Core, batch: Batch) -> list[Block]:
        return [(all_spans(batch, core.causal), core.causal)]

    def held(self, core: Core, batch: Batch) -> int:
        return sum(batch.lengths) * core.kv_heads

    def _both(self, k_TKE: np.ndarray, v_TKV: np.ndarray, batch: Batch) -> list[np.ndarray]:
        return np.split(self.gathered(beside(k_TKE, v_TKV), batch), [k_TKE.shape[2]], axis=2)

    def gathered(self, x_T: np.ndarray, batch: Batch) -> np.ndarray:
        ranks = pieces.cut(batch.every)
        return x_T if is_whole(ranks) else _ordered(self.cp.all_gather(x_T, 0, ranks), batch)

    def summed(self, dx_S: np.ndarray, batch: Batch) -> np.ndarray:
        ranks = pieces.cut(batch.every)
        return dx_S if is_whole(ranks) else self.cp.reduce_scatter(dx_S[_places(batch)], 0, ranks)

    def traffic(self, core: Core, batch: Batch, widths: tuple[int, int], b: int) -> list[Traffic]:
        sent = self.traffic_gathered(batch, core.kv_heads * sum(widths), b)
        return [*sent, *(replace(t, phase="backward") for t in sent[:1])]

    def traffic_gathered(self, batch: Batch, width: int, b: int) -> list[Traffic]:
        if is_whole(pieces.cut(batch.every)):
            return []
        size = message((sum(batch.lengths), width), b)
        return [Traffic("all_gather", self.cp.name, "forward", size), Traffic("reduce_scatter", self.cp.name, "backward", size)]


class Ring(Gather):
    """Keys and values go round (arXiv 2310.01889): while a rank attends to one block, the next is on its way.

        o, lse = attend(q, own k, v)                  every row has a finite lse
        p - 1 times: k, v = shift(k, v)               from the rank before, to the one after
                     o, lse = attend more(q, k, v)
        backward:    k, v travel again, and dk, dv behind them: they begin at the first other rank, and come home after p - 1

    A block holds pieces of sequences; of two pieces one is before the other, so that there is nothing to hide but in a rank's
    own. Two blocks are in memory at a time, in backward up to five: two more of gradients on their way, one being made. Latents
    are gathered, as they are smaller than the heads' keys and values.
    """

    def forward(
        self, q_THE: np.ndarray, k_TKE: np.ndarray, v_TKV: np.ndarray, core: Core, batch: Batch
    ) -> tuple[np.ndarray, tuple]:
        p, E = self.cp.size, k_TKE.shape[2]
        coming = self._shift(beside(k_TKE, v_TKV), 0, p - 1, batch)
        o_THV, (lse_TH,) = Local.forward(self, q_THE, k_TKE, v_TKV, core, batch)
        for hop in range(1, p):
            block = coming.wait()
            coming = self._shift(block, hop, p - 1, batch)
            core.attend_more(q_THE, block[..., :E], block[..., E:], o_THV, lse_TH, self._seen(hop, core, batch))
        return o_THV, (lse_TH,)

    def backward(
        self, do_THV: np.ndarray, o_THV: np.ndarray, qkv: tuple, into: tuple, core: Core, batch: Batch, kept: tuple
    ) -> None:
        (q_THE, k_TKE, v_TKV), p, E = qkv, self.cp.size, qkv[1].shape[2]
        coming, home = self._shift(beside(k_TKE, v_TKV), 0, p - 1, batch), None
        Local.backward(self, do_THV, o_THV, qkv, into, core, batch, kept)
        for hop in range(1, p):
            block = coming.wait()
            coming = self._shift(block, hop, p - 1, batch)
            d = np.zeros_like(block)
            of = (do_THV, o_THV, *kept), (q_THE, block[..., :E], block[..., E:]), (into[0], d[..., :E], d[..., E:])
            core.backward(*of, self._seen(hop, core, batch), causal=False)
            if home is not None:
                # What the ranks before have added up for this block.
                d += home.wait()
            home = self._shift(d, hop, p, batch)
        if home is not None:
            _add_both(into[1:], home.wait())

    def require(self, heads: int, window: int = 0) -> None:
        if window and self.cp.size > 1:  # a piece of a sequence would be seen in part
            raise ValueError(f"cannot attend within a window of {window} by the ring: use ulysses or gather")

    def blocks(self, core: Core, batch: Batch) -> list[Block]:
        return Local.blocks(self, core, batch) + [(self._seen(hop, core, batch), False) for hop in range(1, self.cp.size)]

    def held(self, core: Core, batch: Batch) -> int:
        sizes = [pieces.count(batch.every[self._source(hop)]) for hop in range(self.cp.size)]
        return max(map(sum, pairwise(sizes)), default=sizes[0]) * core.kv_heads

    def _source(self, hop: int) -> int:
        """Whose block this rank has after so many hops."""
        return (self.cp.rank - hop) % self.cp.size

    def _seen(self, hop: int, core: Core, batch: Batch) -> list[Span]:
        return seen_spans(batch.mine, batch.every[self._source(hop)], core.causal)

    def _shift(self, block: np.ndarray, hop: int, until: int, batch: Batch) -> Pending | None:
        """Send on what every rank has after `hop` hops, of those before `until`."""
        if hop >= until:
            return None
        return self.cp.start_shift(block, [pieces.count(batch.every[(r - hop) % self.cp.size]) for r in range(self.cp.size)])

    def traffic(self, core: Core, batch: Batch, widths: tuple[int, int], b: int) -> list[Traffic]:
        p, sizes = self.cp.size, [message((pieces.count(own), core.kv_heads * sum(widths)), b) for own in batch.every]
        sent = lambda hops, phase: [Traffic("shift", self.cp.name, phase, sizes[self._source(hop)]) for hop in hops]  # noqa: E731
        return [*sent(range(p - 1), "forward"), *sent(range(p - 1), "backward"), *sent(range(1, p), "backward")]


class Ulysses(Gather):
    """All tokens of some heads in place of all heads of some tokens (arXiv 2309.14509).

        q_ShE, k_SjE, v_SjV = all_to_all(q_THE), all_to_all(k_TKE), all_to_all(v_TKV)       rows to heads
        o_THV               = all_to_all(attend(q_ShE, k_SjE, v_SjV))                       heads to rows

    Heads are dealt out as evenly as they go; key/value heads that several ranks' heads read go to each. Kept for backward: q,
    k, v, o and the log-sum-exp of these heads.
    """

    def require(self, heads: int, window: int = 0) -> None:
        """Raises ValueError for fewer heads than ranks."""
        if heads < self.cp.size:
            raise ValueError(f"cannot cut {heads} heads over cp={self.cp.size}: use the ring")

    def forward(
        self, q_THE: np.ndarray, k_TKE: np.ndarray, v_TKV: np.ndarray, core: Core, batch: Batch
    ) -> tuple[np.ndarray, tuple]:
        heads, kv_heads, repeated, inside = self._shares(core)
        q_ShE = self._to_heads(q_THE, heads, batch)
        kv_Sjn = self._to_heads(beside(k_TKE, v_TKV)[:, repeated], kv_heads, batch)
        E = k_TKE.shape[2]
        o_ShV, lse_Sh = inside.attend(q_ShE, kv_Sjn[..., :E], kv_Sjn[..., E:], self._spans(core, batch))
        return self._to_rows(o_ShV, heads, batch), (q_ShE, kv_Sjn, o_ShV, lse_Sh)

    def backward(
        self, do_THV: np.ndarray, o_THV: np.ndarray, qkv: tuple, into: tuple, core: Core, batch: Batch, kept: tuple
    ) -> None:
        (q_ShE, kv_Sjn, o_ShV, lse_Sh), (dq_THE, dk_TKE, dv_TKV), E = kept, into, qkv[1].shape[2]
        heads, kv_heads, repeated, inside = self._shares(core)
        do_ShV = self._to_heads(do_THV, heads, batch)
        dq_ShE, dkv_Sjn = np.zeros_like(q_ShE), np.zeros_like(kv_Sjn)
        of = (do_ShV, o_ShV, lse_Sh), (q_ShE, kv_Sjn[..., :E], kv_Sjn[..., E:]), (dq_ShE, dkv_Sjn[..., :E], dkv_Sjn[..., E:])
        inside.backward(*of, self._spans(core, batch), core.causal)
        dq_THE += self._to_rows(dq_ShE, heads, batch)
        dkv_TKn = self._to_rows(dkv_Sjn, kv_heads, batch)
        # A head that several ranks have read gets something from each.
        for n, head in enumerate(repeated):
            dk_TKE[:, head] += dkv_TKn[:, n, :E]
            dv_TKV[:, head] += dkv_TKn[:, n, E:]

    def inside(self, core: Core) -> Core:
        return self._shares(core)[-1]

    def blocks(self, core: Core, batch: Batch) -> list[Block]:
        return [(self._spans(core, batch), core.causal)]

    def held(self, core: Core, batch: Batch) -> int:
        return sum(batch.lengths) * self.inside(core).kv_heads

    def _shares(self, core: Core) -> tuple[Cut, Cut, list[int], Core]:
        """How query heads are cut over cp, and key/value heads, which are repeated so that each rank has what it reads; and
        this rank's own heads."""
        read = [run.kv.start + n // run.group for run in core.runs for n in range(run.q.stop - run.q.start)]
        heads = even(len(read), self.cp.size, "heads")
        needed = [range(read[a], read[e - 1] + 1) for a, e in heads.bounds]
        own = read[slice(*heads.bounds[self.cp.rank])]
        inside = core._replace(runs=runs_of([own.count(head) for head in needed[self.cp.rank]]))
        cut = Cut(sum(map(len, needed)), tuple(pairwise(accumulate(map(len, needed), initial=0))))
        return heads, cut, [head for every in needed for head in every], inside

    @staticmethod
    def _spans(core: Core, batch: Batch) -> list[Span]:
        return own_spans(pieces.whole(batch.lengths), core.causal)

    def _to_heads(self, x_THE: np.ndarray, cut: Cut, batch: Batch) -> np.ndarray:
        return _ordered(self.cp.all_to_all(x_THE, 1, cut, 0, pieces.cut(batch.every)), batch)

    def _to_rows(self, x_ShE: np.ndarray, cut: Cut, batch: Batch) -> np.ndarray:
        return self.cp.all_to_all(x_ShE[_places(batch)], 0, pieces.cut(batch.every), 1, cut)

    def traffic(self, core: Core, batch: Batch, widths: tuple[int, int], b: int) -> list[Traffic]:
        (E, V), (heads, kv_heads, _, inside) = widths, self._shares(core)
        T, S = batch.tokens, sum(batch.lengths)
        sent = lambda phase, *entries: [Traffic("all_to_all", self.cp.name, phase, n * b) for n in entries]  # noqa: E731
        forward = T * heads.length * E, T * kv_heads.length * (E + V), S * inside.heads * V
        return sent("forward", *forward) + sent(
            "backward", T * heads.length * V, S * inside.heads * E, S * inside.kv_heads * (E + V)
        )

    def saved_bytes(self, core: Core, batch: Batch, widths: tuple[int, int], b: int) -> int:
        (E, V), inside = widths, self._shares(core)[-1]
        return message((sum(batch.lengths), inside.heads * (E + V + 1) + inside.kv_heads * (E + V)), b)


KINDS = {"ring": Ring, "ulysses": Ulysses, "gather": Gather}


def beside(k_TKE: np.ndarray, v_TKV: np.ndarray) -> np.ndarray:
    """[k | v] (T, K, E + V), as they travel."""
    return np.concatenate([k_TKE, v_TKV], axis=2)


def all_spans(batch: Batch, causal: bool) -> list[Span]:
    """What this rank's queries see of all keys, sequences one after another."""
    return pieces.all_spans(batch.lengths, batch.mine, causal)


def _add_both(into: tuple[np.ndarray, np.ndarray], d_TKn: np.ndarray) -> None:
    dk_TKE, dv_TKV = into
    dk_TKE += d_TKn[..., : dk_TKE.shape[2]]
    dv_TKV += d_TKn[..., dk_TKE.shape[2] :]


def _places(batch: Batch) -> np.ndarray:
    """Where the tokens of all ranks, in the ranks' order, are in the sequences."""
    return np.concatenate([pieces.places(batch.lengths, own) for own in batch.every])


def _ordered(x_S: np.ndarray, batch: Batch) -> np.ndarray:
    """x of all tokens, sequences one after another, from the ranks' order."""
    ordered = np.empty_like(x_S)
    ordered[_places(batch)] = x_S
    return ordered
