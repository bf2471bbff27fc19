"""The page and its feed of steps: what they are told, with a plain client; what the page makes of it, in a real browser."""

import json
from contextlib import ExitStack, contextmanager

import pytest

from tests.launch import chromium
from tests.launch.serving import Served, tiny_model

# "Send twelve" asks so: three answers to each of four prompts.
THREE = {"prompt": [2, 3, 4], "max_tokens": 500, "ignore_eos": True, "n": 3, "stream": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("tiny"))
    # Without an end token every answer has its full length.
    (folder / "generation_config.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    served = Served(1, "--model", str(folder), "--slots", "8", "--max-batch-tokens", "32", "--kv-memory-mib", "8")
    yield served
    assert served.stop() == 0, "".join(served.log)
    assert "Traceback" not in "".join(served.log)


@contextmanager
def feed(server):
    """Steps as the page gets them: a function that waits for more, and returns all that have come."""
    with server.connection() as raw:
        raw.sendall(b"GET /steps HTTP/1.1\r\nHost: localhost\r\n\r\n")
        read = b""

        def steps():
            nonlocal read
            read += raw.recv(65536)
            found = [part for part in read.decode().split("\n\n") if "event: steps" in part]
            lines = [part.partition("data: ")[2].split("\r\n")[0] for part in found if part.rstrip().endswith("]")]
            return [step for line in lines for step in json.loads(line)]

        yield steps


def test_the_page_and_its_feed(server):
    status, text, headers = server.post("/", None)
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    # One file: nothing is loaded from elsewhere.
    assert "https://" not in text
    assert 'src="' not in text
    asked = {"prompt": [2] * 40, "max_tokens": 3, "ignore_eos": True}
    server.complete(**asked)
    with feed(server) as steps:
        # What was before comes first, what comes now after it; ids rise.
        while not (before := steps()):
            pass
        mine = 1 + max(run[0] for step in before for run in step["runs"])
        server.complete(**asked)
        seen = []
        while not any(str(mine) in step["ended"] for step in seen):
            seen = steps()
    prefill, *decodes = [run[1:] for step in seen for run in step["runs"] if run[0] == mine]
    assert prefill == [1, 8, 0, 1], "32 of 40 tokens were in the prefix cache"
    assert decodes == [[0, 1, 0, 1]] * 2
    assert [step["ended"] for step in seen if str(mine) in step["ended"]] == [{str(mine): "length"}]


def test_four_requests_fill_the_batch_and_the_queue_and_their_end_is_told(server):
    server.quiet()
    with feed(server) as steps, ExitStack() as clients:
        for _ in range(4):
            clients.enter_context(server.open(THREE))
        while not (full := [s for s in steps() if (s["running"], s["waiting"]) == (8, 4)]):
            pass
        running, queue = {run[0] for run in full[-1]["runs"]}, full[-1]["queue"]
        assert len(running) == 8
        assert len(queue) == 4
        assert min(queue) > max(running)
        # Stop: all go at once, so that no step is left which would tell it.
        clients.close()
        while (last := steps()[-1])["running"]:
            pass
    assert last["waiting"] == 0
    assert last["queue"] == []
    assert last["blocks"][0] == 0
    assert set(last["ended"].values()) == {"cancelled"}


@pytest.mark.skipif(chromium.FOUND is None, reason="no Chromium on the path")
@pytest.mark.limit(120)
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(server, tmp_path, width):
    server.quiet()
    page = chromium.Page(server.url, width, tmp_path)
    try:
        page.until("about !== null")
        # All four requests have to come within the 24 steps of the shortest answer.
        for _ in range(5):
            page.js("$('fill').click()")
            page.until("!$('fill').disabled && $('told').textContent")
            assert page.js("$('told').textContent").startswith("12 answers, ")
            if page.js("steps.some((s) => s.running === 8 && s.waiting === 4)"):
                break
        else:
            raise AssertionError("never 8 running and 4 waiting")
        assert page.js("[...document.querySelectorAll('#answer span')].filter((s) => s.textContent).length > 6")
        page.until("$('running').textContent === '0'")
        # Nothing is wider than the page or cut off; the caption is all there.
        assert page.js("document.documentElement.scrollWidth <= innerWidth")
        assert page.js("$('caption').scrollWidth <= $('caption').clientWidth && $('caption').textContent.endsWith('.')")
        for nothing in ("\n", "  \n"):
            page.type(nothing, "prompt")
            assert page.js("$('told').textContent") == "The prompt is empty: type one first."
        # Enter sends; what has come until Stop is counted.
        page.type("400", "most")
        stop = "() => { if ($('answer').textContent) $('stop').click(); }"
        page.js(f"new MutationObserver({stop}).observe($('answer'), {{ childList: true }})")
        page.type("abc\n", "prompt")
        told = page.until("$('told').textContent")
        assert told.startswith("Stopped: ")
        assert 0 < int(told.split()[1]) < 400
        page.until("$('running').textContent === '0'")
    finally:
        page.close()
