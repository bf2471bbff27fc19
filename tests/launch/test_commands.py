"""What holds for every command: its options as they were typed, functions that can be read at once."""

import ast
from copy import deepcopy
from importlib import import_module

import pytest

from tests.harness import ROOT

LLAMA = f"--model {ROOT}/tests/oracles/families/llama"


@pytest.mark.parametrize(
    "words",
    [
        "tp_mlp",
        "tp_attention",
        "tp_attention --kind mla",
        "cp_attention --kind ulysses",
        "ep_moe",
        "dp_train",
        "pipeline",
        "pipeline --simulate 1,1,1,0",
        "train",
        "train --mesh auto",
        "plan --verify --mesh dp=1",
        f"generate --tokens 1,2 {LLAMA} --draft {ROOT}/tests/oracles/families/llama",
        f"score --tokens 1,2 {LLAMA}",
        f"speculate --tokens 1,2 {LLAMA}",
        "kv_cache",
        f"serving_bench --rate 1 {LLAMA}",
        "serving_bench --scheduler-only",
        f"serve --port 0 {LLAMA}",
        *(f"bench.__main__ {what}" for what in ("mlp", "attention", "context", "train", "trace", "plan")),
        *(f"bench.__main__ {what} {LLAMA}" for what in ("decode", "serving")),
    ],
)
def test_options_stay_as_they_were_typed(words):
    """What a check settles and opens is what it returns."""
    name, *typed = words.split()
    command = import_module(f"launch.{name}")
    args = command.options().parse_args(typed)
    before = deepcopy(vars(args))
    opened = command.check(args, 1)
    assert vars(args) == before
    if name == "serve":
        opened.listening.close()


def test_no_function_is_longer_than_sixty_lines():
    """A main runs, judges and tells: what is longer does more than one of these."""
    functions = [
        (path.name, node.name, node.end_lineno - node.lineno + 1)
        for path in (ROOT / "launch").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(functions) > 300
    assert [f for f in functions if f[2] > 60] == []
