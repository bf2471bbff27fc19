"""A rank that ends or stands still at an operation of a pipeline plan: it is named, and so are the operation and the peer."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from parallel import schedules
from tests.ahead import ahead
from tests.cases.piped import BEFALL
from tests.faults.running import Seen, run
from tests.faults.test_faults import AT_ONCE, LIMIT
from tests.grids import thinned

# Seconds: what a rank may wait, and what all may take to be gone after that, or at once where nobody has to wait.
PATIENCE, GONE = 1, 2
# (schedule, ranks, micro-batches) of which every operation is befallen by every kind.
PLANS = [("zb-v", 2, 2), ("1f1b", 4, 4), ("zb-h1", 3, 3)]
ANY_OTHER = r"(receive of \S+ .* from {r}|send of \S+ .* to {r}|all_reduce .*|[\w.]+) .* at \w+/.*"
SAYS = {
    # Before its first message no peer is known.
    "kill": r"(?m)^rank {r} of {n} was killed by SIGKILL at operation ({op} (after|in) .* (to|from) \d #\d|0F0 after Split)",
    "stop": rf"(?m)^rank {{r}} did not come \(stopped \(SIGSTOP\) at operation {{op}}\): .* waited .* in {ANY_OTHER}",
    "raise": r"(?m)^\[{r}\] rank {r} of {n} failed at operation {op}: IndexError: pop from empty list",
}


def befallen() -> list[tuple[tuple[str, int, int], int, str, str]]:
    """(plan, rank, operation, kind)."""
    every = [
        (of, rank, str(op), kind)
        for of in PLANS
        for rank, ops in enumerate(schedules.plan(*of).ranks)
        for op in ops
        for kind in BEFALL
    ]
    few = [(PLANS[0], 0, "3W1", "kill"), (PLANS[1], 2, "2F2", "stop"), (PLANS[2], 1, "1I1", "raise")]
    assert set(few) <= set(every)
    return thinned(every, few)


def seen(of: tuple[str, int, int], rank: int, op: str, kind: str) -> tuple[Seen, float]:
    """How it ended, and how many seconds after the fault all were gone."""
    with TemporaryDirectory() as folder:
        clock = Path(folder) / "clock"
        plan = ["--schedule", of[0], "--micro-batches", str(of[2]), "--fault", f"{op}:{kind}", "--clock", str(clock)]
        done = run(of[1], ["-m", "tests.cases.piped", *plan, "--timeout", str(PATIENCE)], limit=LIMIT)
        return done, time.time() - clock.stat().st_mtime


@pytest.fixture(scope="module")
def runs(request):
    with ahead(request, ThreadPoolExecutor(AT_ONCE), seen) as begun:
        yield begun


@pytest.mark.limit(2 * LIMIT)
@pytest.mark.parametrize(("of", "rank", "op", "kind"), befallen())
def test_what_befalls_a_rank_at_an_operation_is_named(request, runs, of, rank, op, kind):
    done, seconds = runs[request.node.callspec.id].result()
    assert done.status not in (0, None), str(done)
    assert not done.left, str(done)
    said = SAYS[kind].replace("{r}", str(rank)).replace("{n}", str(of[1])).replace("{op}", op)
    assert re.search(said, done.err), f"nothing like {said!r} in\n{done}"
    assert seconds < (PATIENCE if kind == "stop" else 0) + GONE, str(done)
