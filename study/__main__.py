"""`python -m study TABLE`: trains the runs of a table, keeps them in results/, and writes docs/study-tables.md.

Each run is a process of `train.py` with a folder below runs/study. A run that was stopped goes on where it was, and one
that is in results/ is not run again, published ones among them: take those out to train them anew.
"""

import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch

from bench.measure import cpu_name
from common import cli
from common.config import VERSION
from common.errors import InputError
from common.files import read_json, read_json_lines
from study.tables import CONTENT, PAGE, ROOT, Row, add_run, format_page, read_rows
from video_data.shapes import make_dataset

RUNS = ROOT / "runs/study"

Key = tuple[Row, float, int]  # of a run: its row, learning rate and seed


def missing_runs(rows: list[Row], seeds: list[int]) -> list[Key]:
    """What to train next: all rates at seed 0, and once they are there the best one at the other seeds."""
    missing = []
    for row in (row for row in rows if row.command):
        firsts, later = [(lr, 0) for lr in row.lrs], [(row.best_lr, seed) for seed in seeds if row.trains]
        missing += [(row, *key) for key in (firsts if row.best_lr is None else later) if key not in row.runs]
    return missing


def command_of(row: Row, lr: float, seed: int) -> list[str]:
    """The words after `python train.py`, without the run's folder."""
    return [*row.command.split(), "--lr", f"{lr:g}", "--seed", str(seed)]


def read_run(folder: Path) -> dict:
    """The scores and costs of a finished run, from the files in its folder."""
    rows = [row for _, row in read_json_lines(folder / "log.jsonl")]
    config, speeds = read_json(folder / "config.json"), [row["clips/s"] for row in rows if "clips/s" in row]
    validations = [row for row in rows if "val" in row]
    best = max(validations[1:] or validations, key=lambda row: row["val"]["CIDEr"])  # step 0's weights are not kept
    return {"steps": rows[-1]["step"], "best step": best["step"], "val CIDEr": best["val"]["CIDEr"],
            "test": rows[-1]["test"], "seconds": rows[-1]["elapsed"] - validations[0]["elapsed"],
            "seconds per step": config["config"]["batch_size"] / median(speeds) if speeds else None,
            "adapter bytes": (folder / "best/adapter.safetensors").stat().st_size,
            "trained": config["trained"], "total": config["total"]}


def train(runs: Path, key: Key, jobs: int) -> dict:
    """Trains a run in a folder below `runs`, unless it is finished, and returns what results/ keeps of it. Raises
    InputError if it fails."""
    row, lr, seed = key
    threads = max(1, (os.cpu_count() or 1) // jobs)
    folder = runs / re.sub(r"[^\w.]+", "-", f"{row.flags} {lr:g} {seed}").strip("-")
    if not (folder / "test.json").exists():
        words = ["--resume", folder] if (folder / "config.json").exists() else [*command_of(*key), "--out", folder]
        with open(f"{folder}.txt", "a") as log:
            code = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, stdout=log, stderr=log,
                                  env=os.environ | {"OMP_NUM_THREADS": str(threads)}).returncode
        if code:
            raise InputError(f"{folder}: the run ended with {code}, see {log.name}")
    return {"version": VERSION, "flags": row.command, "lr": lr, "seed": seed, "date": time.strftime("%Y-%m-%d"),
            "machine": f"{threads} thread(s) of {cpu_name()}, {jobs} at a time",
            "versions": {"python": platform.python_version(), "torch": torch.__version__}, **read_run(folder)}


def main() -> None:
    parser = cli.Parser("Trains the runs of a table and writes docs/study-tables.md.", "python -m study TABLE")
    parser.add_argument("table", choices=list(CONTENT["tables"]), help="which table of study/tables.toml")
    parser.add_argument("--seeds", type=cli.number(int, 0), nargs="+", default=[0, 1, 2],
                        help="of weights and batches; the learning rate is chosen at seed 0 in any case")
    parser.add_argument("--jobs", type=cli.number(int, 1, 100), default=1, help="runs at a time; they share the cores")
    parser.add_argument("--dry-run", action="store_true", help="print the next commands and train nothing")
    args = parser.parse_args()
    store = CONTENT["tables"][args.table]["store"]
    while keys := missing_runs(read_rows(args.table), sorted({*args.seeds})):
        print("\n".join(" ".join(["python train.py", *command_of(*key)]) for key in keys))
        if args.dry_run:
            return
        (RUNS / store).mkdir(parents=True, exist_ok=True)
        for folder, sizes in CONTENT["clips"].items():
            if any(folder in command_of(*key) for key in keys):
                make_dataset(ROOT / folder, sizes, seed=1)
        with ThreadPoolExecutor(args.jobs) as pool:  # after an error no other run begins
            for run in pool.map(lambda key: train(RUNS / store, key, args.jobs), keys):
                add_run(store, run)
    PAGE.write_text(format_page(), "utf-8")


if __name__ == "__main__":
    cli.run(main)
