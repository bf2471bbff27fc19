"""The next token from logits that are cut over the ranks by vocabulary, without gathering them.

    B rows, one a sequence   V vocabulary   v this rank's share of V over tp

Every rank decides from the same gathered numbers, so that ranks cannot disagree. A draw is a function of (seed, request,
position, token), so that it depends neither on the number of ranks nor on who else is in the batch. The order is temperature,
top-k, top-p, min-p, as in Transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from parallel.axis import Axis
from parallel.shard import Cut, even

# How many of its largest entries a rank sends first, for a filter to find its last token; then four times as many, and so on.
CANDIDATES = 32


class NotFinite(ArithmeticError):
    """The logits that a token is to be chosen by hold NaN or infinity, on `rank`; raised on all ranks alike. Whoever knows says
    of which request, and at which position of it."""

    def __init__(self, rank: int, request: int | None = None, position: int | None = None, of: str = "") -> None:
        self.rank, self.request, self.position, self.of = rank, request, position, of

    def __str__(self) -> str:
        where = "" if self.position is None else f" for position {self.position} of request {self.request}"
        return f"rank {self.rank} has no finite logits{self.of}{where}: weights, or what is made of them, are NaN or infinite"

    def at(self, request: int, position: int, of: str = "") -> NotFinite:
        return NotFinite(self.rank, request, position, of)


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 filter nothing; `top_p` 0 leaves the likeliest token, as in
    llama.cpp. Raises ValueError for one out of range."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be 0 (all) or more")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be from 0 to 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p} must be from 0 to 1")


def _random(seed: int, request: int, position: int, use: str, start: int = 0) -> np.random.Generator:
    """A counter-based generator (Philox; Salmon et al., 2011) whose key is made of all these, from its counter `start` on."""
    key = blake2b(f"{seed}/{request}/{position}/{use}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64), counter=[start, 0, 0, 0]))


def uniform(seed: int, request: int, position: int) -> float:
    """A number of (0, 1], to accept or reject a drafted token by."""
    return 1 - _random(seed, request, position, "accept").random()


def gumbel(seed: int, request: int, position: int, first: int, last: int, use: str = "token") -> np.ndarray:
    """Gumbel noise of the tokens first <= id < last, float64: -log(-log(u)), where the token is the counter that gives u.
    `use`: what is drawn with it, as draws for several uses at one position must not depend on one another."""
    # A step of the counter gives four numbers.
    start = first // 4
    u = _random(seed, request, position, use, start).random(last - 4 * start)[first - 4 * start :]
    # random() can be 0, whose noise would be -inf: add half of its grain.
    return -np.log(-np.log(u + 2.0**-54))


class Sampler:
    """Chooses from logits that are cut over `tp` as `cut` says. All ranks call it together and get the same."""

    def __init__(self, tp: Axis, cut: Cut) -> None:
        self.tp, self.cut = tp, cut
        self.first, self.last = cut.bounds[tp.rank]
        self._ranks = even(tp.size, tp.size)

    def _everyones(self, mine: np.ndarray) -> np.ndarray:
        """(p, ...): the array of each rank, by rank. Raises NotFinite where one has a NaN: no choice is made of it."""
        every = self.tp.all_gather(mine[None], 0, self._ranks)
        if np.isnan(every).any():
            raise NotFinite(int(np.isnan(every).reshape(len(every), -1).any(axis=1).argmax()))
        return every

    def best(self, z_Bv: np.ndarray) -> np.ndarray:
        """The id of the largest entry of each row, the lowest of several: a reduction of (value, id). Raises NotFinite for a
        largest entry that is none."""
        ids_B, ranks = self.best_or_none(z_Bv)
        for rank in ranks.values():
            raise NotFinite(rank)
        return ids_B

    def best_or_none(self, z_Bv: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
        """The same, -1 in rows whose largest entry is NaN or infinite; and of these, by row, the rank that has it."""
        at_B = z_Bv.argmax(axis=1)
        mine_B2 = np.stack([z_Bv[np.arange(len(z_Bv)), at_B], self.first + at_B], axis=1).astype(np.float64)
        every_pB2 = self.tp.all_gather(mine_B2[None], 0, self._ranks)
        # Ranks hold ascending ids: the first rank with the largest value has the lowest. A NaN counts as the largest.
        winner_B = every_pB2[..., 0].argmax(axis=0)
        best_B2 = every_pB2[winner_B, np.arange(len(z_Bv))]
        bad = np.flatnonzero(~np.isfinite(best_B2[:, 0])).tolist()
        best_B2[bad, 1] = -1
        return best_B2[:, 1].astype(np.int64), {row: int(winner_B[row]) for row in bad}

    def log_normaliser(self, z_v: np.ndarray) -> float:
        """log sum exp of the whole row, the same number on every rank, in float64."""
        z_v = z_v.astype(np.float64)
        top = z_v.max(initial=-np.inf)
        with np.errstate(invalid="ignore"):
            total = np.exp(z_v - top).sum() if top > -np.inf else 0.0
        every_p2 = self._everyones(np.array([top, total]))
        highest = every_p2[:, 0].max()
        return float(highest + np.log(np.sum(every_p2[:, 1] * np.exp(every_p2[:, 0] - highest))))

    def log_probabilities(self, z_v: np.ndarray) -> np.ndarray:
        """log softmax of the whole row at this rank's ids."""
        return z_v.astype(np.float64) - self.log_normaliser(z_v)

    def of_token(self, values_v: np.ndarray, token: int) -> np.ndarray:
        """The entry at `token` of an array (v, ...), on every rank, from the one that has it."""
        here = self.first <= token < self.last
        mine = values_v[token - self.first] if here else np.zeros(values_v.shape[1:])
        return self._everyones(np.asarray(mine, np.float64))[self.cut.owner(token)]

    def likeliest(self, z_v: np.ndarray, many: int) -> tuple[list[int], np.ndarray]:
        """The `many` largest entries of the whole row, the lowest id first where several are equal: ids and values."""
        values, ids = self._prefix(z_v, lambda values: many if len(values) >= many else None)
        return ids[:many].tolist(), values[:many]

    def certain(self, token: int) -> np.ndarray:
        """log p of the distribution in which `token` is certain."""
        return np.where(np.arange(self.first, self.last) == token, 0.0, -np.inf)

    def part(self, whole_V: np.ndarray) -> np.ndarray:
        """This rank's part of an array over the whole vocabulary."""
        return whole_V[self.first : self.last]

    def _largest(self, z_v: np.ndarray, many: int) -> tuple[np.ndarray, np.ndarray]:
        """The `many` largest entries of this rank, sorted by (value descending, id ascending): values and ids."""
        many = min(many, len(z_v))
        at = np.argpartition(-z_v, many - 1)[:many] if many < len(z_v) else np.arange(len(z_v))
        # Of several equal entries, argpartition takes any: take all that equal the last, then the lowest ids.
        at = np.flatnonzero(z_v >= z_v[at].min())
        at = at[np.lexsort((at, -z_v[at]))][:many]
        return z_v[at], self.first + at

    def _sorted_candidates(self, z_v: np.ndarray, many: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """The largest entries of all ranks, sorted as above, as far as each rank's `many` make them certain; and whether these
        are all entries."""
        many = max(1, many)
        values, ids = self._largest(z_v, many)
        padded = np.full((2, many), -np.inf)
        padded[0, : len(values)], padded[1, : len(ids)] = values, ids
        if not z_v.max(initial=-np.inf) < np.inf:
            # Sorting would put a NaN last.
            padded[:] = np.nan
        every_p2m = self._everyones(padded)
        complete = all(n <= many for n in self.cut.sizes)
        flat_v, flat_i = every_p2m[:, 0].reshape(-1), every_p2m[:, 1].reshape(-1)
        real = np.isfinite(flat_i)
        flat_v, flat_i = flat_v[real], flat_i[real].astype(np.int64)
        order = np.lexsort((flat_i, -flat_v))
        flat_v, flat_i = flat_v[order], flat_i[order]
        if not complete:
            # What a rank has not sent is no larger than the last that it sent: below the largest of these, others may come.
            lasts = [every[0, -1] for every, n in zip(every_p2m, self.cut.sizes, strict=True) if n > many]
            certain = flat_v > max(lasts)
            flat_v, flat_i = flat_v[certain], flat_i[certain]
        return flat_v, flat_i, complete

    def _prefix(self, z_v: np.ndarray, enough: object) -> tuple[np.ndarray, np.ndarray]:
        """The shortest list of the whole row's largest entries for which `enough(values)` names a length."""
        many = CANDIDATES
        while True:
            values, ids, complete = self._sorted_candidates(z_v, many)
            length = enough(values)
            if length is not None or complete:
                length = len(values) if length is None else length
                return values[:length], ids[:length]
            many *= 4

    def filtered(self, z_v: np.ndarray, sampling: Sampling) -> np.ndarray:
        """log p at this rank's ids, of the distribution after temperature and filters; -inf for what is left out."""
        if sampling.temperature == 0:
            return self.certain(int(self.best(z_v[None])[0]))
        z_v = z_v.astype(np.float64) / sampling.temperature
        if 0 < sampling.top_k < self.cut.length:
            k = sampling.top_k
            values, ids = self._prefix(z_v, lambda values: k if len(values) >= k else None)
            z_v = self._only_up_to(z_v, values, ids)
        if sampling.top_p < 1:
            norm = self.log_normaliser(z_v)

            def crossing(values: np.ndarray) -> int | None:
                # The token that crosses p is kept: the mass before it is less than p.
                before = np.cumsum(np.exp(values - norm))
                reached = np.flatnonzero(before >= sampling.top_p)
                return int(reached[0]) + 1 if len(reached) else None

            z_v = self._only_up_to(z_v, *self._prefix(z_v, crossing))
        if sampling.min_p > 0:
            top = self._everyones(np.array([z_v.max(initial=-np.inf)])).max()
            z_v = np.where(z_v >= top + np.log(sampling.min_p), z_v, -np.inf)
        return z_v - self.log_normaliser(z_v)

    def _only_up_to(self, z_v: np.ndarray, values: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """z, with -inf for all that come after the last of these, by (value descending, id ascending)."""
        last_value, last_id = values[-1], ids[-1]
        ids_v = np.arange(self.first, self.last)
        return np.where((z_v > last_value) | ((z_v == last_value) & (ids_v <= last_id)), z_v, -np.inf)

    def draw(self, log_p_v: np.ndarray, sampling: Sampling, request: int, position: int, use: str = "token") -> int:
        """A token drawn from p, which need not be normalised: the largest of log p + Gumbel noise."""
        noise_v = gumbel(sampling.seed, request, position, self.first, self.last, use)
        return int(self.best((log_p_v + noise_v)[None])[0])

    def choose(self, logits_Bv: np.ndarray, sampling: list[Sampling], requests: list[int], positions: list[int]) -> list[int]:
        """The next token of each row: of request `requests[b]`, at `positions[b]` of its sequence. Raises NotFinite."""
        chosen = [0] * len(sampling)
        greedy = [b for b, s in enumerate(sampling) if s.temperature == 0]
        if greedy:
            ids, ranks = self.best_or_none(logits_Bv[greedy])
            for row, rank in ranks.items():
                raise NotFinite(rank, requests[greedy[row]], positions[greedy[row]])
            for b, token in zip(greedy, ids, strict=True):
                chosen[b] = int(token)
        for b, s in enumerate(sampling):
            if s.temperature > 0:
                try:
                    chosen[b] = self.draw(self.filtered(logits_Bv[b], s), s, requests[b], positions[b])
                except NotFinite as error:
                    raise error.at(requests[b], positions[b]) from None
        return chosen
