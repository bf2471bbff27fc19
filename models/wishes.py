"""What a model's makers want of those who generate with it: tokens that end a text, and how to sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from models.settings import Settings, read_json

# Keys of generation_config.json that say how it was made, or what would be so anyway.
IDLE = frozenset(
    [
        "_from_model_config",
        "transformers_version",
        "bos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "return_dict_in_generate",
        "cache_implementation",
        "max_length",
    ]
)
# Those that change nothing at these values.
NEUTRAL = {
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "early_stopping": False,
    "diversity_penalty": 0.0,
    "num_beam_groups": 1,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
}


@dataclass(frozen=True)
class Wishes:
    """`ends`: tokens that end a text. `samples`: whether to sample if nothing is said. `sampling`: by Sampling's names, what is
    to hold unless the one who asks says otherwise. `unread`: a line for each place with what is not used."""

    ends: frozenset[int] = frozenset()
    samples: bool = False
    sampling: dict[str, float] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


def of_folder(folder: Path, config: Settings) -> Wishes:
    """Of generation_config.json, and where that says nothing of ends, of config.json."""
    file = folder / "generation_config.json"
    s = Settings(read_json(file) if file.is_file() else {}, str(file))
    ends = _ids(s, "eos_token_id") or _ids(config, "eos_token_id")
    numbers = {name: s.number(name, None) for name in ("temperature", "top_p", "min_p")}
    numbers["top_k"] = s.size("top_k", None, least=0)
    samples = s.flag("do_sample", False)
    idle = IDLE | {key for key, value in NEUTRAL.items() if s.values.get(key) == value}
    return Wishes(ends, samples, {k: v for k, v in numbers.items() if v is not None}, tuple(s.unread(idle)))


def of_gguf(metadata: dict[str, object], where: str) -> Wishes:
    """Of GGUF's tokenizer.ggml.* and general.sampling.*."""
    s = Settings(metadata, where)
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    names = {"temperature": "temp", "top_p": "top_p", "min_p": "min_p"}
    numbers = {ours: s.number(f"general.sampling.{theirs}", None) for ours, theirs in names.items()}
    numbers["top_k"] = s.size("general.sampling.top_k", None, least=0)
    sampling = {k: v for k, v in numbers.items() if v is not None}
    further = {k: v for k, v in metadata.items() if k.startswith("general.sampling.")}
    rest = Settings(further, where)
    rest.taken = s.taken
    neutral = {"general.sampling.penalty_repeat": 1.0, "general.sampling.mirostat": 0, "general.sampling.xtc_probability": 0.0}
    idle = {key for key, value in neutral.items() if further.get(key) == value}
    return Wishes(frozenset(i for key in keys for i in _ids(s, key)), bool(sampling), sampling, tuple(rest.unread(idle)))


def _ids(s: Settings, key: str) -> frozenset[int]:
    """A token or a list of them. Raises ModelError for anything else."""
    value = s.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise s.refuse(key, "use a whole number or a list of them")
    return frozenset(ids)
