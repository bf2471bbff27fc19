"""Waits that are no verb of a mesh have the verbs' time limit and their report."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.ahead import ahead
from tests.cases.planted import OUTSIDE
from tests.faults.running import Seen, run
from tests.grids import thinned

KINDS = thinned([*OUTSIDE], ["everyone", "asleep", "splitting"])
# What the report calls them.
NAMES = {"asleep": "control.wait", "duplicating": "Dup", "splitting": "Split", "barrier": "Barrier"}


def seen(kind: str) -> Seen:
    """A real run, in which rank 1 does not come to such a wait."""
    return run(3, ["-m", "tests.cases.planted", kind, "--timeout", "1"])


@pytest.fixture(scope="module")
def runs(request):
    with ahead(request, ThreadPoolExecutor(3), seen) as begun:
        yield begun


@pytest.mark.limit(90)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_does_not_come_is_named(runs, kind):
    done: Seen = runs[kind].result()
    assert done.status not in (None, 0), str(done)
    assert not done.left, str(done)
    assert "rank 1 did not come (asleep or reading): rank" in done.err, str(done)
    assert f"{NAMES.get(kind, f'control.{kind}')} at tests/cases/planted.py" in done.err, str(done)
