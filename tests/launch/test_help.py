"""`--help` of every command and every verb of practice: one page of 80 columns that says what holds."""

import argparse
import re
import shlex
from importlib import import_module

import pytest

from launch import practice
from launch.options import UsageError
from tests.harness import ROOT

STARTED = re.compile(r"^if __name__ == \"__main__\":", re.MULTILINE)
# The menu reads no options of its own (test_menu.py); a learner's process is started by practice alone.
OTHERS = {"launch.__main__", "launch.process.practice_rank"}
FILES = [p for p in sorted((ROOT / "launch").rglob("*.py")) if STARTED.search(p.read_text())]
COMMANDS = [name for p in FILES if (name := ".".join(p.relative_to(ROOT).with_suffix("").parts)) not in OTHERS]
VERBS = next(a for a in practice.options()._actions if isinstance(a, argparse._SubParsersAction)).choices


def parser(module):
    return import_module(module).options()


def page(capsys, *words, of):
    with pytest.raises(SystemExit) as ended:
        of.parse_args([*words, "--help"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    return out


def typed(line):
    """The module and the words of a command line, as a page has it."""
    words = shlex.split(line.partition("python -m ")[2])
    return words[0] + (".__main__" if words[0] == "launch.bench" else ""), words[1:]


@pytest.mark.parametrize("words", [(c,) for c in COMMANDS] + [("launch.practice", verb) for verb in VERBS], ids=" ".join)
def test_help_fits_80_columns_and_has_real_defaults(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    out = page(capsys, *words[1:], of=parser(words[0]))
    assert out.startswith("usage: ")
    assert [line for line in out.splitlines() if len(line) > 80] == []
    joined = " ".join(out.split())
    for wrong in ("None", "default: False", "default: [", "default: )", "%%", "%("):
        assert wrong not in joined, wrong


@pytest.mark.parametrize("name", [c for c in COMMANDS if not c.startswith("launch.pictures")])
def test_the_examples_are_commands_and_the_statuses_are_told(name, capsys):
    out = page(capsys, of=parser(name))
    examples = re.search(r"^examples:\n((?:  .*\n)+)", out, re.MULTILINE)[1].splitlines()
    for module, words in map(typed, examples):
        parser(module).parse_args(words)
    assert name in [typed(line)[0] for line in examples]
    assert re.search(r"^exit status:\n  0  .+\n  1  .+\n  2  .+\n", out, re.MULTILINE)


def test_there_is_a_command_for_each_module_that_can_be_started():
    assert {"launch.tp_mlp", "launch.practice", "launch.bench.__main__", "launch.pictures.columns"} <= set(COMMANDS)
    assert len(COMMANDS) >= 14
    assert len(VERBS) >= 15


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("score", "--seed"),
        ("serve", "--seed"),
        *(("kv_cache", o) for o in ("--seed", "--trace", "--timeout", "--check-collectives")),
        *(("trace", o) for o in ("--seed", "--dtype", "--trace", "--timeout", "--check-collectives")),
    ],
)
def test_an_option_that_would_do_nothing_is_not_offered(name, option, capsys):
    of = parser(f"launch.{name}")
    assert f"\n  {option} " not in page(capsys, of=of)
    given = {"score": ["--tokens", "1,2"], "trace": ["t.json"]}.get(name, [])
    of.parse_args(given)
    with pytest.raises(UsageError, match=f"'{option}' is no option here"):
        of.parse_args([*given, option, "1"])
