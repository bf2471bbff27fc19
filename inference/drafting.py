"""How many tokens to draft for each request of a batch, by prompt lookup. A drafted token is one row more of products that are
computed anyway, and the more rows there are, the less one more costs (arXiv 2211.17192 has the case of one sequence).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from inference.sampling import Sampling
from inference.speculation.drafts import Ngram
from inference.speculation.gain import Gamma, expected_tokens
from inference.speculation.rule import MOST

# Steps after which a request whose drafts did not pay gets one again.
RETRY = 16


def cost(rows: int) -> float:
    """The time of a forward of so many rows, in forwards of one row: as measured up to MOST + 1 rows, then as a product
    grows."""
    known = Gamma.COSTS
    return known[max(rows, 1) - 1] if rows <= len(known) else known[-1] + 0.11 * (rows - len(known))


class _Lookup:
    """Of one request: what repeats in it, how often a guess was right (`alpha`), and for how many steps it had none."""

    def __init__(self) -> None:
        self.ngram, self.alpha, self.silent = Ngram(), 0.7, 0

    def learn(self, drafted: int, accepted: int) -> None:
        for n in range(min(accepted + 1, drafted)):
            self.alpha = 0.8 * self.alpha + 0.2 * (n < accepted)
        self.silent = 0 if drafted else self.silent + 1


class Drafting:
    """Drafts for a batch, on rank 0. Call `draft` before a step, `learn` after it, `forget` at a request's end."""

    def __init__(self) -> None:
        self._known: dict[int, _Lookup] = {}

    def draft(self, contexts: Mapping[int, Sequence[int]], rows: int) -> dict[int, list[int]]:
        """Guesses for decoding requests, from their tokens so far, for a step that has `rows` rows without them: as many as
        make the most tokens a unit of time."""
        guesses = {}
        for id, tokens in contexts.items():
            lookup = self._known.setdefault(id, _Lookup())
            guess = lookup.ngram.propose(tokens, MOST, Sampling(), id).tokens
            if guess:
                guesses[id] = lookup, guess
        if not guesses:
            return {}

        def rate(most: int) -> float:
            each = [(lookup.alpha, min(most, len(guess))) for lookup, guess in guesses.values()]
            made = len(contexts) - len(each) + sum(expected_tokens(alpha, n) for alpha, n in each)
            return made / cost(rows + sum(n for _, n in each))

        best = max(range(MOST + 1), key=rate)
        if best:
            return {id: guess[:best] for id, (_, guess) in guesses.items()}
        return {id: guess[:1] for id, (lookup, guess) in guesses.items() if lookup.silent >= RETRY}

    def learn(self, id: int, drafted: int, accepted: int) -> None:
        if id in self._known:
            self._known[id].learn(drafted, accepted)

    def forget(self, id: int) -> None:
        self._known.pop(id, None)
