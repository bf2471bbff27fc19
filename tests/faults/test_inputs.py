"""Input and files that cannot be used, as a user gives them: each is told in a line, and nothing is left."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.ahead import ahead
from tests.faults.inputs import INPUTS, checkpoints, prepared, seen
from tests.faults.running import Seen
from tests.grids import thinned

EVERY = {case.name: case for cases in INPUTS.values() for case in cases}
NAMES = thinned([*EVERY], [name for name, case in EVERY.items() if case.one])


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    tmp = prepared(tmp_path_factory.mktemp("inputs"))
    if any("--checkpoint" in EVERY[name].typed for name in NAMES):
        checkpoints(tmp)
    with ahead(request, ThreadPoolExecutor(2), lambda name: seen(EVERY[name], tmp)) as begun:
        yield begun


@pytest.mark.limit(90)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_told_in_a_line(runs, name):
    case = EVERY[name]
    done: Seen = runs[name].result()
    assert done.status == case.status, str(done)
    assert not done.left, str(done)
    assert re.search(case.says, done.err), str(done)
    if case.status != 1:
        assert len(done.err.splitlines()) == 1, str(done)
        assert done.err.startswith("error: ") == (case.status == 2), str(done)
