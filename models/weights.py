"""The tensors of a public model, from every kind of file it is published in.

    FOLDER/model.safetensors                   one safetensors file
    FOLDER/model.safetensors.index.json        an index beside its shards, safetensors files
    FOLDER/pytorch_model.bin                   one torch pickle
    FOLDER/pytorch_model.bin.index.json        an index beside its shards, torch pickles
    a file *.safetensors, *.bin, *.pt, *.pth   one of either kind, wherever it lies

An index is {"metadata": {...}, "weight_map": {TENSOR: SHARD, ...}}. A torch pickle [1] is a program for
a small machine that builds objects, and may name any function to call: torch runs it with the
functions that build tensors and no other. Of its two containers the zip keeps each tensor's bytes as
they are and can be mapped; the older one is read into memory.

[1] torch/serialization.py, `_load` and `_legacy_load`; https://docs.python.org/3/library/pickle.html
"""

import os
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from weights import DTYPE_NAMES, InputError, field, read_json, read_safetensors

IN_FOLDER = (  # the first that is there is read
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
PICKLES = {".bin", ".pt", ".pth"}
OTHERS = PICKLES | {".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}  # to name, not to read
WRAPPERS = ("state_dict", "model")  # where training scripts keep the weights beside their own state
# What torch.load and zipfile raise for damaged files; found with the damage of tests/test_checkpoint.py.
DAMAGE = (
    OSError, EOFError, MemoryError, RuntimeError, ValueError, TypeError, LookupError, AttributeError,
    AssertionError, ArithmeticError, struct.error, zipfile.BadZipFile, UnpicklingError,
)  # fmt: skip


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], Path]:
    """A model's folder or one weights file -> {name: tensor}, and the file that errors should name.

    That file is the single one or the index. Tensors are on the CPU, of the dtype they were saved with,
    and stay on the disk until touched (not those of torch's old container). Writing to one changes memory
    only. Raises InputError for what is damaged, incomplete, or holds anything but tensors; no code out of
    a file is run. Damage to the numbers themselves goes unnoticed: none of these files has a checksum of them.
    """
    file = _weights_file(Path(path))
    if file.suffix != ".json":
        return _read_file(file), file
    tensors = {}
    for shard, names in _shards(file).items():
        found = _read_file(shard)
        if found.keys() != names:
            lacks, more = (", ".join(sorted(n)[:3]) or "none" for n in (names - found.keys(), found.keys() - names))
            raise InputError(f"{shard}: expected the tensors that {file.name} names, lacks: {lacks}; has too: {more}")
        tensors |= found
    return tensors, file


def weight_files(path: str | Path) -> list[Path]:
    """Every file that read_tensors(path) reads: the single one, or the index and its shards, sorted."""
    file = _weights_file(Path(path))
    return [file, *_shards(file)] if file.suffix == ".json" else [file]


def _weights_file(path: Path) -> Path:
    """The file to begin with: the bare file itself, in a folder the first of IN_FOLDER."""
    if path.is_dir():
        for name in IN_FOLDER:
            if os.path.lexists(path / name):  # a dead link is an error too, not a reason to look on
                return path / name
        others = sorted(p.name for p in path.glob("*") if p.suffix in OTHERS)[:3]
        found = f"none of them, but {', '.join(others)}" if others else "none of them"
        raise InputError(f"{path}: expected one of {', '.join(IN_FOLDER)}; found {found}")
    if path.suffix not in PICKLES | {".safetensors"}:
        kinds = ", ".join(["*.safetensors", *(f"*{kind}" for kind in sorted(PICKLES))])
        raise InputError(f"{path}: expected a model's folder or a file {kinds}, found neither")
    return path


def _shards(index: Path) -> dict[Path, set[str]]:
    """An index -> its shards, sorted, and the names of the tensors that each must hold.

    `total_size` of its metadata is not looked at: published ones count shared tensors once, twice, by what
    their storage takes, or add up the sizes of the files.
    """
    kind = index.suffixes[-3]  # model.safetensors.index.json
    names: dict[Path, set[str]] = {}
    for tensor, shard in field(read_json(index), "weight_map", dict, index).items():
        # The index comes from elsewhere: it must not point out of its folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+", shard) or Path(shard).suffix != kind:
            raise InputError(f"{index}: {tensor!r:.200}: expected the name of a {kind} file beside it, found {shard!r}")
        names.setdefault(index.with_name(shard), set()).add(tensor)
    if not names:
        raise InputError(f"{index}: field 'weight_map': expected at least one tensor, found none")
    for number, shard in enumerate(sorted(names), 1):
        if not shard.is_file():
            raise InputError(f"{index}: shard {number} of {len(names)} is missing: expected the file {shard.name}")
    return dict(sorted(names.items()))


