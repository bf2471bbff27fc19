"""Faults on several hosts: all ranks end on all of them, one says why and on which host, and nothing is left on any."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.ahead import ahead
from tests.grids import thinned
from tests.harness import MPICH
from tests.hosts.cluster import why_not
from tests.hosts.ends import CASES, Case, Ended, reports, seen

CHOSEN = thinned(CASES, [case for case in CASES if not case.alike])
pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"no hosts: {why_not()}"),
    pytest.mark.skipif(not MPICH, reason="mpirun's options that put ranks on the hosts are MPICH's"),
]


@pytest.fixture(scope="module")
def runs(request):
    with ahead(request, ThreadPoolExecutor(2), lambda case: seen(case)) as begun:
        yield begun


@pytest.mark.limit(120)
@pytest.mark.parametrize("case", CHOSEN, ids=[case.name.replace(" ", "_") for case in CHOSEN])
def test_all_hosts_end_and_one_rank_says_why(request, runs, case: Case):
    done: Ended = runs[request.node.callspec.id].result()
    assert done.status == case.status, f"not {case.status}: {done}"
    assert not done.left, str(done)
    said = reports(done.err)
    assert len(said) == bool(case.says), f"not once: {done}"
    assert re.match(case.says, "".join(said)), f"nothing like {case.says!r} in\n{done}"
