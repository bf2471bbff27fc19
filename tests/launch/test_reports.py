"""Reports fit their terminal: no line of any command's report is wider than COLUMNS, on these ranks and as if on sixteen."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from launch import report, serve
from launch.process import launcher
from launch.terminal import lines
from parallel.ledger import Ledger, Traffic
from reference.compare import compare
from tests.grids import FULL, rarely, thinned
from tests.harness import MPICH, ROOT, mpirun
from tests.inside import ran

FAMILIES = ROOT / "tests/oracles/families"
WIDTHS = (80, 120, 200)
MANY = 16


@pytest.fixture
def columns(monkeypatch):
    return lambda n: monkeypatch.setenv("COLUMNS", str(n))


def wide(text, most):
    return [line for line in text.splitlines() if len(line) > most]


def as_on_many(value):
    """What commands tell of each rank, told of MANY ranks that differ."""
    if isinstance(value, dict):
        for key, held in value.items():
            if key.endswith("_per_rank") and isinstance(held, list):
                value[key] = [held[n % len(held)] + n for n in range(MANY)]
            else:
                as_on_many(held)
    return value


# --- every command

TOKENS = ("--model", FAMILIES / "llama", "--tokens", "1,2,3,4,5,1,2,3")
LATENT = ("--model", FAMILIES / "deepseek_v2", "--tokens", "1,2,3")
QUICK = ("--data", "none", "--tokens", "5", "--d-model", "6", "--d-ff", "32", "--timed", "5,6,32")
HEADS = ("--d-model", "16", "--heads", "16", "--d-head", "2")
MODEL = ("--d-model", "16", "--heads", "4", "--layers", "1", "--sequence-length", "8")
STEP = ("--tokens", "64", "--d-model", "16", "--heads", "4", "--rounds", "1")
REPORTS = [
    ("tp_mlp", "--d-ff", "32", "--timed", "5,6,32"),
    ("tp_mlp", *QUICK, "--no-bias", "--trace", "a.json"),
    ("tp_mlp", *QUICK, "--trace", "b.json"),
    ("tp_mlp", *QUICK, "--explain"),
    ("trace", "a.json"),
    ("trace", "--compare", "a.json", "b.json"),
    ("tp_attention", *HEADS, "--sequences", "1,2,3,4,1,2,1,2,3"),
    ("tp_attention", "--kind", "mla", *HEADS, "--tokens", "8"),
    ("cp_attention", *HEADS, "--sequences", "1,2,3,4,1,2,1,2,3"),
    ("cp_attention", "--attention", "mla", "--kind", "gather", *HEADS, "--tokens", "8"),
    ("ep_moe", "--experts", "64", "--router", "sigmoid", "--groups", "4", "--d-model", "4", "--d-ff", "4", "--timed", "64,8,8"),
    ("dp_train", "--zero", "--steps", "2", "--sequences", "4"),
    ("pipeline", "--layers", "4", "--micro-batches", "3", "--sequence-length", "3", "--timed", "5,8,8"),
    ("pipeline", "--schedule", "zb-v", "--simulate", "18.5,18.1,9.3,0.6", "--stages", "32"),
    ("train", *MODEL, "--batch-tokens", "64", "--steps", "3", "--text", "text.txt", "--sample", "200"),
    ("generate", *TOKENS, "--max-new-tokens", "3", "--logprobs", "--speculate", "ngram"),
    ("generate", *LATENT, "--max-new-tokens", "3"),
    ("score", *TOKENS),
    ("kv_cache", "--ranks", "16", "--tokens", "1048576"),
    ("speculate", *TOKENS, "--max-new-tokens", "4", "--gammas", "1,8", "--drafts", "ngram,layers=1"),
    ("serving_bench", "--model", FAMILIES / "llama", "--requests", "6", "--slots", "3"),
    ("serving_bench", "--scheduler-only", "--full", "--requests", "9"),
    ("bench.__main__", "mlp", "--tokens", "64", "--d-model", "16", "--d-ff", "32", "--rounds", "1"),
    ("bench.__main__", "attention", *STEP[:-2], "--memory"),
    ("bench.__main__", "context", *STEP),
    ("bench.__main__", "context", *STEP[:-2], "--memory"),
    ("bench.__main__", "train", *STEP, "--d-ff", "32", "--layers", "1", "--sequence-length", "8", "--sequence-parallel"),
    ("bench.__main__", "trace", *STEP, "--d-ff", "32", "--layers", "1", "--sequence-length", "8"),
    ("bench.__main__", "plan", *STEP, "--tokens", "96", "--layers", "4", "--sequence-length", "8"),
    ("plan", "--verify", "--mesh", f"dp={launcher.size() or 1}", "--recompute", "full"),
    ("train", *MODEL, "--batch-tokens", "64", "--steps", "1", "--text", "text.txt", "--sample", "0", "--mesh", "auto"),
    ("bench.__main__", "decode", "--model", FAMILIES / "llama", "--tokens", "3", "--rounds", "1"),
]


@pytest.fixture
def published(monkeypatch, columns):
    """What each report printed at each width: as it is, and as it would be of MANY ranks."""
    printed = []

    def publish(as_json, result, show, *rest, **more):
        for ranks in (result.get("ranks"), MANY):
            if ranks is not None:
                result["ranks"] = ranks
            for width in WIDTHS:
                columns(width)
                print(mark := f"\f{width}\n", end="")
                status = real(as_json, result, show, *rest, **more)
                printed.append(mark)
            as_on_many(result)
        print("\f0")
        return status

    monkeypatch.setattr(Figure, "savefig", lambda *args, **more: None)
    real = report.publish
    monkeypatch.setattr(report, "publish", publish)
    return printed


@pytest.mark.limit(180)
@pytest.mark.skipif(not (MPICH or FULL), reason="a report's text is the same under MPICH, unless TESTS=all")
@pytest.mark.mpi(min_size=2, max_size=thinned(4, 2))
def test_every_report_fits_its_terminal(comm, published, tmp_path, monkeypatch):
    monkeypatch.chdir(comm.bcast(str(tmp_path)))
    if comm.rank == 0:
        (tmp_path / "text.txt").write_bytes((ROOT / "README.md").read_bytes()[:3000])
    for name, *options in REPORTS:
        done = ran(comm, name, *options)
        assert done.status == 0, done.out + done.err
        _, *parts = done.out.split("\f")
        told = [part.partition("\n") for part in parts]
        assert [int(width) for width, _, _ in told] == [*WIDTHS, *WIDTHS, 0], name
        for width, _, text in told[:-1]:
            assert wide(text, int(width)) == [], (name, *options)
            assert text.strip()


@rarely("rows of ranks that are alike are one for a server's and for a planned report")
def test_sixteen_real_ranks_are_a_row_where_they_are_alike():
    done = mpirun(MANY, "-m", "launch.tp_mlp", *QUICK, COLUMNS="")
    assert done.returncode == 0, done.stderr
    assert wide(done.stdout, 80) == []
    assert "\n0 to 15, each  " in done.stdout


def test_a_server_says_in_its_width_what_it_did(columns, capsys):
    counts = dict.fromkeys(("prefill_tokens", "hit_tokens", "decode_tokens", "accepted_tokens", "steps", "preemptions"), 10**9)
    result = {"served_model": "SmolLM2", "seconds": 9.0, "responses": {str(200 + n): 1000 for n in range(20)}}
    result |= {"counts": counts | {"finished": {"stop": 1, "length": 2}}, "memory": {"peak_bytes_per_rank": [2**30] * MANY}}
    for width in WIDTHS:
        columns(width)
        serve.show(result)
        out = capsys.readouterr().out
        assert wide(out, width) == []
        assert "GiB" in out
        assert "0 to 15, each" in out


# --- lines and tables


def test_prose_is_folded_between_words_and_paths_stay_whole(columns):
    columns(40)
    path = "out/" + 60 * "x"
    assert lines.fold(f"The picture is {path}") == f"The picture is\n{path}"
    assert lines.fold("short  enough,   as it is") == "short  enough,   as it is"
    assert all(len(line) <= 40 for line in lines.fold("a bc " * 50, "    ").splitlines())


def test_one_is_no_plural():
    assert [lines.counted(n, "token") for n in (0, 1, 1024)] == ["0 tokens", "1 token", "1,024 tokens"]


def test_a_table_folds_its_headings_then_its_cells_and_goes_on_below(columns, capsys):
    def printed(width, *table, **more):
        columns(width)
        lines.table("Title", *table, **more)
        title, *rest = capsys.readouterr().out.splitlines()
        assert title == "Title"
        assert wide("\n".join(rest), width) == []
        return rest

    headings, row = ("name", "message bytes", "predicted bytes"), ("some of several words here", "12,345,678", "12,345,678")
    assert printed(80, headings, [row])[0] == "name                         message bytes   predicted bytes"
    folded = printed(55, headings, [row])
    assert [line.split() for line in folded[:2]] == [["message", "predicted"], ["name", "bytes", "bytes"]]
    assert folded[3].startswith("some of several words here   ")
    assert [line[:20].strip() for line in printed(46, headings, [row])[3:5]] == ["some of several", "words here"]
    numbers = [f"{n}.25" for n in range(100, 120)]
    below = printed(80, ("prompt", "gamma", *numbers), [("story", 4, *numbers)], keys=2)
    assert [line.split()[:2] for line in below].count(["prompt", "gamma"]) == 3
    assert [n for line in below if line.startswith("story") for n in line.split()[2:]] == numbers


@pytest.mark.parametrize(
    ("values", "units", "heading", "cells"),
    [
        ([132_288, 132_288.0], lines.BYTES, "held KiB", ["129.2", "129.2"]),
        ([3 * 2**30, 3 * 2**20, None, 0], lines.BYTES, "held MiB", ["3,072.0", "3.0", "-", "0.0"]),
        ([1023], lines.BYTES, "held B", ["1,023"]),
        ([], lines.BYTES, "held B", []),
        ([0.0123, 70.0], lines.SECONDS, "held ms", ["12.3", "70,000.0"]),
        ([1.25, 70.0], lines.SECONDS, "held s", ["1.2", "70.0"]),
    ],
)
def test_a_column_has_one_unit(values, units, heading, cells):
    assert lines.column("held", values, units) == (heading, cells)


def test_only_what_is_predicted_is_said_to_be(capsys):
    ledger = Ledger()
    ledger.add("all_reduce", "tp", 48, 4, 0.001)
    rows = ledger.report([Traffic("all_reduce", "tp", "none", 48)])
    report.communication(rows)
    report.memory({"weights_bytes_per_rank": [4, 4], "predicted_weights_bytes_per_rank": [4, 4]})
    assert capsys.readouterr().out.count("counted beside predicted") == 2
    report.communication([r | {"predicted_calls": None, "predicted_message_bytes": None} for r in rows])
    report.memory({"weights_bytes_per_rank": [4, 4], "peak_bytes_per_rank": [5, 6]})
    assert "predicted" not in capsys.readouterr().out


def test_ranks_that_hold_the_same_are_one_row():
    assert [report.said(r) for r in report.runs([7, 7, 7, 5, 7, 7])] == ["0 to 2, each", "3", "4 and 5, each"]
    assert [report.said(r) for r in report.runs([1])] == ["0"]


# --- the summary


def checks(*errors):
    return [compare(f"d{n}", "backward", np.array([1.0 + e]), np.array([1.0]), 1e-3) for n, e in enumerate(errors)]


def test_the_summary_says_what_agrees_and_what_was_sent():
    ledger = Ledger()
    for phase in ("forward", "backward"):
        with ledger.phase(phase):
            ledger.add("all_reduce", "tp", 12_288, 4, 0.001)
    predicted = [Traffic("all_reduce", "tp", phase, 12_288) for phase in ("forward", "backward")]
    rows = ledger.report(predicted)
    assert report.summary(checks(0.0, 6e-6), rows) == (
        "ok: 2 of 2 tensors agree with the reference, worst 0.6 % of tolerance; 2 collectives, 24,576 bytes, as predicted"
    )
    wrong = checks(0.0, 2e-3)
    assert report.summary(wrong, ledger.report(predicted[:1]), ["d1", "communication"]) == (
        "NOT OK: d1, communication; 1 of 2 tensors agree with the reference, worst 200.0 % of tolerance; "
        "2 collectives, 24,576 bytes, NOT as predicted"
    )
    assert "worst inf % of" in report.summary(checks(np.nan), rows, ["d0"])


def test_a_tensor_that_is_compared_twice_is_one(capsys):
    both = [compare(name, "backward", np.array([v]), np.array([1.0]), 1e-3) for name, v in (("dW", 1.0), ("dW, all", 2.0))]
    assert "0 of 1 tensors agree" in report.summary(both, [])


@pytest.mark.mpi(min_size=2, max_size=thinned(4, 2))
@pytest.mark.parametrize("name", ["tp_mlp", "tp_attention", "cp_attention", "dp_train"])
def test_commands_that_compare_begin_with_the_summary(comm, name, columns):
    columns(200)
    out = ran(comm, name, *(QUICK if name == "tp_mlp" else HEADS if "attention" in name else ("--steps", "1"))).out
    first, *_, last = out.splitlines()
    assert first.startswith("ok: ")
    assert first.endswith(" bytes, as predicted")
    assert last == "all agreed"
