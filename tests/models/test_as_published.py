"""Models' files as they are published: names, sets of files, settings that nobody needs, and what their makers want."""

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest

from launch.pretrained import name_of
from layers.rope import Rope, Yarn
from models.open import open_model
from tests.models.test_gguf import UNSAID, as_gguf
from tests.models.test_models import FAMILIES, NAMES, arrays_of, edited, part, refused


def alike(a, b):
    """Whether two models have the same arrays, by some that every family has."""
    assert replace(a.config, rope=None) == replace(b.config, rope=None)
    if a.config.rope is not None:
        np.testing.assert_array_equal(a.config.rope.frequencies_P, b.config.rope.frequencies_P)
    D, V = a.config.d_model, a.config.vocabulary
    for name, shape in (("Wte", (V, D)), ("blocks.1.wn1", (D,)), ("wnf", (D,))):
        np.testing.assert_array_equal(part(a, name, shape), part(b, name, shape))


@pytest.mark.parametrize("name", NAMES)
def test_no_stored_model_has_anything_unread(name):
    assert open_model(FAMILIES / name).notes == []


@pytest.mark.parametrize("name", [n for n in NAMES if open_model(FAMILIES / n).config.tied])
def test_a_base_model_saved_by_itself_has_no_prefix(tmp_path, name):
    theirs = arrays_of(FAMILIES / name)
    base = "transformer." if name == "gpt2" else "model."
    bare = {key.removeprefix(base): x for key, x in theirs.items()}
    assert bare.keys() != theirs.keys()
    source = open_model(edited(tmp_path, name, tensors=bare, drop=theirs))
    alike(source, open_model(FAMILIES / name))
    assert source.exported({"wnf": np.ones(source.config.d_model)}).keys() <= bare.keys()


def test_names_without_the_prefix_and_a_head_beside(tmp_path):
    for name in NAMES:
        if not open_model(FAMILIES / name).config.tied:
            theirs = arrays_of(FAMILIES / name)
            bare = {key.removeprefix("model."): x for key, x in theirs.items()}
            bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, "f4")
            alike(open_model(edited(tmp_path / name, name, tensors=bare, drop=theirs)), open_model(FAMILIES / name))


def test_a_head_is_read_where_it_differs_from_the_table_and_not_where_it_does_not(tmp_path):
    table = arrays_of(FAMILIES / "qwen2")["model.embed_tokens.weight"]
    source = open_model(edited(tmp_path / "same", "qwen2", tensors={"lm_head.weight": table}))
    assert (source.config.tied, source.notes) == (True, [])
    other = table.copy()
    other[-1, -1] += 1
    source = open_model(edited(tmp_path / "other", "qwen2", tensors={"lm_head.weight": other}))
    assert not source.config.tied
    np.testing.assert_array_equal(part(source, "Whead", (16, 23)), other.T)
    assert len(source.notes) == 1


def test_settings_that_are_not_known_are_named_in_a_line(tmp_path):
    more = {"logit_scale": 2.0, "use_bidirectional": False, "torch_dtype": "bfloat16", "rope_scaling": None, "embedding": [1]}
    source = open_model(edited(tmp_path, "qwen2", more))
    assert source.notes == [f"{tmp_path / 'model' / 'config.json'}: not known and not used: logit_scale 2.0, embedding [1]"]
    inside = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "long_factor": [1.0]}}
    source = open_model(edited(tmp_path / "rope", "qwen2", inside))
    assert [note.rpartition("config.json: ")[2] for note in source.notes] == [
        "rope_parameters: not known and not used: long_factor [1.0]"
    ]


# --- what the makers want


def wished(tmp_path, generation, **config):
    folder = edited(tmp_path, "qwen2", config)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return open_model(folder)


