"""The runs of a table: which there are, one after another or several at once, and the figures of each.

A run is a folder below `runs/study`. One that was stopped goes on where it was; one that is finished is read
again. What was measured is kept in `results/STORE.json`, which outlives the folders. Tables of the same common flags
share a store, and rows of the same flags share their runs.
"""

import hashlib
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import InputError
from common.files import acquire_lock, field, read_json, write_json
from common.run_log import read_log
from study.tables import SEEDS, Table

ROOT = Path(__file__).resolve().parent.parent
SOMETIMES = ("seconds per step", "peak bytes")  # null where nothing was trained, or where the run was only read again
FIELDS = {"val CIDEr": float, "test": dict, "seconds": float, "trained": int, "total": int, "adapter bytes": int,
          "machine": str, "date": str}  # fmt: skip
RESULTS, RUNS = ROOT / "results", ROOT / "runs/study"


@dataclass(frozen=True)
class RunKey:
    """What tells the runs of a table apart."""

    flags: str  # of the row
    lr: float
    seed: int

    @property
    def folder_name(self) -> str:
        words = self.flags.replace("--", " ").split() or ["default"]
        return "_".join([*words, f"{self.lr:g}", str(self.seed)]).replace("/", "-")


def cpu_name() -> str:
    """"AMD EPYC 9B14", or what Python knows of the machine."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load_results(table: Table) -> dict[RunKey, dict]:
    """The runs in results/STORE.json. Raises InputError for a run of other common flags than the table has today."""
    path = RESULTS / f"{table.store}.json"
    results = {}
    for run in field(read_json(path), "runs", list, path) if path.exists() else []:
        if not isinstance(run, dict):
            raise InputError(f"{path}: runs: expected objects, found {run!r:.40}")
        common, own = table.flags, field(run, "flags", str, path)
        if own != common and not own.startswith(f"{common} "):
            raise InputError(f"{path}: holds a run with other flags than study/tables.py, {own!r}: correct its flags "
                             "or take the run out of the file, then it is trained again")  # fmt: skip
        for name, kind in FIELDS.items():
            field(run, name, kind, path)
        for name in SOMETIMES:
            field(run, name, float, path, None)
        for name in run["test"]:
            field(run["test"], name, float, f"{path}: test")
        if lacking := [name for name in SOMETIMES if name not in run]:
            raise InputError(f"{path}: field {lacking[0]!r} is missing in a run")
        key = RunKey(own.removeprefix(common).strip(), field(run, "lr", float, path), field(run, "seed", int, path))
        results[key] = run
    return results


def lock_results(table: Table) -> int:
    """Locks results/STORE.json for this process, until it ends or closes the descriptor.

    Raises InputError where another study of the same store runs: each would write over what the other has measured.
    """
    RUNS.mkdir(parents=True, exist_ok=True)
    if (lock := acquire_lock(RUNS / f"{table.store}.lock", wait=False)) is None:
        raise InputError(f"{RESULTS / table.store}.json: expected one study of it at a time, another one is running")
    return lock


def store_results(table: Table, results: dict[RunKey, dict]) -> None:
    """Writes results/STORE.json, in an order that does not depend on when a run ended."""
    RESULTS.mkdir(exist_ok=True)
    order = sorted(results, key=lambda key: (key.flags, key.lr, key.seed))
    write_json(RESULTS / f"{table.store}.json", {"runs": [results[key] for key in order]})


def trains(flags: str) -> bool:
    """Whether a row with these flags trains anything."""
    return "--method none" not in flags


def first_runs(table: Table) -> list[RunKey]:
    """Every learning rate at the first seed. A row that trains nothing has one run."""
    return [RunKey(flags, lr, SEEDS[0]) for row, flags in table.rows.items()
            for lr in table.rates(row)[: None if trains(flags) else 1]]  # fmt: skip


def chosen_lr(table: Table, results: dict[RunKey, dict], flags: str) -> float | None:
    """The rate of a row whose run at the first seed has the highest validation CIDEr; None while one is missing."""
    keys = [key for key in first_runs(table) if key.flags == flags]
    if any(key not in results for key in keys):
        return None
    return max(keys, key=lambda key: results[key]["val CIDEr"]).lr


def later_runs(table: Table, results: dict[RunKey, dict], seeds: tuple[int, ...]) -> list[RunKey]:
    """The chosen rate at the other seeds."""
    rows = [flags for flags in table.rows.values() if trains(flags)]
    return [RunKey(flags, lr, seed) for flags in rows if (lr := chosen_lr(table, results, flags)) is not None
            for seed in seeds if seed != SEEDS[0]]  # fmt: skip


def command_of(table: Table, key: RunKey, folder: Path) -> list[str]:
    """The words after `python train.py`; a folder that holds a run continues it."""
    if (folder / "config.json").exists():
        return ["--resume", str(folder)]
    return [*table.flags.split(), *key.flags.split(), "--lr", str(key.lr), "--seed", str(key.seed),
            "--out", str(folder)]  # fmt: skip


def read_figures(folder: Path) -> dict:
    """The scores and costs of a finished run, from the files in its folder."""
    rows = [row for _, row in read_log(folder / "log.jsonl")]
    config, adapter = read_json(folder / "config.json"), folder / "best/adapter.safetensors"
    batch_size, speeds = config["flags"]["batch_size"], [row["clips/s"] for row in rows if "clips/s" in row]
    validations = [row for row in rows if "val" in row]
    validations = validations[1:] or validations  # step 0 is before training: its weights are not kept
    started = next(row["elapsed"] for row in rows if "val" in row)  # before that, data and caches are made
    best = max(validations, key=lambda row: row["val"]["CIDEr"])
    return {
        "steps": rows[-1]["step"], "best step": best["step"], "val CIDEr": best["val"]["CIDEr"],
        "test": rows[-1]["test"], "seconds": rows[-1]["elapsed"] - started,
        "seconds per step": batch_size / statistics.median(speeds) if speeds else None,
        "adapter bytes": adapter.stat().st_size, "trained": config["trained"], "total": config["total"],
    }  # fmt: skip


def run_folder(table: Table, key: RunKey) -> Path:
    """The folder of a run; tables of other common flags have others."""
    return RUNS / f"{table.store}-{hashlib.sha256(table.flags.encode()).hexdigest()[:8]}" / key.folder_name


def train_one(table: Table, key: RunKey, threads: int, jobs: int) -> dict:
    """Trains a run in a process of its own, unless it is finished; -> its figures, with the machine that reads them.
    Raises InputError if it fails."""
    folder = run_folder(table, key)
    peak = None
    if not (folder / "test.json").exists():
        words, log = command_of(table, key, folder), folder.with_name(f"{folder.name}.txt")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as output:
            child = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=output, stderr=output,
                                     env=os.environ | {"OMP_NUM_THREADS": str(threads)})  # fmt: skip
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise InputError(f"{folder}: the run ended with {child.returncode}, see {log}")
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # bytes there, elsewhere KiB
    tested = (folder / "test.json").stat().st_mtime
    machine = f"{threads} thread(s) of {cpu_name()}, {jobs} at a time"
    return {
        "flags": f"{table.flags} {key.flags}".strip(), "lr": key.lr, "seed": key.seed,
        "date": time.strftime("%Y-%m-%d", time.localtime(tested)), "machine": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__}, "peak bytes": peak,
        **read_figures(folder),
    }  # fmt: skip


def run_all(table: Table, keys: list[RunKey], results: dict[RunKey, dict], jobs: int, threads: int) -> None:
    """Runs what `results` lacks, `jobs` at a time, and stores each as it ends."""
    lock = threading.Lock()

    def run(key: RunKey) -> None:
        result = train_one(table, key, threads, jobs)
        with lock:
            results[key] = result
            store_results(table, results)
        print(f"{key.flags or 'default'}, lr {key.lr:g}, seed {key.seed}: validation CIDEr "
              f"{100 * result['val CIDEr']:.1f}, test {100 * result['test']['CIDEr']:.1f}, "
              f"{result['seconds']:.0f} s", flush=True)  # fmt: skip

    pool = ThreadPoolExecutor(jobs)
    try:
        for future in as_completed([pool.submit(run, key) for key in keys if key not in results]):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C: no more runs; those that run end and are stored
