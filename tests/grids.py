"""Grids of cases: few of them in every run, those that differ; all of them in `make test-all`."""

import os
from collections.abc import Iterable
from itertools import product

import pytest

from launch.process import launcher

FULL = os.environ.get("TESTS") == "all"


def thinned(every, few):
    return every if FULL else few


def rarely(why: str) -> pytest.MarkDecorator:
    """Run by `make test-all` only: it is dear, and the suite has the like of it."""
    return pytest.mark.skipif(not FULL, reason=f"{why}; this one by TESTS=all")


def at(*sizes: int) -> pytest.MarkDecorator:
    """Run at these numbers of ranks only, as the others tell little more."""
    said = " and ".join(map(str, sizes))
    return pytest.mark.skipif(not FULL and (launcher.size() or 1) not in sizes, reason=f"at {said} ranks, unless TESTS=all")


def every_other(*columns: Iterable) -> list[tuple]:
    """Every second entry of the product of some columns. Where the columns are the same on any number of ranks, the others are
    run on one rank more, and on one less; where a third one is of this number alone, each two values still meet."""
    return one_in(2, *columns)


def one_in(n: int, *columns: Iterable) -> list[tuple]:
    """Every n-th entry of the product of some columns. Each of n numbers of ranks in a row has others, and together they have
    all: of 3, what 2, 3 and 4 ranks run. Values of two columns meet where a third column has n or more."""
    columns = [list(column) for column in columns]
    every = list(product(*columns))
    places = product(*(range(len(column)) for column in columns))
    ranks = launcher.size() or 1
    return thinned(every, [entry for entry, at in zip(every, places, strict=True) if (sum(at) + ranks) % n == 0])
