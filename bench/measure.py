"""Measures wall time, and the peak memory of processes."""

import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def elapsed(function: Callable) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def median_seconds(function: Callable, runs: int) -> float:
    """The median time of `runs` calls, after one call to warm up."""
    function()
    return statistics.median(elapsed(function) for _ in range(runs))


def compare_in_turns(what: str, ours: Callable, theirs: Callable, repeats: int) -> dict:
    """A row of figures. Both functions are called in turns, and each turn has a ratio. Call them before, to warm up."""
    times = [(elapsed(theirs), elapsed(ours)) for _ in range(repeats)]
    ratios = sorted(their_seconds / our_seconds for their_seconds, our_seconds in times)
    their_median, our_median = map(statistics.median, zip(*times, strict=True))
    return {"what": what, "wall s": our_median, "theirs, wall s": their_median,
            "ratio": statistics.median(ratios), "min ratio": ratios[0], "max ratio": ratios[-1]}  # fmt: skip


def new_process() -> ProcessPoolExecutor:
    """A process that inherits no memory from this one."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def reset_peak_memory() -> None:
    """Sets the peak memory of this process to its current memory."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """The peak resident memory of this process in MiB. (`ru_maxrss` can be that of the parent before exec.)"""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024