def _read_file(path: Path) -> dict[str, Tensor]:
    return read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


# -------------------------------------------------------------------------------- torch pickles


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Whatever reading damaged files raises -> InputError. Keep the block to the call that reads."""
    try:
        yield
    except UnpicklingError as error:
        # torch's own text is long and advises to run the code.
        code = re.search(r"GLOBAL (\S+)", str(error))
        found = f"a call of {code[1]}" if code else "damage or other objects"
        raise InputError(
            f"{path}: expected a torch pickle of nothing but tensors, found {found}; no code in it was run: "
            "use a safetensors file of the model"
        ) from error
    except DAMAGE as error:
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f"{path}: expected a whole file by torch.save: {type(error).__name__}: {reason}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by torch.save, mapped where the container allows it; see read_tensors."""
    if not path.is_file():  # a pipe would keep us waiting for ever
        raise InputError(f"{path}: expected a file, found {'a folder' if path.is_dir() else 'none'}")
    with _damage_named(path):
        size = path.stat().st_size
        entries = _zip_entries(path)
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise InputError(
            f"{path}: expected tensors, found a TorchScript archive, a program; it was not run: "
            "use a safetensors file of the model"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):  # mapped, they would be noise
        raise InputError(f"{path}: expected a zip without compression, as torch.save writes it")
    with _damage_named(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on unusual pickles, whose result is checked below
        content = torch.load(path, map_location="cpu", mmap=bool(entries), weights_only=True)
    tensors = _state_dict(content, path)
    for name, tensor in tensors.items():
        if found := _fault(tensor):
            raise InputError(f"{path}: tensor {name!r:.200}: expected a dense tensor of numbers, found {found}")
    # Nothing else ties the sizes in the pickle to the bytes that there are: memory that the older container
    # promises and does not fill would hold whatever was in it before.
    storages = {(s := tensor.untyped_storage()).data_ptr(): s.nbytes() for tensor in tensors.values()}
    if sum(storages.values()) > size:
        raise InputError(f"{path}: expected {sum(storages.values())} bytes of tensors, found a file of {size}")
    # Kernels want alignment, which another zip program may have lost.
    return {
        name: tensor.detach() if tensor.data_ptr() % tensor.itemsize == 0 else tensor.detach().clone()
        for name, tensor in tensors.items()
    }


def _zip_entries(path: Path) -> list[zipfile.ZipInfo]:
    """What the zip file holds; nothing if it is torch's older container."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return []
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The {name: tensor} that a pickle holds: all of it, or its only one, under one of WRAPPERS."""
    if _is_state_dict(content):
        return content
    inner = [name for name, value in content.items() if _is_state_dict(value)] if isinstance(content, dict) else []
    if len(inner) == 1 and inner[0] in WRAPPERS:
        return content[inner[0]]
    found = f"a {type(content).__name__}" + f" with {', '.join(map(repr, inner[:3]))}" * bool(inner)
    raise InputError(
        f"{path}: expected {{name: tensor}}, or just one such under {' or '.join(map(repr, WRAPPERS))}, found {found}"
    )


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in value.items())
    )


def _fault(tensor: Tensor) -> str | None:
    """What keeps a tensor out of a pickle from being plain numbers in memory, each in a place of its own."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_nested or tensor.layout is not torch.strided:
        return "a nested one" if tensor.is_nested else f"a {type(tensor).__name__} of layout {tensor.layout}"
    if tensor.device.type != "cpu" or tensor.dtype not in DTYPE_NAMES:
        return f"{tensor.dtype} on {tensor.device}"
    reach = 1  # elements from the first to the last that the axes so far span
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach and tensor.numel() > 0:
            return f"elements that overlap: shape {list(tensor.shape)}, strides {list(tensor.stride())}"
        reach += (size - 1) * stride
    return None
