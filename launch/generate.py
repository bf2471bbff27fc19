"""Continue a prompt with a pretrained model, each rank holding its share of the weights and of the KV cache."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mpi4py import MPI

from inference.cache import CACHES
from inference.generate import Generated, Generator, make_cache
from inference.sampling import NotFinite, Sampling
from inference.speculation.gain import Account
from inference.speculation.generator import Speculative
from inference.speculation.rule import MOST
from launch import pretrained, report
from launch.measure import products
from launch.options import UsageError, add_replicas, amount, natural, only_with, parser, positive
from launch.terminal import progress
from launch.terminal.lines import BYTES, column, counted, size
from launch.terminal.printable import printable
from layers.transformer import Transformer
from models.source import Source
from models.tokenizer import Tokenizer
from parallel.control import Control
from parallel.ledger import Traffic, agrees, wire_bytes
from parallel.mesh import Mesh
from parallel.replicas import Copy, Replicas, copies


def options() -> argparse.ArgumentParser:
    p = parser(
        "generate",
        "Continue a prompt with a pretrained model, tensor-parallel.",
        (
            'mpirun -n 2 python -m launch.generate --prompt "The capital of France is"',
            'mpirun -n 3 python -m launch.generate --chat "Who are you?" --temperature 0.7',
            'mpirun -n 2 python -m launch.generate --prompt "1, 2, 3," --speculate ngram',
        ),
        needs="(--prompt TEXT | ...)",
    )
    pretrained.add_model(p)
    pretrained.add_mesh(p)
    what = p.add_argument_group("what to continue, one of these").add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="text to continue")
    what.add_argument("--tokens", type=pretrained.token_ids, help="token ids to continue: 1,2,3")
    what.add_argument("--chat", metavar="TEXT", help="what a user says, to be answered by the model's chat template")
    pretrained.add_special(p)
    p.add_argument("--max-new-tokens", type=positive, default=64, help="the most tokens to add")
    p.add_argument("--ignore-eos", action="store_true", help="go on after the model's end token")
    p.add_argument("--stop", metavar="TEXT", action="append", default=[], help="text at which to end; may be given again")
    s = p.add_argument_group("sampling (the order is temperature, top-k, top-p, min-p)")
    s.add_argument("--temperature", type=amount, help="0 is greedy (default: as the model's makers want it, or 0)")
    s.add_argument("--top-k", type=natural, help="only the k best tokens, 0 for all")
    s.add_argument("--top-p", type=amount, help="only the best tokens of this probability together")
    s.add_argument("--min-p", type=amount, help="only tokens at least so likely, relative to the best")
    s.add_argument("--logprobs", action="store_true", help="each token's log-probability")
    c = p.add_argument_group("KV cache")
    c.add_argument("--cache", choices=tuple(CACHES), default="contiguous", help="how the cache is kept")
    c.add_argument("--prefill-chunk", type=positive, help="tokens of the prompt at a time (default: all)")
    c.add_argument(
        "--mla-cache", choices=("replicated", "striped"), default="replicated", help="latents on every rank, or dealt out"
    )
    add_replicas(p, "tokens")
    d = p.add_argument_group("speculative decoding")
    d.add_argument(
        "--speculate", type=pretrained.kind, metavar="ngram|layers=K", help="draft by prompt lookup, or by the first K layers"
    )
    d.add_argument("--draft", metavar="PATH", type=Path, help="draft with another model of the same vocabulary")
    d.add_argument("--draft-whole", action="store_true", help="run the --draft model whole on every rank, not cut over them")
    d.add_argument(
        "--gamma", type=_gamma, default=None, help="tokens to draft, 1 to 8; auto for as many as pay (default: auto)"
    )
    only_with(p, "--draft-whole", draft=True)
    only_with(p, "--gamma", speculate=True, draft=True)
    return p


def _gamma(text: str) -> int | None:
    """An argparse type: a number of drafted tokens, or None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of drafted tokens: use 1 to {MOST}, or auto")
    return int(text)


class Task(NamedTuple):
    """Ranks along each axis, the model, the ids to continue, how to choose tokens, and the model that drafts, if one does."""

    axes: dict[str, int]
    source: Source
    tokenizer: Tokenizer | None
    prompt: list[int]
    sampling: Sampling
    draft: Source | None