def test_ends_and_sampling_of_a_folder(tmp_path):
    source = wished(
        tmp_path / "a", {"eos_token_id": [3, 5], "do_sample": True, "temperature": 0.6, "top_k": 20}, eos_token_id=7
    )
    assert (source.wishes.ends, source.wishes.samples) == ({3, 5}, True)
    assert source.wishes.sampling == {"temperature": 0.6, "top_k": 20}
    source = wished(tmp_path / "b", {"repetition_penalty": 1.0, "max_new_tokens": 99, "num_beams": 4}, eos_token_id=7)
    assert (source.wishes.ends, source.wishes.samples, source.wishes.sampling) == ({7}, False, {})
    assert source.notes[0].endswith("generation_config.json: not known and not used: max_new_tokens 99, num_beams 4")
    folder = edited(tmp_path / "c", "qwen2")
    (folder / "generation_config.json").write_text('{"temperature": "hot"}')
    assert "generation_config.json: temperature is 'hot': use a number, 0 or more" in refused(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": "a"}')
    assert "generation_config.json: eos_token_id is 'a': use a whole number or a list of them" in refused(folder)


def test_ends_and_sampling_of_a_gguf_file(tmp_path):
    said = {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eot_token_id": 5, "general.sampling.temp": 0.5}
    said |= {"general.sampling.top_k": 7, "general.sampling.mirostat_tau": 5.0, "general.sampling.penalty_repeat": 1.0}
    source = open_model(as_gguf(tmp_path, "qwen2", metadata=said))
    assert (source.wishes.ends, source.wishes.samples) == ({3, 5}, True)
    assert source.wishes.sampling == {"temperature": 0.5, "top_k": 7}
    assert source.notes == [f"{tmp_path / 'model.gguf'}: not known and not used: general.sampling.mirostat_tau 5.0"]


# --- GGUF


def test_keys_of_converters_that_change_nothing_are_passed_over(tmp_path):
    neutral = {"pooling_type": 0, "attention.causal": True, "logit_scale": 1.0, "rope.scaling.attn_factor": 1.0}
    neutral |= {"attention.sliding_window": 0, "use_parallel_residual": True, "final_logit_softcapping": 0.0}
    (tmp_path / "plain").mkdir()
    plain = open_model(as_gguf(tmp_path / "plain", "qwen3"))
    alike(open_model(as_gguf(tmp_path, "qwen3", keys=neutral)), plain)
    assert "attention.causal is False: not supported" in refused(as_gguf(tmp_path, "qwen3", keys={"attention.causal": False}))


def test_yarns_own_length_and_its_factor_in_gguf(tmp_path):
    said = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
    c = open_model(as_gguf(tmp_path, "qwen2", keys=said)).config
    assert (c.context, c.rope.scaling) == (256, Yarn(4.0, 64))
    c = open_model(as_gguf(tmp_path, "qwen2", keys=said | {"rope.scaling.attn_factor": 0.5})).config
    assert c.rope.scaling.table_factor == pytest.approx(0.5 * Yarn(4.0, 64).table_factor)
    assert Rope(4, 100.0).reach == 0


@pytest.mark.parametrize("family", [n for n in NAMES if n not in UNSAID])
def test_a_file_by_any_name(tmp_path, family):
    plain = as_gguf(tmp_path, family)
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(plain.read_bytes())
    alike(open_model(blob), open_model(plain))


def split(folder, file, parts):
    """The tensors of a GGUF file, dealt out over several, as gguf-split does it."""
    reader = gguf.GGUFReader(file)
    names = [f"model-{n + 1:05d}-of-{parts:05d}.gguf" for n in range(parts)]
    for n, name in enumerate(names):
        writer = gguf.GGUFWriter(folder / name, "qwen2")
        for field in reader.fields.values() if n == 0 else ():
            if not field.name.startswith(("GGUF.", "general.architecture")):
                writer.add_key_value(field.name, field.contents(), field.types[0])
        writer.add_uint16("split.no", n)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[n::parts]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return [folder / name for name in names]


def test_a_set_of_files(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "whole").mkdir()
    plain = as_gguf(tmp_path / "whole", "qwen2")
    files = split(tmp_path / "set", plain, 3)
    for path in (tmp_path / "set", files[0], files[2]):
        source = open_model(path)
        alike(source, open_model(plain))
        assert source.nbytes == open_model(plain).nbytes
        assert name_of(source.path) == "model"
    files[1].rename(tmp_path / "kept")
    assert "model-00002-of-00003.gguf: no such file: it is one of 3 with" in refused(tmp_path / "set")
    files[1].write_bytes(files[2].read_bytes())
    assert "is in model-00002-of-00003.gguf too" in refused(tmp_path / "set")


# --- what a model is called


def test_a_snapshot_is_called_by_its_repository(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/93efa2f0"
    snapshot.mkdir(parents=True)
    assert name_of(snapshot) == "HuggingFaceTB/SmolLM2-135M"
    monkeypatch.chdir(snapshot)
    assert name_of(snapshot.relative_to(snapshot)) == "HuggingFaceTB/SmolLM2-135M"
    file = snapshot / "SmolLM2-135M-Q4_K_M-00001-of-00002.gguf"
    file.touch()
    assert name_of(file) == "SmolLM2-135M"
    assert name_of(tmp_path) == tmp_path.name
