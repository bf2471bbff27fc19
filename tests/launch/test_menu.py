"""`rankwise`: the menu, and how it starts a command from any folder."""

import json
import os
import subprocess
import sys

import pytest

from launch.__main__ import GROUPS, commands, menu, ranks_of
from tests.harness import ROOT, launcher_free

RANKWISE = (sys.executable, str(ROOT / "launch" / "__main__.py"))


def typed(*arguments, cwd=ROOT, **environ):
    env = launcher_free() | environ
    return subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_menu_has_every_command_with_a_sentence_and_fits(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    text, known = menu(), commands()
    assert {name for names in GROUPS.values() for name in names} <= known.keys()
    for name, sentence in known.items():
        assert f"\n  {name} " in text
        assert sentence.endswith("."), f"{name} has no sentence"
    assert max(map(len, text.splitlines())) <= columns


def test_the_number_of_ranks_is_taken_out_of_the_options():
    assert ranks_of(["--tokens", "5", "-n", "4", "--json"]) == (4, ["--tokens", "5", "--json"])
    assert ranks_of(["--json"]) == (None, ["--json"])
    for wrong in (["-n"], ["-n", "0"], ["-n", "two"], ["-n", "-1"]):
        with pytest.raises(ValueError, match="is no number of ranks: use 1 or more, as in -n 4"):
            ranks_of(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tp_mpl",), "'tp_mpl' is no command: do you mean tp_mlp?"),
        (("zzz",), "'zzz' is no command: `rankwise` lists them"),
        (("start",), "'start' is no command"),
        (("tp_mlp", "-n", "0"), "-n '0' is no number of ranks: use 1 or more, as in -n 4"),
    ],
)
def test_what_cannot_be_started_is_one_line(arguments, message):
    done = typed(*RANKWISE, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_command_runs_on_its_ranks_from_a_folder_with_modules_of_the_same_names(tmp_path):
    (tmp_path / "models.py").write_text("raise SystemExit('a stranger')")
    (tmp_path / "launch.py").write_text("raise SystemExit('a stranger')")
    sizes = ("--tokens", "5", "--d-model", "6", "--d-ff", "7", "--data", "none", "--json")
    # No mpirun on the path: the environment's own is taken.
    done = typed(*RANKWISE, "tp_mlp", "-n", "3", *sizes, cwd=tmp_path, PATH="/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ranks"] == 3


def test_without_the_environment_one_line_says_how_to_activate_it():
    # -S: without the packages of the environment.
    done = typed(sys.executable, "-S", "-m", "launch.tp_mlp")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "activate`" in done.stderr
    assert done.stderr.count("\n") == 1


def test_python_m_launch_is_the_menu():
    assert typed(sys.executable, "-m", "launch", COLUMNS="80").stdout == typed(*RANKWISE, COLUMNS="80").stdout != ""


def test_a_reader_of_the_menu_may_leave():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(RANKWISE, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
