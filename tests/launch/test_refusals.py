"""What commands refuse, in processes of their own: status 2, one line of error, nothing else. What each says: its own tests."""

import pytest

from tests.grids import every_other
from tests.harness import ROOT, command

LLAMA = ("--model", str(ROOT / "tests/oracles/families/llama"))
# Some are refused by the parser, some by the check.
CASES = {
    "tp_mlp": (("--tokens", "0"), "argument --tokens: '0' is not a size: use a whole number of 1 or more"),
    "tp_attention": (("--heads", "7"), "--heads 7 does not divide --d-model 64: use a divisor of 64, or give --d-head"),
    "cp_attention": (("--mesh", "pp=2"), "--mesh pp=2: this command lays ranks out along cp and tp"),
    "ep_moe": (("--active", "9"), "--active 9 is more than --experts 8: use 1 to 8"),
    "dp_train": (("--sequences", "2", "--micro-batches", "3"), "cannot deal --sequences 2 to "),
    "pipeline": (("--layers", "0,0"), "argument --layers: '0,0' is no number of layers: use for instance 8, or 3,3,2,0"),
    "train": (("--text", "/no/such/file"), "--text /no/such/file: No such file or directory"),
    "generate": ((*LLAMA, "--tokens", "1,17"), "token id 17 is outside of the vocabulary: use 0 to 16"),
    "score": ((*LLAMA, "--tokens", "5"), "1 token predicts nothing that could be scored: use 2 or more"),
    "speculate": ((*LLAMA, "--tokens", "1", "--gammas", "9"), "'9' is no number of drafted tokens"),
    "kv_cache": (("--ranks", "129"), "--ranks 129 is more than the heads of any of these models: use at most 128"),
    "serving_bench": (("--scheduler-only", "--speculate"), "leave --speculate out"),
}


@pytest.mark.parametrize(("name", "ranks"), every_other(CASES, [0, 2]))
def test_bad_input_is_one_line_and_status_two(name, ranks):
    args, message = CASES[name]
    assert message in command(name, ranks, *args, status=2)
