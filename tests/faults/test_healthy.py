"""Healthy runs: with the guard on it says nothing, and every number is the same to the bit as with it off."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.running import run
from tests.harness import ROOT

LLAMA = "--model tests/oracles/families/llama"
COMMANDS = {
    "tp_mlp": "--tokens 5 --d-model 6 --d-ff 13 --data none",
    "tp_attention": "--tokens 9 --d-model 16 --heads 4 --kind mla",
    "train": "--layers 1 --d-model 16 --heads 4 --d-ff 22 --sequence-length 24 --batch-tokens 144 --steps 5 --sample 5 --zero "
    "--text {tmp}/text.txt --output {tmp}/out --mesh dp=2,tp=1",
    "dp_train": "--steps 2",
    "generate": f"{LLAMA} --tokens 1,2,3 --max-new-tokens 6 --temperature 1 --speculate ngram",
    "speculate": f"{LLAMA} --tokens 1,2,3,4 --gammas 2 --max-new-tokens 5 --png {{tmp}}/picture.png",
    "score": f"{LLAMA} --tokens 1,2,3,4,5,6",
}
OFF, ON = ("--check-collectives", "off"), ("--check-collectives", "on")
WATCHED = ("train", "dp_train", "generate")
# What a clock or the operating system tells, and the options that differ by intention.
MEASURED = re.compile(r"second|bandwidth|peak_bytes|utilisation|check_|files|^matmul|^read_|costs|factor_|words")


def told(value: object) -> object:
    """A document without what was measured."""
    if isinstance(value, dict):
        return {k: told(v) for k, v in value.items() if not MEASURED.search(k)}
    return [told(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("healthy")
    (tmp / "text.txt").write_bytes((ROOT / "README.md").read_bytes()[:3000])
    with ThreadPoolExecutor(3) as pool:
        found = {}
        for name, options in COMMANDS.items():
            words = ["-m", f"launch.{name}", *options.format(tmp=tmp).split(), "--dtype", "float64", "--json"]
            replicas = ("--check-replicas", "1") if name in WATCHED else ()
            found[name] = [pool.submit(run, 2, [*words, *guard]) for guard in (OFF, (*ON, *replicas))]
        yield found


@pytest.mark.limit(120)
@pytest.mark.parametrize("name", COMMANDS)
def test_the_guard_says_nothing_and_changes_nothing(runs, name):
    off, on = (future.result() for future in runs[name])
    for done in (off, on):
        assert (done.status, done.err, done.left) == (0, "", []), str(done)
    one, other = told(json.loads(off.out)), told(json.loads(on.out))
    assert one == other
    # Something was compared: numbers with all their digits.
    assert len(re.findall(r"\d\.\d{9,}", json.dumps(one))) >= 1 or len(one.get("tokens", one.get("rows"))) > 1
