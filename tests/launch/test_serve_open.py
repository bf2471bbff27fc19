"""launch.serve where anybody can reach it: keys, other sites' pages, and more clients than there are descriptors."""

import json
import os
import resource
import time
from contextlib import ExitStack

import openai
import pytest

from tests.inside import inside
from tests.launch import chromium
from tests.launch.serving import Served, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(folder):
    (folder / "keys").write_text("second\n\nthird\n")
    keys = ("--api-key", "first", "--api-key", f"@{folder / 'keys'}")
    served = Served(1, "--model", str(folder), *keys, "--allow-host", "rankwise.example", descriptors=110)
    yield served
    assert served.stop() == 0, "".join(served.log)
    assert "Traceback" not in "".join(served.log)


def test_keys_are_asked_for(server):
    for path, status in (("/v1/models", 401), ("/steps", 401), ("/metrics", 401), ("/", 200), ("/health", 200)):
        assert server.get(path)[0] == status, path
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="fourth", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
            client.models.list()
        client.api_key = "third"
        assert [m.id for m in client.models.list()] == [server.name]


@pytest.mark.skipif(chromium.FOUND is None, reason="no Chromium on the path")
def test_the_page_asks_for_a_key_and_keeps_it(server, tmp_path):
    page = chromium.Page(server.url, 390, tmp_path)
    try:
        page.until("$('door').open")
        page.type("fourth\n", "key")
        page.until("$('door').open && $('ask').textContent.startsWith('That is none')")
        page.type("second\n", "key")
        page.until("about !== null")
        page.go(server.url)
        page.until("about !== null")
        assert not page.js("$('door').open")
    finally:
        page.close()


def test_what_another_key_has_asked_is_not_told(server):
    def cached(key):
        asked = {"prompt": [2, 3, 4, 5] * 10, "max_tokens": 1}
        status, text, _ = server.post("/v1/completions", asked, authorization=f"Bearer {key}")
        assert status == 200, text
        return json.loads(text)["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(key) for key in ("first", "first", "second", "second", "first")] == [0, 32, 0, 32, 32]


def test_other_sites_and_other_names_are_refused(server):
    key = {"authorization": "Bearer first"}
    asked = {"prompt": [2], "max_tokens": 1}
    for headers, code in (({"origin": "http://evil.example"}, "wrong_origin"), ({"host": "evil.example"}, "wrong_host")):
        status, text, _ = server.post("/v1/completions", asked, **key, **headers)
        assert (status, json.loads(text)["error"]["code"]) == (403, code)
    for headers in ({"origin": server.url}, {"host": "rankwise.example"}):
        assert server.post("/v1/completions", asked, **key, **headers)[0] == 200


def test_more_clients_than_descriptors_shut_nobody_out(server):
    def flooded(clients):
        """Nobody among so many asks anything; the next one that asks is answered."""
        with ExitStack() as stack:
            for _ in range(clients):
                stack.enter_context(server.connection())
            begun = time.monotonic()
            assert server.get("/health")[0] == 200
            assert time.monotonic() - begun < 5

    used = len(os.listdir(f"/proc/{server.pid}/fd"))
    before, begun = len(server.log), time.monotonic()
    flooded(300)
    # Fewer than the limit on connections has reckoned with.
    time.sleep(1)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (used + 4, 110))
    flooded(300)
    told = server.log[before:]
    assert any("connections are all that this process may have" in line for line in told), told
    assert any("cannot take a connection: Too many open files" in line for line in told), told
    assert len(told) <= 2 + time.monotonic() - begun, told


def test_what_would_be_open_to_all_is_refused(comm, folder):
    model = ("--model", str(folder), "--port", "0")
    for args, said in [
        (("--host", "0.0.0.0"), "--host 0.0.0.0 is open to others and there is no --api-key: give one, or --insecure"),
        (("--api-key", "two words"), "--api-key has none, or one that no header can carry"),
        (("--api-key", "@/no/such/file"), "--api-key @/no/such/file: [Errno 2] No such file"),
    ]:
        assert said in inside(comm, "serve", *model, *args, status=2)
