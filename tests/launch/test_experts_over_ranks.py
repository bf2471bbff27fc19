"""Models with routed experts over ep as a user runs them: the tokens of one process, and bytes as predicted."""

import numpy as np
import pytest

from layers.alike import AlikeMoE
from layers.moe import MoE
from models.build import build
from models.open import open_model
from parallel.ledger import agrees
from parallel.mesh import Mesh
from parallel.parameter import drawn
from tests.harness import ROOT
from tests.inside import inside

FAMILIES = ROOT / "tests/oracles/families"
ROUTED = ("mixtral", "deepseek_v2", "deepseek_v3")
MESH = {1: "ep=1", 2: "ep=2", 3: "ep=3", 4: "ep=2,tp=2"}
D, F = 6, 5


def asked(name, *more):
    ids = np.load(FAMILIES / name / "expected.npz")["ids"][0]
    prompt = ",".join(map(str, ids[:5]))
    return ("generate", "--model", FAMILIES / name, "--tokens", prompt, "--dtype", "float64", "--max-new-tokens", 12, *more)


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("name", ROUTED)
def test_generate_makes_the_tokens_of_one_process(comm, name):
    one = inside(comm, *asked(name), "--json", ranks=1)
    got = inside(comm, *asked(name), "--json", "--mesh", MESH[comm.size], "--check-replicas", 3)
    assert got["ok"]
    assert got["tokens"] == one["tokens"]
    assert all(r["message_bytes"] == r["predicted_message_bytes"] for r in got["communication"])
    sums = {r["phase"]: r for r in got["communication"] if (r["verb"], r["axis"]) == ("all_reduce", "ep")}
    config = open_model(FAMILIES / name).config
    routed = config.layers - config.experts.first
    assert sums["prefill"]["message_bytes"] == routed * 5 * config.d_model * 8
    assert sums["decode"]["message_bytes"] == routed * 11 * config.d_model * 8
    # Experts are shared out: the largest share is less than all.
    held = got["memory"]["weights_bytes_per_rank"]
    assert max(held) < one["memory"]["weights_bytes_per_rank"][0] or comm.size == 1


@pytest.mark.mpi(min_size=2, max_size=4)
@pytest.mark.parametrize("routing", [{}, {"scoring": "sigmoid", "correction": True, "groups": 2, "active_groups": 2}])
def test_it_is_what_one_rank_computes_for_any_number_of_tokens(comm, routing):
    sizes = (D, F, 4, 2, 7)
    axes = {"ep": 2, "tp": comm.size // 2} if comm.size != 3 else {"ep": 3, "tp": 1}
    with Mesh(comm, check=True, **axes) as mesh:
        moe = AlikeMoE(mesh.tp, drawn(1, "float64", 0.5), *sizes, **routing, ep=mesh.ep)
        with Mesh(comm.Split(comm.rank), tp=1) as lone:
            alone = MoE(lone.tp, drawn(1, "float64", 0.5), *sizes, **routing)
            for tokens in (0, 1, 9):
                x = np.random.default_rng(tokens).standard_normal((tokens, D))
                with mesh.phase("forward"):
                    y = moe.apply(x)
                np.testing.assert_allclose(y, alone.apply(x), rtol=0, atol=1e-13)
        predicted = [t for tokens in (0, 1, 9) for t in moe.traffic(tokens)]
        assert agrees([r for r in mesh.ledger.report(predicted) if r["phase"] == "forward"])
        with pytest.raises(NotImplementedError, match="no backward"):
            moe.forward(x)


@pytest.mark.mpi(min_size=2, max_size=2)
def test_tokens_that_are_dispatched_by_each_rank_are_seen(comm, monkeypatch):
    """The same tokens come out, at other costs."""
    monkeypatch.setattr(AlikeMoE, "apply", MoE.apply)
    said = inside(comm, *asked("deepseek_v3"), "--mesh", "ep=2", status=1)
    assert "NOT ALL AGREED: communication of rank 0, communication of rank 1" in " ".join(said.split())


@pytest.mark.mpi(min_size=2, max_size=2)
@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("llama", ("--mesh", "ep=2"), "--mesh ep=2 shares out experts, which "),
        ("mixtral", ("--mesh", "dp=2"), "--mesh dp=2: this command lays ranks out along ep and tp"),
        ("mixtral", ("--mesh", "ep=2", "--speculate", "ngram"), "cannot draft by ngram with --mesh ep=2: leave the drafts out"),
        ("mixtral", ("--mesh", "ep=3"), "--mesh ep=3,tp=1 is for 3 ranks, these are 2: use for instance "),
    ],
)
def test_what_cannot_be_is_one_line(comm, name, more, message):
    assert message in inside(comm, *asked(name), *more, status=2)


def test_more_ranks_than_experts_is_refused():
    from launch import pretrained
    from launch.options import UsageError

    count = open_model(FAMILIES / "mixtral").config.experts.count
    with pytest.raises(UsageError, match=f"^cannot cut {count} experts over ep={count + 1}: use at most ep={count}$"):
        pretrained.opened(FAMILIES / "mixtral", 1, count + 1)


def test_a_model_is_built_of_either_kind():
    from plan.dry import DryAxis, dry_weights

    config = open_model(FAMILIES / "mixtral").config
    kinds = [type(build(config, DryAxis("tp", 1), dry_weights("float32"), alike=alike).routed[0]) for alike in (False, True)]
    assert kinds == [MoE, AlikeMoE]
