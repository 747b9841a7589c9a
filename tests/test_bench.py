"""The benchmarks' own code: unequal results are refused, time and memory are measured."""

import math
import time
from functools import partial

import pytest
import torch

from bench.measure import compare, difference


def make(ours: tuple, theirs: tuple, side: str):
    """Works with a result, that take so much time and memory."""
    value, seconds, megabytes = ours if side == "ours" else theirs

    def work():
        time.sleep(seconds)
        torch.zeros(megabytes * 2**18).sum()
        return torch.tensor([value, 10.0])

    return work


def test_time_and_memory_of_two_processes():
    """0.5 s beside 0.1 s, 300 MiB beside 100."""
    row = compare("x", 0.02, partial(make, (1.0, 0.1, 100), (1.1, 0.5, 300)), 1)
    assert row["s"] >= 0.1 and row["theirs, s"] >= 0.5 and row["differs by"] == pytest.approx(0.01, abs=1e-6)
    assert 150 < row["theirs, MB"] - row["MB"] < 250
    assert row["ratio of s"] == [pytest.approx(row["theirs, s"] / row["s"])] * 3


def test_unequal_results_are_refused():
    with pytest.raises(AssertionError, match="x: differs by 0.2 of the largest number"):
        compare("x", 0.02, partial(make, (3.0, 0, 0), (1.0, 0, 0)), 1)
    assert difference(torch.zeros(2), torch.zeros(3)) == math.inf
