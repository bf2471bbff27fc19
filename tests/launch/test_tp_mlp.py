"""The main job as a user types it."""

import json

import pytest

from tests.grids import thinned
from tests.harness import command, mpirun
from tests.inside import inside, ran

on_ranks = pytest.mark.mpi
QUICK = ("--data", "none", "--tokens", "5", "--d-model", "6", "--timed", "5,6,10")
WIDTHS = [("relu", 64), ("gelu", 61), ("silu", 64), ("swiglu", 61)]


def options(ranks, activation, d_ff):
    bias = ["--no-bias"] if ranks % 2 else []
    return (*QUICK, "--activation", activation, "--d-ff", str(d_ff), "--dtype", "float64", "--json", *bias)


def check_report(got, ranks):
    assert got["ok"]
    assert got["ranks"] == got["mesh"]["tp"] == ranks
    assert got["config"]["bias"] == (ranks % 2 == 0)
    biases = {"db1", "db2"} if got["config"]["bias"] else set()
    assert {c["tensor"] for c in got["checks"]} == {"y", "dx", "dW1", "dW2"} | biases
    assert all(c["ok"] and c["relative_error"] < 1e-12 for c in got["checks"])
    assert [(r["verb"], r["phase"], r["calls"]) for r in got["communication"]] == [
        ("all_reduce", "forward", 1),
        ("all_reduce", "backward", 1),
    ]
    for row in got["communication"]:
        assert row["message_bytes"] == row["predicted_message_bytes"] == 5 * 6 * 8
        assert row["wire_bytes"] == pytest.approx(2 * (ranks - 1) / ranks * row["message_bytes"])
    memory = got["memory"]
    for kind in ("weights", "saved"):
        assert len(memory[f"{kind}_bytes_per_rank"]) == ranks
        assert memory[f"{kind}_bytes_per_rank"] == memory[f"predicted_{kind}_bytes_per_rank"]
    assert got["seconds"].keys() == {"sharded", "unsharded", "matmul_only"}


@on_ranks
@pytest.mark.parametrize(("activation", "d_ff"), WIDTHS)
def test_every_number_of_ranks_agrees(comm, activation, d_ff):
    check_report(inside(comm, "tp_mlp", *options(comm.size, activation, d_ff)), comm.size)


@pytest.mark.parametrize("ranks", thinned([0, 1, 2, 3, 4, 6, 8], [0, 2, 8]))
@pytest.mark.parametrize(("activation", "d_ff"), thinned(WIDTHS, WIDTHS[-1:]))
def test_and_so_it_does_in_processes_of_its_own(ranks, activation, d_ff):
    check_report(command("tp_mlp", ranks, *options(max(ranks, 1), activation, d_ff)), max(ranks, 1))


@pytest.mark.mpi(min_size=3, max_size=thinned(4, 3))
def test_it_learns_to_read_digits_alike_on_any_number_of_ranks(comm):
    """On three; what is unsharded in it is what a run on one rank trains."""
    digits = inside(comm, "tp_mlp", "--activation", "swiglu", "--d-ff", "256", "--json")["digits"]
    assert digits["test_accuracy"] >= 0.97
    assert digits["test_accuracy"] == digits["test_accuracy_unsharded"]
    assert len(digits["loss"]) == len(digits["loss_unsharded"]) == digits["epochs"]
    assert digits["loss"][-1] < 0.1 * digits["loss"][0]


@on_ranks
def test_the_same_seed_prints_the_same_numbers_and_another_does_not(comm):
    runs = [inside(comm, "tp_mlp", *QUICK, "--d-ff", "61", "--seed", seed, "--json") for seed in (3, 3, 4)]
    numbers = [[c["max_abs_error"] for c in run["checks"]] for run in runs]
    assert numbers[0] == numbers[1] != numbers[2]


@pytest.mark.mpi(min_size=2, max_size=thinned(4, 2))
def test_a_large_layer_is_compared_on_a_grid_that_says_so(comm):
    got = inside(comm, "tp_mlp", "--data", "none", "--tokens", "300", "--d-model", "200", "--d-ff", "301", "--json")
    entries = {c["tensor"]: c["entries"] for c in got["checks"]}
    assert entries["y"] == 300 * 200
    assert entries["dW1"] < 200 * 301


@pytest.mark.mpi(min_size=3)
def test_people_get_tables_and_a_last_line(comm):
    done = ran(comm, "tp_mlp", *QUICK, "--d-ff", "10", ranks=3)
    assert done.status == 0
    assert done.out.splitlines()[-1] == "all agreed"
    assert "F 10 (4 or 3 a rank)" in done.out
    assert done.out.count("all_reduce") == 2


@on_ranks
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tokens", "0"], "argument --tokens: '0' is not a size: use a whole number of 1 or more"),
        (["--d-model", "-4"], "argument --d-model: '-4' is not a size: use a whole number of 1 or more"),
        (["--d-ff", "1.5"], "argument --d-ff: '1.5' is not a size: use a whole number of 1 or more"),
        (["--activation", "tanh"], "argument --activation: invalid choice: 'tanh' (choose from"),
        (["--dtype", "int32"], "argument --dtype: invalid choice: 'int32' (choose from"),
        (["--seed", "-1"], "argument --seed: '-1' is not a seed: use a whole number of 0 or more"),
        (["--token", "4"], "'--token' is no option here: do you mean --tokens?"),
        (["--png", "x.png"], "'--png' is no option here: --help lists them"),
    ],
)
def test_bad_input_is_one_line_and_status_two(comm, args, message):
    assert message in inside(comm, "tp_mlp", *args, status=2)


@pytest.mark.mpi(min_size=3)
def test_more_ranks_than_hidden_units_is_refused(comm):
    refused = inside(comm, "tp_mlp", "--d-ff", "2", status=2, ranks=3)
    assert refused == "error: cannot cut --d-ff 2 over 3 ranks: use at most 2 ranks or a larger --d-ff"


def test_bench_starts_its_own_ranks():
    done = mpirun(0, "-m", "launch.bench", "mlp", "--tokens", "8", "--d-model", "8", "--d-ff", "8", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["ranks"] == 2
    assert got["seconds"].keys() == {"matmul_only", "sharded"}
