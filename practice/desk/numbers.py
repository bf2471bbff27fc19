"""The generated parts of practice's pages: the numbers of the cheatsheet, the reading list, the table of mutants."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from inference.speculation.gain import expected_tokens, speedup
from layers.batch import Batch
from layers.loss import VocabParallelCrossEntropy
from models.build import build
from models.config import cache_entries
from models.published import PUBLISHED, entries_by_rank
from parallel.ledger import Traffic, wire_bytes
from plan.dry import DryAxis, dry_weights
from practice import blind, mutants_found, pages, promises
from practice.exercise import every
from practice.workbook import replace

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs/practice.md"
MODEL, RANKS, TOKENS = "SmolLM2-135M", 3, 1024
HALF, SINGLE = 2, 4

Rows = list[tuple[object, ...]]


def model(ranks: int, rank: int = 0) -> object:
    return build(PUBLISHED[MODEL], DryAxis("tp", ranks, rank), dry_weights("float32"))


def entries(parameters: Iterable) -> int:
    return sum(p.data.size for p in parameters)


def sent(traffic: Iterable[Traffic], phase: str, ranks: int) -> float:
    """Bytes that rank 0 sends in a phase."""
    return sum(t.calls * wire_bytes(t.verb, t.message_bytes, ranks) for t in traffic if t.phase == phase)


def mib(n: float) -> str:
    return f"{n / 2**20:.2f} MiB"


def letters() -> Rows:
    c = PUBLISHED[MODEL]
    return [(MODEL, c.d_model, c.d_ff, c.heads, c.kv_heads, c.d_model // c.heads, f"{c.vocabulary:,}", c.layers)]


def parameters() -> Rows:
    m = model(1)
    block = m.blocks[0]
    flops = m.flops(TOKENS)
    return [
        ("attention of a block", f"{entries(block.attention.parameters):,}"),
        ("MLP of a block", f"{entries(block.mlp.parameters):,}"),
        ("embedding, which is the head too", f"{entries(m.embedding.parameters):,}"),
        ("all", f"{entries(m.parameters):,}"),
        (f"FLOPs of a token, forward and backward, in sequences of {TOKENS:,}", f"{flops / 1e9:.3f} G"),
    ]


def memory() -> Rows:
    whole, cut = model(1), model(RANKS)
    n = entries(whole.parameters) * SINGLE
    part = entries(cut.parameters) * SINGLE
    states = [("weights, gradients, m and v", 4 * n), ("the same with ZeRO-1, p = 4", 2 * n + 2 * n / 4)]
    return [
        *((what, mib(size)) for what, size in states),
        (f"weights, gradients, m and v of rank 0 of tp = {RANKS}", mib(4 * part)),
        (f"a block keeps for backward, {TOKENS:,} tokens", mib(whole.blocks[0].saved_bytes(Batch([TOKENS])))),
        (f"the same on rank 0 of tp = {RANKS}", mib(cut.blocks[0].saved_bytes(Batch([TOKENS])))),
        ("scores of one head, were they kept", mib(TOKENS * TOKENS * SINGLE)),
    ]


def communication() -> Rows:
    block = model(RANKS).blocks[0]
    loss = VocabParallelCrossEntropy(DryAxis("tp", RANKS), PUBLISHED[MODEL].vocabulary)
    rows: Rows = [
        (f"{verb} of 1 MiB on 4 ranks", mib(wire_bytes(verb, 2**20, 4)), "")
        for verb in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
    ]
    for what, traffic in (
        ("MLP", block.mlp.traffic(TOKENS)),
        ("attention", block.attention.traffic(Batch([TOKENS]))),
        ("vocabulary-parallel loss", loss.traffic(TOKENS, SINGLE)),
    ):
        ways = [mib(sent(traffic, phase, RANKS)) for phase in ("forward", "backward")]
        rows.append((f"{what}, {TOKENS:,} tokens, tp = {RANKS}", *ways))
    gradients = entries(model(1).parameters) * SINGLE
    rows.append(("gradients of the model, dp = 4, with ZeRO-1 or without", "", mib(wire_bytes("all_reduce", gradients, 4))))
    return rows


def cache() -> Rows:
    return [
        (name, f"{cache_entries(c):,}", f"{cache_entries(c) * HALF:,}", f"{max(entries_by_rank(c, 4)) * HALF:,}")
        for name, c in PUBLISHED.items()
    ]


def speculative() -> Rows:
    return [
        (alpha, *(f"{expected_tokens(alpha, g):.2f}" for g in (1, 3, 5)), f"{speedup(alpha, 5, 0.1):.2f}")
        for alpha in (0.5, 0.7, 0.8, 0.9)
    ]


TABLES: dict[str, tuple[tuple[str, ...], Callable[[], Rows]]] = {
    "letters": (("", "D", "F", "H", "K", "E", "V", "L"), letters),
    "parameters": (("parameters", "numbers"), parameters),
    "memory": (("memory", "bytes"), memory),
    "communication": (("one rank sends", "forward", "backward"), communication),
    "cache": (("kept of a token", "numbers", "bytes, bfloat16", "on the fullest of 4 ranks"), cache),
    "speculative": (("alpha", "g = 1", "g = 3", "g = 5", "speed-up, g = 5, c = .1"), speculative),
}


def cheatsheet(text: str) -> str:
    """The text with its numbers as the code has them now."""
    for name, (columns, rows) in TABLES.items():
        text = pages.between(text, name, pages.table(columns, rows()))
    return text


def docs(text: str) -> str:
    text = pages.between(text, "mutants", pages.table(mutants_found.COLUMNS, mutants_found.rows(every())))
    return pages.between(text, "blind", pages.table(blind.COLUMNS, blind.rows()))


def authoring(text: str) -> str:
    return pages.between(text, "promises", pages.table(promises.COLUMNS, promises.rows(every())))


def write() -> list[Path]:
    """Bring every generated page up to date; returns them."""
    sheet = pages.HERE / "cheatsheet.md"
    replace(sheet, cheatsheet(sheet.read_text()))
    replace(DOCS, docs(DOCS.read_text()))
    reading = pages.HERE / "READING.md"
    replace(reading, pages.shared_reading(every()))
    authors = pages.HERE / "AUTHORING.md"
    replace(authors, authoring(authors.read_text()))
    return [sheet, DOCS, reading, authors]
