"""The server's parts without a server: what is refused, text delta by delta, its shapes, the metrics' text."""

import asyncio
import math
import random

import pytest
from prometheus_client.parser import text_string_to_metric_families

from inference.choosing import Token
from inference.scheduler import Scheduler
from inference.server.inbox import HISTORY, Feed, Inbox
from inference.server.metrics import Metrics
from inference.server.openai_fields import FIELDS, NEUTRAL
from inference.server.openai_reply import Reply, Usage
from inference.server.openai_request import decoded, parsed
from inference.server.refused import Refused
from inference.server.writer import Delta, Writer
from tests.inference.server.calls import call

# --- requests

HUGE = 10**400


def calling(arguments):
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]}


BAD = [
    # chat, fields, the field that is named, what is said of it
    (False, {"temperature": -0.1}, "temperature", "from 0 to 2"),
    (False, {"temperature": 2.5}, "temperature", "from 0 to 2"),
    (False, {"temperature": "warm"}, "temperature", "must be a number"),
    (False, {"temperature": True}, "temperature", "must be a number"),
    (False, {"temperature": HUGE}, "temperature", "from 0 to 2"),
    (False, {"top_p": -0.1}, "top_p", "from 0 to 1"),
    (False, {"top_p": 1.01}, "top_p", "from 0 to 1"),
    (False, {"top_k": -2}, "top_k", "from -1"),
    (False, {"min_p": 2}, "min_p", "from 0 to 1"),
    (False, {"seed": 1.5}, "seed", "whole number"),
    (False, {"seed": HUGE}, "seed", "from -9223372036854775808"),
    (False, {"n": 0}, "n", "from 1 to 128"),
    (False, {"n": True}, "n", "whole number"),
    (False, {"n": 129}, "n", "from 1 to 128"),
    (False, {"n": 64, "prompt": ["a", "b", "c"]}, "prompt", "64 answers to each of 3 prompts"),
    (False, {"max_tokens": 0}, "max_tokens", "from 1"),
    (False, {"max_tokens": "all"}, "max_tokens", "whole number"),
    (False, {"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
    (False, {"stop": ["a", 7]}, "stop", "a list of texts"),
    (False, {"stop": ""}, "stop", "empty text"),
    (False, {"stream": 1}, "stream", "true or false"),
    (False, {"stream_options": {"include_usage": True}}, "stream_options", "only for stream"),
    (False, {"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "Unrecognized"),
    (False, {"stream": True, "stream_options": []}, "stream_options", "an object"),
    (False, {"logprobs": 21}, "logprobs", "from 0 to 20"),
    (False, {"logprobs": True}, "logprobs", "whole number"),
    (False, {"prompt": None}, "prompt", "you must provide prompt"),
    (False, {"prompt": []}, "prompt", "none of them empty"),
    (False, {"prompt": [[1], []]}, "prompt", "none of them empty"),
    (False, {"prompt": [1, "a"]}, "prompt", "token ids"),
    (False, {"prompt": [-1]}, "prompt", "token ids"),
    (False, {"prompt": {"text": "a"}}, "prompt", "must be a text"),
    (False, {"messages": []}, "messages", "Unrecognized request argument"),
    (False, {"model": 5}, "model", "must be a text"),
    (False, {"best_of": 3}, "best_of", "not supported"),
    (False, {"echo": 1}, "echo", "true or false"),
    (False, {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    (False, {"skip_special_tokens": False}, "skip_special_tokens", "not supported"),
    (False, {"prompt_logprobs": 1}, "prompt_logprobs", "not supported"),
    (False, {"parse_special": 1}, "parse_special", "true or false"),
    (False, {"tools": []}, "tools", "Unrecognized"),
    (False, {"suffix": "!"}, "suffix", "not supported"),
    (False, {"logit_bias": {"5": 101}}, "logit_bias[5]", "from -100 to 100"),
    (False, {"logit_bias": {"a": 1}}, "logit_bias", "by token ids"),
    (False, {"logit_bias": [1]}, "logit_bias", "by token ids"),
    (False, {"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "at most 1024"),
    (False, {"presence_penalty": 2.5}, "presence_penalty", "from -2 to 2"),
    (False, {"frequency_penalty": -3}, "frequency_penalty", "from -2 to 2"),
    (False, {"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    (False, {"min_tokens": 17, "max_tokens": 16}, "min_tokens", "at most max_tokens, 16"),
    (False, {"stop_token_ids": [-1]}, "stop_token_ids", "token ids"),
    (False, {"frobnicate": 1}, "frobnicate", "Unrecognized request argument"),
    (True, {"messages": []}, "messages", "at least one message"),
    (True, {"messages": "hello"}, "messages", "must be a list"),
    (True, {"messages": ["hello"]}, "messages[0]", "an object"),
    (True, {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "system, user, assistant or tool"),
    (True, {"messages": [{"role": "user"}]}, "messages[0].content", "a text"),
    (True, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "but text"),
    (
        True,
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "messages[0].tool_calls[0]",
        "must be",
    ),
    (True, {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls", "assistant"),
    (True, {"messages": [calling("[1]")]}, "messages[0].tool_calls[0].function.arguments", "a JSON object"),
    (True, {"messages": [calling("{")]}, "messages[0].tool_calls[0].function.arguments", "a JSON object"),
    (True, {"tools": [{"type": "function"}]}, "tools[0]", "must be"),
    (True, {"tools": {}}, "tools", "a list"),
    (True, {"tool_choice": "required"}, "tool_choice", "not supported"),
    (True, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "not supported"),
    (True, {"chat_template_kwargs": []}, "chat_template_kwargs", "an object"),
    (True, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "may not have"),
    (True, {"chat_template": "{{ x }}"}, "chat_template", "not supported"),
    (True, {"parse_special": True}, "parse_special", "Unrecognized"),
    (True, {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    (True, {"logprobs": 3}, "logprobs", "true or false"),
    (True, {"top_logprobs": 3}, "top_logprobs", "only for logprobs"),
    (True, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    (True, {"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "give one of them"),
    (True, {"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
]


@pytest.mark.parametrize(("chat", "fields", "param", "said"), BAD, ids=[f"{b[2]}-{n}" for n, b in enumerate(BAD)])
def test_what_is_wrong_is_named(chat, fields, param, said):
    with pytest.raises(Refused) as refused:
        call(chat, **fields)
    error = refused.value.body["error"]
    assert refused.value.status == 400
    assert error["param"] == param
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("chat", [False, True])
def test_what_changes_nothing_is_allowed(chat):
    plain = call(chat, seed=1)
    for name, values in NEUTRAL[chat].items():
        for value in [*values, None]:
            assert call(chat, seed=1, **{name: value}) == plain, name
    assert call(chat, seed=1, **{name: None for name in FIELDS[chat] if name not in ("prompt", "messages", "seed")}) == plain
    assert call(chat, seed=1, user="me", metadata={"a": "b"}, model="tiny") == plain
    assert call(chat, seed=1, presence_penalty=0, frequency_penalty=0.0, repetition_penalty=1, logit_bias={"3": 0}) == plain
    assert call(chat, seed=1, min_tokens=0, stop_token_ids=[], stream_options={"include_usage": False}) == plain
    if chat:
        assert call(chat, seed=1, tools=[], tool_choice="auto", chat_template_kwargs={}, top_logprobs=0) == plain
    else:
        assert call(echo=False, add_special_tokens=True, parse_special=True, seed=1) == plain
        assert call(n=3, best_of=3, seed=1) == call(n=3, seed=1)


def test_a_model_that_is_not_served_is_not_found():
    with pytest.raises(Refused) as refused:
        call(model="gpt-4o")
    assert refused.value.status == 404
    assert refused.value.body["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"3", b'{"a": NaN}', b'{"a": -Infinity}', b"\xff{}", b"[" * 10**6, b"1" * 5000]
)
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(Refused) as refused:
        decoded(body)
    assert refused.value.status == 400


def test_fields_become_what_the_engine_is_asked():
    got = call(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=-4, n=2, max_tokens=9, stop="x", logprobs=3)
    asks = got.asks([[5, 6], [7]], 64, frozenset({1}))
    assert [(a.prompt, a.stream) for a in asks] == [([5, 6], 0), ([5, 6], 1), ([7], 0), ([7], 1)]
    assert {(a.max_tokens, a.top_logprobs, a.ends) for a in asks} == {(9, 3, frozenset({1}))}
    s = asks[0].sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.seed) == (0.5, 0.9, 7, 0.1, -4)
    assert call(ignore_eos=True).asks([[5]], 64, frozenset({1}))[0].ends == frozenset()
    # OpenAI's defaults; a seed is drawn anew for each.
    assert call().sampling.temperature == 1
    assert call().sampling.seed != call().sampling.seed
    assert call(temperature=5e-324).sampling.temperature == 0
    assert call(True, logprobs=True).top_logprobs == 0
    assert call(True, logprobs=True, top_logprobs=4).top_logprobs == 4
    assert call(True).top_logprobs is None


def test_room_in_the_context():
    def room(chat, tokens, **fields):
        return call(chat, **fields).asks([[1] * tokens], 64, frozenset())[0].max_tokens

    assert room(False, 10) == 16
    assert room(False, 60) == 4
    assert room(True, 10) == 54
    assert room(True, 10, max_completion_tokens=3) == 3
    for chat, tokens, fields in [(False, 64, {}), (True, 64, {}), (True, 99, {}), (False, 60, {"max_tokens": 5})]:
        with pytest.raises(Refused) as refused:
            room(chat, tokens, **fields)
        error = refused.value.body["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == ("messages" if chat else "prompt")
        assert "maximum context length is 64 tokens" in error["message"]


def test_messages_may_be_in_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    got = parsed({"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]}, True, "tiny")
    assert got.messages == [{"role": "system", "content": "s"}, {"role": "user", "content": "ab"}]


def test_text_needs_a_tokenizer():
    for chat, fields in [(True, {}), (False, {}), (False, {"prompt": [1], "stop": "x"})]:
        with pytest.raises(Refused, match="no tokenizer"):
            call(chat, **fields).encoded(None)
    assert call(prompt=[1, 2]).encoded(None) == [[1, 2]]


# --- text, delta by delta


# Letters, é and € byte by byte, and bytes of them alone, which are no characters.
UNITS = [*([i] for i in (2, 3, 4, 5, 6, 7, 14, 15, 16)), *[[9, 10], [11, 12, 13]] * 3, [12], [9], [11, 12]]


def tokens_of(ids):
    return [Token(i, -float(n), []) for n, i in enumerate(ids)]


def test_pieces_are_the_text_and_hold_back_what_is_not_certain(tokenizer):
    """Random ids, in random deliveries: bytes of characters are split everywhere, and stop texts lie across tokens."""
    draw = random.Random(0)
    stopped = split = held = 0
    for _ in range(1500):
        ids = [i for _ in range(draw.randrange(1, 16)) for i in draw.choice(UNITS)]
        whole = tokenizer.decode(ids)
        stop = [whole[a : a + draw.randrange(1, 4)] for a in range(len(whole)) if draw.random() < 0.05][:3]
        # One that is begun at the end, and does not come.
        stop += [whole[-draw.randrange(1, 4) :] + "x"]
        writer, at, text, said, came = Writer(tokenizer, stop), 0, "", [], []
        reason = None
        while reason is None:
            size = draw.randrange(1, 4)
            delta = writer.write(tokens_of(ids)[at : at + size], "length" if at + size >= len(ids) else None)
            at += size
            text, came, reason = text + delta.text, came + delta.ids, delta.reason
            # A token comes out when some of its text is, or at the end; never before.
            said += delta.said
            assert reason or all(s.at < len(text) for s in said)
            assert not any(s in text for s in stop)
            held += not delta.text
            assert whole.startswith(text.rstrip("\ufffd"))
        if reason == "stop":
            stopped += 1
            # The text ends where the stop text begins that is complete first.
            ends = [whole.find(s) + len(s) for s in stop if s in whole]
            assert any(whole.startswith(text + s) and len(text) + len(s) == min(ends) for s in stop)
            assert all(s.at < len(text) for s in said)
        else:
            assert not any(s in whole for s in stop)
            assert text == whole
            assert [s.token.id for s in said] == ids == came
            assert b"".join(s.bytes for s in said) == b"".join(tokenizer.bytes_of(i) for i in ids)
            split += "\ufffd" not in whole and any(s.bytes in (b"\xa9", b"\xac") for s in said)
    assert min(stopped, split, held) > 50


def test_an_end_token_is_no_text(tokenizer):
    delta = Writer(tokenizer, ends=frozenset({0})).write(tokens_of([2, 3, 0]), "stop")
    assert (delta.text, delta.ids, delta.reason) == ("ab", [2, 3, 0], "stop")
    assert [s.token.id for s in delta.said] == [2, 3]
    # Where it is ignored it is a token, still without text.
    delta = Writer(tokenizer).write(tokens_of([2, 0, 3]), "length")
    assert delta.text == "ab"
    assert [(s.token.id, s.at) for s in delta.said] == [(2, 0), (0, 1), (3, 1)]


def test_without_a_tokenizer_there_are_only_ids():
    delta = Writer(None).write(tokens_of([2, 9]), None)
    assert (delta.text, delta.ids, len(delta.said)) == ("", [2, 9], 2)


# --- shapes


def test_chunks_join_to_the_whole_answer(tokenizer):
    for chat in (False, True):
        likely = {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
        c = call(chat, stream=True, stop=["ca"], **likely)
        reply, writer = Reply(c, "tiny", tokenizer), Writer(tokenizer, c.stop)
        tokens = [Token(i, -0.5, [(i, -0.5), (2, -1.0)]) for i in (4, 11, 12, 13, 3, 4, 2)]
        deltas = [writer.write([t], None) for t in tokens]
        chunks = [chunk for p in deltas for chunk in reply.chunks(0, p)]
        joined = deltas[0]
        for delta in deltas[1:]:
            joined = joined.then(delta)
        [whole] = reply.whole([joined], Usage(1, 0, 7))["choices"]
        choices = [chunk["choices"][0] for chunk in chunks]
        assert {chunk["id"] for chunk in chunks} == {reply.id}
        assert [x["finish_reason"] for x in choices] == [None] * (len(choices) - 1) + ["stop"]
        if chat:
            assert choices[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(x["delta"].get("content", "") for x in choices) == whole["message"]["content"] == "c€b"
            entries = [entry for x in choices if x["logprobs"] for entry in x["logprobs"]["content"]]
            assert entries == whole["logprobs"]["content"]
            assert bytes(b for entry in entries for b in entry["bytes"]).decode() == "c€b"
            assert [len(entry["top_logprobs"]) for entry in entries] == [2] * 5
        else:
            assert "".join(x["text"] for x in choices) == whole["text"] == "c€b"
            logprobs = whole["logprobs"]
            assert logprobs["tokens"] == ["c", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"]
            assert logprobs["text_offset"] == [2, 3, 3, 3, 4]
            assert logprobs["top_logprobs"][0] == {"c": -0.5, "a": -1.0}
            for key in logprobs:
                assert [v for x in choices for v in x["logprobs"][key]] == logprobs[key]


# --- what waits


def test_an_inbox_holds_one_piece_an_answer():
    async def body():
        inbox = Inbox()
        for n in range(1000):
            inbox.put(n % 2, Delta(str(n % 10), [], [n], "length" if n >= 998 else None))
        taken = await inbox.take()
        assert {i: (len(p.text), len(p.ids), p.reason) for i, p in taken.items()} == {
            0: (500, 500, "length"),
            1: (500, 500, "length"),
        }
        inbox.fail(Refused(503, "no"))
        with pytest.raises(Refused):
            await inbox.take()

    asyncio.run(body())


def test_a_slow_reader_of_steps_loses_the_oldest():
    async def body():
        feed = Feed()
        feed.put({"step": -1})
        with feed.reader() as reader:
            assert await reader.take() == [{"step": -1}]
            for n in range(3 * HISTORY):
                feed.put({"step": n})
            assert [s["step"] for s in await reader.take()] == list(range(2 * HISTORY, 3 * HISTORY))
            feed.close()
            assert await reader.take() is None

    asyncio.run(body())


# --- metrics


def test_metrics_are_prometheus_text():
    """As prometheus_client's own parser reads it."""
    metrics, other = (Metrics(Scheduler(8).metrics()) for _ in range(2))
    metrics.responses[200] += 2
    for value in (0.004, 0.5, 0.5, 1000):
        metrics.first_token.observe(value)
    families = {f.name: f for f in text_string_to_metric_families(metrics.text().decode())}
    samples = {(s.name, tuple(s.labels.values())): s.value for f in families.values() for s in f.samples}
    assert families["rankwise_requests_waiting"].type == "gauge"
    assert families["rankwise_steps"].type == "counter"
    assert all(f.documentation and math.isfinite(s.value) for f in families.values() for s in f.samples)
    # A value on a bound is within it.
    assert samples["rankwise_time_to_first_token_seconds_bucket", ("0.25",)] == 1
    assert samples["rankwise_time_to_first_token_seconds_bucket", ("0.5",)] == 3
    assert samples["rankwise_time_to_first_token_seconds_bucket", ("+Inf",)] == 4
    assert samples["rankwise_time_to_first_token_seconds_count", ()] == 4
    assert samples["rankwise_http_responses_total", ("200",)] == 2
    assert samples["rankwise_requests_total", ("cancelled",)] == 0
    assert not any(name.endswith("_created") for name, _ in samples)
    # One server's are not another's, nor this process's.
    assert b"rankwise_http_responses_total{" not in other.text()
    assert b"python_info" not in metrics.text()
