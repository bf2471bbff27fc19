"""Is speculative decoding worth it here? Acceptance, costs and wall time by draft and gamma, predicted beside measured."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mpi4py import MPI

from inference.cache import CACHES
from inference.generate import Generator, Timings, make_cache
from inference.sampling import Sampling
from inference.speculation.gain import Account, Gamma, expected_tokens, operations, speedup
from inference.speculation.generator import Speculative
from inference.speculation.rule import MOST
from launch import pretrained, report
from launch.measure.acceptance import alpha_by_overlap, costs, draft_operations, explained, tie
from launch.measure.prompts import PROMPTS
from launch.options import UsageError, amount, parser, positive
from launch.pictures.speculate import picture
from launch.terminal import progress, targets
from layers.transformer import Transformer
from models.source import Source
from models.tokenizer import Tokenizer
from parallel.control import Control
from parallel.mesh import Mesh

DEFAULT_PROMPTS = ("story", "rename", "quotes", "list")
# Worth it is what gains more than measuring scatters.
GAIN = 1.05


def _gammas(text: str) -> list[int]:
    """An argparse type: 1,2,4."""
    parts = text.split(",")
    wrong = [p for p in parts if not p.isdecimal() or not 1 <= int(p) <= MOST]
    if wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no number of drafted tokens: use some of 1 to {MOST}, as 1,2,4")
    return sorted({int(p) for p in parts})


def _drafts(text: str) -> list[str]:
    """An argparse type: ngram,layers=10."""
    return list(dict.fromkeys(pretrained.kind(part) for part in text.split(",")))


def options() -> argparse.ArgumentParser:
    p = parser(
        "speculate",
        "Is speculative decoding worth it here? Runs real prompts plainly and with each draft and gamma, in turn. As it "
        "stands, with SmolLM2 on 2 ranks, about three minutes: fewer --gammas, --prompts or --max-new-tokens take less.",
        (
            "mpirun -n 2 python -m launch.speculate",
            "mpirun -n 2 python -m launch.speculate --drafts ngram --gammas 2,4",
        ),
    )
    pretrained.add_model(p)
    p.add_argument("--draft", metavar="PATH", type=Path, help="draft with this other model of the same vocabulary")
    p.add_argument(
        "--drafts",
        type=_drafts,
        metavar="ngram,layers=K",
        help="ways to draft (default: ngram and a third of the layers; beside --draft none)",
    )
    p.add_argument("--gammas", metavar="N,N", type=_gammas, default="1,2,3,4,5,6,7,8", help="numbers of tokens to draft")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompts", metavar="NAMES", default=",".join(DEFAULT_PROMPTS), help=f"of {', '.join(PROMPTS)}; or all")
    what.add_argument(
        "--tokens",
        metavar="IDS",
        type=pretrained.token_ids,
        help="token ids instead of prompts, for models without a tokenizer",
    )
    p.add_argument("--max-new-tokens", type=positive, default=32, help="the most tokens to add to a prompt, 2 or more")
    p.add_argument("--temperature", type=amount, default=0.0, help="0 is greedy, and is checked against plain decoding")
    p.add_argument("--cache", choices=tuple(CACHES), default="contiguous", help="how the KV cache is kept")
    p.add_argument("--png", metavar="FILE", type=targets.Picture, default="out/speculate.png", help="the picture")
    return p


class Task(NamedTuple):
    """The model, ids by the name of their prompt, and what drafts: the model itself (`drafts`: how), or another (`draft`)."""

    source: Source
    tokenizer: Tokenizer | None
    prompts: dict[str, list[int]]
    sampling: Sampling
    drafts: list[str]
    draft: Source | None


def check(args: argparse.Namespace, ranks: int) -> Task:
    source = pretrained.opened(args.model, ranks)
    drafts, layers = args.drafts, source.config.layers
    if drafts is None:
        drafts = [] if args.draft else ["ngram", *([f"layers={max(1, layers // 3)}"] if layers > 1 else [])]
    for kind in drafts:
        pretrained.check_layers(kind, source.config)
    pretrained.check_memory(source, ranks, args.dtype)
    tokenizer = pretrained.tokenizer(source)
    draft = pretrained.draft_of(args.draft, ranks, source.config, tokenizer)
    prompts = ids_of_prompts(args, source, tokenizer)
    if args.max_new_tokens < 2:
        raise UsageError("--max-new-tokens 1 leaves nothing to draft: use 2 or more")
    for name, ids in prompts.items():
        # The costs are measured on as many rows more as are verified at once.
        room = source.config.context - args.max_new_tokens - MOST - 1
        if not 0 < len(ids) <= room:
            raise UsageError(
                f"{name} of {len(ids)} tokens with --max-new-tokens {args.max_new_tokens} does not fit into the model's "
                f"context of {source.config.context}: use 1 to {room} tokens"
            )
        pretrained.check_ids(ids, source.config, len(ids))
    return Task(source, tokenizer, prompts, Sampling(args.temperature, seed=args.seed), drafts, draft)


def ids_of_prompts(args: argparse.Namespace, source: Source, tokenizer: Tokenizer | None) -> dict[str, list[int]]:
    if args.tokens is not None:
        return {"tokens": args.tokens}
    names = list(PROMPTS) if args.prompts == "all" else args.prompts.split(",")
    for name in names:
        if name not in PROMPTS:
            raise UsageError(f"--prompts has no {name!r}: use some of {', '.join(PROMPTS)}, or all")
    if tokenizer is None:
        raise UsageError(f"prompts need a tokenizer, which {source.path} has not: give token ids with --tokens")
    try:
        return {name: PROMPTS[name].ids(tokenizer) for name in names}
    except ValueError as error:
        raise UsageError(f"--prompts {args.prompts}: {error}: use story,essay,function,list, which are no chats") from None


def drafting(args: argparse.Namespace, task: Task, model: Transformer, mesh: Mesh) -> dict[str, Speculative]:
    """A generator for each way to draft, each with a cache of its own."""
    ways: dict[str, str | Generator] = {kind: kind for kind in task.drafts}
    if task.draft is not None:
        other, _ = pretrained.load(task.draft, mesh.tp, args.dtype, mesh.tp.rank == 0)
        ways["model"] = Generator(other, mesh, make_cache(other, args.cache))
    return {name: Speculative(model, mesh, make_cache(model, args.cache), way) for name, way in ways.items()}


def timed_tokens(it: Generator, task: Task, prompt: list[int], most: int) -> tuple[list[int], float]:
    """At most so many new tokens, and seconds of one of those that were decoded."""
    it.timings = Timings()
    ends = frozenset() if task.tokenizer is None else frozenset(task.tokenizer.eos_ids)
    tokens = [s.token for s in it.tokens(prompt, task.sampling, most, ends=ends)]
    return tokens, it.timings.decode_seconds / max(1, it.timings.decode_tokens)


def in_turn(task: Task, gammas: list[int], most: int, plain: Generator, drafters: dict[str, Speculative]) -> Iterator[tuple]:
    """Each prompt, gamma by gamma, plainly and then with each draft. Yields what a row is about, its alpha and account, its
    speed over that of plain decoding, and where greedy tokens differ."""
    alphas = {}
    for name, gamma in ((name, gamma) for name in task.prompts for gamma in gammas):
        prompt = task.prompts[name]
        tokens, step_seconds = timed_tokens(plain, task, prompt, most)
        if len(tokens) < 2:
            raise UsageError(f"the model ends at once after {name}: use another prompt")
        for kind, it in drafters.items():
            if (name, kind) not in alphas:
                alphas[name, kind] = alpha_by_overlap(it, prompt + tokens, len(tokens), task.sampling)
            it.gamma, it.account = Gamma(gamma), Account()
            got, seconds = timed_tokens(it, task, prompt, most)
            unlike = tie(plain, prompt, tokens, got, task.source.config) if task.sampling.temperature == 0 else None
            about = {"prompt": name, "draft": kind, "gamma": gamma}
            yield about, alphas[name, kind], it.account, step_seconds / seconds, unlike


def main(args: argparse.Namespace, comm: MPI.Intracomm, task: Task) -> int:
    control, first, source = Control(comm), comm.rank == 0, task.source
    mesh = start.make_mesh(args, comm, tp=comm.size)
    model, _ = pretrained.load(source, mesh.tp, args.dtype, first)
    plain = Generator(model, mesh, make_cache(model, args.cache))
    drafters = drafting(args, task, model, mesh)
    verify, c = costs(drafters, next(iter(task.prompts.values())), task.sampling, args.gammas, comm)
    ops = {kind: draft_operations(it) for kind, it in drafters.items()}
    rows, differences = [], []
    turns = in_turn(task, args.gammas, args.max_new_tokens, plain, drafters)
    count = len(task.prompts) * len(args.gammas) * len(drafters)
    for about, alpha, account, measured, unlike in progress.items("speculating", first, count)(turns):
        kind = about["draft"]
        rows.append({**about, "alpha": alpha, **factors(account, about["gamma"], verify, c[kind], ops[kind], alpha, measured)})
        if unlike is not None:
            differences.append({**about, **unlike})
    same = control.everyone([(r["rounds"], r["accepted"]) for r in rows])
    wrong = [f"{d['prompt']}, {d['draft']}, gamma {d['gamma']}" for d in differences if not d["explained"]]
    if not first:
        return 1 if wrong else 0
    wrong += report.of_ranks("rounds", [s == same[0] for s in same])
    unwritten = targets.write(args.png, lambda file: picture(file, rows, verify, c))
    result = report.header("speculate", args, mesh) | {
        "model": str(source.path),
        "family": source.family,
        "config": {k: getattr(args, k) for k in ("max_new_tokens", "temperature", "cache", "gammas")}
        | {"prompts": {name: len(ids) for name, ids in task.prompts.items()}},
        "costs": {"verify": verify, "draft": c, "draft_operations": ops},
        "rows": rows,
        "differences": differences,
        "words": words(rows, verify, c),
        "png": None if unwritten else str(args.png),
    }
    greedy = "the greedy tokens are those of plain decoding" if args.temperature == 0 else "drawn tokens are not compared"
    return report.publish(args.json, result, lambda: show(result), wrong, f"all agreed: {greedy}", "; ", unwritten=[unwritten])


def factors(
    account: Account, gamma: int, verify: list[float], c: float, ops: float, alpha: float | None, measured: float
) -> dict:
    """A run's counts and factors. Null: without a draft there is no alpha.

    The theorems take a draft to propose `gamma` tokens always. What it proposed in each round is known: the numbers "of these
    rounds" are predicted from that.
    """
    a = 0.0 if alpha is None else alpha
    drafted = {rows - 1: len(seconds) for rows, seconds in account.verify_seconds.items()}
    made = sum(many * expected_tokens(a, n) for n, many in drafted.items())
    spent = sum(many * (n * c + verify[n]) for n, many in drafted.items())
    return {
        "alpha_of_acceptances": account.alpha,
        "rounds": account.rounds,
        "drafted": account.drafted,
        "tested": account.tested,
        "accepted": account.accepted,
        "accepted_to_drafted": account.accepted / account.drafted if account.drafted else None,
        "tokens_per_round": account.tokens / account.rounds,
        "expected_tokens": expected_tokens(a, gamma),
        "expected_of_these_rounds": made / account.rounds,
        "factor_theorem": speedup(a, gamma, c),
        "factor_with_costs": speedup(a, gamma, c, verify[gamma]),
        "factor_of_these_rounds": made / spent,
        "factor_measured": measured,
        "operations_factor": operations(a, gamma, ops),
    }


def words(rows: list[dict], verify: list[float], c: dict[str, float]) -> list[str]:
    """Is it worth it, and why: a sentence or two for each draft."""
    said = []
    for kind in c:
        best: dict[str, dict] = {}
        for r in (r for r in rows if r["draft"] == kind):
            best[r["prompt"]] = max(best.get(r["prompt"], r), r, key=lambda r: r["factor_measured"])
        name = lambda r: f"{r['prompt']} ({r['factor_measured']:.2f} at gamma {r['gamma']}, alpha {r['alpha'] or 0:.2f})"  # noqa: E731
        pays = [name(r) for r in best.values() if r["factor_measured"] > GAIN]
        not_ = [name(r) for r in best.values() if r["factor_measured"] <= GAIN]
        text = f"{kind}: " + (f"worth it on {', '.join(pays)}" if pays else "not worth it on any of these prompts")
        text += f"; not on {', '.join(not_)}." if pays and not_ else f": {', '.join(not_)}." if not_ else "."
        r = max(best.values(), key=lambda r: r["factor_measured"])
        g = r["gamma"]
        text += (
            f" A drafted token costs {c[kind]:.2f} of a plain step, and verifying {g}, which is {g + 1} rows at once, "
            f"{verify[g]:.2f}, where the theorem counts 1: at alpha {r['alpha'] or 0:.2f} it promises "
            f"{r['factor_theorem']:.2f}, these costs leave {r['factor_with_costs']:.2f}"
        )
        share = r["drafted"] / (r["rounds"] * g)
        if share < 0.95:
            text += f", and as {share:.0%} of the tokens that could be were drafted, {r['factor_of_these_rounds']:.2f}"
        text += f"; measured are {r['factor_measured']:.2f}."
        # With one drafted token, alpha must be above this (corollary 3.9, with the costs as they are).
        needed = verify[1] + c[kind] - 1
        text += f" To gain at gamma 1, alpha has to be above {needed:.2f}" + ("." if needed < 1 else ", which it cannot be.")
        said.append(text)
    return said


def show(result: dict) -> None:
    number = lambda v: "-" if v is None else f"{v:.2f}"  # noqa: E731
    verify = result["costs"]["verify"]
    head = f"{result['family']} on tp={result['ranks']}, {result['dtype']}, temperature {result['config']['temperature']:g}"
    report.table(
        f"{head}: what so many rows cost the target at once, in rows of one",
        ("rows", *map(str, range(1, len(verify) + 1))),
        [("t(rows) / t(1)", *(f"{v:.2f}" for v in verify))],
    )
    for kind, c in result["costs"]["draft"].items():
        cells = ("alpha", "alpha_of_acceptances", "accepted_to_drafted", "tokens_per_round", "expected_tokens")
        cells += ("expected_of_these_rounds", "factor_theorem", "factor_with_costs", "factor_of_these_rounds")
        cells += ("factor_measured", "operations_factor")
        report.table(
            f"{kind}: c = {c:.3f} of a step, {result['costs']['draft_operations'][kind]:.3f} of its operations",
            (
                *("prompt", "gamma", "alpha", "by acceptances", "acc/drafted", "tokens/run", "expected", "as drafted"),
                *("theorem 3.8", "with costs", "as drafted", "measured", "operations"),
            ),
            [(r["prompt"], r["gamma"], *(number(r[cell]) for cell in cells)) for r in result["rows"] if r["draft"] == kind],
            keys=2,
        )
    report.say(
        "alpha: 1 - total variation, over the target's own text; by acceptances: accepted of tested, up to the first rejected",
        "as drafted: predicted for what was drafted round by round, where a draft does not always propose gamma tokens",
        "",
        "\n\n".join(result["words"]),
        "",
        *([f"The picture is {result['png']}"] if result["png"] else []),
    )
    for d in result["differences"]:
        report.say(f"{d['prompt']}, {d['draft']}, gamma {d['gamma']}: {explained(d)}")


if __name__ == "__main__":
    start.run(options(), check, main)