def check(args: argparse.Namespace, ranks: int) -> Task:
    axes = pretrained.axes_of(args, ranks)
    tp, ep = axes["tp"], axes.get("ep", 1)
    source = pretrained.opened(args.model, tp, ep)
    sampling, tokenizer, config = pretrained.sampling(args, source), pretrained.tokenizer(source), source.config
    prompt = prompt_ids(args, source, tokenizer)
    if not prompt:
        raise UsageError("the prompt is empty: use at least one token")
    pretrained.check_ids(prompt, config, len(prompt) + 1)
    if len(prompt) + args.max_new_tokens > config.context:
        raise UsageError(
            f"--max-new-tokens {args.max_new_tokens} after a prompt of {counted(len(prompt), 'token')} is beyond the model's "
            f"context of {config.context}: use at most {config.context - len(prompt)}"
        )
    pretrained.check_memory(source, tp, args.dtype, "--max-new-tokens", args.max_new_tokens, tokens=1, ep=ep)
    if args.stop and tokenizer is None:
        raise UsageError(f"--stop needs a tokenizer, which {source.path} has not: leave it out")
    if "" in args.stop:
        raise UsageError("--stop '' would end before anything: use some text")
    if args.speculate and args.draft:
        raise UsageError("--speculate and --draft are two ways to draft: use one of them")
    pretrained.check_layers(args.speculate, config)
    draft = pretrained.draft_of(args.draft, 1 if args.draft_whole else tp, config, tokenizer)
    if args.mla_cache == "striped" and config.latent is None:
        raise UsageError("--mla-cache striped is for latent attention, which this model has not: leave it out")
    return Task(axes, source, tokenizer, prompt, sampling, draft)


def prompt_ids(args: argparse.Namespace, source: Source, tokenizer: Tokenizer | None) -> list[int]:
    if args.tokens is not None:
        return args.tokens
    if args.prompt is not None:
        return pretrained.encoded(args.prompt, source, tokenizer, args)
    if tokenizer is None:
        raise UsageError(f"--chat needs a tokenizer, which {source.path} has not: use --tokens")
    try:
        return tokenizer.chat([{"role": "user", "content": args.chat}])
    except ValueError as error:
        raise UsageError(f"--chat: {error}") from None


def generator_of(args: argparse.Namespace, draft: Source | None, model: Transformer, mesh: Mesh) -> Generator:
    """What generates as the options say: plainly, or with drafts."""
    cache = make_cache(model, args.cache, args.mla_cache == "striped")
    if draft is not None:
        axes = Mesh(MPI.COMM_SELF, tp=1) if args.draft_whole else mesh
        other, _ = pretrained.load(draft, axes.tp, args.dtype, mesh.tp.rank == 0)
        return Speculative(model, mesh, cache, Generator(other, axes, make_cache(other, args.cache)), args.gamma)
    return Speculative(model, mesh, cache, args.speculate, args.gamma) if args.speculate else Generator(model, mesh, cache)


def generated(args: argparse.Namespace, task: Task, generator: Generator, replicas: Replicas, shown: bool) -> dict:
    """The new tokens, their text and log-probabilities, and why it ended; the text is printed as it comes."""
    tokenizer = task.tokenizer
    ends = frozenset() if args.ignore_eos else pretrained.ends(task.source, tokenizer)
    stream = None if tokenizer is None else tokenizer.stream(stop=args.stop)
    tokens, logprobs, text, reason = [], [], [], "length"
    most = {"chunk": args.prefill_chunk, "ends": ends, "logprobs": args.logprobs}
    say = (lambda piece: print(printable(piece), end="", flush=True)) if shown else (lambda piece: None)
    say(args.prompt or "")
    # Text that is shown is progress enough.
    told = progress.items("token", generator.mesh.tp.rank == 0 and not shown, args.max_new_tokens)
    alike = lambda: replicas.check(len(tokens) + 1, lambda: held(generator, [*tokens, None]))  # noqa: E731
    for step in told(_compared(generator.tokens(task.prompt, task.sampling, args.max_new_tokens, **most), alike)):
        tokens.append(step.token)
        logprobs.append(step.logprob)
        replicas.check(len(tokens), lambda: held(generator, tokens))
        if step.token in ends:
            reason = "end token"
            break
        text.append(f"{step.token} " if stream is None else stream.push(step.token))
        say(text[-1])
        if stream is not None and stream.stopped:
            reason = "stop text"
            break
    if stream is not None:
        text.append(stream.flush())
        say(text[-1])
    say("\n\n")
    return {
        "tokens": tokens,
        "text": None if stream is None else "".join(text),
        "logprobs": logprobs if args.logprobs else None,
        "finish_reason": reason,
    }


