"""Measures wall time of functions in turns, and CPU time and memory of a function in a new process."""

import ctypes
import os
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


def release_freed_memory() -> None:
    """Returns to the system what glibc keeps of freed memory."""
    ctypes.CDLL(None).malloc_trim(0)


def peak_memory(reset: bool = False) -> float:
    """The peak resident memory of this process in MiB; `reset` first sets it to the current memory."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    # Not ru_maxrss, which can be that of the parent before exec.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def measure(function: Callable, *args) -> tuple[object, dict[str, float]]:
    """For a new process. -> the result of a function, its CPU seconds and the MiB by which it raises the peak memory.

    CPU time includes child processes, memory does not.
    """
    memory, cpu = peak_memory(reset=True), sum(os.times()[:4])
    result = function(*args)
    return result, {"CPU s": sum(os.times()[:4]) - cpu, "MB": peak_memory() - memory}
