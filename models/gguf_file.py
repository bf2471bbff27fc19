"""A GGUF file: its header, its tensors dequantised as they are read, and its keys and values -> our Config."""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.quants import dequantize

from layers.rope import Divided, Linear, Rope, Scaling, Yarn
from models.config import Config, Experts, Latent
from models.families import gguf_names, pieces
from models.piece import ModelError
from models.settings import Settings
from models.source import Source

ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3", "deepseek2")
_PLAIN = {GGMLQuantizationType.F32: np.dtype("<f4"), GGMLQuantizationType.F16: np.dtype("<f2")}
# How values are stored, by the number of their type; 8 is a string, 9 an array.
_VALUES = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _Header:
    """Reads a header from its first byte on. Past the end of the file it raises struct.error or ValueError."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position = data, 0

    def number(self, code: str) -> int | float | bool | bytes:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.position)
        self.position += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length, start = self.number("Q"), self.position
        self.position += length
        if self.position > len(self.data):
            raise ValueError("a string goes beyond the end")
        return self.data[start : self.position].decode()

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_VALUES[kind])
        inside, length = self.number("I"), self.number("Q")
        if inside in (_STRING, _ARRAY):
            return [self.value(inside) for _ in range(length)]
        dtype = np.dtype(f"<{_VALUES[inside]}")
        start, self.position = self.position, self.position + length * dtype.itemsize
        return np.frombuffer(self.data, dtype, length, start).tolist()


class GGUF:
    """The tensors and the keys and values of a GGUF file, version 2 or 3, little-endian
    (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

    Types and dequantisation are the gguf package's. Its reader is not used: of a vocabulary of 49152 it makes some hundred
    thousand arrays, which takes 4 s and 150 MB on every rank. Raises ModelError for a file that is broken or cut short.
    """

    def __init__(self, file: Path) -> None:
        self.path = file
        self.metadata: dict[str, object] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.nbytes = 0
        self._at: dict[str, tuple[GGMLQuantizationType, int]] = {}
        try:
            with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._read_header(_Header(data))
        except ModelError:
            raise
        except OSError as e:
            raise ModelError(f"{file}: {e.strerror}") from None
        except (struct.error, ValueError, KeyError, OverflowError) as e:
            raise ModelError(f"{file}: not a whole GGUF file: its header is cut short or damaged ({e})") from None

    def _read_header(self, header: _Header) -> None:
        magic, version = header.number("4s"), header.number("I")
        if magic != b"GGUF" or version not in (2, 3):
            begins = header.data[:8]
            raise ModelError(f"{self.path}: not a little-endian GGUF file of version 2 or 3: it begins with {begins!r}")
        tensors, keys = header.number("Q"), header.number("Q")
        for _ in range(keys):
            key = header.string()
            self.metadata[key] = header.value(header.number("I"))
        for _ in range(tensors):
            name = header.string()
            shape = [header.number("Q") for _ in range(header.number("I"))]
            if name in self._at:
                raise ModelError(f"{self.path}: tensor {name!r} is there twice")
            self._at[name] = GGMLQuantizationType(header.number("I")), header.number("Q")
            self.shapes[name] = tuple(reversed(shape))
        alignment = self.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-header.position // alignment) * alignment
        for name, (kind, offset) in self._at.items():
            rows, row = self._rows(name, kind)
            self._at[name] = kind, start + offset
            self.nbytes += prod(rows) * row
            if start + offset + prod(rows) * row > len(header.data):
                raise ModelError(
                    f"{self.path}: cut short: tensor {name!r} ends at byte {start + offset + prod(rows) * row}, "
                    f"the file at {len(header.data)}"
                )

    def _rows(self, name: str, kind: GGMLQuantizationType) -> tuple[tuple[int, ...], int]:
        """The dims but the fastest, and the bytes along that."""
        block, size = GGML_QUANT_SIZES[kind]
        *rows, width = self.shapes[name]
        if width % block:
            raise ModelError(f"{self.path}: tensor {name!r} has rows of {width}, {kind.name} is in blocks of {block}")
        return tuple(rows), width // block * size

    def read(self, name: str, at: tuple[slice, ...]) -> np.ndarray:
        kind, offset = self._at[name]
        if kind in _PLAIN:
            return np.array(np.memmap(self.path, _PLAIN[kind], "r", offset, self.shapes[name])[at], order="C")
        rows, row = self._rows(name, kind)
        block, size = GGML_QUANT_SIZES[kind]
        *outer, inner = at
        # Whole blocks of the fastest dim, those that the range touches.
        first, last = inner.start // block, -(-inner.stop // block)
        stored = np.memmap(self.path, np.uint8, "r", offset, (*rows, row))[(*outer, slice(first * size, last * size))]
        # As one row: gguf takes 16 rows at a time, which are too few entries for NumPy.
        values = dequantize(np.array(stored, order="C").reshape(1, -1), kind).reshape(*stored.shape[:-1], -1)
        return values[..., inner.start - first * block : inner.stop - first * block]

    def file(self, name: str) -> Path:
        return self.path

    def unreadable(self, name: str) -> str | None:
        kind = self._at[name][0]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            return f"{kind.name}, which the gguf package cannot dequantise: use F32, F16, BF16, Q8_0 or another of its types"
        return None


def open_file(file: Path) -> Source:
    """The model in a GGUF file. Reads the header only; its tensors are yet to be checked."""
    gguf = GGUF(file)
    architecture = gguf.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"{file}: general.architecture is {architecture!r}: unknown family, use one of {known}")
    if gguf.metadata.get("split.count", 1) not in (0, 1):
        raise ModelError(f"{file}: one of {gguf.metadata['split.count']} files: join them with llama-gguf-split --merge")
    lead = f"{architecture}."
    inside = {key.removeprefix(lead): value for key, value in gguf.metadata.items() if key.startswith(lead)}
    config = _config(Settings(inside, f"{file}: {architecture}"), architecture, gguf)
    return Source(
        file,
        architecture,
        config,
        gguf,
        pieces(config, gguf_names(gguf.shapes), len(gguf.shapes)),
        harmless=lambda name: name == "rope_freqs.weight" and config.rope is not None,
        metadata=gguf.metadata,
    )


def _config(s: Settings, architecture: str, gguf: GGUF) -> Config:
    def there(name: str) -> bool:
        return name in gguf.shapes

    if not there("token_embd.weight"):
        raise ModelError(f"{gguf.path}: tensor 'token_embd.weight' is missing: a {architecture} needs it")
    gpt2, latent = architecture == "gpt2", architecture == "deepseek2"
    D, H, context = s.size("embedding_length"), s.size("attention.head_count"), s.size("context_length")
    layers, d_ff = s.size("block_count"), s.size("feed_forward_length")
    if D % H and s.get("attention.key_length") is None:
        raise s.refuse("attention.head_count", f"use a divisor of embedding_length, {D}, or give attention.key_length")
    of_latent = _latent(s) if latent else None
    E = of_latent.d_rope if latent else s.size("attention.key_length", D // H)
    if not latent:
        s.only("attention.value_length", E)
    # Latent attention is stored as one key/value head, the latent itself.
    K = s.size("attention.head_count_kv", H)
    K = H if latent else K
    if H % K:
        raise s.refuse("attention.head_count_kv", f"use a divisor of attention.head_count, {H}")
    config = Config(
        vocabulary=gguf.shapes["token_embd.weight"][0],
        d_model=D,
        layers=layers,
        heads=H,
        kv_heads=K,
        d_ff=d_ff,
        context=context,
        d_head=None if latent else E,
        activation="gelu" if gpt2 else "swiglu",
        norm="layer" if gpt2 else "rms",
        eps=s.number("attention.layer_norm_epsilon" if gpt2 else "attention.layer_norm_rms_epsilon"),
        bias=there("blk.0.attn_q.bias") or architecture in ("gpt2", "qwen2"),
        bias_out=there("blk.0.attn_output.bias"),
        bias_mlp=there("blk.0.ffn_down.bias"),
        qk_norm=architecture == "qwen3",
        tied=not there("output.weight"),
        positions=context if gpt2 else 0,
        rope=None if gpt2 else _rope(s, E, architecture, gguf),
        latent=of_latent,
        experts=_experts(s, d_ff, layers, latent, gguf),
    )
    # Known, and of no consequence.
    for key in ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned"):
        s.get(key)
    # Any other setting may change the mathematics.
    further = sorted(set(s.values) - s.taken)
    if further:
        raise s.refuse(further[0], "not supported, such a setting is not known for this family")
    return config


def _latent(s: Settings) -> Latent:
    # Files with the keys of the first line have in those of the second the widths of the absorbed form.
    wide, value = s.size("attention.key_length_mla", None), s.size("attention.value_length_mla", None)
    absorbed = s.size("attention.key_length"), s.size("attention.value_length")
    wide, value = wide or absorbed[0], value or absorbed[1]
    C, R = s.size("attention.kv_lora_rank"), s.size("rope.dimension_count", most=wide - 1)
    return Latent(C, wide - R, R, value, s.size("attention.q_lora_rank", None) or 0)


def _experts(s: Settings, d_ff: int, layers: int, latent: bool, gguf: GGUF) -> Experts | None:
    count, first = s.size("expert_count", 0, least=0), s.size("leading_dense_block_count", 0, least=0)
    width = s.size("expert_feed_forward_length", d_ff)
    shared = width * s.size("expert_shared_count", 0, least=0)
    s.only("nextn_predict_layers", 0)
    if not count or first >= layers:
        s.get("expert_used_count")
        return None
    groups = s.size("expert_group_count", 1, most=count)
    if count % groups:
        raise s.refuse("expert_group_count", f"use a divisor of expert_count, {count}")
    active_groups = s.size("expert_group_used_count", 1, most=groups)
    active = s.size("expert_used_count", most=active_groups * count // groups)
    # 1 is softmax, also where nothing is said; 2 is sigmoid.
    sigmoid = s.only("expert_gating_func", 1, 2) == 2
    return Experts(
        count,
        active,
        width,
        shared,
        first,
        scoring="sigmoid" if sigmoid else "softmax",
        normed=s.flag("expert_weights_norm", not latent),
        scale=s.number("expert_weights_scale", 1.0) or 1.0,
        groups=groups,
        active_groups=active_groups,
        group_top=min(2, count // groups) if sigmoid else 1,
        correction=f"blk.{first}.exp_probs_b.bias" in gguf.shapes,
    )


def _rope(s: Settings, width: int, architecture: str, gguf: GGUF) -> Rope:
    """llama's and deepseek2's weights are turned for interleaved pairs by whoever makes GGUF files, the others are not."""
    s.only("rope.dimension_count", width)
    base, kind = s.number("rope.freq_base", 10000.0, least=1.0), s.only("rope.scaling.type", "none", "linear", "yarn")
    factor = s.number("rope.scaling.factor", 1.0, least=1.0)
    scaling: Scaling | None = None
    if kind == "linear":
        scaling = Linear(factor)
    elif kind == "yarn":
        scaling = _yarn(s, factor, architecture == "deepseek2")
    if "rope_freqs.weight" in gguf.shapes:
        shape = gguf.shapes["rope_freqs.weight"]
        if kind != "none" or shape != (width // 2,):
            raise ModelError(
                f"{gguf.path}: tensor 'rope_freqs.weight' has shape {shape} beside rope.scaling.type {kind!r}, "
                f"use ({width // 2},) and 'none'"
            )
        scaling = Divided(tuple(gguf.read("rope_freqs.weight", (slice(0, width // 2),)).tolist()))
    return Rope(
        s.rotated("rope.dimension_count", width),
        base,
        "interleaved" if architecture in ("llama", "deepseek2") else "half",
        scaling,
    )


def _yarn(s: Settings, factor: float, latent: bool) -> Yarn:
    """As llama.cpp has it: cos and sin times 0.1 ln(factor) + 1; in latent attention, the scores' scale times the square of
    yarn_log_multiplier ln(factor) + 1 instead, that multiplier being 0.1 mscale_all_dim."""
    original = s.size("rope.scaling.original_context_length")
    turns = s.number("rope.scaling.yarn_beta_fast", 32.0), s.number("rope.scaling.yarn_beta_slow", 1.0)
    if not latent:
        return Yarn(factor, original, *turns)
    everywhere = 10 * s.number("rope.scaling.yarn_log_multiplier", 0.0)
    return Yarn(factor, original, *turns, mscale_all_dim=everywhere, attention_factor=1.0)
