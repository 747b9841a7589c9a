"""Tensors of public models: reading every published file format, and strict copying into a module.

    FOLDER/model.safetensors                   one safetensors file
    FOLDER/model.safetensors.index.json        an index and its shards, safetensors files
    FOLDER/pytorch_model.bin                   one torch pickle
    FOLDER/pytorch_model.bin.index.json        an index and its shards, torch pickles
    a file *.safetensors, *.bin, *.pt, *.pth   a single file of either format

An index is {"metadata": {...}, "weight_map": {TENSOR: SHARD, ...}}. A torch pickle [1] is a program that builds
objects and may call any function by name; torch is told to allow only the functions that build tensors. Of its two
containers, the zip stores each tensor's bytes unchanged and can be memory-mapped; the older one is read into memory.

[1] torch/serialization.py, `_load` and `_legacy_load`; https://docs.python.org/3/library/pickle.html
"""

import os
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import InputError
from common.files import field, read_json
from models.safetensors import DTYPE_NAMES, read_safetensors

WEIGHT_FILE_NAMES = (  # in a model's folder; the first that exists is read
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
PICKLE_SUFFIXES = {".bin", ".pt", ".pth"}
# Named in the error if a folder has none of the above.
OTHER_SUFFIXES = PICKLE_SUFFIXES | {".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}
WRAPPERS = ("state_dict", "model")  # keys under which training scripts store the weights beside their state
# Raised by torch.load and zipfile for damaged files; found with the damage of tests/models/test_weights.py.
LOAD_ERRORS = (
    OSError, EOFError, MemoryError, RuntimeError, ValueError, TypeError, LookupError, AttributeError,
    AssertionError, ArithmeticError, struct.error, zipfile.BadZipFile, UnpicklingError,
)  # fmt: skip


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], Path]:
    """A model's folder or one weights file -> {name: tensor}, and the file for error messages.

    That file is the single file or the index. Tensors are on the CPU and keep their dtype; they are memory-mapped,
    except for those of torch's older container. Writing to a tensor changes memory only. Raises InputError for damaged
    and incomplete files and for pickles of anything but tensors; code in a file is never run. Changed numbers are not
    detected: these formats have no checksums.
    """
    file = _find_weights(Path(path))
    if file.suffix != ".json":
        return _read_file(file), file
    tensors = {}
    for shard, names in _shards(file).items():
        part = _read_file(shard)
        if part.keys() != names:
            missing, unexpected = (", ".join(sorted(diff)[:3]) or "none"
                                   for diff in (names - part.keys(), part.keys() - names))  # fmt: skip
            raise InputError(f"{shard}: does not have the tensors that {file.name} names: missing: {missing}; "
                             f"unexpected: {unexpected}")  # fmt: skip
        tensors |= part
    return tensors, file


def weight_files(path: str | Path) -> list[Path]:
    """Every file that read_tensors(path) reads: the single file, or the index and its shards, sorted."""
    file = _find_weights(Path(path))
    return [file, *_shards(file)] if file.suffix == ".json" else [file]


def _find_weights(path: Path) -> Path:
    """The single file or index to read: the path itself, or in a folder the first of WEIGHT_FILE_NAMES."""
    if path.is_dir():
        for name in WEIGHT_FILE_NAMES:
            if os.path.lexists(path / name):  # a dangling link is an error, not a missing file
                return path / name
        others = sorted(p.name for p in path.glob("*") if p.suffix in OTHER_SUFFIXES)[:3]
        found = f"none of them, but {', '.join(others)}" if others else "none of them"
        raise InputError(f"{path}: expected one of {', '.join(WEIGHT_FILE_NAMES)}; found {found}")
    if path.suffix not in PICKLE_SUFFIXES | {".safetensors"}:
        kinds = ", ".join(["*.safetensors", *(f"*{suffix}" for suffix in sorted(PICKLE_SUFFIXES))])
        raise InputError(f"{path}: expected a model's folder or a file {kinds}, found neither")
    return path


def read_index(index: Path) -> dict[str, set[str]]:
    """An index -> {name of the shard: names of its tensors}, sorted by shard. Raises InputError.

    `total_size` in its metadata is ignored: published files disagree on whether it counts shared tensors twice.
    """
    suffix = index.suffixes[-3]  # model.safetensors.index.json
    shards: dict[str, set[str]] = {}
    for tensor, shard in field(read_json(index), "weight_map", dict, index).items():
        # The index is not trusted: shards must be in its folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+", shard) or Path(shard).suffix != suffix:
            raise InputError(f"{index}: {tensor!r:.200}: expected the name of a {suffix} file in the same folder, "
                             f"found {shard!r:.200}")  # fmt: skip
        shards.setdefault(shard, set()).add(tensor)
    if not shards:
        raise InputError(f"{index}: field 'weight_map': expected at least one tensor, found none")
    return dict(sorted(shards.items()))


def _shards(index: Path) -> dict[Path, set[str]]:
    """An index -> the paths of its shards, which must exist, and the names of the tensors in each."""
    shards = {index.with_name(name): tensors for name, tensors in read_index(index).items()}
    for number, shard in enumerate(shards, 1):
        if not shard.is_file():
            raise InputError(f"{index}: shard {number} of {len(shards)} is missing: expected the file {shard.name}")
    return shards


def _read_file(path: Path) -> dict[str, Tensor]:
    return read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


# -------------------------------------------------------------------------------- torch pickles


