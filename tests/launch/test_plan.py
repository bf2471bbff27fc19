"""launch.plan as a user types it: one layout, all layouts, tables, what if, pictures, and what is refused."""

import csv
import json
from math import prod

import pytest

from launch.planning.table import PREDICTED
from tests.inside import inside
from tests.plan.known import DATA, rows

LLAMA = ("--model", "llama3-8b", "--machine", "h100-sxm", "--sequence-length", "8192")
ONE = (*LLAMA, "--batch", "64", "--mesh", "pp=2,dp=4,tp=8", "--zero", "1", "--sequence-parallel")
TOY = (
    "--family",
    "gpt2",
    "--layers",
    "4",
    "--d-model",
    "256",
    "--heads",
    "4",
    "--vocabulary",
    "1024",
    "--sequence-length",
    "128",
)
A100 = ("--machine", "a100-80gb")


@pytest.mark.mpi(max_size=2)
def test_one_layout_says_all_that_it_should(comm):
    got = inside(comm, "plan", *ONE, "--what-if", "memory=2x,peak=2x", "--what-if", "zero=3", "--sensitivity", "--json")
    assert (got["command"], got["mode"], got["ok"], got["seed"]) == ("plan", "predict", True, 0)
    assert got["model"] | {"config": None} == {
        "name": "llama3-8b", "parameters": 8030261248, "active_parameters": 8030261248, "config": None,
    }  # fmt: skip
    assert got["machine"] == {"name": "h100-sxm", "ranks": 64, "nodes": 8, "gpus_per_node": 8}
    assert got["mesh"] == {"pp": 2, "dp": 4, "ep": 1, "cp": 1, "tp": 8}
    assert got["layout"]["stage_layers"] == [16, 16]
    assert got["layout"]["micro_batches"] == 16
    assert got["batch"] == {"sequences": 64, "tokens": 64 * 8192, "sequence_length": 8192}
    seconds = got["seconds"]
    assert sum(v for k, v in seconds.items() if k != "exposed") + sum(seconds["exposed"].values()) == pytest.approx(
        got["iteration_seconds"]
    )
    assert got["tokens_per_second"] == pytest.approx(64 * 8192 / got["iteration_seconds"])
    assert got["mfu"] == pytest.approx(got["model_flops"] / (64 * 989e12 * got["iteration_seconds"]))
    assert got["tflops_per_gpu"] == pytest.approx(got["mfu"] * 989)
    memory = got["memory"]
    assert memory["capacity_bytes"] == 80 * 2**30
    assert memory["peak_bytes"] == max(stage["total"] for stage in memory["stages"])
    for stage in memory["stages"]:
        kinds = set(stage) - {"stage_rank", "margin", "total", "in_flight"}
        assert stage["total"] == pytest.approx(sum(stage[kind] for kind in kinds))
    classes = got["communication"]
    assert sum(c["ranks"] for c in classes) == 64
    for row in (row for c in classes for row in c["rows"]):
        assert row["exposed_seconds"] <= row["seconds"] * (1 + 1e-9)
    assert [c["change"] for c in got["what_if"]] == ["memory=2x,peak=2x", "zero=3"]
    assert got["what_if"][0]["ratio"] < 1 < got["what_if"][1]["ratio"] * 2
    assert all(c["ratio"] <= 1 + 1e-9 for c in got["sensitivity"])
    text = inside(comm, "plan", *ONE, "--explain")
    for said in ("a step takes", "fits into 80.0 GiB a GPU", "queries, keys, values", "exposed tp", "reduce_scatter"):
        assert said in text


@pytest.mark.mpi(max_size=2)
def test_all_layouts_of_some_ranks(comm):
    got = inside(comm, "plan", *TOY, *A100, "--batch", "16", "--ranks", "8", "--keep", "3", "--fix", "zero=1",
                 "--try", "recompute=none,full", "--json")  # fmt: skip
    assert got["mode"] == "search"
    found = got["search"]
    assert len(found["layouts"]) == 3
    times = [e["iteration_seconds"] for e in found["layouts"]]
    assert times == sorted(times)
    assert all(prod(e["mesh"].values()) == 8 and e["layout"]["zero"] == 1 for e in found["layouts"])
    assert found["considered"] == found["feasible"] + sum(miss["count"] for miss in found["infeasible"])
    assert "communication" not in found["layouts"][0]
    one = found["layouts"][0]
    typed = [f"--{k.replace('_', '-')}={one['layout'][k]}" for k in ("schedule", "chunks", "micro_batch", "recompute", "zero")]
    mesh = ",".join(f"{k}={n}" for k, n in one["mesh"].items())
    again = inside(comm, "plan", *TOY, *A100, "--batch", "16", "--mesh", mesh, *typed, "--json")
    assert again["iteration_seconds"] == one["iteration_seconds"]
    text = inside(comm, "plan", *LLAMA, "--ranks", "8", "--batch", "8", "--memory-gib", "20", "--fix", "tp=8,micro_batch=4")
    assert "too large: the nearest" in text


