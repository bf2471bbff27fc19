"""launch.serve, by what a request may ask: to score a prompt, biases and penalties, tools; and who may read it in a browser."""

import numpy as np
import openai
import pytest

from tests.launch.serving import FAMILIES, Served, events, tiny_model

EXPECTED = np.load(FAMILIES / "llama/expected.npz")
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SITE = "https://example.org"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("tiny"))
    # One rank, as what is about several is tested without a server.
    served = Served(0, "--model", str(folder), "--kv-memory-mib", "1", "--dtype", "float64", "--cors", SITE, "--api-key", "k")
    served.key = "k"
    yield served
    assert served.stop() == 0, "".join(served.log)
    assert "Traceback" not in "".join(served.log)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client:
        yield client


def test_a_harness_scores_a_prompt(server, client):
    """By echo, log-probabilities and no new token: those of Transformers, None first."""
    ids, logits = EXPECTED["ids"][0], EXPECTED["logits"][0]
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    for most in (0, 1):
        # Shared blocks do not spare it, and a stream says the same.
        answer = client.completions.create(
            model=server.name, prompt=ids.tolist(), echo=True, logprobs=1, max_tokens=most, temperature=0
        )
        [choice], length = answer.choices, len(ids) + answer.usage.completion_tokens
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), most)
        told = choice.logprobs
        assert told.token_logprobs[0] is told.top_logprobs[0] is None
        want = log_p[np.arange(len(ids) - 1), ids[1:]]
        assert told.token_logprobs[1 : len(ids)] == pytest.approx(want, abs=1e-11)
        assert [max(top.values()) for top in told.top_logprobs[1 : len(ids)]] == pytest.approx(
            log_p[:-1].max(axis=1), abs=1e-11
        )
        assert len(told.tokens) == len(told.text_offset) == length
    fields = {"prompt": "abc", "echo": True, "logprobs": 0, "max_tokens": 3, "seed": 1, "ignore_eos": True}
    [whole] = server.complete(**fields)["choices"]
    assert whole["text"].startswith("abc")
    streamed = [e["choices"][0] for e in events(server.post(COMPLETIONS, {**fields, "stream": True})[1])]
    assert "".join(c["text"] for c in streamed) == whole["text"]
    assert [p for c in streamed for p in c["logprobs"]["token_logprobs"]] == whole["logprobs"]["token_logprobs"]
    [plain] = server.complete(**{**fields, "echo": False})["choices"]
    assert whole["text"] == "abc" + plain["text"]
    assert whole["logprobs"]["text_offset"][-3:] == plain["logprobs"]["text_offset"]


def test_biases_penalties_and_ends(server):
    fields = {"temperature": 0, "max_tokens": 12, "return_token_ids": True}

    def ids(**more):
        [choice] = server.complete(EXPECTED["prompt"].tolist(), **fields, **more)["choices"]
        return choice["token_ids"], choice["finish_reason"]

    plain = ids(ignore_eos=True)[0]
    assert ids(ignore_eos=True, logit_bias={"7": 100})[0] == [7] * 12
    banned = ids(ignore_eos=True, logit_bias={str(plain[0]): -100})[0]
    assert plain[0] not in banned
    assert len(set(ids(ignore_eos=True, presence_penalty=2, frequency_penalty=2, repetition_penalty=100)[0])) >= 10
    stop = plain[2]
    assert ids(ignore_eos=True, stop_token_ids=[stop]) == (plain[: plain.index(stop) + 1], "stop")
    late, reason = ids(logit_bias={"0": 100}, min_tokens=5)
    assert (late[5], reason, 0 in late[:5]) == (0, "stop", False)
    # Temperature 1 with only the likeliest token left is greedy.
    assert ids(ignore_eos=True, top_p=0)[0] == plain
    status, text, _ = server.post(COMPLETIONS, {"prompt": "a", "logit_bias": {"17": 1}})
    assert (status, "token id 17 of the bias" in text) == (400, True)


def test_tools_and_what_a_template_refuses(server):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "b"},
    ]
    status, text, _ = server.post(CHAT, {"messages": messages, "tools": [tool], "tool_choice": "auto", "max_tokens": 1})
    assert status == 200, text
    status, text, _ = server.post(CHAT, {"messages": messages, "chat_template_kwargs": {"refuse": True}})
    assert (status, "refuses these messages: as you wish" in text) == (400, True)


def test_a_page_of_another_site_may_ask(server):
    """A browser asks first, without a key; then it sends, and lets the page read the answer, an error too."""
    wants = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    status, _, headers = server.post(COMPLETIONS, None, "OPTIONS", Origin=SITE, **wants)
    assert status == 200
    assert headers["access-control-allow-origin"] == SITE
    assert "authorization" in headers["access-control-allow-headers"]
    status, _, headers = server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}, Origin=SITE)
    assert (status, headers["access-control-allow-origin"]) == (200, SITE)
    status, _, headers = server.post(COMPLETIONS, {"prompt": ""}, Origin=SITE)
    assert (status, headers["access-control-allow-origin"]) == (400, SITE)
    status, _, headers = server.post(COMPLETIONS, {"prompt": "a"}, Origin=SITE, Authorization="Bearer x")
    assert (status, headers["access-control-allow-origin"]) == (401, SITE)
    status, _, headers = server.post(COMPLETIONS, {"prompt": "a"}, Origin="https://other.org")
    assert (status, "access-control-allow-origin" in headers) == (403, False)
