"""Messages from rank 0 to rank 1 that go wrong: `python -m tests.cases.sent KIND --check-collectives on`."""

import launch.start as start  # isort: skip

import numpy as np

from launch.options import parser


def options():
    p = parser("sent", __doc__)
    p.add_argument("kind", choices=("unreceived", "changed", "changed sum"))
    return p


def main(args, comm, opened):
    pp = start.make_mesh(args, comm, pp=comm.size).pp
    x = np.ones(3)
    if args.kind == "changed sum":
        sum_x = pp.start_all_reduce(x)
        x[comm.rank] = 5
        sum_x.wait()
    elif comm.rank == 0:
        message = pp.start_send(x, 1, "0F0")
        x[1] = 5 if args.kind == "changed" else 1
        message.wait()
    elif comm.rank == 1 and args.kind == "changed":
        pp.receive((3,), float, 0, "0F0")
    return 0


if __name__ == "__main__":
    start.run(options(), lambda args, ranks: None, main)
