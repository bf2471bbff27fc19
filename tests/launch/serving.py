"""A server as a user starts it, and clients for it, well-behaved and not."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers.models import BPE

from parallel.remains import die_with_parent
from tests.harness import ROOT, begun

FAMILIES = ROOT / "tests/oracles/families"
# 17 tokens, as the tiny model has: two control tokens, letters, a merge, and the bytes of é and € one by one.
END, START = "<|im_end|>", "<|im_start|>"
TOKENS = [END, START, *"abcst", "Ġ", "Ċ", "Ã", "©", "â", "Ĥ", "¬", "ab", "n", "Ġa"]
CHAT = "{% if refuse %}{{ raise_exception('as you wish') }}{% endif %}"
CHAT += "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


def tiny_model(folder: Path, name: str = "llama") -> Path:
    """A random model of the tests' oracles, given a tokenizer."""
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / file).write_bytes((FAMILIES / name / file).read_bytes())
    backend = tokenizers.Tokenizer(BPE({t: i for i, t in enumerate(TOKENS)}, [("a", "b"), ("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True), AddedToken(START, special=True)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "chat_template": CHAT}))
    return folder


class Served:
    """`mpirun -n RANKS python -m launch.serve --port 0 ARGS` (ranks 0: without mpirun), once it answers. `url`, its address;
    `pid`, that of rank 0; `process`, what was started. `descriptors`: the most that a process may have."""

    def __init__(self, ranks: int, *args: str, patience: float = 60.0, descriptors: int | None = None) -> None:
        # Sent with each request, where it is set.
        self.key = ""
        begin = partial(_begin, os.getpid(), descriptors)
        self.process = begun(ranks, "-m", "launch.serve", "--port", "0", *args, preexec_fn=begin)
        # A server that hangs before it says where it is.
        watch = threading.Timer(patience, self.kill)
        watch.start()
        self.log = []
        for line in self.process.stderr:
            self.log.append(line)
            if said := re.search(r"(\S+) at (http://\S+) on .*SIGTERM to pid (\d+)", line):
                self.name, self.url, self.pid = said[1], said[2], int(said[3])
                break
        watch.cancel()
        assert hasattr(self, "url"), "".join(self.log)
        self.address = (urlsplit(self.url).hostname, urlsplit(self.url).port)
        # Read on, that the server may write on.
        self._reading = [threading.Thread(target=self.log.extend, args=(self.process.stderr,), daemon=True)]
        self.out: list[str] = []
        self._reading.append(threading.Thread(target=self.out.extend, args=(self.process.stdout,), daemon=True))
        for thread in self._reading:
            thread.start()

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)

    def wait(self, timeout: float = 30.0) -> int:
        """The status in which it ends."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server still runs after {timeout} s:\n{''.join(self.log)}") from None
        for thread in self._reading:
            thread.join(5)
        return status

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def ranks(self) -> dict[int, int]:
        """The ranks' pids. Linux."""
        found: dict[int, dict[int, int]] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if not self._descends(int(folder.name)) or b"mpirun" in (folder / "cmdline").read_bytes():
                    continue
                environ = (folder / "environ").read_bytes().decode("utf-8", "replace")
                said = re.search(r"(?:^|\0)(?:PMI_RANK|OMPI_COMM_WORLD_RANK)=(\d+)", environ)
                if said:
                    found.setdefault(int(said[1]), {})[int(folder.name)] = _parent(int(folder.name))
            except OSError:
                continue
        # A rank's keeper is its parent.
        return {rank: next(pid for pid in pids if pid not in pids.values()) for rank, pids in sorted(found.items())}

    def _descends(self, pid: int) -> bool:
        while pid > 1:
            if pid == self.process.pid:
                return True
            pid = _parent(pid)
        return False

    def memory(self) -> list[int]:
        """Bytes that each rank holds."""
        told = [Path(f"/proc/{pid}/status").read_text() for pid in self.ranks().values()]
        return [1024 * int(re.search(r"VmRSS:\s+(\d+)", t)[1]) for t in told]

    # --- requests

    def get(self, path: str) -> tuple[int, str]:
        return self.post(path, None)[:2]

    def post(self, path: str, body: object, method: str | None = None, **headers: str) -> tuple[int, str, dict]:
        """Status, text and headers; `body` None: GET, bytes: as they are."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {}) | headers
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read().decode(), dict(response.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(), dict(error.headers)

    def complete(self, prompt: object, **fields: object) -> dict:
        status, text, _ = self.post("/v1/completions", {"prompt": prompt, **fields})
        assert status == 200, text
        return json.loads(text)

    def metrics(self) -> dict[str, float]:
        lines = self.get("/metrics")[1].splitlines()
        return {name: float(value) for name, _, value in (n.rpartition(" ") for n in lines if not n.startswith("#"))}

    def until(self, condition: object, timeout: float = 20.0) -> dict[str, float]:
        """The metrics, as soon as `condition` holds of them."""
        end = time.monotonic() + timeout
        while not condition(m := self.metrics()):
            assert time.monotonic() < end, m
            time.sleep(0.02)
        return m

    def quiet(self, timeout: float = 20.0) -> dict[str, float]:
        """The metrics, once nothing runs, waits or holds a block."""
        return self.until(idle, timeout)

    def connection(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=20)

    def open(self, body: dict, path: str = "/v1/completions") -> socket.socket:
        """A connection on which this has been asked, and nothing been read."""
        raw = self.connection()
        raw.sendall(request(body, path))
        return raw


def _begin(parent: int, descriptors: int | None) -> None:
    die_with_parent(parent)
    if descriptors is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def idle(m: dict[str, float]) -> bool:
    return not (m["rankwise_requests_running"] or m["rankwise_requests_waiting"] or m['rankwise_kv_blocks{state="used"}'])


def request(body: object, path: str = "/v1/completions") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def events(text: str) -> list[dict]:
    """Of a stream, without its end, which must be there."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", text[-300:]
    return [json.loads(line) for line in lines[:-1]]