def _compared(steps: Iterable[Generated], alike: Callable[[], None]) -> Iterator[Generated]:
    """Each step. Where there is none, as its numbers are none, `alike` is asked first whether it is so on all ranks."""
    try:
        yield from steps
    except NotFinite:
        alike()
        raise


def held(generator: Generator, tokens: list[int | None]) -> Iterator[Copy]:
    """What must be the same on several ranks."""
    yield Copy("the sequence of tokens", tokens)
    for p in generator.model.parameters:
        yield from copies(p.name, p.layout, generator.mesh.place, p.data)


def main(args: argparse.Namespace, comm: MPI.Intracomm, task: Task) -> int:
    control, first, source = Control(comm), comm.rank == 0, task.source
    # A chat template may tell the time, which is not the same on all ranks.
    task = task._replace(prompt=control.from_first(task.prompt))
    mesh = start.make_mesh(args, comm, **task.axes)
    model, load_seconds = pretrained.load(source, mesh.tp, args.dtype, first, mesh.ep if "ep" in mesh.sizes else None)
    generator = generator_of(args, task.draft, model, mesh)
    control.wait()
    replicas = Replicas(mesh, control, args.check_replicas)
    try:
        answer = generated(args, task, generator, replicas, shown=first and not args.json)
    except NotFinite as error:
        return report.failed(args.json, report.header("generate", args, mesh), str(error)) if first else 1
    read_seconds = generator.model.read_bytes / products.read_bandwidth(comm)
    rows, agreed = communication(args, task, generator)
    mine = (answer["tokens"], agreed, pretrained.held(model), read_seconds)
    tokens, sent, memory, bounds = zip(*control.everyone(mine), strict=True)
    if not first:
        return 0
    wrong = report.of_ranks("tokens", [t == answer["tokens"] for t in tokens]) + report.of_ranks("communication", sent)
    result = report.header("generate", args, mesh) | {
        "model": str(source.path),
        "family": source.family,
        "notes": source.notes,
        "prompt_tokens": task.prompt,
        **answer,
        "load_seconds": load_seconds,
        **of_a_token(generator, rows, 1 / max(bounds), source.config.vocabulary),
        "latent_layouts": latent_layouts(generator, mesh) if source.config.latent is not None else None,
        "speculation": gain(generator.account) if isinstance(generator, Speculative) else None,
        "communication": rows,
        "memory": report.by_rank(memory),
    }
    return report.publish(args.json, result, lambda: show(args, result), wrong, agreed="all ranks agreed")


def communication(args: argparse.Namespace, task: Task, generator: Generator) -> tuple[list[dict], bool]:
    """What this rank sent, for JSON, and whether that was predicted."""
    rows = generator.mesh.ledger.report(predicted(len(task.prompt), args.prefill_chunk, generator))
    # What filters and drafts send depends on the logits; only plain greedy choices have a closed form.
    if task.sampling.temperature == 0 and not args.logprobs and not isinstance(generator, Speculative):
        return rows, agrees(rows)
    return [r | {"predicted_calls": None, "predicted_message_bytes": None} for r in rows], True


def predicted(prompt: int, chunk: int | None, generator: Generator) -> list[Traffic]:
    """What a prompt of so many tokens and the decoding of greedy tokens send, by the closed forms."""
    chunk = chunk or prompt
    sizes = [min(chunk, prompt - first) for first in range(0, prompt, chunk)]
    sent = [t for n in sizes for t in generator.traffic(n, "prefill")]
    sent += generator.traffic_greedy("prefill")
    each = [*generator.traffic(1, "decode"), *generator.traffic_greedy("decode")]
    return sent + [replace(t, calls=generator.timings.decode_tokens * t.calls) for t in each]


def of_a_token(generator: Generator, rows: list[dict], bound: float, vocabulary: int) -> dict:
    """Tokens a second, and what this rank keeps of a token and sends to decode one. `bound`: what memory's bandwidth allows."""
    timings, sent = generator.timings, sum(r["wire_bytes"] for r in rows if r["phase"] == "decode")
    decoded = timings.decode_tokens
    return {
        "prefill_seconds": timings.prefill_seconds,
        "prefill_tokens_per_second": timings.prefill_tokens / timings.prefill_seconds,
        "decode_seconds": timings.decode_seconds,
        "decode_tokens_per_second": decoded / timings.decode_seconds if decoded else None,
        "bandwidth_bound_tokens_per_second": bound,
        "kv_bytes_per_token_per_rank": generator.cache.bytes_per_token,
        "kv_bytes_per_token_per_rank_counted": timings.cache_bytes_per_token,
        "mpi_bytes_per_token": sent / decoded if decoded else None,
        # Gathering the logits alone would be so much.
        "gather_bytes_per_token": 4 * vocabulary,
    }


