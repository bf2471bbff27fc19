"""What the commands for pretrained models share: opening them, their prompts and token ids, and what is checked of these."""

from __future__ import annotations

import argparse
import re
import resource
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from time import perf_counter

import numpy as np

from inference.generate import make_cache
from inference.sampling import Sampling
from launch.options import UsageError, axis_sizes, settled
from launch.process import memory
from launch.terminal import progress
from layers.transformer import Transformer
from models.build import build
from models.config import Config
from models.default import default_model
from models.open import open_model
from models.piece import ModelError
from models.source import Source
from models.tokenizer import Tokenizer
from models.tokenizer_file import open_tokenizer
from parallel.axis import Axis
from plan.dry import DryAxis, dry_weights

# The options that say how a token is chosen, by Sampling's names.
SAMPLED = ("temperature", "top_k", "top_p", "min_p")


def add_mesh(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--mesh",
        type=axis_sizes,
        metavar="ep=N,tp=N",
        help="ranks along each axis; ep: experts (default: all along tp)",
    )


def axes_of(args: argparse.Namespace, ranks: int) -> dict[str, int]:
    """The ranks along tp and, where it is given, ep. Raises UsageError for a mesh that they are not, or that cannot draft."""
    axes = settled(args.mesh, ranks, "tp", ("ep", "tp"))
    if axes.get("ep", 1) > 1 and (drafts := getattr(args, "draft", None) or args.speculate) not in (None, "off"):
        # How much to draft is settled by the clock, and within tp.
        raise UsageError(f"cannot draft by {drafts} with --mesh ep={axes['ep']}: leave the drafts out, or ep")
    return axes


