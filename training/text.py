"""Text to learn from: bytes or tokens cut into sequences, dealt out in an order that a checkpoint can resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parallel.shard import even

VOCABULARY = 256
# The last tenth is for validation.
TRAINED = 0.9


class MicroBatch(NamedTuple):
    """What a rank computes at once: the tokens of some sequences, one after another.

    ids, targets: (T,); the target of a token is the one after it. Without targets only logits are asked for.
    """

    ids: np.ndarray
    targets: np.ndarray | None
    lengths: list[int]


class Text(NamedTuple):
    """Ids to train on, and to validate with. `per_byte`: how many of them a byte of the text is, 1 where they are bytes."""

    train: np.ndarray
    validation: np.ndarray
    per_byte: float = 1.0


def read(path: str | None, sequence_length: int, encode: Callable[[str], list[int]] | None = None) -> Text:
    """The bytes of the file, or of the documentation that comes with Python (`pydoc_data.topics`); with `encode`, its tokens.

    Raises ValueError for a file that cannot be read, is empty, or leaves either part shorter than a sequence and one more.
    """
    if path is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics)).encode()
    else:
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"--text {path}: {error.strerror or error}: use a file of text that can be read") from None
        if not text:
            raise ValueError(f"--text {path} is empty: use a file of text")
    data, what = np.frombuffer(text, np.uint8).astype(np.int64), "bytes"
    if encode is not None:
        try:
            data, what = np.array(encode(text.decode()), np.int64), "tokens"
        except ValueError as error:
            raise ValueError(f"--text {path}: {error}: use text in UTF-8") from None
    train, validation = np.split(data, [int(TRAINED * len(data))])
    if len(validation) <= sequence_length:
        raise ValueError(
            f"--text {path} has {len(data)} {what}, the last tenth of them {len(validation)}: too short for --sequence-length "
            f"{sequence_length}: use at least {10 * (sequence_length + 1)} {what} or shorter sequences"
        )
    return Text(train, validation, len(data) / len(text))


def sequences(data: np.ndarray, chosen: np.ndarray, length: int) -> MicroBatch:
    """The sequences number `chosen` of data: bytes [n length, (n + 1) length), each followed by its target."""
    starts = chosen[:, None] * length + np.arange(length)
    return MicroBatch(data[starts].reshape(-1), data[starts + 1].reshape(-1), [length] * len(chosen))


def whole_sequences(data: np.ndarray, length: int) -> int:
    return (len(data) - 1) // length


class Order:
    """The order of the sequences: all of them shuffled, then shuffled again. `resume` goes on from a `state()`."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self._random = count, np.random.Generator(np.random.Philox(seed))
        self._shuffle()

    def _shuffle(self) -> None:
        self._before = self._random.bit_generator.state
        self._order, self._at = self._random.permutation(self.count), 0

    def next(self, many: int) -> np.ndarray:
        taken = []
        while many:
            if self._at == self.count:
                self._shuffle()
            taken.append(self._order[self._at : self._at + many])
            self._at += len(taken[-1])
            many -= len(taken[-1])
        return np.concatenate(taken)

    def state(self) -> dict:
        """For JSON: the random state before the last shuffle, and how many sequences of it have been taken."""
        inner = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in self._before["state"].items()}
        buffer = self._before["buffer"].tolist()
        return {"random": self._before | {"state": inner, "buffer": buffer}, "position": self._at, "sequences": self.count}

    def resume(self, state: dict) -> None:
        as_array = lambda v: np.array(v, np.uint64)  # noqa: E731
        inner = {k: as_array(v) for k, v in state["random"]["state"].items()}
        self._random.bit_generator.state = state["random"] | {"state": inner, "buffer": as_array(state["random"]["buffer"])}
        self._shuffle()
        if not 0 <= state["position"] <= self.count:
            raise ValueError(f"position {state['position']} is beyond {self.count} sequences")
        self._at = int(state["position"])


def dealt(data: np.ndarray, chosen: np.ndarray, length: int, ranks: int, rank: int, micro_batches: int) -> list[MicroBatch]:
    """This dp rank's share of the sequences `chosen`, in micro-batches; shares differ by one where they do not divide."""
    mine = even(len(chosen), ranks, "sequences").take(chosen, 0, rank)
    cut = even(len(mine), micro_batches, "sequences")
    return [sequences(data, cut.take(mine, 0, n), length) for n in range(micro_batches)]
