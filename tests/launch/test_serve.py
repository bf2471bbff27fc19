"""launch.serve on a tiny random model, as its clients see it: the official one, plain HTTP, and raw sockets that misbehave."""

import json
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from models.open import open_model
from models.tokenizer_file import open_tokenizer
from tests.launch.serving import FAMILIES, Served, events, request, tiny_model

EXPECTED = np.load(FAMILIES / "llama/expected.npz")
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# A pool that is too small for eight requests of the context's 512 tokens.
SIZES = ("--slots", "8", "--max-batch-tokens", "32", "--kv-memory-mib", "1", "--queue-limit", "12", "--dtype", "float64")
LONG = {"prompt": [2, 3, 4], "max_tokens": 500, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return open_tokenizer(folder, open_model(folder).metadata)


@pytest.fixture(scope="module")
def server(folder):
    served = Served(2, "--model", str(folder), *SIZES, "--json")
    yield served
    # SIGTERM to mpirun, not to a rank.
    assert served.stop() == 0, "".join(served.log)
    told = json.loads("".join(served.out))
    assert told["ok"]
    assert told["counts"]["blocks_used"] == told["counts"]["running"] == told["counts"]["waiting"] == 0
    assert "Traceback" not in "".join(served.log)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


# --- the official client


def test_the_official_client_completes_and_chats_whole_and_streamed(server, client):
    assert [m.id for m in client.models.list()] == [server.name]
    assert client.models.retrieve(server.name).id == server.name
    common = {"model": server.name, "seed": 5, "temperature": 1.2, "top_p": 0.95, "extra_body": {"ignore_eos": True}}
    for create, what, text_of in (
        (client.completions.create, {"prompt": "abc", "max_tokens": 20}, lambda c: c.text),
        (
            client.chat.completions.create,
            {"messages": [{"role": "user", "content": "abc"}], "max_completion_tokens": 20},
            lambda c: (c.delta if hasattr(c, "delta") else c.message).content or "",
        ),
    ):
        whole = create(**what, **common)
        assert whole.usage.completion_tokens == 20
        assert whole.usage.total_tokens == 20 + whole.usage.prompt_tokens
        assert whole.choices[0].finish_reason == "length"
        chunks = list(create(**what, **common, stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 20
        assert {c.usage for c in chunks[:-1]} == {None}
        assert "".join(text_of(c.choices[0]) for c in chunks[:-1]) == text_of(whole.choices[0])
        assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
        assert len(chunks) > 5
        without = list(create(**what, **common, stream=True))
        assert all(c.choices for c in without)


def test_the_official_client_raises_its_own_errors(server, client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt-4o", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=server.name, prompt="a", max_tokens=600)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=server.name, messages=[{"role": "user", "content": "a"}], response_format={"type": "json_object"}
        )
    assert caught.value.param == "response_format"
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model=server.name, prompt="a" * 2_000_000)
    assert caught.value.status_code == 413


# --- what is answered


def test_greedy_tokens_are_those_of_transformers(server):
    fields = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "return_token_ids": True}
    [choice] = server.complete(EXPECTED["prompt"].tolist(), **fields)["choices"]
    assert choice["token_ids"] == EXPECTED["greedy"].tolist()


def test_logprobs_are_those_of_transformers(server, tokenizer):
    ids, logits = EXPECTED["ids"], EXPECTED["logits"]
    for row, length in ((0, 3), (1, 8), (2, 9)):
        z = logits[row, length - 1]
        want = z - z.max() - np.log(np.exp(z - z.max()).sum())
        fields = {"temperature": 0, "max_tokens": 1, "ignore_eos": True, "logprobs": 17}
        [choice] = server.complete(ids[row, :length].tolist(), **fields)["choices"]
        told = choice["logprobs"]
        assert told["token_logprobs"] == [pytest.approx(want.max(), abs=1e-11)]
        assert sorted(told["top_logprobs"][0].values()) == pytest.approx(sorted(want), abs=1e-11)
        # From the prompt's first character on.
        assert told["text_offset"] == [len(tokenizer.decode(ids[row, :length].tolist(), special=True))]
    # Chat tells the same numbers of the same tokens, in its own shape.
    messages = [{"role": "user", "content": "cab"}]
    fields = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
    status, text, _ = server.post(CHAT, {"messages": messages, "logprobs": True, "top_logprobs": 3, **fields})
    assert status == 200, text
    content = json.loads(text)["choices"][0]["logprobs"]["content"]
    [choice] = server.complete(tokenizer.chat(messages), logprobs=3, **fields)["choices"]
    assert [e["logprob"] for e in content] == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-12)
    for entry, top in zip(content, choice["logprobs"]["top_logprobs"], strict=True):
        likely = sorted(top.values(), reverse=True)[:3]
        assert [e["logprob"] for e in entry["top_logprobs"]] == pytest.approx(likely, abs=1e-12)
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]


