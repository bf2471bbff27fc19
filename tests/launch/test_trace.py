"""`--trace` of a command: it computes the same, and a slow rank, a failure and a path that cannot be written are told."""

import json
import os
import re
from collections import Counter

from launch.measure import timeline
from tests.harness import command, mpirun
from tests.parallel.watch.trace_format import asked, events_of

SMALL = ("--tokens", "32", "--d-model", "16", "--d-ff", "64", "--data", "none", "--json")


def test_a_slow_rank_is_named_and_perfetto_reads_the_file(tmp_path):
    """Rank 1 sleeps before its third sum: the two others wait for it, in the trace's own numbers and in Perfetto's."""
    path = tmp_path / "slow.json"
    slow = {"RANKWISE_FAULT": "rank=1,at=all_reduce:3,kind=sleep:0.8"}
    done = mpirun(3, "-m", "launch.tp_mlp", *SMALL, "--trace", str(path), **slow)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    summary = command("trace", 0, str(path), "--json")
    assert summary["straggler"] == 1
    said = " ".join(mpirun(0, "-m", "launch.trace", str(path)).stdout.split())
    assert re.search(r"straggler: rank 1: the others waited [\d.]+ ms for it, \d+% of all their waiting", said)
    by_rank = summary["seconds_by_rank"]
    assert by_rank[1]["kept_others_waiting"] > 1.4
    assert min(by_rank[0]["waiting"], by_rank[2]["waiting"]) > 0.7
    assert by_rank[1]["waiting"] < by_rank[0]["waiting"]
    events = events_of(path)
    verbs = [e for e in events if e.get("cat") == "verb"]
    sums = [v for v in verbs if v["pid"] == 1 and v["args"]["phase"] == "forward"]
    assert len(sums) == next(r["calls"] for r in result["communication"] if r["phase"] == "forward")
    slices, ends, waited, bad, memory, names = asked(
        path,
        "select category, count(*) as n from slice group by 1",
        "select count(*) as n from flow",
        "select p.name, sum(s.dur) as ns from slice s join thread_track t on s.track_id = t.id join thread using (utid) "
        "join process p using (upid) where s.category = 'wait' group by 1 order by 2",
        "select name, value from stats where severity != 'info' and value > 0",
        "select count(*) as n from counter c join process_counter_track t on c.track_id = t.id where t.name like 'memory%'",
        "select name from process where pid > 0 order by pid",
    )
    assert {r["category"]: r["n"] for r in slices} == Counter(e["cat"] for e in events if e["ph"] == "X")
    # A link of three ranks is two arrows.
    assert ends == [{"n": 2 * len({v["bind_id"] for v in verbs if "bind_id" in v})}]
    assert waited[0]["name"].startswith("rank 1 ")
    assert bad == []
    assert memory[0]["n"] == sum(e["ph"] == "C" for e in events)
    assert [r["name"].split(" on ")[0] for r in names] == ["rank 0", "rank 1", "rank 2"]


def test_training_computes_the_same_with_a_trace(tmp_path):
    sizes = ("--layers", "1", "--d-model", "32", "--heads", "2", "--sequence-length", "32", "--batch-tokens", "128")
    args = (*sizes, "--steps", "3", "--sample", "0", "--output", str(tmp_path), "--dtype", "float64", "--mesh", "dp=2,tp=1")
    text = tmp_path / "text"
    text.write_text("all work and no play " * 80)
    plain = command("train", 2, *args, "--text", str(text), "--json")
    path = tmp_path / "t.json"
    seen = command("train", 2, *args, "--text", str(text), "--json", "--trace", str(path))
    for key in ("loss", "validation_bits_per_byte", "config", "memory"):
        assert seen[key] == plain[key], key
    line = timeline.read(path)
    events_of(path)
    assert timeline.steps(line)["training step"][0] == 3
    assert timeline.overlap(line).calls > 0
    assert {"blocks.0.attention forward", "blocks.0.mlp backward", "AdamW"} <= {s.name for s in line.ranks[1].work}
    picture = tmp_path / "t.png"
    shown = mpirun(0, "-m", "launch.trace", str(path), "--png", str(picture), COLUMNS="60")
    assert shown.returncode == 0, shown.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    strips = [line for line in shown.stdout.splitlines() if line.startswith("rank ")][:2]
    assert all(len(strip) <= 60 and {"F", "B"} <= set(strip) for strip in strips)


def test_a_rank_that_fails_leaves_what_it_has(tmp_path):
    path = tmp_path / "t.json"
    fault = {"RANKWISE_FAULT": "rank=1,at=all_reduce:2,kind=raise"}
    done = mpirun(2, "-m", "launch.tp_mlp", *SMALL, "--trace", str(path), timeout=30, **fault)
    assert done.returncode != 0
    assert not path.exists()
    line = timeline.read(tmp_path / "t.rank1.json")
    assert list(line.about["failed"]) == ["1"]
    assert [s.name for s in line.ranks[1].verbs] == ["all_reduce tp"]


def test_unusable_paths_are_one_line(tmp_path):
    nowhere = str(tmp_path / "none" / "t.json")
    assert "there is no folder" in command("tp_mlp", 2, *SMALL, "--trace", nowhere, status=2)
    assert "cannot read" in command("trace", 0, nowhere, status=2)
    full = {"RANKWISE_FAULT": "rank=0,at=all_reduce:1,kind=disk:1000"}
    done = mpirun(2, "-m", "launch.tp_mlp", *SMALL, "--trace", str(tmp_path / "t.json"), **full)
    assert (done.returncode, os.listdir(tmp_path)) == (2, [])
    assert done.stderr.splitlines()[-1] == f"error: cannot write --trace {tmp_path / 't.json'}: File too large"


def test_the_bench_counts_the_spans_of_a_step():
    """Times are for people; that a step traced is the step untraced, with as many spans each time, is for a test."""
    sizes = ("--tokens", "32", "--sequence-length", "16", "--d-model", "16", "--d-ff", "32", "--heads", "2", "--layers", "1")
    bench = command("bench", 2, "trace", *sizes, "--rounds", "2", "--json")
    # The same number each round, or the mean of three would be no whole number.
    calls, verbs = bench["calls_a_step"], bench["verbs_a_step"]
    assert (calls, verbs) == (int(calls), int(verbs))
    # Layers on top of one another, and the sums of a block, of the loss and of the step.
    assert min(calls, verbs) > 8
    assert bench["ratios"].keys() == {"untraced_again_to_untraced", "traced_to_untraced"}
    cost = calls * bench["call_seconds"] + verbs * bench["verb_seconds"]
    assert bench["worked_out"] == cost / bench["seconds"]["untraced"]
