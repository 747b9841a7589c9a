"""The folder of a run: what training writes, and what it resumes from.

    config.json   the version, the Config, fingerprints of the frozen models and of each split, numbers of parameters,
                  the commit of the code that it began with, versions of packages
    log.jsonl     a row for each log line and each validation; the last row is the test's
    best/         adapter.safetensors: the trained tensors of the best validation so far
    last/         adapter.safetensors, and state.pt: the same tensors, the optimizer, the step, the best score so far
    val/STEP.json captions and scores of the validation split after so many steps
    test.json     captions and scores of the test split, and the CIDEr of each clip
    report.html   the same as a page, with frames and attention
    lock          held by the process that trains; the system releases it however the process ends

A resumed run reads state.pt alone, which is replaced atomically, so it is complete whenever the program or the machine
stops. Nothing else is needed to resume bit for bit: the clips, frames and captions of a step are drawn from (seed,
epoch, clip) alone, hidden tokens and samples from (seed, step, process); the learning rate follows from the step.
"""

import io
import json
import os
import platform
import subprocess
import time
import zipfile
from pathlib import Path

import av
import torch

from common.config import VERSION, to_json
from common.errors import InputError, reading, writing
from common.files import acquire_lock, field, open_to_read, read_json, read_json_lines, replace_atomically, write_json
from training.distributed import ProcessGroup


def find_commit() -> str | None:
    """The commit of this code, with "-dirty" if Python files differ from it or are new; None where git knows none."""
    commands = ("rev-parse", "HEAD"), ("status", "--porcelain", "--", "*.py")
    try:
        commit, changes = (subprocess.run(["git", "--no-optional-locks", *words], cwd=Path(__file__).parent.parent,
                                          capture_output=True, text=True).stdout.strip() for words in commands)
    except OSError:  # git is not installed
        return None
    return commit + ("-dirty" if changes else "") if commit else None


def check_out(folder: Path) -> None:
    """Raises InputError unless a new run can be made in the folder: it is missing, or empty, and can be written to. A
    run that was killed before it had a config.json has left last/ at most."""
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if found := [name for name in found if name not in ("lock", "last") and not name.endswith(".tmp")]:
        raise InputError(f"--out {folder}: holds {', '.join(found[:5])}, expected a new or an empty folder; --resume "
                         "continues a run")
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--out {folder}: cannot be written to")


def check_models(run: Path, fingerprints: dict[str, str]) -> None:
    """Raises InputError, naming a file, unless the run was made with these frozen models."""
    models = field(read_json(path := run / "config.json"), "models", dict, path)
    if different := [name for name in models.keys() | fingerprints if models.get(name) != fingerprints.get(name)]:
        raise InputError(f"{path}: the run was trained with another model: {min(different)} is another file, new or "
                         "gone")


def data_differences(run: Path, dataset) -> dict[str, str]:
    """A line for each split of a dataset whose clips, captions or sizes of videos are not those of the run."""
    splits = field(read_json(path := run / "config.json"), "splits", dict, path)
    return {split: f"not the data of the run, {found} instead of {splits.get(split)}"
            for split, found in dataset.fingerprints().items() if found != splits.get(split)}


def load_state(path: Path, captioner, optimizer: torch.optim.Optimizer | None,
               device: torch.device) -> tuple[int, float]:
    """Restores the trained tensors and the optimizer from `last/state.pt`. Returns the step and the best score until
    then. Raises InputError."""
    with open_to_read(path) as file:
        if damaged := zipfile.ZipFile(file).testzip():
            raise InputError(f"{path}: is damaged in {damaged}")
        file.seek(0)
        state = torch.load(file, map_location=device, weights_only=True)
        captioner.load_tensors(state["tensors"], path)
        if optimizer is not None:
            # The settings of the groups are the config's; what is restored are the moments.
            optimizer.load_state_dict(state["optimizer"] | {"param_groups": optimizer.state_dict()["param_groups"]})
            for parameter, moments in optimizer.state.items():  # the fused step would read beyond a smaller one
                if {moments[name].shape for name in ("exp_avg", "exp_avg_sq")} != {parameter.shape}:
                    raise InputError("a moment of the optimizer has another shape than its tensor")
        step, best = int(state["step"]), float(state["best"])
    return step, best


