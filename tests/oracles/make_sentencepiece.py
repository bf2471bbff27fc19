"""Make sentencepiece.json: a small SentencePiece BPE model as GGUF's keys have it, and the ids that it gives for texts.

    pip install sentencepiece==0.2.3
    python tests/oracles/make_sentencepiece.py

Trained on this project's own pages, with Llama 2's settings: no normalisation, a space before the text, bytes for what no token
spells.
"""

import json
import tempfile
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent
SETTINGS = {
    "model_type": "bpe",
    "vocab_size": 700,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "user_defined_symbols": ["<sep>"],
    "max_sentence_length": 100000,
}
TEXTS = [
    "",
    " ",
    "a",
    "The ranks of a mesh share the weights.",
    "  two spaces,  and  more   ",
    "naïve 你好 😀👍🏽\n\ttabs\r\n",
    "attention attention attentionattention",
    "1234567890 + 3.14159",
    "before<sep>after <sep> end",
    "|---|---|",
    "\u2581already spelt",
    "<0x41><unk> is text",
]


def main():
    pages = "\n".join(file.read_text("utf-8") for file in sorted((HERE.parent.parent / "docs").glob("*.md")))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text").write_text(pages, "utf-8")
        sentencepiece.SentencePieceTrainer.train(input=f"{folder}/text", model_prefix=f"{folder}/m", **SETTINGS)
        model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/m.model")
    ids = range(model.get_piece_size())
    kinds = [("is_unknown", 2), ("is_control", 3), ("is_unused", 5), ("is_byte", 6)]
    types = [next((n for name, n in kinds if getattr(model, name)(i)), 1) for i in ids]
    tokens = [model.id_to_piece(i) for i in ids]
    types[tokens.index("<sep>")] = 4
    texts = [*TEXTS, *(line for line in pages.splitlines()[::67] if len(line) > 20)][:60]
    said = {"model": "llama", "tokens": tokens, "scores": [round(model.get_score(i), 6) for i in ids], "token_type": types}
    said |= {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id(), "unknown_token_id": model.unk_id()}
    oracle = {"keys": said, "texts": {text: model.encode(text) for text in texts}}
    (HERE / "sentencepiece.json").write_text(json.dumps(oracle, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
