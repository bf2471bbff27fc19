"""The learner's process of `launch.practice`: `python -I practice_rank.py ROOT RANKS JOB`, under mpirun for several RANKS."""

import os
import sys

if __name__ == "__main__":
    root, ranks, job = sys.argv[1:]
    sys.path.insert(0, root)
    from practice import worker

    if ranks == "1":
        worker.main(job)
        # Whatever threads and exit handlers the learner's file has left end here.
        os._exit(0)
    else:
        from mpi4py import MPI

        worker.main(job, MPI.COMM_WORLD)
