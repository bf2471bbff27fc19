"""What befalls a server from outside, as rows of docs/faults.md: a client that takes all connections, pages of other sites,
other names, no key, and what one client can see of another's requests.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.harness import ROOT, launcher_free

MODEL = "tests/oracles/families/llama"
SILENT = 300
BODY = json.dumps({"prompt": [i % 16 for i in range(70)], "max_tokens": 2, "model": "llama"})


@contextmanager
def serving(*options: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A server's port and process. It is ended by SIGTERM."""
    mpirun = str(Path(sys.executable).parent / "mpirun")
    command = [mpirun, "-n", "2", sys.executable, "-m", "launch.serve", "--model", MODEL, "--port", "0", *options]
    process = subprocess.Popen(
        ["sh", "-c", 'ulimit -n 80; exec "$@"', "sh", *command],
        cwd=ROOT, env=launcher_free(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield int(re.search(r":(\d+) on", process.stderr.readline())[1]), process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(40)


def asked(port: int, key: str = "", source: str = "127.0.0.1", **headers: str) -> str:
    """The status of an answer, and what it says of itself."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20, source_address=(source, 0))
    more = {"Authorization": f"Bearer {key}"} if key else {}
    connection.request("POST", "/v1/completions", BODY, {"Content-Type": "application/json"} | more | headers)
    answer = connection.getresponse()
    said = json.loads(answer.read())
    if answer.status != 200:
        return f"{answer.status}: {said['error']['message']}"
    return f"200, cached_tokens {said['usage']['prompt_tokens_details']['cached_tokens']}"


def rows() -> list[str]:
    """A line of the table for each."""
    found = []
    with serving() as (port, process):
        silent = []
        for _ in range(SILENT):
            with suppress(OSError):
                silent.append(socket.create_connection(("127.0.0.1", port)))
        found.append((f"a request, after {SILENT} connections that say nothing", "none", asked(port)))
        found.append(("the same once more", "none", asked(port)))
        found.append(("the same from another address", "none", asked(port, source="127.0.0.9")))
        found.append(("in the name of another host", "none", asked(port, Host="evil.example")))
        found.append(("from another site's page", "none", asked(port, Origin="https://evil.example")))
        for connection in silent:
            connection.close()
    lines = process.stderr.read().splitlines()
    found.append(("what it says of all these, and its status on SIGTERM", "none", f"{lines[0]}; {process.returncode}"))
    with serving("--api-key", "one", "--api-key", "two") as (port, _):
        found.append(("a request without a key", "one, two", asked(port)))
        found += [(f"a request with key {key}", "one, two", asked(port, key)) for key in ("one", "one", "two")]
    return [f"| {what} | {keys} | `{said.replace('`', chr(39))}` |" for what, keys, said in found]
