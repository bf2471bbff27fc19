"""`launch.bench speculate`: SmolLM2 plainly and with drafts by prompt lookup, on text that repeats its source and on prose."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

from mpi4py import MPI
from threadpoolctl import threadpool_limits

from inference.generate import Generator, Timings, make_cache
from inference.sampling import Sampling
from inference.speculation.gain import Account, Gamma
from inference.speculation.generator import Speculative
from launch import pretrained, report
from launch.bench.sizes import Sizes
from launch.bench.turns import in_turn, ratio
from launch.measure.prompts import PROMPTS
from launch.options import UsageError
from models.source import Source
from models.tokenizer import Tokenizer
from parallel.control import Control
from parallel.mesh import Mesh

REPEATING = tuple(name for name, p in PROMPTS.items() if p.repeats)
PROSE = ("story", "essay", "questions")


def check(args: argparse.Namespace, sizes: Sizes, ranks: int) -> tuple[Source, Tokenizer]:
    """SmolLM2. Raises UsageError where it is not installed or cannot be cut."""
    source = pretrained.opened(None, ranks)
    if sizes.tokens < 2:
        raise UsageError(f"--tokens {sizes.tokens} leaves nothing to draft: use 2 or more")
    return source, pretrained.tokenizer(source)


def measure(args: argparse.Namespace, sizes: Sizes, opened: tuple, comm: MPI.Intracomm, mesh: Mesh) -> dict:
    """Seconds of decoding up to `sizes.tokens` greedy tokens after each prompt, plainly and with as many drafts as pay; medians
    of ratios of turns of the same round. Prefill, the same for both, is left out, and counted in `ratios_with_prefill`."""
    source, tokenizer = opened
    model, _ = pretrained.load(source, mesh.tp, args.dtype, comm.rank == 0)
    plain = Generator(model, mesh, make_cache(model, "contiguous"))
    ngram = Speculative(model, mesh, make_cache(model, "contiguous"), "ngram")
    timings: dict[str, list[Timings]] = {}
    tokens: dict[str, list[int]] = {}

    def run(name: str, it: Generator, prompt: str) -> None:
        it.timings = Timings()
        if it is ngram:
            ngram.gamma, ngram.account = Gamma(None), Account()
        steps = it.tokens(PROMPTS[prompt].ids(tokenizer), Sampling(), sizes.tokens, ends=frozenset(tokenizer.eos_ids))
        tokens[name] = [s.token for s in steps]
        timings.setdefault(name, []).append(it.timings)
        accounts[prompt] = ngram.account

    accounts: dict[str, Account] = {}
    steps = {
        f"{kind}_{prompt}": partial(run, f"{kind}_{prompt}", it, prompt)
        for prompt in (*REPEATING, *PROSE)
        for kind, it in (("plain", plain), ("ngram", ngram))
    }
    with threadpool_limits(args.threads, user_api="blas"):
        whole = in_turn(steps, sizes.rounds, comm)
    control = Control(comm)
    every = control.everyone({name: [c.decode_seconds for c in cs[1:]] for name, cs in timings.items()})
    control.close()
    decode = {name: [max(s) for s in zip(*(e[name] for e in every), strict=True)] for name in steps}

    def factors(turns: dict[str, list[float]], of: Callable[[list[float]], float]) -> dict[str, float]:
        return {p: of([a / b for a, b in zip(turns[f"plain_{p}"], turns[f"ngram_{p}"], strict=True)]) for p in accounts}

    return {
        "seconds": {name: median(s) for name, s in decode.items()},
        "spread": {
            p: {"least": low, "most": high, "repeats": p in REPEATING, "tokens": len(tokens[f"plain_{p}"])}
            | {"alpha": accounts[p].alpha, "tokens_per_round": accounts[p].tokens / max(1, accounts[p].rounds)}
            | {"same_tokens": tokens[f"plain_{p}"] == tokens[f"ngram_{p}"]}
            for (p, low), high in zip(factors(decode, min).items(), factors(decode, max).values(), strict=True)
        },
        "ratios": {p: ratio(decode[f"plain_{p}"], decode[f"ngram_{p}"]) for p in accounts},
        "ratios_with_prefill": {p: ratio(whole[f"plain_{p}"], whole[f"ngram_{p}"]) for p in accounts},
    }


def show(result: dict) -> None:
    c, spread = result["config"], result["spread"]
    number = lambda v: "-" if v is None else f"{v:.2f}"  # noqa: E731
    report.table(
        f"SmolLM2, up to {c['tokens']} greedy tokens, ngram with auto gamma against plain decoding: {result['dtype']}, "
        f"{result['ranks']} ranks of {c['threads']} BLAS thread(s), {c['rounds']} rounds in turn",
        (
            *("prompt", "tokens", "plain ms", "ngram ms", "times as fast", "least", "most", "with prefill"),
            *("alpha", "tokens/run", "same"),
        ),
        [
            (
                f"{p} ({'repeats its source' if s['repeats'] else 'prose'})",
                s["tokens"],
                *(f"{1e3 * result['seconds'][f'{kind}_{p}']:.0f}" for kind in ("plain", "ngram")),
                *(f"{v:.2f}" for v in (result["ratios"][p], s["least"], s["most"], result["ratios_with_prefill"][p])),
                number(s["alpha"]),
                f"{s['tokens_per_round']:.2f}",
                "yes" if s["same_tokens"] else "NO",
            )
            for p, s in spread.items()
        ],
    )
    for repeats, what in ((True, "where the text repeats"), (False, "on prose")):
        ratios = [r for p, r in result["ratios"].items() if spread[p]["repeats"] == repeats]
        report.say(f"{what}, drafts by prompt lookup make decoding {min(ratios):.2f} to {max(ratios):.2f} times as fast")
