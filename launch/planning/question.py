"""From values by name, of options or of a table's row, to what is planned: a model, a machine, a layout."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path

from launch.planning import columns
from layers.rope import Rope
from models.config import Config, Experts, Latent, gpt2_like, llama_like
from models.families.table import MODEL_TYPES
from models.huggingface import read_json
from models.published import PUBLISHED
from models.settings import Settings
from parallel.schedules import SCHEDULES
from parallel.shard import AXES
from plan import here
from plan import machine as machines
from plan.machine import Machine
from plan.strategy import Strategy

Values = Mapping[str, object]
# Heads and experts of a model: each is dealt to its rank.
MOST_OF = 2**14
LLAMA3 = {"context": 8192, "rope": Rope(128, 500000.0)}
# As their authors' papers or config.json files say; GPT-3 with the vocabulary that Megatron-LM trains it with.
KNOWN = {
    "gpt3-175b": gpt2_like(51200, 12288, 96, 96, 4 * 12288, 2048),
    "llama3-8b": PUBLISHED["Llama-3-8B"],
    "llama3-70b": PUBLISHED["Llama-3-70B"],
    "llama3-405b": replace(llama_like(128256, 16384, 126, 128, 8, 53248, 8192), **LLAMA3),
    "mixtral-8x7b": replace(
        llama_like(32000, 4096, 32, 32, 8, 14336, 32768), rope=Rope(128, 1e6), experts=Experts(8, 2, 14336)
    ),
    "deepseek-v3": PUBLISHED["DeepSeek-V3"],
}
# The keys of a Config that a TOML file may have, of which these are tables.
_TABLES = {"latent": Latent, "experts": Experts}


def config_of(values: Values) -> tuple[str, Config]:
    """The model's name and Config. Raises ValueError, in one line."""
    given = {name: values[name] for name in columns.MODEL if values.get(name) is not None}
    return _config_of(str(values.get("model") or ""), values.get("sequence_length") or 2048, tuple(given.items()))


@lru_cache(1024)
def _config_of(model: str, S: int, items: tuple) -> tuple[str, Config]:
    """Kept, so that rows of a table with the same model have the very same Config."""
    given = dict(items)
    if model:
        name = model
        base = KNOWN[name] if name in KNOWN else _read(name)
        if "family" in given:
            raise ValueError(f"--family {given['family']} beside --model {name}: give one of them")
    else:
        needed = ("family", "layers", "d_model", "heads", "vocabulary")
        if missing := [f"--{n.replace('_', '-')}" for n in needed if n not in given]:
            known = f"--model, a file or one of {', '.join(KNOWN)}"
            raise ValueError(f"no model: give {known}; or {', '.join(missing)} as well")
        name, base = given["family"], _like(given, S)
    return name, _checked(_overridden(base, given))


def _like(given: dict, S: int) -> Config:
    """A model of the family, of these sizes."""
    D, H = given["d_model"], given["heads"]
    sizes = (given["vocabulary"], D, given["layers"], H)
    if D % H and "d_head" not in given:
        raise ValueError(f"cannot share d_model {D} among {H} heads: use a divisor of {D}, or give --d-head")
    if given["family"] == "gpt2":
        return gpt2_like(*sizes, given.get("d_ff", 4 * D), S, given.get("tied", True))
    d_ff = given.get("d_ff", -(-8 * D // 3 // 256) * 256)
    made = llama_like(*sizes, given.get("kv_heads", H), d_ff, S, given.get("tied", False))
    if given["family"] == "deepseek":
        made = replace(made, latent=Latent(512, 128, 64, 128, 0), kv_heads=H, rope=Rope(64, pairing="interleaved"))
    return made


def _overridden(base: Config, given: dict) -> Config:
    """With what is given beside a model, or beyond a family's sizes."""
    plain = {name: given[name] for name in ("layers", "d_model", "heads", "kv_heads", "d_head", "d_ff", "vocabulary", "tied")
             if name in given}  # fmt: skip
    if "heads" in plain and "kv_heads" not in plain and base.kv_heads == base.heads:
        plain["kv_heads"] = plain["heads"]
    c = replace(base, **plain)
    latent = {name: given[name] for name in ("d_latent", "d_query_latent", "d_nope", "d_rope", "d_value") if name in given}
    if latent:
        c = replace(c, latent=replace(c.latent or Latent(512, 128, 64, 128, 0), **latent), kv_heads=c.heads)
    routed = {
        "count": "experts",
        "active": "experts_active",
        "d_ff": "d_expert",
        "d_shared": "d_shared",
        "first": "dense_layers",
    }
    own = {field: given[name] for field, name in routed.items() if name in given}
    if own.get("count") == 0 or (c.experts is None and not own.get("count")):
        if unused := [name for field, name in routed.items() if field in own and field != "count" and own[field]]:
            raise ValueError(f"--{unused[0].replace('_', '-')} does nothing without experts: give --experts, or leave it out")
        return replace(c, experts=None)
    if own:
        c = replace(c, experts=replace(c.experts or Experts(own["count"], min(2, own["count"]), c.d_ff), **own))
    return c


def _checked(c: Config) -> Config:
    """Raises ValueError for sizes that do not go together, or that nobody could build."""
    counts = {"heads": c.heads, "experts": c.experts.count if c.experts is not None else 0}
    if most := [what for what, n in counts.items() if n > MOST_OF]:
        raise ValueError(f"--{most[0]} {counts[most[0]]} are too many to be built: use at most {MOST_OF}")
    E = c.d_head or (c.d_model // c.heads if c.d_model % c.heads == 0 else None)
    if E is None:
        raise ValueError(
            f"cannot share d_model {c.d_model} among {c.heads} heads: use a divisor of {c.d_model}, or give --d-head"
        )
    if c.heads % c.kv_heads:
        raise ValueError(f"cannot share {c.heads} heads among {c.kv_heads} key/value heads: use a divisor of {c.heads}")
    if c.experts is not None and c.experts.active > c.experts.count:
        raise ValueError(f"--experts-active {c.experts.active} of {c.experts.count} experts: use at most {c.experts.count}")
    width = E if c.latent is None else c.latent.d_rope
    if c.rope is not None and c.rope.width != width:
        # Of the rotation nothing but its width costs anything.
        c = replace(c, rope=Rope(width, c.rope.base, c.rope.pairing))
    return c


@lru_cache(64)
def _read(name: str) -> Config:
    """Of a config.json, a folder that has one, or a TOML file with the keys of Config."""
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"--model {name} is not known: use a config.json, a FILE.toml, or one of {', '.join(KNOWN)}")
    if path.suffix == ".toml":
        try:
            return _from_toml(tomllib.loads(path.read_text("utf-8")))
        except OSError as error:
            raise ValueError(f"--model {name}: {error.strerror}") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"--model {name}: {error}") from None
    s = Settings(read_json(path), str(path))
    # In a list, as what the file says may be of a type that a dict cannot look up.
    if (kind := s.get("model_type")) not in list(MODEL_TYPES):
        raise s.refuse("model_type", f"unknown family, use one of {', '.join(MODEL_TYPES)}")
    return MODEL_TYPES[kind].config(s)


def _from_toml(values: dict) -> Config:
    for name, cls in _TABLES.items():
        if isinstance(values.get(name), dict):
            values[name] = _made(cls, values[name], f"[{name}]")
    if isinstance(rope := values.get("rope"), dict):
        if unknown := [name for name in rope if name not in ("width", "base", "pairing")]:
            raise ValueError(f"[rope] has {unknown[0]}, which is not known: use width, base, pairing")
        values["rope"] = Rope(**rope)
    return _made(Config, values, "the file")


def _made(cls: type, values: dict, where: str) -> object:
    known = {f.name: f for f in fields(cls)}
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"{where} has {unknown[0]}, which is not known: use {', '.join(known)}")
    for name, value in values.items():
        whole = str(known[name].type).startswith("int")
        if whole and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ValueError(f"{where}: {name} is {json.dumps(value, default=str)}: use a whole number")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {str(error).partition('() ')[2]}") from None