@contextmanager
def _load_errors_to_input_errors(path: Path) -> Iterator[None]:
    """Turns every exception of a damaged file into an InputError. For blocks that only read."""
    try:
        yield
    except UnpicklingError as error:
        # torch's own message is long and recommends to run the code.
        code = re.search(r"GLOBAL (\S+)", str(error))
        found = f"a call of {code[1]}" if code else "damage or other objects"
        raise InputError(
            f"{path}: expected a torch pickle of nothing but tensors, found {found}; no code in it was run: "
            "use a safetensors file of the model"
        ) from error
    except LOAD_ERRORS as error:
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f"{path}: not a complete file of torch.save: {type(error).__name__}: {reason}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch.save file, memory-mapped if the container allows it; see read_tensors."""
    if not path.is_file():  # opening a pipe would block
        raise InputError(f"{path}: expected a file, found {'a folder' if path.is_dir() else 'none'}")
    with _load_errors_to_input_errors(path):
        size = path.stat().st_size
        entries = _zip_entries(path)
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise InputError(
            f"{path}: expected tensors, found a TorchScript archive, a program; it was not run: "
            "use a safetensors file of the model"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):  # memory-mapping needs plain bytes
        raise InputError(f"{path}: expected a zip without compression, as torch.save writes it")
    with _load_errors_to_input_errors(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unusual pickles; the result is checked below
        content = torch.load(path, map_location="cpu", mmap=bool(entries), weights_only=True)
    tensors = _state_dict(content, path)
    for name, tensor in tensors.items():
        if found := _unsupported(tensor):
            raise InputError(f"{path}: tensor {name!r:.200}: expected a dense tensor of numbers, found {found}")
    # A damaged file of the older container may declare storages that it does not fill: uninitialized memory.
    storages = {(s := tensor.untyped_storage()).data_ptr(): s.nbytes() for tensor in tensors.values()}
    if sum(storages.values()) > size:
        raise InputError(f"{path}: expected {sum(storages.values())} bytes of tensors, found a file of {size}")
    # Kernels need aligned tensors; a zip that another program has packed may not be aligned.
    return {
        name: tensor.detach() if tensor.data_ptr() % tensor.itemsize == 0 else tensor.detach().clone()
        for name, tensor in tensors.items()
    }


def _zip_entries(path: Path) -> list[zipfile.ZipInfo]:
    """The entries of a zip container; none for torch's older container."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return []
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The {name: tensor} of a pickle: the whole content, or the only such dict in it, under one of WRAPPERS."""
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


def _unsupported(tensor: Tensor) -> str | None:
    """Why an unpickled tensor is not an array of numbers with a memory location for each; None if it is one."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_nested or tensor.layout is not torch.strided:
        return "a nested one" if tensor.is_nested else f"a {type(tensor).__name__} of layout {tensor.layout}"
    if tensor.device.type != "cpu" or tensor.dtype not in DTYPE_NAMES:
        return f"{tensor.dtype} on {tensor.device}"
    span = 1  # elements from the first to the last, over the axes with the smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < span and tensor.numel() > 0:
            return f"elements that overlap: shape {list(tensor.shape)}, strides {list(tensor.stride())}"
        span += (size - 1) * stride
    return None


# -------------------------------------------------------------------------- tensors -> a module


def copy_strict(
    module: nn.Module,
    tensors: dict[str, Tensor],
    names: dict[str, str],
    where: str | Path,
    ignored: Iterable[str] = (),
) -> None:
    """Assigns `tensors` to the module's parameters and persistent buffers.

    `names` maps each name in module.state_dict() to the name of its tensor. Missing, unexpected and misshapen tensors
    raise an InputError that starts with `where` and names them; then the module is unchanged. Tensors in `ignored` are
    not unexpected.

    Tensors are not copied: parameters take their dtype and device, so the module may be on the meta device. Parameters
    with the same tensor name become one parameter (tied). Buffers that are not persistent stay unchanged.
    """
    targets = module.state_dict(keep_vars=True)
    problems = {
        "missing": [source for source in dict.fromkeys(names.values()) if source not in tensors],
        "unexpected": sorted(set(tensors) - set(names.values()) - set(ignored)),
        "mismatched": _mismatched(targets, tensors, names),
        "no tensor named for": [name for name in targets if name not in names],
        "not in the model": [name for name in names if name not in targets],
    }
    if any(problems.values()):
        text = "; ".join(
            f"{kind}: {', '.join(items[:5])}" + f" and {len(items) - 5} more" * (len(items) > 5)
            for kind, items in problems.items()
            if items
        )
        raise InputError(f"{where}: tensors do not fit the model: {text}")

    parameters: dict[str, nn.Parameter] = {}
    for name, target in targets.items():
        owner, _, attribute = name.rpartition(".")
        value = tensors[names[name]]
        if isinstance(target, nn.Parameter):
            value = parameters.setdefault(names[name], nn.Parameter(value, target.requires_grad))
        setattr(module.get_submodule(owner), attribute, value)


def drop_tied_copy(tensors: dict[str, Tensor], copy: str, original: str) -> None:
    """Removes the tensor `copy` if it equals `original`: some public files hold a tied tensor twice."""
    a, b = tensors.get(copy), tensors.get(original)
    if a is not None and b is not None and a.dtype == b.dtype and a.equal(b):
        del tensors[copy]


def _mismatched(targets: dict[str, Tensor], tensors: dict[str, Tensor], names: dict[str, str]) -> list[str]:
    """Which tensors differ from their targets in shape, or are integers instead of floats or the reverse."""
    mismatched = []
    for name, target in targets.items():
        tensor = tensors.get(names.get(name))
        if tensor is None:
            continue
        if tensor.shape != target.shape:
            found, expected = list(tensor.shape), list(target.shape)
        elif tensor.dtype != target.dtype and not (tensor.is_floating_point() and target.is_floating_point()):
            found, expected = tensor.dtype, target.dtype
        else:
            continue
        mismatched.append(f"{names[name]} is {found}, expected {expected} for {name}")
    return mismatched
