"""A minute of many streaming clients, most of them well-behaved: `python -m tests.launch.soak`.

Well-behaved ones (the official client) stream answers one after another and check each against the same request asked alone;
the others, raw sockets, stall, vanish in the middle, or send rubbish. At the end no block may be in use, and every well-behaved
request must be complete.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import openai

from launch import report
from tests.launch.serving import Served, request, tiny_model
from tests.launch.test_serve import RUBBISH


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m tests.launch.soak", description=__doc__.splitlines()[0])
    p.add_argument("--clients", type=int, default=200, help="at the same time; three of four behave well (%(default)s)")
    p.add_argument("--seconds", type=float, default=60.0, help="in which new requests are begun (%(default)s)")
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--smollm2", action="store_true", help="the default model, not a tiny random one")
    return p.parse_args()


def asks(model: str, smollm2: bool) -> list[dict]:
    """Requests of which each well-behaved client asks one after another, at random."""
    draw = random.Random(0)
    words = ["the", "sea", "a", "river", "rain", "bread", "light", "stone"] if smollm2 else list("abcstn")
    return [
        {
            "model": model,
            "prompt": " ".join(draw.choice(words) for _ in range(draw.randrange(3, 30))),
            "max_tokens": draw.randrange(4, 40),
            "temperature": draw.choice((0.0, 0.8)),
            "seed": n,
            "extra_body": {"ignore_eos": True},
        }
        for n in range(24)
    ]


async def streamed(client: openai.AsyncOpenAI, ask: dict) -> tuple[str, int | None]:
    """Text, and the tokens that the server counts."""
    text, tokens = "", None
    async for chunk in await client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        text += "".join(c.text for c in chunk.choices)
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return text, tokens


async def behave(client: openai.AsyncOpenAI, known: list[tuple[dict, str]], until: float, seen: Counter) -> None:
    while time.monotonic() < until:
        n = random.randrange(len(known))
        ask, alone = known[n]
        seen["begun"] += 1
        try:
            text, tokens = await streamed(client, ask)
        except openai.APIStatusError as error:
            seen[f"status {error.status_code}"] += 1
            # As a client does that is told to come again.
            seen["begun"] -= error.status_code == 429
            await asyncio.sleep(float(error.response.headers.get("retry-after", 0)))
            continue
        except (openai.APIError, OSError) as error:
            seen[f"error: {type(error).__name__}"] += 1
            continue
        seen["complete"] += tokens == ask["max_tokens"]
        seen["short"] += tokens != ask["max_tokens"]
        seen["other text than alone"] += text != alone
        seen["tokens"] += tokens or 0


async def misbehave(served: Served, until: float, seen: Counter) -> None:
    loop = asyncio.get_running_loop()
    while time.monotonic() < until:
        raw = socket.socket()
        # Little room for what is not read.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        kind = random.choice(("stalled", "vanished", "rubbish"))
        long = {
            "prompt": [2] * 20,
            "max_tokens": random.randrange(100, 400),
            "ignore_eos": True,
            "stream": random.random() < 0.7,
        }
        seen[kind] += 1
        try:
            await loop.sock_connect(raw, served.address)
            sent = (
                random.choice([*RUBBISH, random.randbytes(random.randrange(1, 3000))]) if kind == "rubbish" else request(long)
            )
            await loop.sock_sendall(raw, sent)
            await asyncio.sleep(random.uniform(2, 10) if kind == "stalled" else random.uniform(0, 1))
        except OSError:
            seen["refused"] += 1
        finally:
            raw.close()


async def soaked(served: Served, args: argparse.Namespace) -> tuple[Counter, dict[str, list[int]]]:
    seen: Counter = Counter()
    memory = {}
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        known = [(ask, (await streamed(client, ask))[0]) for ask in asks(served.name, args.smollm2)]
        good = args.clients * 3 // 4
        until = time.monotonic() + args.seconds
        clients = [asyncio.create_task(behave(client, known, until, seen)) for _ in range(good)]
        clients += [asyncio.create_task(misbehave(served, until, seen)) for _ in range(args.clients - good)]
        for when, seconds in (("after 5 s", 5.0), ("in the middle", args.seconds / 2 - 5)):
            await asyncio.sleep(max(0.0, seconds))
            memory[when] = await asyncio.to_thread(served.memory)
        await asyncio.gather(*clients)
        memory["at the end"] = await asyncio.to_thread(served.memory)
    return seen, memory


def main() -> int:
    args = options()
    with tempfile.TemporaryDirectory() as folder:
        model = () if args.smollm2 else ("--model", str(tiny_model(Path(folder))), "--kv-memory-mib", "1", "--dtype", "float64")
        served = Served(args.ranks, *model, "--queue-limit", str(max(1, args.clients)), "--slots", "16")
        try:
            before = served.quiet()
            seen, memory = asyncio.run(soaked(served, args))
            after = served.quiet(timeout=120)
            status = served.stop()
        finally:
            if served.process.poll() is None:
                served.kill()
    leaked = int(after['rankwise_kv_blocks{state="used"}'])
    wrong = [
        what
        for what, is_wrong in (
            ("the server's status", status != 0),
            ("a traceback in its log", "Traceback" in "".join(served.log)),
            ("blocks leaked", leaked > 0),
            ("requests that were not completed", seen["complete"] < seen["begun"] or not seen["begun"]),
            ("other text than alone", seen["other text than alone"] > 0 and not args.smollm2),
        )
        if is_wrong
    ]

    def more(name: str) -> int:
        return int(after[name] - before[name])

    report.table(
        f"{args.clients} clients for {args.seconds:g} s, {args.ranks} ranks, {served.name}",
        ("", "requests"),
        [
            ("well-behaved: begun", seen["begun"]),
            ("  complete", seen["complete"]),
            *((f"  {kind}", n) for kind, n in sorted(seen.items()) if kind.startswith(("status", "error", "short", "other"))),
            ("  tokens", f"{seen['tokens']:,}"),
            *((kind, seen[kind]) for kind in ("stalled", "vanished", "rubbish", "refused")),
            ("preempted", more("rankwise_preemptions_total")),
            ("cancelled by the server", more('rankwise_requests_total{outcome="cancelled"}')),
            ("KV blocks in use afterwards", leaked),
        ],
    )
    report.table(
        "Memory by rank",
        ("rank", *(f"{when} MiB" for when in memory)),
        [(rank, *(f"{n / 2**20:,.1f}" for n in held)) for rank, held in enumerate(zip(*memory.values(), strict=True))],
    )
    print(f"WRONG: {', '.join(wrong)}" if wrong else "all well-behaved requests complete, no block leaked")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
