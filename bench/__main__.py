"""Benchmarks: what this project computes beside the tools that compute the same, on the same input, in one run.

Where there is such a tool, its output is compared with ours before any figure is printed. Scorers and loading run in a
process of their own each (bench_processes.py). Models run by turns in one (bench_models.py), as do the ways to read a
video (bench_data.py); training steps by turns in several (bench_train.py).
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import bench_data
import bench_models
import bench_processes
import bench_train

BENCHMARKS = {  # name: function of the number of repeats -> rows of figures
    "metrics": bench_processes.compare_metrics,
    "vit": bench_models.compare_vit,
    "lm": bench_models.compare_lm,
    "decode-text": bench_models.compare_decoding,
    "loading": bench_processes.compare_loading,
    "decode": bench_data.compare_reading,
    "cache": bench_data.compare_cache,
    "train": bench_train.compare_training,
    "cost": bench_train.compare_cost,
}


def machine(packages=("numpy", "torch", "transformers", "peft", "pycocoevalcap", "av")) -> dict:
    """What the figures were taken on and with."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    java = []
    if shutil.which("java"):
        java = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr.splitlines()
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "cpu": f"{cpu.group(1) if cpu else platform.machine()}, {os.cpu_count()} cores",
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions,
        "java": java[0] if java else "none",
    }


def table(rows: list[dict]) -> str:
    """Rows as a table in Markdown; a ratio is how many times less CPU, or time, than the other tool's."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        lines.append([f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def names_of(text: str) -> list[str]:
    names = text.split(",")
    if odd := set(names) - BENCHMARKS.keys():
        raise argparse.ArgumentTypeError(f"{min(odd)!r}, expected some of {', '.join(BENCHMARKS)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", type=names_of, default=[list(BENCHMARKS)],
                        help=", ".join(BENCHMARKS))  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="how often cheap runs are repeated; the median counts")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    given = parser.parse_args()
    if given.repeats < 1:
        parser.error(f"--repeats: is {given.repeats}, expected at least 1")
    if given.json and not os.access(Path(given.json).resolve().parent, os.W_OK):
        parser.error(f"--json: {given.json} cannot be written")
    chosen, about = sum(given.only, []), machine()
    groups = []
    for name, function in BENCHMARKS.items():
        if name in chosen:  # in a process of its own: none inherits what another left in memory
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                groups.append(process.submit(function, given.repeats).result())
    print(*map(table, groups), sep="\n\n")
    print("", *(f"{key}: {value}" for key, value in about.items()), sep="\n")
    if given.json:
        rows = [row for group in groups for row in group]
        Path(given.json).write_text(json.dumps({"machine": about, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
