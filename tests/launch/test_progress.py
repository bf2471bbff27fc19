"""What long work says where there is no terminal: a line now and then, none of short work; loss.csv as a run goes on."""

import csv

import pytest

from launch.measure.losses import LossTable
from launch.terminal import progress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def spoken(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 3.0)


def lines(clock, total, seconds, done=0, facts=()):
    """What is said of items of so many seconds each."""
    it = progress.Lines("step", total, done, clock)
    for n in range((total or 10) - done):
        clock.now += seconds
        if (line := it.advance(*facts)) is not None:
            yield n + 1, line


def test_a_line_every_few_seconds_and_none_of_short_work(spoken):
    assert list(lines(Clock(), 1000, 0.0029)) == []
    facts = (lambda rate: "loss 2.310", lambda rate: f"{1000 * rate:,.0f} tokens/s")
    told = list(lines(Clock(), 1000, 0.5, facts=facts))
    assert told[0] == (6, "step 6/1000  loss 2.310  2,000 tokens/s  8:17 left")
    assert [n for n, _ in told] == list(range(6, 1000, 6))
    # The last step is told by the report.
    assert [n for n, _ in lines(Clock(), 3, 4)] == [1, 2]


def test_a_run_that_is_taken_up_counts_from_where_it_was(spoken):
    assert next(lines(Clock(), 1000, 1, done=500)) == (3, "step 503/1000  8:17 left")
    assert next(lines(Clock(), None, 4)) == (1, "step 1")


def test_items_go_through_and_only_one_rank_speaks(spoken, capsys, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "Lines", lambda *about: Lines(*about, clock=clock))

    def slow():
        for n in range(4):
            clock.now += 2
            yield n

    for here in (False, True):
        assert list(progress.items("reading", here, 4)(slow())) == [0, 1, 2, 3]
    with progress.steps("training", 4, 0, 10, True) as advance:
        for _ in slow():
            advance(0.5)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == ["reading 2/4  0:04 left", "step 2/4  loss 0.500  5 tokens/s  0:04 left"]


Lines = progress.Lines


def test_what_took_a_moment_to_load_is_told(capsys):
    progress.loaded("SmolLM2", 134_515_008, 0.6, True)
    progress.loaded("small", 5_000, 0.4, True)
    progress.loaded("other rank's", 5_000, 0.4, False)
    progress.loaded("tiny", 5_000, 0.01, True)
    said = ["loaded SmolLM2, 135 M parameters, 0.6 s", "loaded small, 5,000 parameters, 0.4 s"]
    assert capsys.readouterr().err.splitlines() == said


# --- loss.csv


def rows(path):
    with open(path, newline="") as file:
        return [(int(r["step"]), int(r["tokens"]), float(r["loss_nats"])) for r in csv.DictReader(file)]


def test_losses_are_there_as_soon_as_they_are_known(tmp_path):
    path = tmp_path / "out" / "loss.csv"
    table = LossTable(path, 10, [])
    assert not path.parent.exists()
    for n in range(3):
        table.add(n + 0.5)
        assert rows(path) == [(k + 1, 10 * (k + 1), k + 0.5) for k in range(n + 1)]
    table.add()
    assert len(rows(path)) == 3
    assert table.problem is None


def test_a_run_that_is_taken_up_doubles_no_step(tmp_path):
    path = tmp_path / "loss.csv"
    table = LossTable(path, 10, [])
    for loss in (3.0, 2.0, 1.5):
        table.add(loss)
    # Left after step 3, taken up from the checkpoint of step 2.
    LossTable(path, 10, [3.0, 2.0]).add(1.25)
    assert rows(path) == [(1, 10, 3.0), (2, 20, 2.0), (3, 30, 1.25)]
    LossTable(path, 10, [3.0]).add()
    assert rows(path) == [(1, 10, 3.0)]


def test_a_table_that_cannot_be_written_stops_no_run(tmp_path):
    path = tmp_path / "out" / "loss.csv"
    (tmp_path / "out").write_text("in the way")
    table = LossTable(path, 10, [])
    table.add(3.0)
    assert table.problem == f"cannot write {path}: File exists"
    (tmp_path / "out").unlink()
    table.add(2.0)
    assert table.problem is None
    assert [loss for *_, loss in rows(path)] == [3.0, 2.0]
