"""What a model has learned: its loss on text that it has not seen, and a sample of its own.

T tokens   V vocabulary   v this rank's share of V over tp
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import log
from typing import NamedTuple

import numpy as np

from parallel.ledger import Traffic, message
from training.text import MicroBatch, sequences, whole_sequences
from training.trainer import Trainer

# What a sample begins with, and how freely it is drawn.
PROMPT, TEMPERATURE = "The ", 0.5

Told = Callable[[Iterable], Iterable]


class Validation:
    """The sequences of `data`, of `length` tokens each, dealt out over dp and ep; `each`: how many make a micro-batch.

    They go through the stages in groups of as many micro-batches as there are ranks of pp. Every rank has as many
    micro-batches, some perhaps empty: experts on other ranks are asked by all of them together.
    """

    def __init__(self, trainer: Trainer, data: np.ndarray, length: int, each: int) -> None:
        dealt, self.trainer = trainer.mesh.over("dp", "ep"), trainer
        self.tokens = whole_sequences(data, length) * length
        count = self.tokens // length
        mine, most = np.arange(count)[dealt.rank :: dealt.size], -(-count // dealt.size)
        parts = [sequences(data, mine[n : n + each], length) for n in range(0, most, each)]
        together = trainer.mesh.pp.size
        self.groups = [parts[n : n + together] for n in range(0, len(parts), together)]

    def bits(self, told: Told) -> float:
        """Bits a token. `told`: goes through the groups and says how far it is."""
        nats = sum(self.trainer.forward(group, "validation").nats for group in told(self.groups))
        with self.trainer.mesh.phase("validation"):
            nats = self.trainer.form.losses.all_reduce(np.array([float(nats)])).item()
        return nats / (self.tokens * log(2))

    def traffic(self) -> list[Traffic]:
        """What `bits` sends."""
        sent = [t for group in self.groups for t in self.trainer.forward_traffic(group, "validation")]
        return [*sent, Traffic("all_reduce", self.trainer.form.losses.name, "validation", 8)]


class Spelling(NamedTuple):
    """Text to ids and back: bytes, or a tokenizer's."""

    encode: Callable[[str], list[int]] = lambda text: list(text.encode())
    decode: Callable[[list[int]], str] = lambda ids: bytes(ids).decode("utf-8", errors="replace")


class Sample:
    """`many` tokens after PROMPT, each drawn at TEMPERATURE from a forward over the last `length` that stand before it: by the
    rank that has the last token's logits, which then tells the others."""

    def __init__(self, trainer: Trainer, length: int, many: int, seed: int, spelling: Spelling) -> None:
        self.trainer, self.length, self.many, self.seed = trainer, length, many, seed
        self.spelling, self.prompt = spelling, spelling.encode(PROMPT)
        self._last = [*trainer.rank_of.values()][-1]
        self._heads = [stage.end.head for stage in trainer.stages.values() if stage.end is not None]

    def text(self, told: Told) -> str:
        """PROMPT and what follows; "" where nothing is asked for."""
        random, mesh, ids = np.random.default_rng(self.seed), self.trainer.mesh, list(self.prompt)
        for _ in told(range(self.many)):
            work, owner = self.trainer.forward([self._recent(ids)], "sample"), self._owner(len(ids))
            with mesh.phase("sample"):
                chosen = np.array([self._drawn(work.logits[0], owner, random) if self._heads else 0])
                chosen = mesh.cp.broadcast(chosen, owner)
                ids.append(mesh.pp.broadcast(chosen, self._last).item())
        return self.spelling.decode(ids) if self.many else ""

    def _recent(self, ids: Sequence[int]) -> MicroBatch:
        recent = np.array(ids[-self.length :])
        return MicroBatch(recent, None, [len(recent)])

    def _owner(self, tokens: int) -> int:
        """The rank of cp that has the last of so many tokens; there it is the last row."""
        last = min(tokens, self.length)
        every, _ = self.trainer.form.pieces_of([last])
        return next(rank for rank, pieces in enumerate(every) if any(p.stop == last for p in pieces))

    def _drawn(self, logits_Tv: np.ndarray, owner: int, random: np.random.Generator) -> int:
        """The largest of z / temperature + Gumbel noise is a draw from their softmax."""
        head = self._heads[0]
        noise_V = random.gumbel(size=head.cut.length)
        if self.trainer.mesh.cp.rank != owner:
            return 0
        z_V = head.tp.all_gather(logits_Tv[-1], 0, head.cut).astype(np.float64)
        return int(np.argmax(z_V / TEMPERATURE + noise_V))

    def traffic(self) -> list[Traffic]:
        """What `text` sends."""
        trainer, sent = self.trainer, []
        for n in range(len(self.prompt), len(self.prompt) + self.many):
            sent += trainer.forward_traffic([self._recent([0] * n)], "sample")
            if self._heads and trainer.mesh.cp.rank == self._owner(n):
                logits = message((self._heads[0].cut.length,), trainer.dtype.itemsize)
                sent.append(Traffic("all_gather", "tp", "sample", logits))
            sent += [Traffic("broadcast", axis, "sample", 8) for axis in ("cp", "pp")]
        return sent
