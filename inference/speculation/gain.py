"""What speculation gains: the closed forms of arXiv 2211.17192, what was counted, and the number of drafts that pays."""

from __future__ import annotations

from dataclasses import dataclass, field

from inference.speculation.rule import MOST


def expected_tokens(alpha: float, gamma: int) -> float:
    """Tokens of a round: (1 - alpha^(gamma + 1)) / (1 - alpha) (equation 1)."""
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def speedup(alpha: float, gamma: int, cost: float, verify: float = 1.0) -> float:
    """The factor in wall time (theorem 3.8). `cost`: a drafted token's time over a plain step's; `verify`: the time of the
    target on gamma + 1 tokens over its time on one, which the theorem takes to be 1."""
    return expected_tokens(alpha, gamma) / (gamma * cost + verify)


def operations(alpha: float, gamma: int, cost: float) -> float:
    """The factor in arithmetic operations (theorem 3.11). `cost`: the draft's operations a token over the target's."""
    return (gamma * cost + gamma + 1) / expected_tokens(alpha, gamma)


@dataclass
class Account:
    """What rounds have shown. `tested`: drafts that were compared with the target, which in a round ends with the first
    rejected one. accepted / tested estimates alpha; accepted / drafted would be too low."""

    rounds: int = 0
    drafted: int = 0
    tested: int = 0
    accepted: int = 0
    tokens: int = 0
    draft_seconds: float = 0.0
    verify_seconds: dict[int, list[float]] = field(default_factory=dict)

    @property
    def alpha(self) -> float | None:
        return self.accepted / self.tested if self.tested else None

    def add(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        self.rounds += 1
        self.drafted += drafted
        self.tested += min(accepted + 1, drafted)
        self.accepted += accepted
        self.tokens += accepted + 1
        self.draft_seconds += draft_seconds
        self.verify_seconds.setdefault(drafted + 1, []).append(verify_seconds)


class Gamma:
    """How many tokens to draft next: always the same, or (`fixed` None) as acceptance and measured times advise.

    alpha is a mean over tested drafts that forgets old ones. The time of so many rows is their cost in units times the unit.
    Every round updates the unit, so that a machine that turns busy changes no choice. Costs are `COSTS` at first, and slowly
    become those measured. Where drafting does not pay, it is tried again now and then, as text changes: RETRY rounds later, one
    token at a time as long as these are right. Each time that it does not pay again, the wait doubles.
    """

    # The cost of 1, 2, ... rows in units of one row, before it is measured.
    COSTS = (1.0, 1.45, 1.8, 1.85, 1.95, 2.05, 2.2, 2.3, 2.4)
    RETRY, LATEST = 16, 128
    KEPT, KEPT_UNIT = 0.9, 0.7

    def __init__(self, fixed: int | None) -> None:
        self.fixed, self.alpha = fixed, 0.7
        self._unit, self._draft = 0.0, 0.0
        self._rows = list(self.COSTS)
        self._silent, self._wait = 0, self.RETRY

    def next(self) -> int:
        if self.fixed is not None:
            return self.fixed
        best = max(range(MOST + 1), key=self._rate)
        if best == 0 and self._silent >= self._wait:
            return 1
        return best

    def _rate(self, gamma: int) -> float:
        """Tokens a unit of time."""
        return expected_tokens(self.alpha, gamma) / (self._rows[gamma] + gamma * self._draft)

    def learn(self, asked: int, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        kept = self.KEPT
        for n in range(min(accepted + 1, drafted)):
            self.alpha = kept * self.alpha + (1 - kept) * (n < accepted)
        unit = verify_seconds / self._rows[drafted]
        self._unit = self.KEPT_UNIT * self._unit + (1 - self.KEPT_UNIT) * unit if self._unit else unit
        self._rows[drafted] = kept * self._rows[drafted] + (1 - kept) * verify_seconds / self._unit
        if drafted:
            each = draft_seconds / drafted / self._unit
            self._draft = kept * self._draft + (1 - kept) * each if self._draft else each
        if asked == 0:
            self._silent += 1
        elif max(range(MOST + 1), key=self._rate) > 0:
            self._silent, self._wait = 0, self.RETRY
        elif accepted < drafted:
            self._silent, self._wait = 0, min(2 * self._wait, self.LATEST)