@pytest.mark.mpi(max_size=2)
def test_tables_keep_their_columns_and_say_what_cannot_be(comm, tmp_path):
    path, out = tmp_path / "rows.csv", tmp_path / "predicted.csv"
    if comm.rank == 0:
        lines = rows("korthikanti")[:2]
        wrong = ({"tp": "7"}, {"schedule": "2f2b"}, {"dp": "3"}, {"machine": ""}, {"layers": "50000", "pp": "50000"},
                 {"heads": "1000000", "d_model": "1000000"}, {"sequence_parallel": "1.0", "overlap": "0.0"})  # fmt: skip
        bad = [{**lines[0], **cells} for cells in wrong]
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows([*lines, *bad])
    comm.barrier()
    path, out = comm.bcast(path), comm.bcast(out)
    got = inside(comm, "plan", "--table", path, "--output", out, "--json")
    assert (got["mode"], got["table"]["rows"], got["table"]["failed"]) == ("table", 9, 5)
    assert got["score"]["rows"] == 4
    if comm.rank == 0:
        with open(out) as file:
            written = list(csv.DictReader(file))
        assert list(written[0]) == [*rows("korthikanti")[0], *(f"predicted_{name}" for name in PREDICTED)]
        assert written[0]["measured_seconds"] == "1.42"
        assert abs(float(written[0]["predicted_iteration_seconds"]) / 1.42 - 1) < 0.1
        assert written[0]["predicted_fits"] == "1"
        assert written[3]["predicted_iteration_seconds"] == ""
        assert written[3]["predicted_error"].startswith("schedule '2f2b': use one of gpipe, 1f1b, interleaved, zb-h1")
        assert written[4]["predicted_error"] == "cannot deal 4 sequences to 3 data ranks x micro-batch 4: use 1"
        assert written[5]["predicted_error"].startswith("no machine: give one of a100-40gb, ")
        assert written[6]["predicted_error"].startswith("50000 stages are too many to be timed")
        assert written[7]["predicted_error"] == "--heads 1000000 are too many to be built: use at most 16384"


@pytest.mark.mpi(max_size=1)
def test_a_timeline_is_read_by_launch_trace(comm, tmp_path):
    out = tmp_path / "step.json"
    inside(comm, "plan", *ONE, "--timeline", out, "--png", tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    read = inside(comm, "trace", out, "--json")
    planned = inside(comm, "plan", *ONE, "--json")
    assert read["ranks"] == 2
    assert read["to_seconds"] - read["from_seconds"] == pytest.approx(planned["iteration_seconds"], rel=1e-3)
    verbs = {(v["verb"], v["axis"]) for v in read["verbs"]}
    assert {("send", "pp"), ("receive", "pp"), ("all_reduce", "tp"), ("all_reduce", "dp")} <= verbs
    assert json.loads(out.read_text())["otherData"]["planned"]


@pytest.mark.mpi(max_size=2)
def test_collectives(comm):
    got = inside(comm, "plan", "--collective", "all_reduce", "--group", "8", "--bytes", "1MiB,16MiB", *A100, "--json")
    assert [row["message_bytes"] for row in got["rows"]] == [2**20, 2**24]
    assert got["rows"][1]["bus_bytes_per_second"] == pytest.approx(2 * 7 / 8 * 2**24 / got["rows"][1]["seconds"])


@pytest.mark.mpi(max_size=1)
def test_models_from_files(comm, tmp_path):
    toml = tmp_path / "toy.toml"
    toml.write_text('vocabulary = 1024\nd_model = 256\nlayers = 4\nheads = 4\nkv_heads = 4\nd_ff = 512\ncontext = 128\n'
                    "[experts]\ncount = 8\nactive = 2\nd_ff = 128\n[rope]\nwidth = 64\n")  # fmt: skip
    got = inside(comm, "plan", "--model", toml, "--layers", "2", *A100, "--sequence-length", "128", "--batch", "4", "--json")
    assert got["model"]["config"]["layers"] == 2
    assert got["model"]["active_parameters"] < got["model"]["parameters"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
                                  "intermediate_size": 512, "vocab_size": 1024}))  # fmt: skip
    got = inside(comm, "plan", "--model", config, *A100, "--sequence-length", "128", "--batch", "4", "--json")
    assert got["model"]["parameters"] == 2 * (4 * 256**2 + 3 * 256 * 512 + 2 * 256) + 2 * 1024 * 256 + 256