def latent_layouts(generator: Generator, mesh: Mesh) -> list[dict]:
    """A latent cache, whole on every rank and dealt out: what a rank keeps of a token, and sends for one."""
    whole = generator.cache.bytes_per_token * (mesh.tp.size if generator.striped else 1)
    return [
        {
            "layout": "striped" if striped else "replicated",
            "kv_bytes_per_token_per_rank": whole / mesh.tp.size if striped else whole,
            "mpi_bytes_per_token": sum(
                t.calls * wire_bytes(t.verb, t.message_bytes, mesh.sizes[t.axis])
                for t in generator.traffic(1, "decode", striped)
            ),
        }
        for striped in (False, True)
    ]


def gain(account: Account) -> dict:
    """What a run of speculation has shown."""
    return {
        "rounds": account.rounds,
        "drafted": account.drafted,
        "accepted": account.accepted,
        "alpha": account.alpha,
        "tokens_per_round": account.tokens / account.rounds if account.rounds else None,
    }


def show(args: argparse.Namespace, result: dict) -> None:
    """The report for people."""
    rows = [
        ("prompt", counted(len(result["prompt_tokens"]), "token"), f"{result['prefill_tokens_per_second']:.1f} tokens/s"),
        ("time to first token", f"{1e3 * result['prefill_seconds']:.0f} ms", ""),
    ]
    if result["decode_tokens_per_second"]:
        share = result["decode_tokens_per_second"] / result["bandwidth_bound_tokens_per_second"]
        rows.append(("decode", counted(len(result["tokens"]), "token"), f"{result['decode_tokens_per_second']:.1f} tokens/s"))
        bound = f"{result['bandwidth_bound_tokens_per_second']:.1f} tokens/s"
        rows.append(("  bound by memory's bandwidth", f"{share:.0%} of", bound))
        rows.append(("sent by a rank, a token", size(result["mpi_bytes_per_token"]), ""))
        rows.append(("  gathered logits alone would be", size(result["gather_bytes_per_token"]), ""))
    if result["speculation"] is not None:
        s = result["speculation"]
        alpha = "" if s["alpha"] is None else f"alpha {s['alpha']:.2f}"
        rows.append((f"speculation ({args.speculate or 'model'})", f"{s['accepted']} of {s['drafted']} drafts", alpha))
        rows.append(("  tokens a round of the target", f"{s['tokens_per_round'] or 0:.2f}", f"{s['rounds']} rounds"))
    kept = (result["kv_bytes_per_token_per_rank"], result["kv_bytes_per_token_per_rank_counted"])
    rows.append(("KV cache of a token, on a rank", size(kept[0]), f"counted {size(kept[1])}"))
    rows.append(("loading", f"{result['load_seconds']:.2f} s", ""))
    axes = ", ".join(f"{name}={n}" for name, n in result["mesh"].items())
    axes += f", {result['dtype']}, {args.cache} cache; ended by {result['finish_reason']}"
    report.table(f"{result['family']} on {axes}", ("", "", ""), rows)
    if result["latent_layouts"]:
        layouts = result["latent_layouts"]
        kept, sent = (
            column(f"{done} by a rank, a token", [r[f"{what}_per_token{whose}"] for r in layouts], BYTES)
            for done, what, whose in (("kept", "kv_bytes", "_per_rank"), ("sent", "mpi_bytes", ""))
        )
        names = [r["layout"] for r in layouts]
        report.table("The latent cache in its two layouts", ("", kept[0], sent[0]), zip(names, kept[1], sent[1], strict=True))
    if args.logprobs:
        report.table("Log-probabilities", ("token", "log p"),
                     [(t, f"{p:.4f}") for t, p in zip(result["tokens"], result["logprobs"], strict=True)])  # fmt: skip
    report.communication(result["communication"], "it all on rank 0")
    report.memory(result["memory"])


if __name__ == "__main__":
    start.run(options(), check, main)
