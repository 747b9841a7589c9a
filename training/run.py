"""The folder of a run: what training writes, and what it resumes from.

    config.json   every flag, the adapter's shape, SHA-256 of the frozen models, numbers of parameters, versions, seed,
                  sizes of the splits
    log.jsonl     a row for each log line and each validation; the last row is the test's
    best/         adapter.safetensors: the trained tensors of the best validation so far
    last/         adapter.safetensors, and state.pt: the optimizer, the step, the best score so far
                  in both sha256.json, the checksums of the other files
    val/STEP.json captions and scores of the validation split after so many steps
    test.json     captions and scores of the test split
    report.html   the same as a page, with frames and attention
    lock          held by the process that trains; the system releases it however the process ends

Nothing else is needed to resume bit for bit: the clips, frames and captions of a step are drawn from (seed, epoch,
clip) alone, the learning rate follows from the step, and nothing else in a step is random. A folder is a run once
config.json exists, which is written after the first checkpoint.

A checkpoint is written beside the old one and flushed to the disk, then the two folders are renamed; whenever the
program or the machine stops, one of the two is complete [1]. It holds the SHA-256 of the frozen backbones and no tensor
of them.

[1] T. Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.
"""

import argparse
import json
import os
import platform
import shutil
from dataclasses import asdict
from pathlib import Path

import av
import torch

from common.errors import InputError
from common.files import (
    acquire_lock,
    open_to_read,
    parse_object,
    read_json,
    replace_atomically,
    sha256_of,
    sync_folder,
    write_json,
)
from common.run_log import read_log
from models.safetensors import read_metadata
from models.weights import LOAD_ERRORS
from training.config import NOT_STORED
from training.distributed import ProcessGroup
from training.frozen_models import GENERATION_CONFIG

CHECKSUMS = "sha256.json"
RESULTS = "test.json", "report.html"

# ----------------------------------------------------------------------------------- checkpoints


def checkpoint_path(run: Path, which: str) -> Path:
    """`run/which/adapter.safetensors`; in `which`.old while, or after, the renaming of folders was interrupted."""
    folder, old = run / which, run / f"{which}.old"
    return (old if old.exists() and not folder.exists() else folder) / "adapter.safetensors"


def check_checkpoint(path: Path, hashes: dict[str, str], adapter: dict) -> None:
    """Raises InputError, naming the difference, unless the checkpoint has these backbones and this adapter's shape."""
    metadata = read_metadata(path)
    for name in sorted(hashes.keys() | {n for n in metadata if n.startswith(("vit/", "lm/", "mllm/"))}):
        if name == f"lm/{GENERATION_CONFIG}" and name not in metadata:
            continue  # read since version 0.3: older checkpoints do not have its hash
        if metadata.get(name) != hashes.get(name):
            raise InputError(f"{path}: was trained with another {name} (sha256 {str(metadata.get(name))[:12]}, "
                             f"found {str(hashes.get(name))[:12]})")  # fmt: skip
    trained = parse_object(metadata.get("adapter", "{}").encode(), f"{path}: metadata field 'adapter'")
    if different := sorted(name for name in trained if name not in adapter or trained[name] != adapter[name]):
        name = different[0]  # older checkpoints lack the newest fields
        raise InputError(f"{path}: {name} of its adapter is {trained[name]!r}, config.json of its run says "
                         f"{adapter.get(name)!r}")  # fmt: skip


def save_checkpoint(folder: Path, captioner, metadata: dict[str, str], state: dict | None = None) -> None:
    """Replaces `folder` by the trained tensors of a Captioner and, if given, a `state` of the optimizer.

    Raises InputError if the disk refuses; then the old checkpoint is where `checkpoint_path` says.
    """
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        captioner.save(new / "adapter.safetensors", metadata | {"adapter": json.dumps(asdict(captioner.config))})
        if state is not None:
            with replace_atomically(new / "state.pt") as file:
                torch.save(state, file)
        write_json(new / CHECKSUMS, {path.name: sha256_of(path) for path in sorted(new.iterdir())})
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def check_sums(folder: Path) -> None:
    """Raises InputError for a checkpoint whose files are not as they were written. Versions before 0.7 kept no sums."""
    path = folder / CHECKSUMS
    for name, digest in read_json(path).items() if path.exists() else ():
        if sha256_of(folder / name) != digest:
            raise InputError(f"{folder / name}: is damaged, its SHA-256 is not the one in {path}")


