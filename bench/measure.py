"""Time and memory of our work against the same work of another library, each in a process of its own. Linux only.
"""

import os
import platform
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from torch import Tensor

Work = Callable[[], Tensor]  # its results are compared


def cpu_name() -> str:
    """"AMD EPYC 9B14", or what Python knows of the machine."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text()) if path.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def prepare(make: Callable[[str], Work], side: str) -> None:
    """Makes the work of this process."""
    global work
    work = make(side)


def take_turn() -> tuple[Tensor, dict[str, float]]:
    """Does the work once. Returns its result and its figures: seconds, those of all cores and child processes, and the
    peak of this process's memory in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at the memory of this moment
    start, cpu_start = time.perf_counter(), sum(os.times()[:4])
    result = work()
    seconds, cpu_seconds = time.perf_counter() - start, sum(os.times()[:4]) - cpu_start
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return result, {"s": seconds, "CPU s": cpu_seconds, "MB": int(peak[1]) / 1024}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item() if ours.shape == theirs.shape else float("inf")


def compare(what: str, tolerance: float, make: Callable[[str], Work], repeats: int) -> dict:
    """A row of figures: medians over turns that alternate. The first turn warms up, and its results are compared.

    make: gives the work of a side, "ours" or "theirs". A ratio is theirs / ours. An infinite tolerance is for two that
    do different work.
    """
    context = get_context("spawn")  # a process that inherits no memory
    with (ProcessPoolExecutor(1, context, prepare, (make, "ours")) as us,
          ProcessPoolExecutor(1, context, prepare, (make, "theirs")) as them):
        turns = [[side.submit(take_turn).result() for side in (us, them)] for _ in range(repeats + 1)]
    error = difference(*(result for result, _ in turns[0]))
    assert error <= tolerance, f"{what}: differs by {error:.2g} of the largest number"
    row = {"what": what, "differs by": error}
    for name in "s", "CPU s", "MB":
        ours, theirs = ([turn[side][1][name] for turn in turns[1:]] for side in (0, 1))
        ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
        row |= {name: median(ours), f"theirs, {name}": median(theirs),
                f"ratio of {name}": [median(ratios), ratios[0], ratios[-1]]}
    return row
