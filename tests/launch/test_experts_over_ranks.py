"""Models with routed experts over ep as a user runs them: the tokens of one process, and bytes as predicted."""

import numpy as np
import pytest

from layers.alike import AlikeMoE
from layers.moe import MoE
from models.build import build
from models.open import open_model
from models.tokenizer_file import open_tokenizer
from parallel.ledger import agrees
from parallel.mesh import Mesh
from parallel.parameter import drawn
from tests.grids import every_other
from tests.harness import ROOT
from tests.inside import inside
from tests.launch.serving import Served, tiny_model

FAMILIES = ROOT / "tests/oracles/families"
ROUTED = ("mixtral", "deepseek_v2", "deepseek_v3")
MESH = {1: "ep=1", 2: "ep=2", 3: "ep=3", 4: "ep=2,tp=2"}
D, F = 6, 5


def expected_of(name):
    """What transformers makes of it."""
    return np.load(FAMILIES / name / "expected.npz")


def asked(name, *more):
    prompt = ",".join(map(str, expected_of(name)["prompt"]))
    return ("generate", "--model", FAMILIES / name, "--tokens", prompt, "--dtype", "float64", "--max-new-tokens", 12, *more)


@pytest.mark.mpi(max_size=4)
@pytest.mark.parametrize("name", [name for (name,) in every_other(ROUTED)])
def test_generate_makes_the_tokens_of_one_process(comm, name):
    one = inside(comm, *asked(name), "--json", ranks=1)
    got = inside(comm, *asked(name), "--json", "--mesh", MESH[comm.size], "--check-replicas", 3)
    assert got["ok"]
    assert got["tokens"] == one["tokens"] == expected_of(name)["greedy"][:12].tolist()
    assert all(r["message_bytes"] == r["predicted_message_bytes"] for r in got["communication"])
    sums = {r["phase"]: r for r in got["communication"] if (r["verb"], r["axis"]) == ("all_reduce", "ep")}
    config = open_model(FAMILIES / name).config
    routed = config.layers - config.experts.first
    assert sums["prefill"]["message_bytes"] == routed * len(got["prompt_tokens"]) * config.d_model * 8
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
        with pytest.raises(TypeError, match="no backward"):
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


# The oracles have three sequences; ranks of dp and ep have their own here.
SCORED = {2: ("ep=2",), 3: ("tp=3", "ep=3"), 4: ("dp=2,tp=2", "ep=2,tp=2")}


@pytest.mark.mpi(min_size=2, max_size=4)
@pytest.mark.parametrize("name", ROUTED)
def test_score_gives_transformers_loss_logits_and_gradients(comm, shared, name):
    expected = expected_of(name)
    if comm.rank == 0:
        np.save(shared / "ids.npy", expected["ids"])
    comm.Barrier()
    files = ("--logits", shared / "z.npy", "--gradients", shared / "g.npz")
    what = ("--model", FAMILIES / name, "--tokens-file", shared / "ids.npy", "--dtype", "float64", "--json")
    for mesh in SCORED[comm.size]:
        got = inside(comm, "score", *what, *files, "--mesh", mesh)
        assert got["ok"]
        assert got["loss"] == pytest.approx(float(expected["loss"]), rel=1e-12)
        np.testing.assert_allclose(np.load(shared / "z.npy"), expected["logits"], rtol=0, atol=1e-12)
        with np.load(shared / "g.npz") as gradients:
            for key, g in gradients.items():
                want = expected[f"grad.{key}"]
                np.testing.assert_allclose(g, want, rtol=0, atol=1e-11 * max(1, abs(want).max()), err_msg=key)
        comm.Barrier()
    rows = {(r["verb"], r["axis"]) for r in got["communication"] if r["phase"] in ("forward", "backward")}
    assert ("exchange", "ep") in rows


@pytest.mark.mpi(min_size=2, max_size=2)
def test_score_refuses_more_ranks_than_sequences(comm):
    refused = inside(comm, "score", "--model", FAMILIES / "mixtral", "--tokens", "1,2,3", "--mesh", "ep=2", status=2)
    assert refused == "error: cannot deal 1 sequence to dp=1,ep=2: use fewer ranks, or more sequences"


def test_a_server_answers_with_the_tokens_of_one_process(tmp_path):
    folder, expected = tiny_model(tmp_path, "deepseek_v3"), expected_of("deepseek_v3")
    served = Served(2, "--model", str(folder), "--mesh", "ep=2", "--dtype", "float64", "--kv-memory-mib", "1")
    answer = served.complete(expected["prompt"].tolist(), max_tokens=8, temperature=0, ignore_eos=True)
    assert served.stop() == 0, "".join(served.log)
    whole = open_tokenizer(folder, open_model(folder).metadata).decode(expected["greedy"][:8].tolist())
    assert answer["choices"][0]["text"] == whole
    assert "on 2 ranks" in "".join(served.log)


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
