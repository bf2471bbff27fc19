"""Options that do nothing without others are refused by name."""

from importlib import import_module

import pytest

from launch.options import UsageError, only_with, parser


@pytest.fixture
def bound():
    p = parser("planted", "")
    p.add_argument("kind", choices=("a", "b"))
    p.add_argument("--with", dest="also", action="store_true")
    p.add_argument("--many", action="append", default=[])
    p.add_argument("--size", type=int, default=3)
    only_with(p, "--size", kind=("a",), also=True)
    only_with(p, "--many", also=False)
    return p


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("b", None),
        ("a --size 4", None),
        ("b --with --size 4", None),
        # Also what is given as it is anyway.
        ("b --size 3", "--size does nothing without a or --with: leave --size out"),
        ("a --many x --many y", None),
        ("a --with --many x", "--many does nothing with --with: leave --many out"),
    ],
)
def test_an_option_needs_one_of_what_it_is_bound_to(bound, words, why):
    if why is None:
        args = bound.parse_args(words.split())
        assert args.size == (4 if "4" in words else 3)
        assert args.many == (["x", "y"] if "--many" in words else [])
        return
    with pytest.raises(UsageError) as refused:
        bound.parse_args(words.split())
    assert str(refused.value) == why


@pytest.mark.parametrize(
    ("command", "words", "option"),
    [
        ("train", "--save-every 5", "--save-every"),
        ("train", "--resume", "--resume"),
        ("tp_attention", "--d-latent 8", "--d-latent"),
        ("tp_attention", "--kind gqa --d-value 8", "--d-value"),
        ("tp_attention", "--kind mla --no-bias", "--no-bias"),
        ("tp_attention", "--rope none --rope-base 100", "--rope-base"),
        ("cp_attention", "--d-latent 8", "--d-latent"),
        ("generate", "--tokens 1 --gamma 2", "--gamma"),
        ("generate", "--tokens 1 --draft-whole", "--draft-whole"),
        ("serving_bench", "--scheduler-only --kv-blocks 5", "--kv-blocks"),
        ("trace", "--compare a b --png c", "--png"),
        ("bench.__main__", "attention --d-ff 5", "--d-ff"),
        ("bench.__main__", "mlp --sequence-length 5", "--sequence-length"),
        ("bench.__main__", "mlp --model x", "--model"),
        ("bench.__main__", "mlp --sequence-parallel", "--sequence-parallel"),
        ("bench.__main__", "train --memory", "--memory"),
        ("bench.__main__", "mlp --memory --rounds 3", "--rounds"),
    ],
)
def test_options_that_would_do_nothing_are_refused(command, words, option):
    with pytest.raises(UsageError, match=f"^{option} does nothing with"):
        import_module(f"launch.{command}").options().parse_args(words.split())


def test_sizes_that_nothing_can_count_are_refused():
    with pytest.raises(UsageError, match="is too large a size: use at most 1000000000"):
        import_module("launch.tp_mlp").options().parse_args(["--d-model", "10000000000"])
    assert import_module("launch.tp_mlp").options().parse_args(["--seed", "10000000000"]).seed == 10**10
