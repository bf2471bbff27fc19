"""A pretrained model in its files: its configuration, and its weights, of which every rank reads its own slices only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np

from models.config import Config
from models.piece import ModelError, Piece, Tensors
from models.wishes import Wishes
from parallel.parameter import Weights
from parallel.shard import Layout, Place


@dataclass
class Source:
    """A pretrained model. `config`: what it is made of. `family`: its model_type or general.architecture. `pieces`: which
    parts of which tensors each of our parameters is. `metadata`: the keys and values of a GGUF file, tokenizer.* among them.

    `harmless`: whether a tensor of this name, which the model does not need, may be in the files. `copies`: tensors that may be
    there as copies of others, which they are tied to: {"lm_head.weight": "model.embed_tokens.weight"}. `wishes`: how its makers
    want it to be asked. `notes`: a line for each thing in the files that is not used, or not as it says.
    """

    path: Path
    family: str
    config: Config
    tensors: Tensors
    pieces: dict[str, list[Piece]]
    harmless: Callable[[str], bool] = lambda name: False
    copies: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, object] = field(default_factory=dict)
    wishes: Wishes = field(default_factory=Wishes)
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors, as stored."""
        return self.tensors.nbytes

    def weights(self, dtype: np.dtype | str) -> Weights:
        """Weights for `build`: of each array, this rank's part is read from the files, and no more."""

        def read(name: str, layout: Layout, place: Place, mean: float, std: float, out: np.ndarray) -> None:
            self._require(name, layout.shape)
            for piece in self.pieces[name]:
                piece.read(self.tensors, out, layout.bounds(place))

        return Weights(lambda name, shape: np.empty(shape, dtype), read)

    def _require(self, name: str, shape: tuple[int, ...]) -> None:
        if sum(p.size for p in self.pieces.get(name, [])) != prod(shape):
            raise ModelError(f"{self.path}: a {self.family} of its configuration has no {name} of shape {shape}")

    def exported(self, ours: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The files' tensors, by their names, put together from `ours`: whole arrays, weights or gradients, by our names.

        A tensor is left out if `ours` has no part of it. A tied head is there if the files have one. Raises ModelError for a
        name that the model does not have, or not in this size, and for a tensor that `ours` has only a part of.
        """
        for name, x in ours.items():
            self._require(name, x.shape)
        inside: dict[str, list[tuple[str, Piece]]] = {}
        for name, pieces in self.pieces.items():
            for piece in pieces:
                inside.setdefault(piece.tensor, []).append((name, piece))
        theirs = {}
        for tensor, parts in inside.items():
            absent = [name for name, _ in parts if name not in ours]
            if len(absent) == len(parts):
                continue
            if absent:
                raise ModelError(f"{self.path}: tensor {tensor!r} cannot be put together without {absent[0]}{_more(absent)}")
            theirs[tensor] = np.empty(parts[0][1].shape, ours[parts[0][0]].dtype)
            for name, piece in parts:
                piece.write(ours[name], theirs[tensor])
        stored = {copy: of for copy, of in self.copies.items() if copy in self.tensors.shapes and of in theirs}
        return theirs | {copy: theirs[of] for copy, of in stored.items()}

    def check(self) -> None:
        """Raises ModelError, with its name, for a tensor that is missing, surplus, misshapen or of a type that we cannot read.
        The files' headers suffice for that."""
        wanted = {p.tensor: p.shape for pieces in self.pieces.values() for p in pieces}
        shapes = self.tensors.shapes
        missing = [name for name in wanted if name not in shapes]
        if missing:
            raise ModelError(
                f"{self.path}: tensor {missing[0]!r} of shape {wanted[missing[0]]} is missing{_more(missing)}: "
                f"a {self.family} of {self.config.layers} layers needs it"
            )
        wanted |= {copy: wanted[of] for copy, of in self.copies.items() if copy in shapes}
        surplus = [name for name in shapes if name not in wanted and not self.harmless(name)]
        if surplus:
            raise ModelError(
                f"{self.tensors.file(surplus[0])}: tensor {surplus[0]!r}{_more(surplus)} has no place in "
                f"a {self.family} of {self.config.layers} layers and its configuration"
            )
        for name, shape in wanted.items():
            if shapes[name] != shape:
                raise ModelError(
                    f"{self.tensors.file(name)}: tensor {name!r} has shape {shapes[name]}, the configuration wants {shape}"
                )
            why = self.tensors.unreadable(name)
            if why is not None:
                raise ModelError(f"{self.tensors.file(name)}: tensor {name!r} is stored as {why}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
