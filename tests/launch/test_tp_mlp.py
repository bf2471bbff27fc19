"""The main job as a user types it."""

import json

import pytest

from tests.harness import mpirun

TP_MLP = ("-m", "launch.tp_mlp")
QUICK = ("--data", "none", "--tokens", "5", "--d-model", "6", "--timed", "5,6,10")


def report(ranks, *args):
    done = mpirun(ranks, *TP_MLP, "--json", *args)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("ranks", [0, 1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize(("activation", "d_ff"), [("relu", 64), ("gelu", 61), ("silu", 64), ("swiglu", 61)])
def test_every_number_of_ranks_agrees(ranks, activation, d_ff):
    bias = ["--no-bias"] if ranks % 2 else []
    got = report(ranks, *QUICK, "--activation", activation, "--d-ff", str(d_ff), "--dtype", "float64", *bias)
    assert got["ok"]
    assert got["ranks"] == got["mesh"]["tp"] == max(ranks, 1)
    assert {c["tensor"] for c in got["checks"]} == {"y", "dx", "dW1", "dW2"} | (set() if bias else {"db1", "db2"})
    assert all(c["ok"] and c["relative_error"] < 1e-12 for c in got["checks"])
    assert [(r["verb"], r["phase"], r["calls"]) for r in got["communication"]] == [
        ("all_reduce", "forward", 1),
        ("all_reduce", "backward", 1),
    ]
    for row in got["communication"]:
        assert row["message_bytes"] == row["predicted_message_bytes"] == 5 * 6 * 8
        assert row["wire_bytes"] == pytest.approx(2 * (got["ranks"] - 1) / got["ranks"] * row["message_bytes"])
    memory = got["memory"]
    for kind in ("weights", "saved"):
        assert len(memory[f"{kind}_bytes_per_rank"]) == got["ranks"]
        assert memory[f"{kind}_bytes_per_rank"] == memory[f"predicted_{kind}_bytes_per_rank"]
    assert got["seconds"].keys() == {"sharded", "unsharded", "matmul_only"}


def test_it_learns_to_read_digits_alike_on_any_number_of_ranks():
    runs = [report(n, "--activation", "swiglu", "--d-ff", "256")["digits"] for n in (1, 3)]
    for digits in runs:
        assert digits["test_accuracy"] >= 0.97
        assert digits["test_accuracy"] == digits["test_accuracy_unsharded"] == runs[0]["test_accuracy"]
        assert len(digits["loss"]) == len(digits["loss_unsharded"]) == digits["epochs"]
        assert digits["loss"][-1] < 0.1 * digits["loss"][0]


def test_the_same_seed_prints_the_same_numbers_and_another_does_not():
    numbers = [[c["max_abs_error"] for c in report(2, *QUICK, "--seed", str(seed))["checks"]] for seed in (3, 3, 4)]
    assert numbers[0] == numbers[1] != numbers[2]


def test_a_large_layer_is_compared_on_a_grid_that_says_so():
    got = report(2, "--data", "none", "--tokens", "300", "--d-model", "200", "--d-ff", "301")
    entries = {c["tensor"]: c["entries"] for c in got["checks"]}
    assert entries["y"] == 300 * 200
    assert entries["dW1"] < 200 * 301


def test_people_get_tables_and_a_last_line():
    done = mpirun(3, *TP_MLP, *QUICK, "--d-ff", "10")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "all agreed"
    assert "F 10 (4 or 3 a rank)" in done.stdout
    assert done.stdout.count("all_reduce") == 2


@pytest.mark.parametrize("ranks", [0, 1, 3])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tokens", "0"], "argument --tokens: '0' is not a size: use a whole number of 1 or more"),
        (["--d-model", "-4"], "argument --d-model: '-4' is not a size: use a whole number of 1 or more"),
        (["--d-ff", "1.5"], "argument --d-ff: '1.5' is not a size: use a whole number of 1 or more"),
        (["--activation", "tanh"], "argument --activation: invalid choice: 'tanh' (choose from"),
        (["--dtype", "int32"], "argument --dtype: invalid choice: 'int32' (choose from"),
        (["--seed", "-1"], "argument --seed: '-1' is not a seed: use a whole number of 0 or more"),
        (["--token", "4"], "unrecognized arguments: --token 4"),
    ],
)
def test_bad_input_is_one_line_and_status_two(ranks, args, message):
    done = mpirun(ranks, *TP_MLP, *args)
    assert (done.returncode, done.stdout) == (2, "")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr


def test_more_ranks_than_hidden_units_is_refused():
    done = mpirun(3, *TP_MLP, "--d-ff", "2")
    assert done.returncode == 2
    assert "error: cannot cut --d-ff 2 over 3 ranks: use at most 2 ranks or a larger --d-ff" in done.stderr


def test_bench_starts_its_own_ranks():
    done = mpirun(0, "-m", "launch.bench", "mlp", "--tokens", "8", "--d-model", "8", "--d-ff", "8", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["ranks"] == 2
    assert got["seconds"].keys() == {"matmul_only", "sharded"}
