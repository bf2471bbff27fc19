"""What is printed cannot steer the terminal, and no standard output is too narrow for it."""

from types import SimpleNamespace

import pytest

from inference.generate import Generated
from launch import generate, train
from launch.terminal.printable import printable
from tests.harness import mpirun

EVIL = "a\x1b[2Jb\r\x07\x9b\x7f\u202ec\n\td é 😀"
SAFE = "a\\x1b[2Jb\\r\\x07\\x9b\\x7f\\u202ec\n\td é 😀"


def test_control_characters_are_escaped():
    assert printable(EVIL) == SAFE
    assert printable(printable(EVIL)) == SAFE


def test_generated_text_is_escaped_as_it_streams(capsys):
    stream = SimpleNamespace(push=lambda token: EVIL, flush=lambda: "\x1b", stopped=False)
    task = SimpleNamespace(
        tokenizer=SimpleNamespace(eos_ids=[], stream=lambda stop: stream),
        prompt=[1],
        sampling=None,
        source=SimpleNamespace(wishes=SimpleNamespace(ends=frozenset())),
    )
    mesh = SimpleNamespace(tp=SimpleNamespace(rank=0))
    generator = SimpleNamespace(tokens=lambda *asked, **more: iter([Generated(5, 0.0)]), mesh=mesh)
    args = generate.options().parse_args(["--prompt", "say \x1b"])
    replicas = SimpleNamespace(check=lambda *asked: None)
    answer = generate.generated(args, task, generator, replicas, shown=True)
    # As it is, where no terminal reads it.
    assert answer["text"] == EVIL + "\x1b"
    assert capsys.readouterr().out == f"say \\x1b{SAFE}\\x1b\n\n"


def test_a_sample_of_a_trained_model_is_escaped(capsys, monkeypatch):
    for what in ("table", "communication", "memory"):
        monkeypatch.setattr(train.report, what, lambda *about: None)
    config = dict.fromkeys(("family", "layers", "d_model", "heads", "d_ff", "sequence_length", "batch_tokens"), 1)
    result = {"mesh": {"dp": 1}, "config": config, "parameters": 1, "dtype": "f", "seed": 0, "communication": [], "memory": {}}
    result |= {"loss": [], "validation_bits_per_byte": 1.0, "files": [], "sample": EVIL}
    train.show(result, [1.0])
    assert "\x1b" not in (said := capsys.readouterr().out)
    assert "a\\x1b[2Jb" in said


@pytest.mark.parametrize(("encoding", "printed"), [("ascii", "\\u2588"), ("utf-8", "█")])
def test_a_block_goes_into_any_standard_output(encoding, printed):
    done = mpirun(0, "-m", "tests.cases.planted", "block", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr, done.stdout.splitlines()[-1]) == (0, "", printed)
