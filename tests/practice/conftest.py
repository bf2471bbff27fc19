"""Repairs of a learner's file are looked for a quarter as long here as in a check: what these tests find is found soon."""

import pytest

from practice import repairs


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(repairs, "SECONDS", 1.0)
