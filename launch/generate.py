"""Continue a prompt with a pretrained model, each rank holding its share of the weights and of the KV cache."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter

from mpi4py import MPI

from inference.cache import CACHES
from inference.generate import Generator, make_cache
from inference.sampling import Sampling
from inference.speculation.gain import Account
from launch import pretrained, report
from launch.measure import products
from launch.options import UsageError, add_replicas, amount, natural, parser, positive
from models.build import build
from parallel.control import Control
from parallel.ledger import Traffic, agrees, wire_bytes
from parallel.replicas import Copy, Replicas, copies


def options() -> argparse.ArgumentParser:
    p = parser("generate", "Continue a prompt with a pretrained model, tensor-parallel.")
    pretrained.add_model(p)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="text to continue")
    what.add_argument("--tokens", type=pretrained.token_ids, help="token ids to continue: 1,2,3")
    what.add_argument("--chat", metavar="TEXT", help="what a user says, to be answered by the model's chat template")
    p.add_argument("--max-new-tokens", type=positive, default=64, help="the most tokens to add")
    p.add_argument("--ignore-eos", action="store_true", help="go on after the model's end token")
    p.add_argument("--stop", metavar="TEXT", action="append", default=[], help="text at which to end; may be given again")
    s = p.add_argument_group("sampling (the order is temperature, top-k, top-p, min-p)")
    s.add_argument("--temperature", type=amount, default=0.0, help="0 is greedy")
    s.add_argument("--top-k", type=natural, default=0, help="only the k best tokens, 0 for all")
    s.add_argument("--top-p", type=amount, default=1.0, help="only the best tokens of this probability together")
    s.add_argument("--min-p", type=amount, default=0.0, help="only tokens at least so likely, relative to the best")
    s.add_argument("--logprobs", action="store_true", help="each token's log-probability")
    c = p.add_argument_group("KV cache")
    c.add_argument("--cache", choices=tuple(CACHES), default="contiguous", help="how the cache is kept")
    c.add_argument("--prefill-chunk", type=positive, help="tokens of the prompt at a time (all)")
    c.add_argument(
        "--mla-cache", choices=("replicated", "striped"), default="replicated", help="latents on every rank, or dealt out"
    )
    add_replicas(p, "tokens")
    d = p.add_argument_group("speculative decoding")
    pretrained.add_speculation(d)
    return p


def check(args: argparse.Namespace, ranks: int) -> None:
    try:
        filters = (args.temperature, args.top_k, args.top_p, args.min_p)
        args.sampling = Sampling(*filters, args.seed)
    except ValueError as error:
        raise UsageError(str(error)) from None
    args.source = pretrained.opened(args.model, ranks)
    args.tokenizer = pretrained.tokenizer(args.source)
    args.prompt_ids = prompt_ids(args)
    if not args.prompt_ids:
        raise UsageError("the prompt is empty: use at least one token")
    most = len(args.prompt_ids) + args.max_new_tokens
    pretrained.check_ids(args.prompt_ids, args.source.config, len(args.prompt_ids) + 1)
    if most > args.source.config.context:
        room = args.source.config.context - len(args.prompt_ids)
        raise UsageError(
            f"--max-new-tokens {args.max_new_tokens} after a prompt of {len(args.prompt_ids)} tokens is beyond the model's "
            f"context of {args.source.config.context}: use at most {room}"
        )
    if args.stop and args.tokenizer is None:
        raise UsageError(f"--stop needs a tokenizer, which {args.source.path} has not: leave it out")
    if "" in args.stop:
        raise UsageError("--stop '' would end before anything: use some text")
    pretrained.check_speculation(args, ranks)
    if args.mla_cache == "striped" and args.source.config.latent is None:
        raise UsageError("--mla-cache striped is for latent attention, which this model has not: leave it out")


def prompt_ids(args: argparse.Namespace) -> list[int]:
    if args.tokens is not None:
        return args.tokens
    if args.prompt is not None:
        return pretrained.encoded(args.prompt, args.source, args.tokenizer)
    if args.tokenizer is None:
        raise UsageError(f"--chat needs a tokenizer, which {args.source.path} has not: use --tokens")
    try:
        return args.tokenizer.chat([{"role": "user", "content": args.chat}])
    except ValueError as error:
        raise UsageError(f"--chat: {error}") from None


def main(args: argparse.Namespace, comm: MPI.Intracomm, opened: None) -> int:
    control, first = Control(comm), comm.rank == 0
    mesh = start.make_mesh(args, comm, tp=comm.size)
    begun = perf_counter()
    model = build(args.source.config, mesh.tp, args.source.weights(args.dtype))
    load_seconds = perf_counter() - begun
    cache = make_cache(model, args.cache, args.mla_cache == "striped")
    speculative = pretrained.speculation(args, model, mesh, cache)
    generator = Generator(model, mesh, cache) if speculative is None else speculative
    control.wait()
    replicas = Replicas(mesh, control, args.check_replicas)
    told = generated(args, generator, replicas, shown=first and not args.json)
    bandwidth = products.read_bandwidth(comm)
    read = generator.model.read_bytes
    timings, steps = generator.timings, generator.timings.decode_tokens
    rows = mesh.ledger.report(predicted(args, generator))
    # What filters and drafts send depends on the logits; only plain greedy choices have a closed form.
    closed = args.sampling.temperature == 0 and not args.logprobs and speculative is None
    agreed = agrees(rows) if closed else True
    if not closed:
        for r in rows:
            r["predicted_calls"] = r["predicted_message_bytes"] = None
    every = control.everyone(
        (told["tokens"], agreed, pretrained.peak_bytes(), sum(p.data.nbytes for p in model.parameters), read / bandwidth)
    )
    if not first:
        return 0
    wrong = [f"tokens of rank {r}" for r, (tokens, *_) in enumerate(every) if tokens != told["tokens"]]
    wrong += [f"communication of rank {r}" for r, (_, ok, *_) in enumerate(every) if not ok]
    bound = 1 / max(seconds for *_, seconds in every)
    sent = sum(r["wire_bytes"] for r in rows if r["phase"] == "decode")
    result = {
        "command": "generate",
        "ok": not wrong,
        "ranks": comm.size,
        "mesh": mesh.sizes,
        "dtype": args.dtype,
        "seed": args.seed,
        "model": str(args.source.path),
        "family": args.source.family,
        "prompt_tokens": args.prompt_ids,
        **told,
        "load_seconds": load_seconds,
        "prefill_seconds": timings.prefill_seconds,
        "prefill_tokens_per_second": timings.prefill_tokens / timings.prefill_seconds,
        "decode_seconds": timings.decode_seconds,
        "decode_tokens_per_second": steps / timings.decode_seconds if steps else None,
        "bandwidth_bound_tokens_per_second": bound,
        "kv_bytes_per_token_per_rank": generator.cache.bytes_per_token,
        "kv_bytes_per_token_per_rank_counted": timings.cache_bytes_per_token,
        "mpi_bytes_per_token": sent / steps if steps else None,
        "gather_bytes_per_token": 4 * args.source.config.vocabulary,
        "latent_layouts": latent_layouts(generator, mesh.tp.size) if args.source.config.latent is not None else None,
        "speculation": None if speculative is None else told_of(speculative.account),
        "communication": rows,
        "memory": {
            "weights_bytes_per_rank": [weights for *_, weights, _ in every],
            "peak_bytes_per_rank": [peak for _, _, peak, *_ in every],
        },
    }
    if args.json:
        print(json.dumps(result, allow_nan=False))
    else:
        show(args, result)
        print(f"NOT ALL AGREED: {', '.join(wrong)}" if wrong else "all ranks agreed")
    return 1 if wrong else 0


def latent_layouts(generator: Generator, ranks: int) -> list[dict]:
    """A latent cache, whole on every rank and dealt out: what a rank keeps of a token, and sends for one."""
    whole = generator.cache.bytes_per_token * (ranks if generator.striped else 1)
    return [
        {
            "layout": "striped" if striped else "replicated",
            "kv_bytes_per_token_per_rank": whole / ranks if striped else whole,
            "mpi_bytes_per_token": sum(
                t.calls * wire_bytes(t.verb, t.message_bytes, ranks) for t in generator.traffic(1, "decode", striped)
            ),
        }
        for striped in (False, True)
    ]


def told_of(account: Account) -> dict:
    """What a run of speculation has shown, for JSON."""
    return {
        "rounds": account.rounds,
        "drafted": account.drafted,
        "accepted": account.accepted,
        "alpha": account.alpha,
        "tokens_per_round": account.tokens / account.rounds if account.rounds else None,
    }


def generated(args: argparse.Namespace, generator: Generator, replicas: Replicas, shown: bool) -> dict:
    """The new tokens, their text and log-probabilities, and why it ended; the text is printed as it comes."""
    ends = frozenset() if args.ignore_eos or args.tokenizer is None else frozenset(args.tokenizer.eos_ids)
    stream = None if args.tokenizer is None else args.tokenizer.stream(stop=args.stop)
    tokens, logprobs, text, reason = [], [], [], "length"
    most = {"chunk": args.prefill_chunk, "ends": ends, "logprobs": args.logprobs}
    if shown and args.prompt is not None:
        print(args.prompt, end="", flush=True)
    for step in generator.tokens(args.prompt_ids, args.sampling, args.max_new_tokens, **most):
        tokens.append(step.token)
        logprobs.append(step.logprob)
        replicas.check(len(tokens), lambda: held(generator, tokens))
        if step.token in ends:
            reason = "end token"
            break
        if stream is not None:
            text.append(stream.push(step.token))
            if shown:
                print(text[-1], end="", flush=True)
            if stream.stopped:
                reason = "stop text"
                break
        elif shown:
            print(step.token, end=" ", flush=True)
    if stream is not None:
        text.append(stream.flush())
        if shown:
            print(text[-1], end="", flush=True)
    if shown:
        print("\n")
    return {
        "tokens": tokens,
        "text": None if stream is None else "".join(text),
        "logprobs": logprobs if args.logprobs else None,
        "finish_reason": reason,
    }


def held(generator: Generator, tokens: list[int]) -> Iterator[Copy]:
    """What must be the same on several ranks."""
    yield Copy("the sequence of tokens", tokens)
    for p in generator.model.parameters:
        yield from copies(p.name, p.layout, generator.mesh.tp, p.data)


def predicted(args: argparse.Namespace, generator: Generator) -> list[Traffic]:
    """What the prompt and the decoding of greedy tokens send, by the closed forms."""
    prompt, chunk = len(args.prompt_ids), args.prefill_chunk or len(args.prompt_ids)
    sizes = [min(chunk, prompt - first) for first in range(0, prompt, chunk)]
    sent = [t for n in sizes for t in generator.traffic(n, "prefill")]
    sent += generator.traffic_greedy("prefill")
    each = [*generator.traffic(1, "decode"), *generator.traffic_greedy("decode")]
    return sent + [replace(t, calls=generator.timings.decode_tokens * t.calls) for t in each]


def show(args: argparse.Namespace, result: dict) -> None:
    """The report for people."""
    rows = [
        ("prompt", f"{len(result['prompt_tokens'])} tokens", f"{result['prefill_tokens_per_second']:.1f} tokens/s"),
        ("time to first token", f"{1e3 * result['prefill_seconds']:.0f} ms", ""),
    ]
    if result["decode_tokens_per_second"]:
        share = result["decode_tokens_per_second"] / result["bandwidth_bound_tokens_per_second"]
        rows.append(("decode", f"{len(result['tokens'])} tokens", f"{result['decode_tokens_per_second']:.1f} tokens/s"))
        bound = f"{result['bandwidth_bound_tokens_per_second']:.1f} tokens/s"
        rows.append(("  bound by memory's bandwidth", f"{share:.0%} of", bound))
        rows.append(("sent by a rank, a token", report.size(result["mpi_bytes_per_token"]), ""))
        rows.append(("  gathered logits alone would be", report.size(result["gather_bytes_per_token"]), ""))
    if result["speculation"] is not None:
        s = result["speculation"]
        alpha = "" if s["alpha"] is None else f"alpha {s['alpha']:.2f}"
        rows.append((f"speculation ({args.speculate or 'model'})", f"{s['accepted']} of {s['drafted']} drafts", alpha))
        rows.append(("  tokens a round of the target", f"{s['tokens_per_round'] or 0:.2f}", f"{s['rounds']} rounds"))
    kept = (result["kv_bytes_per_token_per_rank"], result["kv_bytes_per_token_per_rank_counted"])
    rows.append(("KV cache of a token, on a rank", report.size(kept[0]), f"counted {report.size(kept[1])}"))
    rows.append(("loading", f"{result['load_seconds']:.2f} s", ""))
    axes = f"tp={result['ranks']}, {result['dtype']}, {args.cache} cache; ended by {result['finish_reason']}"
    report.table(f"{result['family']} on {axes}", ("", "", ""), rows)
    if result["latent_layouts"]:
        report.table("The latent cache in its two layouts", ("", "kept by a rank, a token", "sent by a rank, a token"),
                     [(r["layout"], report.size(r["kv_bytes_per_token_per_rank"]), report.size(r["mpi_bytes_per_token"]))
                      for r in result["latent_layouts"]])  # fmt: skip
    if args.logprobs:
        report.table("Log-probabilities", ("token", "log p"),
                     [(t, f"{p:.4f}") for t, p in zip(result["tokens"], result["logprobs"], strict=True)])  # fmt: skip
    report.communication(result["communication"], "it all on rank 0")
    report.memory(result["memory"])


if __name__ == "__main__":
    start.run(options(), check, main)