# --- machine and layout


def machine_of(values: Values, machine: Machine | None = None) -> Machine:
    """The machine of that name, with what is given beside it."""
    if machine is None and values.get("machine") is None:
        raise ValueError(f"no machine: give one of {', '.join(machines.known())}, or a FILE.toml")
    m = machine or _machine(str(values["machine"]))
    if (n := values.get("node_gbs")) is not None:
        m = machines.changed(m, "node_gbs", n / m.between.node_gbs)
    given = {name: values[name] for name in ("gpus_per_node", "memory_gib") if values.get(name) is not None}
    if "gpus_per_node" in given:
        # A node has as many NICs as GPUs, unless its bandwidth is said.
        scale = 1.0 if values.get("node_gbs") is not None else given["gpus_per_node"] / m.gpus_per_node
        m = machines.changed(m, "node_gbs", scale)
    return replace(m, **given) if given else m


_machine = lru_cache(64)(here.read)


def options_of(values: Values, config: Config, machine: Machine) -> dict:
    """What of a Strategy is given, by its own names; the mesh and the micro-batch are left to the caller."""
    found = {name: values[name] for name in columns.LAYOUT if values.get(name) is not None}
    dtype = found.setdefault("dtype", next((d for d in ("bf16", "fp16", "float32") if d in machine.peaks), "float32"))
    machine.peak(dtype)
    best = [name for name in ("flash3", "flash2", "flash1") if name in machine.flash]
    found.setdefault("attention", best[0] if best else "unfused")
    schedule = SCHEDULES[found.get("schedule", "1f1b")]
    found.setdefault("chunks", schedule.chunks)
    if (S := values.get("sequence_length")) is None and not values.get("model"):
        raise ValueError("no sequence length: give --sequence-length, tokens of a sequence")
    S = S or config.context
    return found | {"config": config, "sequence_length": S, "batch": batch_of(values, S)}


def batch_of(values: Values, S: int) -> int:
    """Sequences of a step."""
    if values.get("batch") is not None:
        return values["batch"]
    if (tokens := values.get("batch_tokens")) is None:
        raise ValueError("no batch: give --batch, sequences of a step, or --batch-tokens")
    if tokens % S:
        raise ValueError(f"--batch-tokens {tokens} is no multiple of the sequence length {S}: use {tokens // S * S or S}")
    return tokens // S


def strategy_of(values: Values, config: Config, machine: Machine) -> Strategy:
    """The one layout that is asked for. Raises ValueError, in one line."""
    options = options_of(values, config, machine)
    mesh = {name: values.get(name) or 1 for name in AXES}
    micro = values.get("micro_batch") or 1
    if (number := values.get("micro_batches")) is not None:
        data = mesh["dp"] * mesh["ep"]
        if options["batch"] % (data * number):
            per = options["batch"] // data
            raise ValueError(f"cannot deal {options['batch']} sequences to {data} data ranks x {number} micro-batches: "
                             f"use a divisor of {per}" if options["batch"] % data == 0 else
                             f"cannot deal {options['batch']} sequences to {data} data ranks: use a divisor")  # fmt: skip
        micro = options["batch"] // (data * number)
    return Strategy(**options, **mesh, micro_batch=micro)
