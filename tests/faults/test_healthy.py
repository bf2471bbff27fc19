"""Healthy runs: with the guard on it says nothing, and every number is the same to the bit as with it off."""

from __future__ import annotations

import json
import re

import pytest

from tests.harness import ROOT
from tests.inside import ran

LLAMA = "--model tests/oracles/families/llama"
COMMANDS = {
    "tp_mlp": "--tokens 5 --d-model 6 --d-ff 13 --timed 5,6,13 --data none",
    "tp_attention": "--tokens 4 --d-model 8 --heads 4 --kind mla",
    "cp_attention": "--tokens 7 --d-model 8 --heads 4",
    "ep_moe": "--tokens 5 --d-model 6 --d-ff 5 --timed 9,6,5 --shared 1",
    "train": "--layers 1 --d-model 16 --heads 4 --d-ff 22 --sequence-length 24 --batch-tokens 144 --steps 5 --sample 5 --zero "
    "--text {tmp}/text.txt --output {tmp}/out --mesh dp={n},tp=1",
    "dp_train": "--steps 2 --sequences 4 --sequence-length 5",
    "pipeline": "--layers 2 --d-model 8 --d-ff 6 --micro-batches 2 --sequence-length 3 --timed 5,8,8 --schedule zb-h1 --tied",
    "generate": f"{LLAMA} --tokens 1,2,3 --max-new-tokens 6 --temperature 1 --speculate ngram",
    "speculate": f"{LLAMA} --tokens 1,2,3,4 --gammas 2 --max-new-tokens 5 --png {{tmp}}/picture.png",
    "score": f"{LLAMA} --tokens 1,2,3,4,5,6",
}
OFF, ON = ("--check-collectives", "off"), ("--check-collectives", "on")
WATCHED = ("train", "dp_train", "generate")
# What a clock or the operating system tells, and the options that differ by intention.
MEASURED = re.compile(
    r"second|bandwidth|peak_bytes|utilisation|check_|files|^matmul|^read_|costs|factor_|words|span|bubble|^timed"
)


def lasting(value: object) -> object:
    """A document without what was measured."""
    if isinstance(value, dict):
        return {k: lasting(v) for k, v in value.items() if not MEASURED.search(k)}
    return [lasting(v) for v in value] if isinstance(value, list) else value


@pytest.mark.mpi(min_size=2, max_size=2)
@pytest.mark.parametrize("name", COMMANDS)
def test_the_guard_says_nothing_and_changes_nothing(name, comm, shared):
    if comm.rank == 0:
        (shared / "text.txt").write_bytes((ROOT / "README.md").read_bytes()[:3000])
    comm.Barrier()
    words = [*COMMANDS[name].format(tmp=shared, n=comm.size).split(), "--dtype", "float64", "--json"]
    replicas = ("--check-replicas", "1") if name in WATCHED else ()
    off, on = (ran(comm, name, *words, *guard) for guard in (OFF, (*ON, *replicas)))
    assert [(done.status, done.err) for done in (off, on)] == [(0, "")] * 2
    one, other = lasting(json.loads(off.out)), lasting(json.loads(on.out))
    assert one == other
    # Something was compared: numbers with all their digits.
    assert len(re.findall(r"\d\.\d{9,}", json.dumps(one))) >= 1 or len(one.get("tokens", one.get("rows"))) > 1