def load_state(path: Path, optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[int, float]:
    """Restores the optimizer from `last/state.pt`; -> the step and the best score until then. Raises InputError."""
    try:
        with open_to_read(path) as file:
            state = torch.load(file, map_location=device, weights_only=True)
        # The groups are ours: those of version 0.2 were one, of the same tensors in the same order.
        optimizer.load_state_dict(state["optimizer"] | {"param_groups": optimizer.state_dict()["param_groups"]})
        for parameter, moments in optimizer.state.items():
            for name, shape in (("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape), ("step", ())):
                found = list(moments[name].shape) if isinstance(moments[name], torch.Tensor) else type(moments[name])
                if found != list(shape):
                    raise ValueError(f"a moment is {found}, expected {list(shape)} for {name}")
        step = int(state["step"])
        if step < 0:
            raise ValueError(f"step is {step}, expected at least 0")
        return step, float(state["best"])
    except LOAD_ERRORS as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise InputError(f"{path}: not the state of this run: {reason}") from error


# ------------------------------------------------------------------------------------ the folder


def lock_run(run: Path) -> int:
    """Makes this process the only writer of the run, until it ends or closes the descriptor that is returned.

    Completes or removes what a killed process left. Raises InputError if another process writes.
    """
    descriptor = acquire_lock(run / "lock", wait=False)
    if descriptor is None:
        raise InputError(f"{run}: another process is training this run")
    for which in ("best", "last"):
        if (run / f"{which}.old").exists() and not (run / which).exists():
            os.rename(run / f"{which}.old", run / which)
        for suffix in (".new", ".old"):
            shutil.rmtree(run / (which + suffix), ignore_errors=True)
    for temporary in (*run.glob(".*.tmp"), *run.glob("val/.*.tmp")):
        temporary.unlink()
    return descriptor


def append_row(path: Path, row: dict) -> None:
    """Appends a row to the log and flushes it, so that it is on the disk before a later checkpoint is."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def truncate_log(path: Path, step: int) -> float:
    """Keeps the rows of training and validation up to `step`; a half-written last row is dropped too. Raises InputError
    for any other row that is damaged.

    From step 0 on, everything is done again, the first validation too. -> the seconds that the run had taken at the
    last row that is kept; 0 in logs of versions before 0.4.
    """
    rows, elapsed = [], 0.0
    for line, row in read_log(path) if path.exists() else ():
        if step > 0 and row["step"] <= step and "test" not in row:
            rows.append(line + b"\n")
            elapsed = row.get("elapsed") or elapsed
    with replace_atomically(path) as file:
        file.write(b"".join(rows))
    return elapsed


class Run:
    """The folder of one run, written by rank 0 only: on other ranks `log`, `save` and `save_captions` do nothing."""

    def __init__(self, folder: Path, group: ProcessGroup, hashes: dict[str, str]):
        self.folder, self.group, self.hashes = folder, group, hashes
        self.lock: int | None = None

    def check(self, adapter: dict, counts: dict[str, int], data: Path) -> None:
        """Raises InputError unless the run was made with these backbones, this adapter and this dataset."""
        config = read_json(self.folder / "config.json")
        check_checkpoint(checkpoint_path(self.folder, "last"), self.hashes, adapter)
        if config.get("splits") != counts:
            raise InputError(f"{data}: holds {counts}, the run was trained on {config.get('splits')}")

    def _open(self) -> None:
        """Creates and locks the folder; other ranks read it only after that."""
        if self.group.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock_run(self.folder)
        self.group.barrier()

    def create(self, captioner, optimizer: torch.optim.Optimizer | None, args: argparse.Namespace, dataset) -> None:
        """Writes the checkpoint of step 0, then config.json: every flag, and the VideoDataset as it was found.

        Without an optimizer nothing is trained, and the checkpoint is the best one too.
        """
        self._open()
        if self.group.rank != 0:
            return
        if (self.folder / "config.json").exists():
            raise InputError(f"{self.folder}: holds a run already; --out names another folder")
        (self.folder / "log.jsonl").unlink(missing_ok=True)
        self.save("last", captioner, 0, optimizer)
        if optimizer is None:
            self.save("best", captioner, 0)
        sync_folder(self.folder.parent)
        write_json(self.folder / "config.json", {
            "flags": {name: value for name, value in vars(args).items() if name not in NOT_STORED},
            "adapter": asdict(captioner.config), "sha256": self.hashes,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "av": av.__version__},
            "trained": sum(p.numel() for p in captioner.trained().values()),
            "total": sum(p.numel() for p in captioner.parameters()),
            "splits": dataset.counts(), "differences": dataset.differences(), "seed": args.seed,
        })  # fmt: skip

    def restart(self) -> None:
        """Locks the folder of a run that trains nothing, and begins its log anew."""
        self._open()
        if self.group.rank == 0:
            truncate_log(self.folder / "log.jsonl", 0)

    def resume(self, captioner, optimizer: torch.optim.Optimizer, args: argparse.Namespace, steps: int,
               device: torch.device) -> tuple[int, float, float]:  # fmt: skip
        """Restores the trained tensors and the optimizer; -> the step, the best validation score until then, and the
        seconds that the run had taken.

        Locks the folder, drops later rows of the log, and stores new --data and --epochs.
        """
        self._open()
        for name in RESULTS:
            if (self.folder / name).is_dir():
                raise InputError(f"{self.folder / name}: expected a file, found a folder")
        for which in ("best", "last"):  # best/ is needed at the end, so its damage must not be found only then
            if which == "last" or (self.folder / which).exists():
                check_sums(self.folder / which)
                captioner.load(checkpoint_path(self.folder, which))
        step, best = load_state(self.folder / "last" / "state.pt", optimizer, device)
        path = self.folder / "config.json"
        if step > steps:
            raise InputError(f"{path}: its flags or --epochs make {steps} steps, {self.folder}/last is at step {step}")
        elapsed = 0.0
        if self.group.rank == 0:
            elapsed = truncate_log(self.folder / "log.jsonl", step)
            for name in RESULTS if step < steps else ():  # they are of a shorter run
                (self.folder / name).unlink(missing_ok=True)
            config = read_json(path)
            moved = config["flags"] | {"data": str(args.data), "epochs": args.epochs}
            if moved != config["flags"]:
                write_json(path, config | {"flags": moved})
        return step, best, elapsed

    def log(self, row: dict) -> None:
        if self.group.rank == 0:
            append_row(self.folder / "log.jsonl", row)

    def save(self, which: str, captioner, step: int, optimizer: torch.optim.Optimizer | None = None,
             best: float = -1.0) -> None:  # fmt: skip
        """Writes `best` or `last`; with an optimizer also its state, the step and the best score."""
        if self.group.rank == 0:
            state = None if optimizer is None else {"optimizer": optimizer.state_dict(), "step": step, "best": best}
            save_checkpoint(self.folder / which, captioner, self.hashes | {"step": str(step)}, state)

    def load_best(self, captioner) -> None:
        """Gives every rank the trained tensors of the best validation."""
        if self.group.rank == 0:
            check_sums(self.folder / "best")
            captioner.load(checkpoint_path(self.folder, "best"))
        self.group.broadcast(captioner.saved().values())

    def save_captions(self, name: str, captions: dict[str, str], scores: dict[str, float], signature: str) -> None:
        """Writes the captions and scores of a split into the file `name`: test.json, or val/STEP.json."""
        if self.group.rank == 0:
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"scores": scores, "signature": signature, "captions": captions})
