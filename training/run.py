"""A run's folder: what training leaves, and what it goes on from.

    config.json   every flag, the adapter's shape, versions, seed, sha256 of both backbones, sizes of the splits
    log.jsonl     a row a report and a row a validation; the last row is the test's
    best/         adapter.safetensors: the trained tensors as they validated best
    last/         adapter.safetensors, and state.pt: the optimizer, the step, the best score until then
    test.json     the test split's captions and scores
    lock          held by the process that trains; the system lets go of it whatever ends the process

Nothing else is needed to go on to the bit: which clips, frames and captions a step takes is drawn from (seed, epoch,
clip) alone, the learning rate follows from the step, and no other part of a step is random. A folder is a run once
config.json is there, which is written after the first checkpoint.

A checkpoint is written beside the old one and flushed to the disk, then they change places; whenever the program or
the machine stops, one of the two is there and whole [1]. It holds no tensor of a frozen backbone but their sha256.

[1] T. Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.
"""

import json
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import torch

import hub
from checkpoint import DAMAGE, weight_files
from devices import DTYPES, pick_precision
from lm import CausalLM
from model import AdapterConfig, Captioner
from tokens import load_tokenizer
from vit import ViT
from weights import InputError, field, read_json, read_metadata, replace_atomically, sha256_of, sync_folder

# ----------------------------------------------------------------------------- checkpoints and whose they are


def backbone_hashes(vit: Path, lm: Path) -> dict[str, str]:
    """sha256 of every file that both backbones are read from, which a checkpoint names and cannot do without."""
    hashes = {}
    for part, path, beside in (("vit", vit, "preprocessor_config.json"), ("lm", lm, "tokenizer.model")):
        for file in (path / "config.json", path / beside, *weight_files(path)):
            if file.exists():
                hashes[f"{part}/{file.name}"] = sha256_of(file)
    return hashes


def checkpoint(run: Path, which: str) -> Path:
    """`run/which/adapter.safetensors`, or where that is while checkpoints change places or if that was cut short."""
    folder, old = run / which, run / f"{which}.old"
    return (old if old.exists() and not folder.exists() else folder) / "adapter.safetensors"


def check_checkpoint(path: Path, hashes: dict[str, str], adapter: AdapterConfig) -> None:
    """Raises InputError, naming what differs, unless the checkpoint is of these backbones and this shape."""
    metadata = read_metadata(path)
    for name in sorted(hashes.keys() | {n for n in metadata if n.startswith(("vit/", "lm/"))}):
        if metadata.get(name) != hashes.get(name):
            raise InputError(f"{path}: was trained with another {name} (sha256 {str(metadata.get(name))[:12]}, "
                             f"found {str(hashes.get(name))[:12]})")  # fmt: skip
    if metadata.get("adapter") != json.dumps(asdict(adapter)):
        raise InputError(f"{path}: is an adapter of {metadata.get('adapter')}, its run's config.json says "
                         f"{json.dumps(asdict(adapter))}")  # fmt: skip


def save_checkpoint(folder: Path, captioner: Captioner, metadata: dict[str, str], state: dict | None = None) -> None:
    """Writes the trained tensors, with a `state` also that, and puts both in the place of what `folder` held.

    Raises InputError if the disk refuses; then the old checkpoint is where `checkpoint` says.
    """
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        captioner.save(new / "adapter.safetensors", metadata | {"adapter": json.dumps(asdict(captioner.config))})
        if state is not None:
            with replace_atomically(new / "state.pt") as file:
                torch.save(state, file)
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


def load_state(path: Path, optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[int, float]:
    """Puts the optimizer where `last/state.pt` says it was; returns the step and the best score until then."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in optimizer.state.items():
            if moments["exp_avg"].shape != parameter.shape:
                raise ValueError(f"a moment is {list(moments['exp_avg'].shape)}, expected {list(parameter.shape)}")
        return int(state["step"]), float(state["best"])
    except DAMAGE as error:
        what = str(error).partition("\n")[0][:200] or type(error).__name__
        raise InputError(f"{path}: not the state of this run: {what}") from error


# ------------------------------------------------------------------------------------------- the folder


def take(run: Path) -> int:
    """Makes this process, until it ends or closes the file descriptor returned, the only one that writes to the run,
    and clears what a killed one left. Raises InputError if another writes."""
    import fcntl  # which Windows lacks

    file = os.open(run / "lock", os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # POSIX allows either
        os.close(file)
        raise InputError(f"{run}: another process is training this run") from error
    for which in ("best", "last"):
        if (run / f"{which}.old").exists() and not (run / which).exists():
            os.rename(run / f"{which}.old", run / which)
        for end in (".new", ".old"):
            shutil.rmtree(run / (which + end), ignore_errors=True)
    for half_written in run.glob(".*.tmp"):
        half_written.unlink()
    return file


def write_json(path: Path, content: dict) -> None:
    with replace_atomically(path) as file:
        file.write((json.dumps(content, indent=1, default=str) + "\n").encode())


def add_row(path: Path, row: dict) -> None:
    """A row more in the log, on the disk before a checkpoint is that comes after it."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def keep_rows(path: Path, step: int) -> None:
    """Cuts the log back to what training and validation wrote up to `step`; a half-written last row goes too."""
    kept = []
    for row in path.read_text().splitlines() if path.exists() else []:
        try:
            content = json.loads(row)
        except json.JSONDecodeError:
            break
        if content["step"] <= step and "test" not in content:
            kept.append(row + "\n")
    with replace_atomically(path) as file:
        file.write("".join(kept).encode())


def adapter_config(config: dict, path: Path) -> AdapterConfig:
    """The field "adapter" of a run's config.json; each of its fields must be there and of its type."""
    given = field(config, "adapter", dict, path)
    types = {f.name: f.type for f in fields(AdapterConfig)}
    if odd := sorted(types.keys() ^ given.keys()):
        raise InputError(f"{path}: adapter: expected the fields {', '.join(types)}; {odd[0]!r} is missing or too much")
    return AdapterConfig(**{name: field(given, name, kind, path) for name, kind in types.items()})


def load_run(run: Path, which: str = "best") -> tuple[Captioner, dict]:
    """The captioner of a run's folder, from its config, its two backbones and `which`/adapter.safetensors."""
    where = run / "config.json"
    if not where.is_file():
        raise InputError(f"{run}: expected a run's folder with config.json in it, as train.py makes it")
    config = read_json(where)
    flags = field(config, "flags", dict, where)
    vit, lm = (hub.local(field(flags, name, str, where)) for name in ("vit", "lm"))
    size, precision = field(flags, "image_size", int, where, None), field(flags, "precision", str, where, "fp32")
    if precision not in DTYPES:
        raise InputError(f"{where}: flags: precision is {precision!r}, expected one of {', '.join(DTYPES)}")
    shape, path, dtype = adapter_config(config, where), checkpoint(run, which), DTYPES[precision]
    pick_precision(precision, torch.device("cpu"), frozen=shape.method != "full")
    check_checkpoint(path, backbone_hashes(vit, lm), shape)
    vit, tokenizer = ViT.from_pretrained(vit, dtype, size), load_tokenizer(lm)
    captioner = Captioner(vit, CausalLM.from_pretrained(lm, dtype), tokenizer, shape)
    captioner.load(path)
    return captioner, config
