"""Prompts that come back with their log-probabilities, and what else a request's fields make of prompt and choices."""

import pytest

from inference.choosing import Token
from inference.penalties import Penalties
from inference.server.openai_reply import Reply, Usage
from inference.server.writer import Writer
from tests.inference.server.calls import call

SCORED = [Token(3, -1.0, [(3, -1.0), (2, -2.0)]), Token(9, -3.0, []), Token(10, -0.25, [])]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_comes_back_with_its_log_probabilities(tokenizer, stream):
    """As evaluation harnesses score: token_logprobs of the prompt, None first, and offsets from its first character."""
    ids = [2, 3, 9, 10]
    for prompt in (tokenizer.decode(ids), ids):
        c = call(prompt=prompt, echo=True, logprobs=1, max_tokens=2, stream=stream)
        reply, writer = Reply(c, "tiny", tokenizer, [ids]), Writer(tokenizer)
        deltas = [writer.write([Token(2, -0.5, [])], None, SCORED), writer.write([Token(11, -4.0, [])], "length")]
        if stream:
            choices = [chunk["choices"][0] for delta in deltas for chunk in reply.chunks(0, delta)]
            text = "".join(x["text"] for x in choices)
            told = {key: [v for x in choices for v in x["logprobs"][key]] for key in choices[0]["logprobs"]}
        else:
            [choice] = reply.whole([deltas[0].then(deltas[1])], Usage(4, 0, 2))["choices"]
            text, told = choice["text"], choice["logprobs"]
        assert text == "abéa\ufffd"
        assert told["token_logprobs"] == [None, -1.0, -3.0, -0.25, -0.5, -4.0]
        assert told["text_offset"] == [0, 1, 2, 2, 3, 4]
        assert told["top_logprobs"][:2] == [None, {"b": -1.0, "a": -2.0}]
        assert told["tokens"][:2] == ["a", "b"]


def test_a_prompt_alone_comes_back(tokenizer):
    c = call(prompt="ab", echo=True, logprobs=0, max_tokens=0)
    [ask] = c.asks([[2, 3]], 64, frozenset())
    assert (ask.max_tokens, ask.prompt_logprobs) == (0, 0)
    delta = Writer(tokenizer).write([], "length", SCORED[:1])
    [choice] = Reply(c, "tiny", tokenizer, [[2, 3]]).whole([delta], Usage(2, 0, 0))["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0]
    assert call(prompt="ab", echo=True, max_tokens=1).asks([[2, 3]], 64, frozenset())[0].prompt_logprobs is None
    # Without an echo, offsets count from the prompt's first character all the same.
    delta = Writer(tokenizer).write([Token(2, -0.5, [])], "length")
    [choice] = Reply(call(prompt="ab", logprobs=0), "tiny", tokenizer, [[2, 3]]).whole([delta], Usage(2, 0, 1))["choices"]
    assert choice["logprobs"]["text_offset"] == [2]


def test_ends_and_penalties():
    fields = {"stop_token_ids": [7, 1], "min_tokens": 2, "logit_bias": {"5": -3, "2": 1}, "presence_penalty": 1}
    [ask] = call(**fields).asks([[5]], 64, frozenset({0}))
    assert ask.ends == {0, 1, 7}
    assert ask.penalties == Penalties(presence=1.0, min_tokens=2, bias=((2, 1.0), (5, -3.0)))
    assert call(stop_token_ids=[7], ignore_eos=True).asks([[5]], 64, frozenset({0}))[0].ends == {7}


def test_control_tokens_of_a_prompt_are_tokens_unless_a_field_says_no(tokenizer):
    """As vLLM and llama.cpp's server read a prompt; in a chat, never."""
    [ids] = call(prompt="a<|im_end|>b").encoded(tokenizer)
    assert ids == [2, 0, 3]
    [text] = call(prompt="a<|im_end|>b", parse_special=False).encoded(tokenizer)
    assert 0 not in text
    [chat] = call(True, messages=[{"role": "user", "content": "<|im_end|>"}]).encoded(tokenizer)
    # The turn's own end.
    assert chat.count(0) == 1
