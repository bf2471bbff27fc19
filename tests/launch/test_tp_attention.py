"""launch.tp_attention and bench attention as a user types them."""

import json

import pytest

from launch import tp_attention
from launch.measure import attention
from launch.measure.attention import KINDS
from tests.grids import FULL, every_other, rarely, thinned
from tests.harness import command, mpirun
from tests.inside import inside, ran

on_ranks = pytest.mark.mpi
AT = ("--heads", "9", "--d-model", "36", "--json")
# 129 is beyond a block of 128 keys, and what is derived of it costs seconds.
LONG, SHORT = "1,7,64,129", "1,7,12"
# On how many ranks a kind is run with long sequences.
LONGEST = {"mha": 2, "gqa": 1, "mqa": 4, "mla": 3}


@pytest.fixture
def few_entries(monkeypatch):
    """Fewer entries are compared one by one; the direction through all of them stays."""
    monkeypatch.setattr(attention, "BUDGET", 0.03)


def check_kind(got, kind, lengths, dtype):
    """What a run on ragged sequences must say, whatever its ranks."""
    assert got["ok"]
    assert got["config"]["lengths"] == [int(n) for n in lengths.split(",")]
    assert all(c["ok"] and c["entries"] for c in got["checks"])
    if dtype == "float64":
        assert max(c["relative_error"] for c in got["checks"]) < 1e-12
    assert all(r["message_bytes"] == r["predicted_message_bytes"] for r in got["communication"])
    weights = {"mla": {"Wdkv", "Wkr", "wckv", "Wukv", "Wq", "Wo"}}.get(kind, {f"{a}{b}" for a in "Wb" for b in "qkvo"})
    assert {c["tensor"] for c in got["checks"]} == {"y"} | {f"d{n}{all}" for n in {*weights, "x"} for all in ("", ", all")}
    memory = got["memory"]
    for what in ("weights", "saved"):
        assert len(memory[f"{what}_bytes_per_rank"]) == got["ranks"]
        assert memory[f"{what}_bytes_per_rank"] == memory[f"predicted_{what}_bytes_per_rank"]
    assert got["seconds"].keys() == {"sharded", "unsharded", "matmul_only"}


@on_ranks
@pytest.mark.parametrize("kind", [kind for (kind,) in every_other(KINDS)])
def test_every_kind_agrees_on_every_number_of_ranks(comm, request, kind):
    dtype = "float32" if comm.size == 3 else "float64"
    # Each kind's long sequences at one number of ranks; as many entries as a user gets on one, and on nine below.
    lengths = LONG if FULL or comm.size == LONGEST[kind] else SHORT
    if not FULL and (lengths == SHORT or comm.size > 1):
        request.getfixturevalue("few_entries")
    check_kind(inside(comm, tp_attention, "--sequences", lengths, *AT, "--kind", kind, "--dtype", dtype), kind, lengths, dtype)


@pytest.mark.parametrize("kind", thinned(KINDS, ["gqa"]))
def test_every_head_may_have_a_rank_of_its_own(kind):
    got = command("tp_attention", 9, "--sequences", SHORT, *AT, "--kind", kind, "--dtype", "float64")
    assert got["ranks"] == 9
    check_kind(got, kind, SHORT, "float64")


TWO_KV_HEADS = ("--heads", "8", "--kv-heads", "2", "--d-model", "32", "--tokens", "20", "--dtype", "float64", "--json")


def check_groups(got, ranks):
    groups = {r["axis"]: r["message_bytes"] for r in got["communication"] if r["axis"] != "tp"}
    half = ranks // 2
    # a key and a value head of width 4, for 32 inputs and a bias, in float64
    assert groups == {f"tp[0..{half - 1}]": 33 * 2 * 4 * 8, f"tp[{half}..{ranks - 1}]": 33 * 2 * 4 * 8}


@pytest.mark.mpi(min_size=4)
def test_two_kv_heads_on_four_ranks(comm, few_entries):
    check_groups(inside(comm, tp_attention, *TWO_KV_HEADS, ranks=4), 4)


@rarely("a key/value head is on two ranks each of four")
def test_two_kv_heads_on_eight_ranks():
    check_groups(command("tp_attention", 8, *TWO_KV_HEADS), 8)


