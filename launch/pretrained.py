"""What the commands for pretrained models share: opening them, their prompts and token ids, and what is checked of these."""

from __future__ import annotations

import argparse
import os
import resource
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
from mpi4py import MPI

from inference.cache import Cache, Striped
from inference.generate import Generator, make_cache
from inference.speculation.generator import Speculative
from inference.speculation.rule import MOST
from launch.options import UsageError
from layers.transformer import Transformer
from models.build import build
from models.config import Config
from models.default import default_model
from models.open import open_model
from models.piece import ModelError
from models.source import Source
from models.tokenizer import Tokenizer, open_tokenizer
from parallel.atomic import write_atomically
from parallel.mesh import Mesh


def add_model(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", metavar="PATH", type=Path, help="folder or .gguf file (SmolLM2-135M-Instruct)")


def token_ids(text: str) -> list[int]:
    """An argparse type: 1,2,3."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids: use for instance 1,2,3")
    return [int(part) for part in parts]


def opened(path: Path | None, tp: int) -> Source:
    """The model, its headers read. Raises UsageError for one that cannot be used, or not be cut over so many ranks."""
    try:
        source = open_model(default_model() if path is None else path)
    except (ModelError, OSError) as error:
        raise UsageError(f"--model: {error}") from None
    c = source.config
    widths = {"heads": c.heads, "hidden units": c.d_ff, "rows of the vocabulary": c.vocabulary}
    if c.experts is not None:
        widths["hidden units of an expert"] = c.experts.d_ff
    for name, most in widths.items():
        if tp > most:
            raise UsageError(f"cannot cut the model's {most} {name} over tp={tp}: use at most {most} ranks")
    return source


def tokenizer(source: Source) -> Tokenizer | None:
    try:
        return open_tokenizer(source.path, source.metadata)
    except ValueError as error:
        raise UsageError(f"--model {source.path}: {error}") from None


def encoded(text: str, source: Source, known: Tokenizer | None) -> list[int]:
    if known is None:
        raise UsageError(f"--model {source.path} has no tokenizer: give token ids with --tokens")
    return known.encode(text)


def sequences(args: argparse.Namespace) -> np.ndarray:
    """(sequences, tokens) from --text, --text-file, --tokens or --tokens-file."""
    if args.tokens is not None:
        return np.array([args.tokens], np.int64)
    if args.tokens_file is not None:
        return _ids_of_file(args.tokens_file)
    text = args.text
    if args.text_file is not None:
        try:
            text = args.text_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--text-file {args.text_file}: {error}: use a file of UTF-8 text") from None
    ids = encoded(text, args.source, args.tokenizer)
    if not ids:
        raise UsageError("the text to score is empty: use some text")
    return np.array([ids], np.int64)


def _ids_of_file(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"--tokens-file {path}: {error}: use an .npy file of integers") from None
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or not ids.size:
        shape = f"{ids.dtype} of shape {ids.shape}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise UsageError(f"--tokens-file {path} holds {shape}: use integers of shape (tokens,) or (sequences, tokens)")
    return np.atleast_2d(ids).astype(np.int64)


def check_ids(ids: np.ndarray | Sequence[int], config: Config, length: int) -> None:
    """Refuse ids outside of the vocabulary and sequences beyond the context."""
    ids = np.asarray(ids)
    wrong = ids[(ids < 0) | (ids >= config.vocabulary)]
    if wrong.size:
        raise UsageError(f"token id {wrong[0]} is outside of the vocabulary: use 0 to {config.vocabulary - 1}")
    if length > config.context:
        raise UsageError(f"{length} tokens are beyond the model's context: use at most {config.context}")


def kind(text: str) -> str:
    """An argparse type: ngram, or layers=K."""
    name, _, layers = text.partition("=")
    if text != "ngram" and not (name == "layers" and layers.isdecimal() and int(layers)):
        raise argparse.ArgumentTypeError(f"{text!r} is no draft: use ngram, or layers=K with a number of layers")
    return text


def _gamma(text: str) -> int | None:
    """An argparse type: a number of drafted tokens, or None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of drafted tokens: use 1 to {MOST}, or auto")
    return int(text)


def add_speculation(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--speculate", type=kind, metavar="ngram|layers=K", help="draft by prompt lookup, or by the first K layers")
    p.add_argument("--draft", metavar="PATH", type=Path, help="draft with another model of the same vocabulary")
    p.add_argument("--draft-whole", action="store_true", help="run the --draft model whole on every rank, not cut over them")
    p.add_argument("--gamma", type=_gamma, default=None, help="tokens to draft, 1 to 8; auto for as many as pay (auto)")


def check_speculation(args: argparse.Namespace, ranks: int) -> None:
    """Refuse drafts that cannot be; opens the draft's model."""
    if args.speculate and args.draft:
        raise UsageError("--speculate and --draft are two ways to draft: use one of them")
    if args.draft_whole and not args.draft:
        raise UsageError("--draft-whole is about the model of --draft PATH: give one, or leave it out")
    layers = args.source.config.layers
    if args.speculate and args.speculate != "ngram" and int(args.speculate.partition("=")[2]) >= layers:
        raise UsageError(f"--speculate {args.speculate}: the model has {layers} layers: use layers=1 to layers={layers - 1}")
    args.draft_source = opened(args.draft, 1 if args.draft_whole else ranks) if args.draft else None
    if args.draft_source is not None and args.draft_source.config.vocabulary != args.source.config.vocabulary:
        theirs, ours = args.draft_source.config.vocabulary, args.source.config.vocabulary
        raise UsageError(f"--draft {args.draft} has a vocabulary of {theirs}, the model one of {ours}: use one of the same")


def speculation(args: argparse.Namespace, model: Transformer, mesh: Mesh, cache: Cache | Striped) -> Speculative | None:
    """What drafts and verifies as the options say; None where they ask for plain decoding."""
    if args.draft_source is not None:
        axes = Mesh(MPI.COMM_SELF, tp=1) if args.draft_whole else mesh
        other = build(args.draft_source.config, axes.tp, args.draft_source.weights(args.dtype))
        return Speculative(model, mesh, cache, Generator(other, axes, make_cache(other, args.cache)), args.gamma)
    return Speculative(model, mesh, cache, args.speculate, args.gamma) if args.speculate else None


def write(path: Path, put: Callable[[BinaryIO], None]) -> None:
    """Write a file whole or not at all. Raises OSError, naming it, where it cannot be written."""
    try:
        with write_atomically(path, "wb") as file:
            put(file)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None


def check_picture(path: Path) -> None:
    """Refuse a --png that cannot be written; its folder may be new, that one's may not."""
    folder = path.absolute().parent
    if not (folder if folder.is_dir() else folder.parent).is_dir():
        raise UsageError(f"cannot write --png {path}: there is no folder {folder.parent}")
    if not os.access(folder if folder.is_dir() else folder.parent, os.W_OK) or path.is_dir():
        raise UsageError(f"cannot write --png {path}: use a file in a folder that may be written")
    if find_spec("matplotlib") is None:
        raise UsageError("the picture needs matplotlib, which is not installed: run `pip install matplotlib`")


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
