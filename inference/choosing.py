"""What comes of a step's logits, on every rank alike: the next tokens of each request, and how likely its prompt was.

B rows whose logits are wanted   G rows of greedy requests   v this rank's share of the vocabulary over tp
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from inference.penalties import NONE, Penalties
from inference.sampling import NotFinite, Sampler, Sampling
from inference.scheduler import Run
from inference.speculation.rule import matched


class Token(NamedTuple):
    """`logprob`: under the model itself (temperature 1, no filters), if asked for; `top`: the likeliest, descending."""

    id: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass
class Known:
    """What every rank knows of a request that has run. `top_logprobs`, `prompt_logprobs`: as in Ask. `ends`, `prompt`: its end
    tokens and its prompt, if anything depends on them. `answer`: its new tokens so far. `scored`: the tokens of the prompt from
    the second on, as far as their log-probabilities are known. `table`: the blocks of its latest run."""

    sampling: Sampling
    stream: int
    top_logprobs: int | None
    prompt_logprobs: int | None = None
    penalties: Penalties = NONE
    ends: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    answer: list[int] = field(default_factory=list)
    scored: list[Token] = field(default_factory=list)
    table: list[int] = field(default_factory=list)

    def rows(self, run: Run) -> int:
        """The logits of how many of a run's last tokens are wanted: those that choose, and those that score the prompt."""
        choose = 1 + run.drafts if run.sample else 0
        if self.prompt_logprobs is None or len(self.scored) >= len(self.prompt) - 1:
            return choose
        return max(choose, run.first + len(run.tokens) - max(run.first, len(self.scored)))


class Chooser:
    """All ranks call it together and get the same."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def chosen(
        self, logits_Bv: np.ndarray, runs: Sequence[Run], known: Mapping[int, Known]
    ) -> dict[int, list[Token] | NotFinite]:
        """The new tokens of each run that samples, from the rows of all runs; or why there are none."""
        rows, end = {}, 0
        for run in runs:
            begin, end = end, end + known[run.id].rows(run)
            rows[run.id] = np.arange(begin, end)
        made: dict[int, list[Token] | NotFinite] = {}
        for run in runs:
            if known[run.id].prompt_logprobs is not None:
                try:
                    self._score(logits_Bv[rows[run.id]], run, known[run.id])
                except NotFinite as error:
                    made[run.id] = error.at(run.id, len(known[run.id].scored) + 1)
        choosing = [run for run in runs if run.sample and run.id not in made]
        # Rows by which they choose, with what their requests change in them.
        z_gv = {run.id: self._changed(logits_Bv[rows[run.id][-1 - run.drafts :]], run, known[run.id]) for run in choosing}
        greedy = [run.id for run in choosing if known[run.id].sampling.temperature == 0]
        best: dict[int, list[int]] = {}
        ranks: dict[int, dict[int, int]] = {}
        if greedy:
            ids_G, at = self.sampler.best_or_none(np.concatenate([z_gv[id] for id in greedy]))
            end = 0
            for id in greedy:
                begin, end = end, end + len(z_gv[id])
                best[id] = ids_G[begin:end].tolist()
                ranks[id] = {n - begin: rank for n, rank in at.items() if begin <= n < end}
        for run in choosing:
            mine, drafts = known[run.id], run.tokens[len(run.tokens) - run.drafts :]
            first = run.first + len(run.tokens) - run.drafts
            try:
                if run.id in best:
                    ids = matched(best[run.id], drafts)
                    if (last := len(ids) - 1) in ranks[run.id]:
                        raise NotFinite(ranks[run.id][last], run.id, first + last)
                else:
                    ids = self._drawn(z_gv[run.id], drafts, mine, run.id, first)
            except NotFinite as error:
                made[run.id] = error
                continue
            mine.answer += ids
            own_gv = logits_Bv[rows[run.id][-1 - run.drafts :]]
            made[run.id] = [self._token(row_v, id, mine.top_logprobs) for row_v, id in zip(own_gv, ids, strict=False)]
        return made

    def _changed(self, logits_gv: np.ndarray, run: Run, known: Known) -> np.ndarray:
        """The rows as penalties make them, each after the drafts before it."""
        if not known.penalties:
            return logits_gv
        drafts, first = run.tokens[len(run.tokens) - run.drafts :], self.sampler.first
        return np.stack(
            [
                known.penalties.applied(row_v, first, known.prompt, [*known.answer, *drafts[:n]], known.ends)
                for n, row_v in enumerate(logits_gv)
            ]
        )

    def _drawn(self, z_gv: np.ndarray, drafts: list[int], known: Known, id: int, position: int) -> list[int]:
        """The tokens from `position` on, drawn as they would be one by one: as many as equal the drafts, and one more.

        A guess without a distribution is accepted with probability p, as by the rule of speculative sampling. But here, what
        comes does not depend on what was guessed: guesses depend on the company."""
        ids: list[int] = []
        for z_v, guess in zip(z_gv, [*drafts, None], strict=True):
            try:
                log_p_v = self.sampler.filtered(z_v, known.sampling)
            except NotFinite as error:
                raise error.at(id, position + len(ids)) from None
            ids.append(self.sampler.draw(log_p_v, known.sampling, known.stream, position + len(ids)))
            if ids[-1] != guess:
                break
        return ids

    def _score(self, logits_gv: np.ndarray, run: Run, known: Known) -> None:
        """How likely the prompt's tokens are that follow those of these rows. One that ran before, and lost its blocks, has its
        first ones already."""
        begin = run.first + len(run.tokens) - len(logits_gv)
        for n, row_v in enumerate(logits_gv, begin + 1):
            if len(known.scored) + 1 == n < len(known.prompt):
                known.scored.append(self._token(row_v, known.prompt[n], known.prompt_logprobs))

    def _token(self, logits_v: np.ndarray, id: int, top: int | None) -> Token:
        if top is None:
            return Token(id, None, [])
        norm = self.sampler.log_normaliser(logits_v)
        own = float(self.sampler.of_token(logits_v.astype(np.float64), id) - norm)
        if not top:
            return Token(id, own, [])
        ids, values = self.sampler.likeliest(logits_v, top)
        return Token(id, own, list(zip(ids, (values.astype(np.float64) - norm).tolist(), strict=True)))