def test_a_seed_is_the_same_text_in_any_company(server):
    fields = {"max_tokens": 14, "temperature": 1.5, "ignore_eos": True, "return_token_ids": True}

    def ids(prompt, seed, **more):
        return [c["token_ids"] for c in server.complete(prompt, seed=seed, **fields, **more)["choices"]]

    alone = ids("abc", 7)
    with ThreadPoolExecutor(9) as pool:
        others = [pool.submit(ids, "cab" * n, n) for n in range(1, 9)]
        assert ids("abc", 7) == alone
        company = [other.result() for other in others]
    assert company[2] == ids("cab" * 3, 3)
    assert ids("abc", 8) != alone
    # Each of n is another draw, the first of them that of one alone; several prompts are as each of them alone.
    three = ids("abc", 7, n=3)
    assert three[:1] == alone
    assert len({tuple(t) for t in three}) == 3
    assert ids(["abc", "cab"], 7, n=2) == three[:2] + ids("cab", 7, n=2)
    usage = server.complete(["abc", "cab" * 9], n=2, seed=7, **fields)["usage"]
    assert usage["completion_tokens"] == 56


def test_stop_texts_lie_across_tokens_and_are_never_seen(server):
    # With this seed é and € are among what is drawn, byte by byte.
    fields = {"seed": 21, "temperature": 1.5, "max_tokens": 48, "ignore_eos": True}
    whole = server.complete("abc", **fields)["choices"][0]["text"]
    assert {"é", "€"} <= set(whole)
    streamed = events(server.post(COMPLETIONS, {"prompt": "abc", "stream": True, **fields})[1])
    assert "".join(e["choices"][0]["text"] for e in streamed) == whole
    for at in (14, 20):
        stop = [whole[at : at + 4], "never"]
        first = whole.find(stop[0])
        [choice] = server.complete("abc", stop=stop, **fields)["choices"]
        assert choice["text"] == whole[:first]
        assert choice["finish_reason"] == "stop"
        streamed = events(server.post(COMPLETIONS, {"prompt": "abc", "stop": stop, "stream": True, "logprobs": 1, **fields})[1])
        texts = [e["choices"][0]["text"] for e in streamed]
        assert "".join(texts) == whole[:first]
        told = [n for e in streamed for n in e["choices"][0]["logprobs"]["text_offset"]]
        assert max(told) < len("abc") + first
        assert streamed[-1]["choices"][0]["finish_reason"] == "stop"
    server.quiet()


def test_end_tokens_end_and_are_counted(server):
    answer = server.complete("abc", seed=0, temperature=2, max_tokens=400, return_token_ids=True, n=4)
    ids = [choice["token_ids"] for choice in answer["choices"]]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * 4
    assert [i.index(0) for i in ids] == [len(i) - 1 for i in ids]
    assert answer["usage"]["completion_tokens"] == sum(map(len, ids))


def test_a_prefix_is_found_computed(server):
    prompt = [random.Random(3).randrange(2, 17) for _ in range(40)]
    before = server.metrics()["rankwise_prefix_hit_tokens_total"]
    cached = [server.complete(prompt, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]
    assert cached == [0, 32]
    assert server.metrics()["rankwise_prefix_hit_tokens_total"] == before + 32


def test_metrics_count_what_was_asked(server):
    before = server.quiet()
    server.complete("abc", max_tokens=30, ignore_eos=True, n=2)
    after = server.quiet()

    def more(name):
        return after[name] - before[name]

    assert more("rankwise_time_to_first_token_seconds_count") == more("rankwise_request_seconds_count") == 2
    assert more("rankwise_inter_token_seconds_count") == 2 * 29
    assert more('rankwise_requests_total{outcome="length"}') == 2
    assert more("rankwise_decode_tokens_total") == 2 * 29
    assert more("rankwise_requests_waiting") == 0


# --- what is refused


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "said"),
    [
        ("POST", COMPLETIONS, b"{", 400, None, "could not parse the JSON body"),
        ("POST", COMPLETIONS, {"prompt": [17]}, 400, None, "token id 17 is outside of the vocabulary: use 0 to 16"),
        ("POST", COMPLETIONS, {"prompt": ""}, 400, None, "prompt is empty"),
        ("POST", COMPLETIONS, {"prompt": "\ud800"}, 400, None, "half a surrogate pair"),
        ("POST", COMPLETIONS, {"prompt": "a", "model": "\ud800"}, 404, "model_not_found", "\\ud800"),
        ("POST", COMPLETIONS, {"prompt": [2] * 512}, 400, "context_length_exceeded", "maximum context length is 512"),
        ("POST", COMPLETIONS, {"prompt": "a" * 1000}, 400, "context_length_exceeded", "maximum context length is 512"),
        ("POST", CHAT, {"messages": [{"role": "user", "content": "a" * 1000}]}, 400, "context_length_exceeded", "512"),
        ("POST", CHAT, {"messages": []}, 400, None, "at least one message"),
        ("POST", COMPLETIONS, b"x" * (2**20 + 1), 413, "request_too_large", "longer than 1,048,576 bytes"),
        ("GET", COMPLETIONS, None, 405, None, "GET is not allowed"),
        ("GET", "/v1/nothing", None, 404, None, "there is no GET /v1/nothing"),
        ("GET", "/v1/models/nobody", None, 404, "model_not_found", "nobody"),
    ],
)
def test_errors_have_openai_s_shape(server, method, path, body, status, code, said):
    got, text, headers = server.post(path, body, method)
    assert got == status, text
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    assert said in error["message"]
    assert headers["content-type"] == "application/json"