def add_model(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", metavar="PATH", type=Path, help="folder or .gguf file (default: SmolLM2-135M-Instruct)")


def token_ids(text: str) -> list[int]:
    """An argparse type: 1,2,3."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids: use for instance 1,2,3")
    return [int(part) for part in parts]


token_ids.metavar = "IDS"


def opened(path: Path | None, tp: int, ep: int = 1) -> Source:
    """The model, with its headers read. Raises UsageError if it cannot be used, or cannot be cut over so many ranks."""
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
    if ep > 1 and c.experts is None:
        raise UsageError(f"--mesh ep={ep} shares out experts, which {source.path} has not: leave ep out")
    if c.experts is not None and ep > c.experts.count:
        raise UsageError(f"cannot cut {c.experts.count} experts over ep={ep}: use at most ep={c.experts.count}")
    return source


def name_of(path: Path) -> str:
    """What people and clients call a model: the repository that a Hugging Face cache keeps a snapshot of, or else the name of
    its folder, or of its file without the number in a set and the quantisation."""
    if path.is_file():
        stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.name.removesuffix(".gguf"))
        return re.sub(r"[.-](I?Q\d\w*|BF16|F16|F32)$", "", stem)
    folder = path.absolute()
    *_, cached, snapshots, _ = ("", "", *folder.parts)
    if snapshots == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/")
    return path.resolve().name


def load(
    source: Source, tp: Axis, dtype: str, here: bool, ep: Axis | None = None, alike: bool = True
) -> tuple[Transformer, float]:
    """The model, with this rank's share of its weights read, and the seconds that took; `here`: this rank says so at once.
    `ep`: its ranks share the experts out. `alike`: they have the same tokens, and make no gradients."""
    begun = perf_counter()
    model = build(source.config, tp, source.weights(dtype), ep=ep, alike=alike and ep is not None)
    seconds = perf_counter() - begun
    if here:
        for note in source.notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
    progress.loaded(name_of(source.path), sum(prod(p.layout.shape) for p in model.parameters), seconds, here)
    return model, seconds


def check_memory(
    source: Source, tp: int, dtype: str, option: str = "", count: int = 0, tokens: int = 0, nbytes: int = 0, ep: int = 1
) -> None:
    """Refuse what this host's ranks together have no memory for: on each its weights, and a KV cache of `count`, as `option`
    says, each of so many tokens or bytes."""
    dry, ranks = build(source.config, DryAxis("tp", tp), dry_weights(dtype), ep=DryAxis("ep", ep)), ep * tp
    weights = sum(p.data.nbytes for p in dry.parameters)
    one = nbytes + tokens * make_cache(dry, "paged").bytes_per_token
    has = memory.available()
    if why := memory.lacking(weights, ranks, has):
        raise UsageError(f"the weights of {source.path} take {why}: use more hosts, or a smaller model")
    if why := memory.lacking(weights + count * one, ranks, has):
        most = int((has // memory.ranks_here(ranks) - weights) // one)
        raise UsageError(f"{option} {count} and the model's weights take {why}: use at most {most}")


def tokenizer(source: Source) -> Tokenizer | None:
    """The model's tokenizer; None where there is none that can be used, which a note then says."""
    try:
        return open_tokenizer(source.path, source.metadata)
    except ValueError as error:
        source.notes.append(f"its tokenizer cannot be used, only token ids: {error}")
        return None


def ends(source: Source, known: Tokenizer | None) -> frozenset[int]:
    """The tokens that end a text: those that the files name, and the tokenizer's own."""
    return source.wishes.ends | (frozenset() if known is None else frozenset(known.eos_ids))


def sampling(args: argparse.Namespace, source: Source) -> Sampling:
    """How to choose tokens: as the options say, and where one says nothing, as the model's makers want it, if they want it to
    be sampled at all. Raises UsageError for what is out of range, and for filters of a greedy choice."""
    given = {name: getattr(args, name) for name in SAMPLED if getattr(args, name) is not None}
    wished = {"temperature": 1.0} | dict(source.wishes.sampling) if source.wishes.samples else {}
    try:
        made = Sampling(**wished | given, seed=args.seed)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if filters := [name for name in given if name != "temperature" and not made.temperature]:
        raise UsageError(f"--{filters[0].replace('_', '-')} does nothing without --temperature: leave it out, or give one")
    if made.temperature and (unsaid := {name: value for name, value in wished.items() if name not in given}):
        said = ", ".join(f"{name} {value:g}" for name, value in unsaid.items())
        source.notes.append(
            f"{source.path} asks for {said}, which holds where no option says otherwise; greedy: --temperature 0"
        )
    return made


def add_special(p: argparse._ActionsContainer) -> None:
    """How the text of a prompt becomes tokens; the defaults are those of vLLM and of llama.cpp's server."""
    yes = {"action": argparse.BooleanOptionalAction, "default": True}
    p.add_argument("--add-special-tokens", **yes, help="begin a text with bos, if the model's texts do")
    p.add_argument("--parse-special", **yes, help="read control tokens such as <|im_end|> in a text as tokens, not as text")


def encoded(text: str, source: Source, known: Tokenizer | None, args: argparse.Namespace) -> list[int]:
    if known is None:
        why = next((f": {note}" for note in source.notes if note.startswith("its tokenizer")), "")
        raise UsageError(f"--model {source.path} has no tokenizer{why}: give token ids with --tokens")
    try:
        return known.encode(text, args.parse_special, None if args.add_special_tokens else False)
    except ValueError as error:
        raise UsageError(f"{error}: use text in UTF-8") from None


def sequences(args: argparse.Namespace, source: Source, known: Tokenizer | None) -> np.ndarray:
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
    ids = encoded(text, source, known, args)
    if not ids:
        raise UsageError("the text to score is empty: use some text")
    return np.array([ids], np.int64)


def _ids_of_file(path: Path) -> np.ndarray:
    try:
        # A map: a header may claim more than the file and the memory have.
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy's reader has no error of its own
        why = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"--tokens-file {path}: {why[:200]}: use an .npy file of integers") from None
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or not ids.size:
        shape = f"{ids.dtype} of shape {ids.shape}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise UsageError(f"--tokens-file {path} holds {shape}: use integers of shape (tokens,) or (sequences, tokens)")
    try:
        return np.atleast_2d(ids).astype(np.int64)
    except MemoryError:
        raise UsageError(f"--tokens-file {path} holds {ids.size:,} tokens, more than memory does: use fewer") from None


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


def check_layers(kind: str | None, config: Config) -> None:
    """Refuse to draft by as many layers as the model has, or more."""
    if kind and kind != "ngram" and int(kind.partition("=")[2]) >= config.layers:
        most = config.layers - 1
        raise UsageError(f"--speculate {kind}: the model has {config.layers} layers: use layers=1 to layers={most}")


def draft_of(path: Path | None, tp: int, config: Config, known: Tokenizer | None) -> Source | None:
    """The model that drafts, where there is one. Tables of different length must be rounded up differently only: raises
    UsageError where the tokenizers of both do not show that."""
    if path is None:
        return None
    draft = opened(path, tp)
    theirs, ours = draft.config.vocabulary, config.vocabulary
    if theirs == ours:
        return draft
    said = f"--draft {path} has a vocabulary of {theirs}, the model one of {ours}"
    other = tokenizer(draft)
    if known is None or other is None:
        raise UsageError(f"{said}, and without tokenizers nothing shows that their tokens are the same: use one of the same")
    common = min(known.vocabulary, other.vocabulary)
    differs = next((i for i in range(common) if known.bytes_of(i, True) != other.bytes_of(i, True)), None)
    if differs is not None or common > min(theirs, ours):
        raise UsageError(f"{said}, and their tokens are not the same, as {differs or common} is not: use one of the same")
    return draft


def held(model: Transformer) -> dict[str, int]:
    """Bytes of this rank: its weights, and the most that it has held."""
    return {"weights": sum(p.data.nbytes for p in model.parameters), "peak": peak_bytes()}


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
