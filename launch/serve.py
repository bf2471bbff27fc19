"""Serve a pretrained model to OpenAI's clients, tensor-parallel, with continuous batching."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from math import prod
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from mpi4py import MPI

from inference.cache import BLOCK
from inference.engine import Engine
from inference.generate import make_cache
from inference.policies import POLICIES
from inference.server.answer import Model
from inference.server.entrance import room
from inference.server.server import Server
from launch import pretrained, report
from launch.options import UsageError, amount, parser, positive
from models.source import Source
from models.tokenizer import Tokenizer
from parallel.control import Control
from parallel.mesh import Mesh

MIB = 2**20
# Rank 0 alone handles these.
IGNORED = (signal.SIGTERM, signal.SIGUSR1)


def options() -> argparse.ArgumentParser:
    p = parser(
        "serve",
        "Serve a pretrained model to OpenAI's clients: /v1/completions, /v1/chat/completions, and a page at /. "
        "SIGTERM to mpirun or to rank 0 finishes what runs, and ends all ranks with status 0; a second one ends them at once, "
        "and so does Ctrl-C. Open MPI's mpirun kills its ranks on SIGTERM: send it SIGUSR1, or SIGTERM to rank 0, whose pid "
        "the first line names, or start without mpirun.",
        (
            "mpirun -n 2 python -m launch.serve",
            "python -m launch.serve --port 0 --speculate ngram",
        ),
        without=("seed",),
    )
    pretrained.add_model(p)
    pretrained.add_mesh(p)
    h = p.add_argument_group("HTTP")
    h.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all")
    h.add_argument("--port", type=_port, default=8000, help="port to listen at; 0 for a free one")
    h.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="answer only requests with this key, or with a key of the file that is named as @FILE; may be given again",
    )
    h.add_argument("--insecure", action="store_true", help="let whoever reaches a --host beyond this machine ask without a key")
    h.add_argument(
        "--allow-host",
        action="append",
        metavar="NAME",
        help="a name that clients or a proxy call this server by, besides localhost and addresses; may be given again",
    )
    h.add_argument(
        "--served-model-name",
        type=_name,
        metavar="NAME",
        help="what clients call the model (default: what its files are called)",
    )
    h.add_argument(
        "--cors",
        type=_origin,
        action="append",
        metavar="ORIGIN",
        help="a site whose pages may ask from a browser, as https://example.org; * for all; may be given again",
    )
    h.add_argument("--queue-limit", type=positive, default=256, help="requests that may wait; more get a 429")
    h.add_argument("--drain-seconds", type=amount, default=30.0, help="how long requests may take to finish on SIGTERM")
    h.add_argument("--verbose", action="store_true", help="one line a request on standard error")
    b = p.add_argument_group("batch")
    b.add_argument("--slots", type=positive, default=8, help="the most requests in a step")
    b.add_argument("--max-batch-tokens", type=positive, default=256, help="the most tokens in a step")
    b.add_argument("--kv-memory-mib", type=positive, default=256, help="KV cache of each rank")
    b.add_argument("--policy", choices=POLICIES, default="continuous", help="when requests may join those that run")
    b.add_argument("--speculate", choices=("ngram", "off"), default="off", help="draft by prompt lookup, where that pays")
    return p


def _origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*]+", text.lower()):
        raise argparse.ArgumentTypeError(f"{text!r} is no origin: use SCHEME://HOST or SCHEME://HOST:PORT, or *")
    return text.lower()


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: use 0 to 65535")
    return int(text)


def _name(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is no name: use some printable text")
    return text


class Task(NamedTuple):
    """Ranks along each axis, the model, and on rank 0 the socket at which clients are queued, the API keys, and how many
    connections it may have."""

    axes: dict[str, int]
    source: Source
    tokenizer: Tokenizer | None
    listening: socket.socket | None
    keys: list[str]
    connections: int


def check(args: argparse.Namespace, ranks: int) -> Task:
    if args.max_batch_tokens < args.slots:
        raise UsageError(
            f"--max-batch-tokens {args.max_batch_tokens} is less than --slots {args.slots}, each of which may need one: "
            f"use at least {args.slots}"
        )
    axes = pretrained.axes_of(args, ranks)
    tp, ep = axes["tp"], axes.get("ep", 1)
    source = pretrained.opened(args.model, tp, ep)
    pretrained.check_memory(source, tp, args.dtype, "--kv-memory-mib", args.kv_memory_mib, nbytes=MIB, ep=ep)
    tokenizer = pretrained.tokenizer(source)
    if start.begin().rank:
        return Task(axes, source, tokenizer, None, [], 0)
    keys, connections = keys_of(args.api_key or ()), room()
    if not connections:
        raise UsageError("this process may open too few files to take a connection: raise `ulimit -n` by 100")
    # Last: it may fail because of another process, though the options are fine.
    return Task(axes, source, tokenizer, listening(args.host, args.port, bool(keys) or args.insecure), keys, connections)


def keys_of(given: Sequence[str]) -> list[str]:
    """API keys, themselves or by line of the files that are named as @FILE. Raises UsageError for what can be none."""
    keys = []
    for text in given:
        if text.startswith("@"):
            try:
                keys += [line.strip() for line in Path(text[1:]).read_text(encoding="utf-8").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"--api-key {text}: {error}: use a file with a key a line") from None
        else:
            keys.append(text)
    if (given and not keys) or not all(re.fullmatch("[!-~]+", key) for key in keys):
        raise UsageError("--api-key has none, or one that no header can carry: use letters, digits and signs without spaces")
    return keys


def listening(host: str, port: int, public: bool = False) -> socket.socket:
    """A socket at which clients are queued from now on. `public`: it may be at an address that others than this machine reach.
    Raises UsageError where it cannot be made."""
    made = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        if not public and not ip_address(address[0].partition("%")[0]).is_loopback:
            raise UsageError(
                f"--host {host} is open to others and there is no --api-key: give one, or --insecure to let all ask"
            )
        made = socket.socket(family, kind, protocol)
        # A port that was just closed can be used at once, one that is in use cannot.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(2048)
    except (OSError, UnicodeError) as error:
        if made is not None:
            made.close()
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot listen at --host {host} --port {port}: {why}: use another --host or --port") from None
    return made


def blocks_of(args: argparse.Namespace, bytes_per_token: int) -> int:
    """Blocks in a rank's KV memory. Raises UsageError if there is room for none."""
    blocks = args.kv_memory_mib * MIB // (BLOCK * bytes_per_token)
    if not blocks:
        least = -(-BLOCK * bytes_per_token // MIB)
        raise UsageError(
            f"--kv-memory-mib {args.kv_memory_mib} holds no block of {BLOCK} tokens of {bytes_per_token:,} bytes: "
            f"use at least {least}"
        )
    return blocks


def main(args: argparse.Namespace, comm: MPI.Intracomm, task: Task) -> int:
    control = Control(comm)
    mesh = start.make_mesh(args, comm, **task.axes)
    model, _ = pretrained.load(task.source, mesh.tp, args.dtype, comm.rank == 0, mesh.ep if "ep" in mesh.sizes else None)
    bytes_per_token = max(control.everyone(make_cache(model, "paged").bytes_per_token))
    blocks = blocks_of(args, bytes_per_token)
    context = min(task.source.config.context, blocks * BLOCK)
    scheduler = POLICIES[args.policy](
        blocks,
        slots=args.slots,
        max_batch_tokens=args.max_batch_tokens,
        context=context,
        queue_limit=args.queue_limit,
    )
    engine = Engine(model, mesh, control, scheduler, args.speculate == "ngram")
    if comm.rank == 0:
        result = served(args, task, mesh, engine, context, bytes_per_token)
    else:
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        engine.follow()
    peaks = control.everyone(pretrained.peak_bytes())
    if comm.rank:
        return 0
    result["memory"] = {"peak_bytes_per_rank": peaks}
    return report.publish(args.json, result, lambda: show(result), agreed=None)


def served(args: argparse.Namespace, task: Task, mesh: Mesh, engine: Engine, context: int, bytes_per_token: int) -> dict:
    """Serve until a signal ends it. Returns what happened, for JSON."""
    source, tokenizer = task.source, task.tokenizer
    name = args.served_model_name or pretrained.name_of(source.path)
    about = {
        "model": name,
        "ranks": prod(mesh.sizes.values()),
        "dtype": args.dtype,
        "context": context,
        "slots": args.slots,
        "max_batch_tokens": args.max_batch_tokens,
        "blocks": engine.scheduler.pool.size,
        "policy": args.policy,
        "speculate": args.speculate,
        "chat": tokenizer is not None and tokenizer.chats,
        "text": tokenizer is not None,
    }
    model = Model(name, tokenizer, context, pretrained.ends(source, tokenizer), source.wishes.sampling)
    names = [args.host, socket.gethostname(), *(args.allow_host or ())]
    server = Server(engine, model, about, args.drain_seconds, args.verbose, task.keys, names, task.connections, args.cors or ())
    begun = perf_counter()
    server.run(task.listening, ready(about, task.listening, source.config.context))
    seconds = perf_counter() - begun
    more = {
        "model": str(source.path),
        "served_model": name,
        "notes": source.notes,
        "kv_bytes_per_token_per_rank": bytes_per_token,
        "seconds": seconds,
        "responses": {str(status): n for status, n in sorted(server.metrics.responses.items())},
        "counts": engine.scheduler.metrics(),
    }
    return report.header("serve", args, mesh) | about | more


def ready(about: dict, listening: socket.socket, most: int) -> Callable[[], None]:
    """What prints where the model is served, and with how much room. `most`: the model's context."""
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    clamped = f", of the model's {most:,}, by --kv-memory-mib" if about["context"] < most else ""
    line = (
        f"{about['model']} at {url} on {about['ranks']} rank{'' if about['ranks'] == 1 else 's'}, {about['slots']} slots, "
        f"{about['blocks']:,} KV blocks of {BLOCK} tokens on each, context {about['context']:,}{clamped}; "
        f"SIGTERM to pid {os.getpid()} ends it when what runs is finished"
    )
    return lambda: print(line, file=sys.stderr, flush=True)


def show(result: dict) -> None:
    """The report for people."""
    counts = result["counts"]
    answers = ", ".join(f"{n} {reason}" for reason, n in sorted(counts["finished"].items())) or "none"
    rows = [
        ("answers", answers),
        ("prompt tokens run, and found computed", f"{counts['prefill_tokens']:,}, {counts['hit_tokens']:,}"),
        ("decode tokens run, drafts accepted", f"{counts['decode_tokens']:,}, {counts['accepted_tokens']:,}"),
        ("steps, preemptions", f"{counts['steps']:,}, {counts['preemptions']:,}"),
        ("HTTP responses", ", ".join(f"{n} x {status}" for status, n in result["responses"].items()) or "none"),
    ]
    report.table(f"Served {result['served_model']} for {result['seconds']:.0f} s", ("", ""), rows)
    report.memory(result["memory"])


if __name__ == "__main__":
    parser = options()
    start.under_mpirun(parser, "serve", 2, passing=True)
    start.run(parser, check, main)
