"""Grids of cases: few of them in every run, those that differ; all of them in `make test-all`."""

import os

FULL = os.environ.get("TESTS") == "all"


def thinned(every, few):
    return every if FULL else few
