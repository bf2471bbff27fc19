"""launch.ep_moe as a user types it: every tensor, bytes by the counts, load, and when ep or tp is better."""

import numpy as np
import pytest

from launch import ep_moe
from launch.measure import experts
from layers.dispatch import Moved
from parallel.shard import even
from tests.inside import inside, ran

on_ranks = pytest.mark.mpi
D, F = 6, 5
QUICK = ("--d-model", D, "--d-ff", F, "--timed", "12,6,8", "--tokens", "5")
V3 = ("--router", "sigmoid", "--groups", "3", "--experts", "6", "--active", "3", "--shared", "2")
# By the number of ranks: nothing divides, a rank without tokens, all experts active, both axes.
RUNS = {
    1: [("--experts", "5"), V3],
    2: [("--experts", "5", "--tokens", "9,0"), ("--mesh", "tp=2", *V3)],
    3: [("--experts", "4", "--active", "4"), V3],
    4: [("--experts", "6", "--tokens", "0,5,2,9"), ("--mesh", "tp=2", *V3)],
}


@pytest.mark.mpi(max_size=4)
def test_tensors_are_the_reference_s_and_bytes_those_of_the_counts(comm):
    for more in RUNS[comm.size]:
        got = inside(comm, "ep_moe", *QUICK, *more, "--dtype", "float64", "--json")
        ep, tp = got["mesh"]["ep"], got["mesh"]["tp"]
        c, T = got["config"], sum(got["config"]["tokens"])
        assert got["ok"]
        assert ep * tp == comm.size
        assert len(c["tokens"]) == ep
        names = {"dx", "dWr", "dW1", "dW2"} | ({"dshared.W1", "dshared.W2"} if c["d_shared"] else set())
        assert {check["tensor"] for check in got["checks"]} == {"y"} | names | {f"{n}, all" for n in names}
        assert all(check["ok"] and check["relative_error"] < 1e-12 for check in got["checks"])
        assert sum(got["tokens_per_expert"]) == T * c["active"]
        assert got["worst_over_mean"] == pytest.approx(max(got["tokens_per_expert"]) * c["experts"] / (T * c["active"]))
        left = got["pairs_sent_per_rank"]
        assert len(left) == comm.size
        exchanges = [r for r in got["communication"] if r["verb"] == "exchange"]
        sent = sum(r.get("message_bytes_sum", comm.size * r["message_bytes"]) for r in exchanges)
        counts = tp * (ep - 1) * c["experts"]
        assert sent == (8 * (2 * sum(left) * (2 * D + 1) + counts) if ep > 1 else 0)
        dense = [r["message_bytes"] for r in got["communication"] if (r["verb"], r["axis"]) == ("all_reduce", "ep")]
        assert dense == [8 * D * (c["experts"] + 3 * -(-c["d_shared"] // tp))]
        for kind in ("weights", "saved"):
            assert got["memory"][f"{kind}_bytes_per_rank"] == got["memory"][f"predicted_{kind}_bytes_per_rank"]
        assert got["seconds"].keys() == {"sharded", "unsharded", "matmul_only"}
        assert {(a["ep"], a["tp"]) for a in got["layouts"]} == {(ep, tp), (comm.size, 1), (1, comm.size)}
        assert all(a["busiest"] >= 1 for a in got["layouts"])


@pytest.mark.mpi(min_size=2, max_size=2)
def test_people_get_tables_and_a_sentence(comm):
    done = ran(comm, "ep_moe", *QUICK, "--experts", "20")
    assert done.status == 0, done.err
    assert done.out.splitlines()[-1] == "all agreed"
    flat = " ".join(done.out.split())
    assert "Tokens per expert, the 16 busiest of 20" in flat
    assert f"ep={comm.size} sends" in flat
    assert "By bytes and balance" in flat
    told = inside(comm, "ep_moe", *QUICK, "--explain", "--rank", "1")
    assert "WHAT RANK 1 HOLDS" in told
    assert "exchange" in told


def summed_over_ep_too(monkeypatch):
    """As for the gradients of dense parameters."""
    plain = experts.MoE.backward

    def backward(moe, dy, saved, later=None):
        dx = plain(moe, dy, saved, later)
        for p in moe.W1_xD2f.parameters:
            p.grad[...] = moe.ep.all_reduce(p.grad)
        return dx

    monkeypatch.setattr(experts.MoE, "backward", backward)
    return {"dW1"}


def dense_not_summed(monkeypatch):
    monkeypatch.setattr(experts.GradientSums, "finish", lambda self: None)
    monkeypatch.setattr(experts.GradientSums, "filled", lambda self, parameters: None)
    return {"dWr", "communication"}


def a_pair_too_many(monkeypatch):
    plain = experts.moved
    monkeypatch.setattr(experts, "moved", lambda *of: [Moved(m.left + 1, m.came) for m in plain(*of)])
    return {"communication"}


@pytest.mark.mpi(min_size=2, max_size=2)
@pytest.mark.parametrize("sabotage", [summed_over_ep_too, dense_not_summed, a_pair_too_many])
def test_sabotage_is_seen(comm, monkeypatch, sabotage):
    wrong = sabotage(monkeypatch)
    done = ran(comm, "ep_moe", *QUICK)
    assert done.status == 1
    last = done.out.split("NOT ALL AGREED: ")[1]
    assert all(name in last for name in wrong)


@on_ranks
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--active", "9"), "--active 9 is more than --experts 8: use 1 to 8"),
        (("--groups", "3"), "cannot put 8 experts into 3 groups: use a divisor of 8"),
        (("--groups", "4", "--active", "5"), "cannot choose 5 of 4 experts (2 of 4 groups): use 1 to 4"),
        (("--tokens", "1,2,3,4,5"), "--tokens has 5 numbers for ep="),
        (("--tokens", "x"), "argument --tokens: 'x' is not a count: use a whole number of 0 or more"),
        (("--mesh", "dp=2"), "--mesh dp=2: this command lays ranks out along ep and tp"),
        (("--mesh", "ep=5"), "--mesh ep=5,tp=1 is for 5 ranks, these are "),
        (("--timed", "4,4"), "'4,4' is not T,D,F: use three sizes, such as 1024,128,256"),
    ],
)
def test_bad_input_is_one_line_and_status_two(comm, args, message):
    assert message in inside(comm, "ep_moe", *args, status=2)


@pytest.mark.mpi(min_size=3)
def test_what_cannot_be_cut_is_refused(comm):
    refused = inside(comm, "ep_moe", "--experts", "2", status=2, ranks=3)
    assert refused == "error: cannot cut 2 experts over ep=3: use at most ep=2"
    refused = inside(comm, "ep_moe", "--mesh", "tp=3", "--d-ff", "2", status=2, ranks=3)
    assert refused == "error: cannot cut --d-ff 2 over tp=3: use at most tp=2 or a larger --d-ff"
    refused = inside(comm, "ep_moe", "--mesh", "ep=2", status=2, ranks=3)
    assert refused == "error: --mesh ep=2,tp=1 is for 2 ranks, these are 3: use for instance ep=3,tp=1"


def test_what_moves_by_hand():
    # Tokens 0 and 1 on rank 0, token 2 on rank 1; experts 0 to 2 and 3 to 4.
    c_TA = np.array([[0, 3], [1, 2], [4, 0]])
    assert experts.moved(c_TA, even(3, 2), even(5, 2)) == [Moved(1, 1), Moved(1, 1)]


def laid(ep, tp, wire, busiest):
    return {"ep": ep, "tp": tp, "wire_bytes_per_rank": [wire, wire - 1], "gradient_wire_bytes": 8, "busiest": busiest}


@pytest.mark.parametrize(
    ("wire", "busiest", "less", "rate", "words"),
    [
        (192, 1.5, "ep", 50.0, "ep is better where a rank sends less than"),
        (192, 1.0, "ep", None, "ep is better at any rate"),
        (392, 1.5, "tp", None, "tp is better at any rate"),
        (392, 0.5, "tp", 50.0, "tp is better where a rank sends less than"),
    ],
)
def test_when_which_is_better(wire, busiest, less, rate, words):
    found = [laid(4, 1, wire, busiest), laid(2, 2, 1, 1.0), laid(1, 4, 292, 1.0)]
    of = ep_moe.verdict(found, 4.0, 2)
    assert (of["fewer_bytes"], of["break_even_bytes_per_second"]) == (less, rate)
    assert words in " ".join(ep_moe.said(of))
    assert ep_moe.verdict(found[1:], 4.0, 2) is None