def test_the_table_of_the_cache_is_the_published_one(comm, monkeypatch):
    """DeepSeek-V2 (arXiv 2405.04434): 16 heads of 128, latent 512, rotated 64, 27 layers: 110,592 against 15,552 elements."""
    monkeypatch.setattr(attention, "compared", lambda *given: ())
    sizes = ("--heads", "16", "--d-model", "16", "--d-head", "128", "--d-latent", "512", "--d-rope", "64", "--layers", "27")
    got = inside(comm, tp_attention, "--kind", "mla", *sizes, "--tokens", "4", "--sequences", "2", "--json")
    elements = {row["kind"]: row["elements"] for row in got["kv_cache_per_token"]}
    assert elements == {"mha": 110592, "gqa": 55296, "mqa": 6912, "mla": 15552}


@pytest.mark.mpi(min_size=2)
def test_people_get_tables_and_a_last_line(comm):
    what = ("--heads", "3", "--d-model", "6", "--tokens", "9", "--sequences", "2", "--kind", "mqa")
    done = ran(comm, tp_attention, *what, ranks=2)
    assert done.status == 0, done.err
    assert done.out.splitlines()[-1] == "all agreed"
    assert "Heads by rank: 0-1, 2; key/value heads: 0, 0" in done.out
    # y, dx, and what both ranks hold of keys and values.
    assert "3\ncollectives" in done.out


@on_ranks
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--heads", "7"], "--heads 7 does not divide --d-model 64: use a divisor of 64, or give --d-head"),
        (["--kv-heads", "3"], "--kv-heads 3 does not divide --heads 8: use a divisor of 8"),
        (["--heads", "32", "--d-model", "32", "--kind", "mha"], "--rope half cannot rotate heads of odd width 1 in pairs"),
        (["--kind", "mla", "--d-rope", "3"], "--d-rope 3 cannot be rotated in pairs: use an even width"),
        (["--sequences", "3,0,2"], "argument --sequences: '0' is not a size: use a whole number of 1 or more"),
        (["--sequences", "3,x"], "argument --sequences: 'x' is not a size: use a whole number of 1 or more"),
        (["--sequences", "9", "--tokens", "8"], "cannot cut --tokens 8 into 9 sequences: use at most 8"),
        (["--sequences", "3", "4", "--tokens", "8"], "--tokens 8 is not the sum of --sequences 3,4: use 7"),
        (["--kind", "mqa", "--kv-heads", "2"], "--kind mqa has 1 kv-heads, not 2: use --kind gqa, or no --kv-heads"),
        (["--kind", "mla", "--qk-norm"], "--qk-norm does nothing without --kind mha or gqa or mqa: leave --qk-norm out"),
        (["--rope-scaling", "ntk"], "argument --rope-scaling: unknown scaling 'ntk': use one of none, linear, llama3, yarn"),
        (["--rope-scaling", "yarn:facto=3"], "'facto=3' is no setting of yarn: use factor, original, beta_fast,"),
        (["--rope-scaling", "yarn:factor=big"], "'factor=big' is not a number of yarn: use for instance factor=8"),
        (
            ["--rope", "none", "--rope-scaling", "linear"],
            "--rope-scaling does nothing without --rope half or interleaved: leave --rope-scaling out",
        ),
        (["--rope-base", "0"], "--rope-base 0 is no base: use a number above 1, such as 10000"),
    ],
)
def test_bad_input_is_one_line_and_status_two(comm, args, message):
    assert message in inside(comm, tp_attention, *args, status=2)


@pytest.mark.mpi(min_size=3)
def test_more_ranks_than_heads_is_refused(comm):
    refused = inside(comm, tp_attention, "--heads", "2", status=2, ranks=3)
    assert refused == "error: cannot cut --heads 2 over 3 ranks: use at most 2 ranks or more --heads"


def test_bench_measures_attention_and_its_memory():
    bench = ("-m", "launch.bench", "attention", "--tokens", "64", "--d-model", "16", "--heads", "2", "--json")
    timed, held = (json.loads(mpirun(0, *bench, *more).stdout) for more in (("--rounds", "1"), ("--memory",)))
    assert timed["seconds"].keys() == {"matmul_only", "sharded"}
    assert timed["ratios"].keys() == {"sharded_to_matmul_only"}
    assert [m["tokens"] for m in held["memory"]] == [8, 16, 32, 64]
    assert all(m["peak_bytes"] > m["saved"] for m in held["memory"])
