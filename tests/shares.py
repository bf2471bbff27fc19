"""The tests at one rank, by several runs side by side: `python -m tests.shares 3 [pytest's options]`.

One rank leaves the other cores idle. Each run takes the next file of tests that no other has begun. The first prints as it
goes, the others when they have ended; the status is the worst of all.
"""

import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

ROOT = Path(__file__).resolve().parent.parent


def main(shares: int, options: list[str]) -> int:
    with TemporaryDirectory() as claims:
        own = [str(Path(sys.executable).parent / "mpirun"), "-n", "1", sys.executable, "-m", "pytest", f"--claims={claims}"]
        return worst([*own, *options], shares)


def worst(command: list[str], shares: int) -> int:
    """The worst status of so many runs of the command."""
    outputs = [None, *(TemporaryFile() for _ in range(1, shares))]  # noqa: SIM115  read at the end
    runs = [subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out) for out in outputs]
    try:
        statuses = [run.wait() for run in runs]
    except KeyboardInterrupt:
        for run in runs:
            run.terminate()
        statuses = [130, *(run.wait() for run in runs)]
    for out in outputs[1:]:
        out.seek(0)
        sys.stdout.buffer.write(out.read())
    return max(map(abs, statuses))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
