"""The learner's process of `launch.practice`: `python -I practice_rank.py ROOT RANKS JOB`, under mpirun for several RANKS."""

import os
import sys

if __name__ == "__main__":
    parent = os.getppid()
    root, ranks, job = sys.argv[1:]
    sys.path.insert(0, root)
    from parallel import remains, space

    remains.die_with_parent(parent)
    from practice import worker

    if ranks == "1":
        worker.main(job)
        # Whatever threads and exit handlers the learner's file has left end here.
        os._exit(0)
    else:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI

        first = os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "0"
        if problem := space.missing(MPI.get_vendor()[0], int(ranks)):
            sys.exit(f"error: {problem}" if first else 2)
        MPI.Init_thread()
        remains.unlink_names(MPI.COMM_WORLD)
        if MPI.COMM_WORLD.size != int(ranks):
            sys.exit("error: the launcher is gone, or is another MPI's")
        worker.main(job, MPI.COMM_WORLD)