def test_a_body_without_a_length_is_not_read_to_its_end(server):
    with server.connection() as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        for _ in range(24):
            raw.sendall(chunk)
        assert raw.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_full_queue_is_told_when_to_come_again(server):
    server.quiet()
    raws = [server.open({**LONG, "seed": n}) for n in range(8)]
    try:
        server.until(lambda m: m["rankwise_requests_running"] == 8)
        raws += [server.open({**LONG, "seed": n}) for n in range(12)]
        server.until(lambda m: m["rankwise_requests_waiting"] == 12)
        status, text, headers = server.post(COMPLETIONS, {"prompt": "a"})
        assert status == 429, text
        assert int(headers["retry-after"]) >= 1
        assert json.loads(text)["error"]["type"] == "rate_limit_error"
        # All or none.
        assert server.post(COMPLETIONS, {"prompt": "a", "n": 5})[0] == 429
    finally:
        for raw in raws:
            raw.close()
    # Those that ran and those that waited.
    after = server.quiet()
    assert after['rankwise_requests_total{outcome="cancelled"}'] >= 20


# --- clients that misbehave


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_blocks(server, stream):
    before = server.quiet()
    with server.open({**LONG, "seed": 1, "stream": stream}) as raw:
        if stream:
            assert raw.recv(4096).startswith(b"HTTP/1.1 200 OK")
        server.until(lambda m: m["rankwise_decode_tokens_total"] > before["rankwise_decode_tokens_total"])
    after = server.quiet()
    assert after['rankwise_requests_total{outcome="cancelled"}'] == before['rankwise_requests_total{outcome="cancelled"}'] + 1
    # Long before it would have been finished.
    assert after["rankwise_decode_tokens_total"] < before["rankwise_decode_tokens_total"] + 450


RUBBISH = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    b"GET\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nX: " + b"y" * 100_000,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    request(b'{"prompt": "a"}') * 3,
    request({"prompt": [2] * 40, "max_tokens": 400, "ignore_eos": True})[:-3],
    b"\r\n" * 500,
    b"GET /%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
]


@pytest.mark.limit(180)
def test_stallers_rubbish_and_the_vanishing_do_not_harm_the_others(server):
    """A soak in small: preemptions too, as the pool does not hold the eight that run. What each gets is what it gets alone."""
    server.quiet()
    draw = random.Random(2)
    prompts = [[draw.randrange(2, 17) for _ in range(draw.randrange(320, 330))] for _ in range(9)]
    asks = [{"prompt": prompt, "seed": n, "max_tokens": 140, "ignore_eos": True} for n, prompt in enumerate(prompts)]
    ids = {"return_token_ids": True, "temperature": 1.0}
    alone = server.complete(**asks[0], **ids)["choices"][0]["token_ids"]
    stop, raws = threading.Event(), []

    def harass():
        draw = random.Random(threading.get_ident())
        while not stop.is_set():
            raw = server.connection()
            # Reads nothing, and has little room for what it does not read.
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            kind = draw.randrange(4)
            try:
                if kind == 0:
                    raw.sendall(draw.choice(RUBBISH))
                elif kind == 1:
                    raw.sendall(draw.randbytes(draw.randrange(1, 2000)))
                else:
                    raw.sendall(request({**LONG, "stream": kind == 2}))
                stop.wait(draw.random() / 4)
            except OSError:
                pass
            if kind == 2 and len(raws) < 4:
                # Stalls, and stays.
                raws.append(raw)
            else:
                raw.close()

    before = server.metrics()
    threads = [threading.Thread(target=harass) for _ in range(2)]
    for thread in threads:
        thread.start()

    def persist(ask):
        while True:
            status, text, _ = server.post(COMPLETIONS, {**ask, **ids})
            if status != 429:
                assert status == 200, text
                return json.loads(text)["choices"][0]["token_ids"]
            server.until(lambda m: m["rankwise_requests_waiting"] < 12, timeout=120)

    try:
        with ThreadPoolExecutor(len(asks)) as pool:
            got = list(pool.map(persist, asks))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        for raw in raws:
            raw.close()
    assert got[0] == alone
    assert all(len(tokens) == 140 for tokens in got)
    after = server.quiet()
    assert after["rankwise_preemptions_total"] > before["rankwise_preemptions_total"]
    assert server.get("/health") == (200, '{"status": "ok"}')
