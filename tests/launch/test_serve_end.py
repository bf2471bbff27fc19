"""How launch.serve ends: drained by a signal, at once, or before it began."""

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from inference.server.server import ONE_SIGNAL
from tests.harness import MPICH, command
from tests.inside import inside
from tests.launch.serving import Served, events, tiny_model
from tests.launch.test_serve import COMPLETIONS, LONG, SIZES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def gone(pids):
    return all(not os.path.exists(f"/proc/{pid}") for pid in pids)


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(folder):
    """Started without mpirun, which it starts itself; the signal goes to rank 0 alone."""
    served = Served(0, "--model", str(folder), *SIZES, "--speculate", "ngram", "--verbose", "--json")
    ranks = served.ranks()
    assert len(ranks) == 2
    assert ranks[0] == served.pid
    with ThreadPoolExecutor(2) as pool:
        asked = {**LONG, "max_tokens": 200, "temperature": 0, "return_token_ids": True}
        running = pool.submit(served.post, COMPLETIONS, asked)
        streamed = pool.submit(served.post, COMPLETIONS, {**asked, "stream": True})
        served.until(lambda m: m["rankwise_decode_tokens_total"] > 5)
        os.kill(served.pid, signal.SIGTERM)
        for _ in range(100):
            health = served.get("/health")
            if health[0] == 503:
                break
        assert health == (503, '{"status": "draining"}')
        refused, text, _ = served.post(COMPLETIONS, {"prompt": "a"})
        assert refused == 503, text
        assert json.loads(text)["error"]["code"] == "shutting_down"
        status, text, _ = running.result()
        assert status == 200
        ids = json.loads(text)["choices"][0]["token_ids"]
        assert len(ids) == 200
        assert [i for e in events(streamed.result()[1]) for i in e["choices"][0]["token_ids"]] == ids
    assert served.wait() == 0
    assert gone(ranks.values())
    told = json.loads("".join(served.out))
    assert told["counts"]["finished"] == {"length": 2}
    assert told["counts"]["accepted_tokens"] > 0
    log = "".join(served.log)
    assert "draining: 2 requests may finish within 30 s" in log
    assert f"127.0.0.1 POST {COMPLETIONS} 503" in log
    assert "3+200 tokens" in log


def test_requests_that_take_too_long_to_finish_are_told(folder):
    served = Served(1, "--model", str(folder), *SIZES, "--drain-seconds", "0.05")
    with served.open({**LONG, "stream": True}) as raw, ThreadPoolExecutor(1) as pool:
        assert raw.recv(64).startswith(b"HTTP/1.1 200")
        whole = pool.submit(served.post, COMPLETIONS, {**LONG, "n": 8})
        served.until(lambda m: m["rankwise_requests_running"] + m["rankwise_requests_waiting"] == 9)
        served.process.send_signal(signal.SIGUSR1)
        status, text, _ = whole.result()
        assert status == 503, text
        raw.settimeout(20)
        read = b""
        while part := raw.recv(65536):
            read += part
    assert b'data: {"error":{"message":"the server is shutting down before this was finished"' in read
    assert b"[DONE]" not in read
    assert served.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_sigterm_and_ctrl_c_end_all_ranks_at_once(folder, number):
    served = Served(2, "--model", str(folder), *SIZES, "--drain-seconds", "60")
    ranks = served.ranks()
    assert len(ranks) == 2
    raws = [served.open({**LONG, "n": 8, "seed": n}) for n in range(2)]
    served.until(lambda m: m["rankwise_requests_running"] == 8)
    if number == signal.SIGTERM:
        served.process.send_signal(number)
        while served.get("/health")[0] == 200:
            time.sleep(0.01)
        # One that comes at once is taken for the same.
        time.sleep(ONE_SIGNAL + 0.2)
    served.process.send_signal(number)
    status = served.wait(10)
    assert status == 128 + number if MPICH else status
    assert ("interrupted\n" if number == signal.SIGINT else "ended by SIGTERM\n") in "".join(served.log)
    end = time.monotonic() + 5
    while not gone(ranks.values()) and time.monotonic() < end:
        time.sleep(0.05)
    assert gone(ranks.values())
    for raw in raws:
        raw.close()


def test_what_cannot_be_served_is_one_line_of_error(comm, folder):
    model = ("--model", str(folder))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = f"error: cannot listen at --host 127.0.0.1 --port {port}: Address already in use: use another --host or --port"
        assert command("serve", 2, *model, "--port", port, status=2) == said
        assert inside(comm, "serve", *model, "--port", port, status=2) == said
    for args, said in [
        (("--host", "no.such.host.invalid", "--port", "0"), "cannot listen at --host no.such.host.invalid"),
        (("--slots", "9", "--max-batch-tokens", "8"), "--max-batch-tokens 8 is less than --slots 9"),
    ]:
        assert said in inside(comm, "serve", *model, *args, status=2)
