"""The same numbers on several hosts as on one: `python -m tests.hosts.same 2 --gbit 1` runs commands on both.

With --deterministic sums are in the order of ranks, wherever these are: all that is no time must be equal to the bit.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE

from tests.hosts.cluster import ROOT, Cluster, environment

LLAMA = "tests/oracles/families/llama"
TRAIN = (
    "launch.train --layers 2 --d-model 36 --heads 6 --kv-heads 6 --d-ff 48 --sequence-length 24 --batch-tokens {batch} "
    "--steps 6 --warmup 2 --sample 8 --text {shared}/text --output {shared}/out-{where} --mesh "
)
# By name: what is typed, and whether the ranks are dealt to the hosts by turns, so that tp and not dp goes over hosts.
COMMANDS: dict[str, tuple[str, bool]] = {
    "tp_mlp": ("launch.tp_mlp --tokens 48 --d-model 64 --d-ff 96 --timed 48,64,96", False),
    "dp_train": ("launch.dp_train", False),
    "train, dp over hosts": (TRAIN + "dp={hosts},tp=2", False),
    "train, tp over hosts": (TRAIN + "dp=2,tp={hosts}", True),
    "train, pp over hosts": (TRAIN + "pp={hosts},tp=2 --layers {hosts} --micro-batches 2", False),
    "pipeline": ("launch.pipeline", False),
    "generate": (f"launch.generate --model {LLAMA} --tokens 1,2,3 --max-new-tokens 8", False),
    "serve": (f"launch.serve --model {LLAMA} --port 0", False),
}
# What no two runs have alike.
TIMES = r"second|rate|peak_bytes|ratio|gflop|_ms|output|curve|simulat|measured|bubble|utilisation|files|span|created"
OWN = ("timed", "hop", "id")
# What the server is asked for: greedy tokens, drawn ones, and how likely those of a prompt are.
ASKED = {
    "greedy": {"prompt": [1, 2, 3], "max_tokens": 8, "temperature": 0, "logprobs": 3},
    "drawn": {"prompt": [4, 1], "max_tokens": 9, "seed": 5, "temperature": 1.5, "n": 2, "logprobs": 1},
    "echoed": {"prompt": [1, 2, 3, 4], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True},
}
# A client on the host of rank 0, where alone the server's address is one.
CLIENT = """
import json, sys, urllib.request
url, headers = sys.argv[1] + "/v1/completions", {"content-type": "application/json"}
for key, body in json.loads(sys.argv[2]).items():
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        print(json.dumps([key, json.loads(response.read())]))
"""


def leaves(it: object, path: str = "") -> Iterator[tuple[str, object]]:
    """The values of a document by their path, without times."""
    name = path.rpartition(".")[2]
    if re.search(TIMES, name) or name in OWN:
        return
    if isinstance(it, dict | list):
        for key, value in it.items() if isinstance(it, dict) else enumerate(it):
            yield from leaves(value, f"{path}.{key}")
    else:
        yield path, it


def typed(name: str, hosts: int, where: str, shared: Path) -> list[str]:
    words, _ = COMMANDS[name]
    words = words.format(hosts=hosts, where=where, shared=shared, batch=24 * 12)
    return ["-n", str(2 * hosts), sys.executable, "-m", *words.split(), "--deterministic", "--timeout", "300"]


def ran(cluster: Cluster, command: Sequence[str]) -> dict:
    done = subprocess.run([*command, "--json"], env=environment(), capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def served(cluster: Cluster, command: Sequence[str]) -> dict:
    """What the server says to the requests of a client; it is asked to end then, and must say that all is well."""
    with subprocess.Popen(command, env=environment(), stdout=DEVNULL, stderr=PIPE, text=True, cwd=ROOT) as server:
        try:
            lines = []
            while not (said := re.search(r" at (http://\S+) on ", lines[-1] if lines else "")):
                lines.append(server.stderr.readline())
                if not lines[-1]:
                    raise RuntimeError(f"no server: {''.join(lines)[-2000:]}")
            client = cluster.on("h1", [sys.executable, "-c", CLIENT, said[1], json.dumps(ASKED)])
            answers = subprocess.run(client, capture_output=True, text=True, check=True).stdout
        finally:
            server.terminate()
        rest = server.stderr.read()
    if server.returncode:
        raise RuntimeError(f"the server ended with status {server.returncode}: {rest[-2000:]}")
    return dict(map(json.loads, answers.splitlines()))


def timed(run: Callable[[Cluster, Sequence[str]], dict], *args: object) -> tuple[dict, float]:
    begun = time.monotonic()
    return run(*args), time.monotonic() - begun


def compared(cluster: Cluster, name: str) -> tuple[int, list[str], tuple[float, float]]:
    """How many numbers are alike, what is not, and the seconds of both runs."""
    (cluster.shared / "text").write_bytes((ROOT / "README.md").read_bytes()[:6000])
    hosts, mpirun = len(cluster.hosts), str(Path(sys.executable).parent / "mpirun")
    on_one, run = [2 * hosts] + [0] * (hosts - 1), served if name == "serve" else ran
    dealt = cluster.dealt([mpirun, *typed(name, hosts, "one", cluster.shared)], on_one)
    one, alone = timed(run, cluster, dealt)
    dealt = cluster.dealt([mpirun, *typed(name, hosts, "several", cluster.shared)], by_turns=COMMANDS[name][1])
    several, together = timed(run, cluster, dealt)
    a, b = dict(leaves(one)), dict(leaves(several))
    apart = [f"{path}: {a.get(path)}, on one host, {b.get(path)}" for path in {**a, **b} if a.get(path) != b.get(path)]
    return sum(isinstance(v, int | float) for v in a.values()), apart, (alone, together)


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m tests.hosts.same", description=__doc__)
    p.add_argument("hosts", type=int)
    p.add_argument("--gbit", type=float)
    p.add_argument("--only", default="", help="commands whose name has this in it, or one of these, with commas between")
    args = p.parse_args()
    wrong = 0
    with Cluster.up(args.hosts, args.gbit) as cluster:
        for name in COMMANDS:
            if not any(part in name for part in args.only.split(",")):
                continue
            numbers, apart, (alone, together) = compared(cluster, name)
            left = {host: what for host, what in cluster.left(patience=2).items() if what}
            verdict = f"{len(apart)} DIFFER" if apart else "all the same"
            print(
                f"{name}: {numbers} numbers, {verdict}; {alone:.1f} s on one host, {together:.1f} s on {args.hosts}", flush=True
            )
            for line in (*apart[:10], *(f"left: {item}" for item in left.items())):
                print(f"  {line}")
            wrong += bool(apart or left)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