TOY_A100 = (*TOY, *A100)
REFUSED = {
    "more ranks than there are": ((*TOY, "--batch", "4", "--mesh", "tp=4"), "error: --machine here measures the ranks"),
    "a constant of what is measured": (
        (*TOY, "--batch", "4", "--what-if", "memory=2x"),
        "error: --what-if memory: what was measured has no constants",
    ),
    "ours on a GPU": ((*TOY_A100, "--batch", "4", "--account", "ours"), "error: --account ours has no times for"),
    "no model": ((*A100, "--batch", "1", "--sequence-length", "8"), "error: no model: give --model, a file or one of"),
    "machine": ((*TOY, "--batch", "4", "--machine", "a100"), "error: --machine a100 is not known: use one of a100-40gb"),
    "batch": (TOY_A100, "error: no batch: give --batch, sequences of a step, or --batch-tokens"),
    "uneven": ((*TOY_A100, "--batch", "1536", "--mesh", "dp=28", "--micro-batch", "2"),
               "error: cannot deal 1536 sequences to 28 data ranks x micro-batch 2: use 24 or 32"),
    "tokens": ((*TOY_A100, "--batch-tokens", "1000"), "is no multiple of the sequence length 128: use 896"),
    "heads": ((*TOY_A100, "--batch", "4", "--mesh", "tp=8"), "error: cannot cut 4 heads over tp=8: use at most tp=4"),
    "stages": ((*TOY_A100, "--batch", "8", "--mesh", "pp=8"), "error: cannot put 4 layers on 8 stages"),
    "schedule": ((*TOY_A100, "--batch", "2", "--mesh", "pp=2", "--schedule", "dualpipe-v"),
                 "error: dualpipe-v needs 4 micro-batches for pp=2, got 2: use zb-v"),
    "kernel": ((*TOY_A100, "--batch", "2", "--attention", "flash3"), "error: a100-80gb has no flash3: use one of unfused"),
    "dtype": ((*TOY_A100, "--batch", "2", "--dtype", "fp8"), "error: a100-80gb has no peak in fp8: use one of"),
    "option": ((*TOY_A100, "--batch", "2", "--zero", "4"), "'4': use one of 0, 1, 2, 3"),
    "what if": ((*TOY_A100, "--batch", "2", "--what-if", "speed=2x"), "'speed' is nothing that can be changed"),
    "both": ((*TOY_A100, "--batch", "2", "--ranks", "8", "--mesh", "dp=8"), "--mesh does nothing with --ranks"),
    "fix": ((*TOY_A100, "--batch", "2", "--ranks", "8", "--fix", "nodes=2"), "'nodes' is nothing that is searched"),
    "table": (("--table", "nowhere.csv"), "error: --table nowhere.csv: No such file or directory"),
    "size": (("--collective", "send", "--bytes", "1MX", *A100), "'1MX' is no size: use for instance 1MiB"),
    "zero over": ((*TOY_A100, "--batch", "8", "--mesh", "dp=8", "--zero", "3", "--zero-over", "3"),
                  "error: cannot shard 8 data ranks in groups of 3"),
    "two questions": (("--verify", "--what-if", "zero=1"), "error: --what-if does nothing with --verify: leave --what-if out"),
    "a verb of a mesh": (("--collective", "send", *A100, "--mesh", "dp=8"), "error: --mesh does nothing with --collective"),
    "ours in a table": (("--table", "nowhere.csv", "--account", "ours"), "error: --account ours measures these ranks"),
    "these ranks in a table": (("--table", "nowhere.csv", "--machine", "here"), "error: --machine here measures one layout"),
    "verify on a GPU": (("--verify", *A100), "error: --verify is about these ranks, not --machine a100-80gb"),
    "write a GPU": ((*TOY_A100, "--batch", "2", "--write-machine", "x.toml"), "error: --write-machine is about these ranks"),
    "no bandwidth": ((*TOY_A100, "--batch", "2", "--node-gbs", "inf"), "'inf': use a number above 0"),
    "own plan": ((*TOY_A100, "--batch", "8", "--mesh", "pp=2", "--plan", "nowhere.txt"), "error: --plan nowhere.txt: No such"),
}  # fmt: skip


@pytest.mark.mpi(max_size=3)
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_one_line(comm, what):
    typed, said = REFUSED[what]
    assert said in inside(comm, "plan", *typed, status=2)


@pytest.mark.mpi(max_size=1)
def test_machine_files_refuse_unknown_keys(comm, tmp_path):
    from plan.machine import HERE

    text = (HERE / "a100-80gb.toml").read_text()
    cases = {
        "sms = 108": ("sms = 108\nclock = 1", "[compute] has clock, which is not known"),
        "unfused =": ("flash9 =", "[kernel] has flash9, which is not known"),
        'product = "': ('produce = "', "[source] says nothing of product"),
        "rested = 0.107": ("rested = 1.5", "rested is 1.5: use a number of 0 or more, below 1"),
        "gpus_per_node = 8": ("gpus_per_node = 4", "level 1 has other ranks than gpus_per_node, 4"),
        "memory_gbs = 2039": ("memory_gbs = -1", "memory_gbs is -1: use a number above 0"),
    }
    for old, (new, said) in cases.items():
        file = tmp_path / "mine.toml"
        file.write_text(text.replace(old, new, 1))
        assert said in inside(comm, "plan", *TOY, "--batch", "2", "--machine", file, status=2)


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize("name", ["llama3", "vtrain-multi"])
def test_a_table_of_published_rows_is_predicted(comm, name, tmp_path):
    got = inside(comm, "plan", "--table", DATA / f"{name}.csv", "--output", tmp_path / "out.csv", "--json")
    assert got["table"]["rows"] == len(rows(name))
    # 126 layers do not fill 128 stages.
    assert got["table"]["failed"] == (3 if name == "llama3" else 0)
    assert got["score"]["tau"] > 0.5
