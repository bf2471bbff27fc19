"""Is speculative decoding worth it here? Acceptance, costs and wall time by draft and gamma, predicted beside measured."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
import json
from pathlib import Path

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
from models.build import build
from parallel.control import Control

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
    )
    pretrained.add_model(p)
    p.add_argument("--draft", metavar="PATH", type=Path, help="draft with this other model of the same vocabulary")
    p.add_argument(
        "--drafts",
        type=_drafts,
        metavar="ngram,layers=K",
        help="ways to draft (ngram and a third of the layers; beside --draft none)",
    )
    p.add_argument("--gammas", type=_gammas, default="1,2,3,4,5,6,7,8", help="numbers of tokens to draft")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompts", default=",".join(DEFAULT_PROMPTS), help=f"of {', '.join(PROMPTS)}; or all")
    what.add_argument(
        "--tokens", type=pretrained.token_ids, help="token ids instead of prompts, for models without a tokenizer"
    )
    p.add_argument("--max-new-tokens", type=positive, default=32, help="the most tokens to add to a prompt, 2 or more")
    p.add_argument("--temperature", type=amount, default=0.0, help="0 is greedy, and is checked against plain decoding")
    p.add_argument("--cache", choices=tuple(CACHES), default="contiguous", help="how the KV cache is kept")
    p.add_argument("--png", metavar="FILE", type=Path, default=Path("out/speculate.png"), help="the picture")
    return p


def check(args: argparse.Namespace, ranks: int) -> None:
    args.sampling = Sampling(args.temperature, seed=args.seed)
    args.source = pretrained.opened(args.model, ranks)
    layers = args.source.config.layers
    if args.drafts is None:
        args.drafts = [] if args.draft else ["ngram", *([f"layers={max(1, layers // 3)}"] if layers > 1 else [])]
    for kind in args.drafts or [None]:
        asked = argparse.Namespace(source=args.source, speculate=kind, draft=None, draft_whole=False)
        pretrained.check_speculation(asked, ranks)
    asked = argparse.Namespace(source=args.source, speculate=None, draft=args.draft, draft_whole=False)
    pretrained.check_speculation(asked, ranks)
    args.draft_source = asked.draft_source
    args.tokenizer = pretrained.tokenizer(args.source)
    args.ids = prompts(args)
    if args.max_new_tokens < 2:
        raise UsageError("--max-new-tokens 1 leaves nothing to draft: use 2 or more")
    for name, ids in args.ids.items():
        # The costs are measured on as many rows more as are verified at once.
        room = args.source.config.context - args.max_new_tokens - MOST - 1
        if not 0 < len(ids) <= room:
            raise UsageError(
                f"{name} of {len(ids)} tokens with --max-new-tokens {args.max_new_tokens} does not fit into the model's "
                f"context of {args.source.config.context}: use 1 to {room} tokens"
            )
        pretrained.check_ids(ids, args.source.config, len(ids))
    pretrained.check_picture(args.png)


def prompts(args: argparse.Namespace) -> dict[str, list[int]]:
    if args.tokens is not None:
        return {"tokens": args.tokens}
    names = list(PROMPTS) if args.prompts == "all" else args.prompts.split(",")
    for name in names:
        if name not in PROMPTS:
            raise UsageError(f"--prompts has no {name!r}: use some of {', '.join(PROMPTS)}, or all")
    if args.tokenizer is None:
        raise UsageError(f"prompts need a tokenizer, which {args.source.path} has not: give token ids with --tokens")
    try:
        return {name: PROMPTS[name].ids(args.tokenizer) for name in names}
    except ValueError as error:
        raise UsageError(f"--prompts {args.prompts}: {error}: use story,essay,function,list, which are no chats") from None


# --- the runs


def timed_tokens(it: Generator, args: argparse.Namespace, prompt: list[int]) -> tuple[list[int], float]:
    """New tokens, and seconds of one of those that were decoded."""
    it.timings = Timings()
    ends = frozenset() if args.tokenizer is None else frozenset(args.tokenizer.eos_ids)
    tokens = [s.token for s in it.tokens(prompt, args.sampling, args.max_new_tokens, ends=ends)]
    return tokens, it.timings.decode_seconds / max(1, it.timings.decode_tokens)


def main(args: argparse.Namespace, comm: MPI.Intracomm, opened: None) -> int:
    control, first = Control(comm), comm.rank == 0
    mesh = start.make_mesh(args, comm, tp=comm.size)
    model = build(args.source.config, mesh.tp, args.source.weights(args.dtype))
    plain = Generator(model, mesh, make_cache(model, args.cache))
    drafters = {kind: Speculative(model, mesh, make_cache(model, args.cache), kind) for kind in args.drafts}
    if args.draft_source is not None:
        other = build(args.draft_source.config, mesh.tp, args.draft_source.weights(args.dtype))
        draft = Generator(other, mesh, make_cache(other, args.cache))
        drafters["model"] = Speculative(model, mesh, make_cache(model, args.cache), draft)
    name, ids = next(iter(args.ids.items()))
    verify, c = costs(drafters, ids, args.sampling, args.gammas, comm)
    ops = {kind: draft_operations(it) for kind, it in drafters.items()}
    rows, differences, alphas = [], [], {}
    every = [(name, gamma) for name in args.ids for gamma in args.gammas]
    for name, gamma in report.progress("speculating", first)(every):
        tokens, step_seconds = timed_tokens(plain, args, args.ids[name])
        if len(tokens) < 2:
            raise UsageError(f"the model ends at once after {name}: use another prompt")
        for kind, it in drafters.items():
            if (name, kind) not in alphas:
                alphas[name, kind] = alpha_by_overlap(it, args.ids[name] + tokens, len(tokens), args.sampling)
            it.gamma, it.account = Gamma(gamma), Account()
            got, seconds = timed_tokens(it, args, args.ids[name])
            rows.append({"prompt": name, "draft": kind, "gamma": gamma, "alpha": alphas[name, kind]})
            rows[-1] |= told(it.account, gamma, verify, c[kind], ops[kind], alphas[name, kind], step_seconds / seconds)
            found = tie(plain, args.ids[name], tokens, got, args.source.config) if args.temperature == 0 else None
            if found is not None:
                differences.append({"prompt": name, "draft": kind, "gamma": gamma, **found})
    same = control.everyone([(r["rounds"], r["accepted"]) for r in rows])
    if not first:
        return 0 if all(d["explained"] for d in differences) else 1
    wrong = [f"{d['prompt']}, {d['draft']}, gamma {d['gamma']}" for d in differences if not d["explained"]]
    wrong += [f"rounds of rank {r}" for r, s in enumerate(same) if s != same[0]]
    picture(args.png, rows, verify, c)
    result = {
        "command": "speculate",
        "ok": not wrong,
        "ranks": comm.size,
        "mesh": mesh.sizes,
        "dtype": args.dtype,
        "seed": args.seed,
        "model": str(args.source.path),
        "family": args.source.family,
        "config": {
            "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature,
            "cache": args.cache,
            "prompts": {name: len(ids) for name, ids in args.ids.items()},
            "gammas": args.gammas,
        },
        "costs": {"verify": verify, "draft": c, "draft_operations": ops},
        "rows": rows,
        "differences": differences,
        "words": words(rows, verify, c),
        "png": str(args.png),
    }
    if args.json:
        print(json.dumps(result, allow_nan=False))
    else:
        show(result)
        greedy = "the greedy tokens are those of plain decoding" if args.temperature == 0 else "drawn tokens are not compared"
        print(f"NOT ALL AGREED: {'; '.join(wrong)}" if wrong else f"all agreed: {greedy}")
    return 1 if wrong else 0


def told(account: Account, gamma: int, verify: list[float], c: float, ops: float, alpha: float | None, measured: float) -> dict:
    """A run's counts and factors. What it drafted round by round is known: a draft that does not always propose `gamma` tokens
    is predicted by those that it did, beside the theorems, which take it to. Null: without a draft there is no alpha."""
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


# --- what people get


def words(rows: list[dict], verify: list[float], c: dict[str, float]) -> list[str]:
    """Is it worth it, and why: a sentence or two for each draft."""
    said = []
    for kind in c:
        best: dict[str, dict] = {}
        for r in (r for r in rows if r["draft"] == kind):
            if r["prompt"] not in best or r["factor_measured"] > best[r["prompt"]]["factor_measured"]:
                best[r["prompt"]] = r
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
        )
    print(
        "alpha: 1 - total variation, over the target's own text; by acceptances: accepted over tested, up to the first rejected"
    )
    print("as drafted: predicted for what was drafted round by round, where a draft does not always propose gamma tokens\n")
    print(*result["words"], sep="\n\n")
    print(f"\nThe picture is {result['png']}")
    for d in result["differences"]:
        print(f"{d['prompt']}, {d['draft']}, gamma {d['gamma']}: {explained(d)}")


if __name__ == "__main__":
    start.run(options(), check, main)