def truncate_log(path: Path, step: int) -> float:
    """Keeps the rows of training and validation up to `step`; from step 0 on everything is done again. Returns the
    seconds that the run had taken at the last row that is kept. Raises InputError for a damaged row."""
    with reading(path):
        rows = [row for row in (read_json_lines(path) if path.exists() else ())
                if 0 < step >= row["step"] and "test" not in row]
        elapsed = field(rows[-1], "elapsed", float, path, least=0, most=1e9) if rows else 0.0
    with replace_atomically(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    return elapsed


class Run:
    """The folder of one run, written by rank 0 only: on other ranks what logs or saves does nothing."""

    def __init__(self, folder: Path, group: ProcessGroup, start_time: float):
        """start_time: when the run began, on the clock time.monotonic."""
        self.folder, self.group, self.start_time = folder, group, start_time

    def elapsed(self) -> float:
        """Seconds since the run began, without the time between a stop and its resuming."""
        return time.monotonic() - self.start_time

    def _open(self) -> None:
        """Creates and locks the folder, and removes what a killed process left; other ranks read it only after that."""
        if self.group.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = acquire_lock(self.folder / "lock", wait=False)
            if self.lock is None:
                raise InputError(f"{self.folder}: another process is training this run")
            for temporary in self.folder.rglob(".*.tmp"):
                temporary.unlink()
        self.group.barrier()

    def create(self, captioner, optimizer: torch.optim.Optimizer | None, dataset, fingerprints: dict[str, str]) -> None:
        """Writes the checkpoint of step 0, then config.json, which makes the folder a run. fingerprints: of the frozen
        models."""
        self._open()
        if self.group.rank != 0:
            return
        check_out(self.folder)  # again, now that it is locked
        self.save_last(captioner, 0, optimizer)
        write_json(self.folder / "config.json", {
            "version": VERSION, "config": to_json(captioner.config), "models": fingerprints,
            "splits": dataset.fingerprints(),
            "trained": sum(p.numel() for p in captioner.trained().values()),
            "total": sum(p.numel() for p in captioner.parameters()),
            "versions": {"commit": find_commit(), "python": platform.python_version(), "torch": torch.__version__,
                         "av": av.__version__},
        })
        if optimizer is None:  # --method none: the models as they are
            self.save_best(captioner)

    def resume(self, captioner, optimizer: torch.optim.Optimizer | None, steps: int,
               device: torch.device) -> tuple[int, float]:
        """Restores the trained tensors and the optimizer. Returns the step and the best validation score until then.
        Drops later rows of the log, and stores new --data and --epochs."""
        self._open()
        if (best_path := self.folder / "best/adapter.safetensors").exists():  # it is needed at the end
            captioner.load(best_path)
        step, best = load_state(self.folder / "last/state.pt", captioner, optimizer, device)
        if best >= 0 and not best_path.exists():
            raise InputError(f"{best_path}: expected a file, found none")
        path = self.folder / "config.json"
        if not 0 <= step <= steps:
            raise InputError(f"{path}: its flags or --epochs make {steps} steps, {self.folder}/last is at step {step}")
        if self.group.rank == 0:
            self.start_time -= truncate_log(self.folder / "log.jsonl", step)
            if step < steps:  # the results are of a shorter run
                for name in ("test.json", "report.html"):
                    (self.folder / name).unlink(missing_ok=True)
            write_json(path, read_json(path) | {"config": to_json(captioner.config)})
        return step, best

    def log(self, row: dict) -> None:
        """Appends a row to the log and flushes it, so that it is on the disk before a later checkpoint is."""
        if self.group.rank == 0:
            path = self.folder / "log.jsonl"
            with writing(path), open(path, "a") as file:
                file.write(json.dumps(row | {"elapsed": self.elapsed()}) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def save_best(self, captioner) -> None:
        """Writes `best/`."""
        if self.group.rank == 0:
            (folder := self.folder / "best").mkdir(exist_ok=True)
            captioner.save(folder / "adapter.safetensors")

    def save_last(self, captioner, step: int, optimizer: torch.optim.Optimizer | None, best: float = -1.0) -> None:
        """Writes `last/`, with the state that a resumed run needs. best: the best validation score so far."""
        if self.group.rank == 0:
            (folder := self.folder / "last").mkdir(exist_ok=True)
            captioner.save(folder / "adapter.safetensors")
            state = {"tensors": captioner.checkpoint_tensors(), "step": step, "best": best,
                     "optimizer": optimizer and optimizer.state_dict()}
            torch.save(state, buffer := io.BytesIO())  # in memory: torch hides the error of a full disk
            with replace_atomically(folder / "state.pt") as file:
                file.write(buffer.getbuffer())

    def load_best(self, captioner) -> None:
        """Gives every rank the trained tensors of the best validation."""
        if self.group.rank == 0:
            captioner.load(self.folder / "best/adapter.safetensors")
        self.group.broadcast(captioner.checkpoint_tensors().values())

    def save_captions(self, name: str, result) -> None:
        """Writes an `evaluate.SplitResult` into the file `name`: test.json, or val/STEP.json. CIDEr is that of each
        clip, rounded."""
        if self.group.rank == 0:
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            ciders = {clip: round(scores["CIDEr"], 5) for clip, scores in result.clip_scores.items()}
            write_json(path, {"scores": result.scores, "signature": result.signature, "captions": result.captions,
                              "CIDEr": ciders})
