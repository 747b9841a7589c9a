"""Tensors of public models: reading every published file format, and strict copying into a module.

    FOLDER/model.safetensors                   one safetensors file
    FOLDER/model.safetensors.index.json        an index and its shards, safetensors files
    FOLDER/pytorch_model.bin                   one torch pickle
    FOLDER/pytorch_model.bin.index.json        an index and its shards, torch pickles
    a file *.safetensors                       one safetensors file
    any other file (*.bin, *.pt, *.pth)        one torch pickle

An index is {"metadata": {...}, "weight_map": {TENSOR: SHARD, ...}}. A torch pickle [1] is a program that builds
objects and may call any function by name; torch is told to allow only the functions that build tensors. Of its two
containers, the zip stores each tensor's bytes unchanged and can be memory-mapped; the older one is read into memory.

[1] torch/serialization.py, `_load` and `_legacy_load`; https://docs.python.org/3/library/pickle.html
"""

import os
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import InputError, reading
from common.files import field, open_to_read, read_json
from models.names import IGNORED, find_prefix
from models.safetensors import read_safetensors

# In a model's folder; the first that exists is read.
WEIGHT_FILE_NAMES = ("model.safetensors", "model.safetensors.index.json",
                     "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], Path]:
    """The tensors {name: tensor} of a model's folder or of one weights file, and the file for error messages.

    That file is the single file or the index. Tensors are on the CPU and keep their dtype; they are memory-mapped,
    except for those of torch's older container. Writing to a tensor changes memory only. Raises InputError for damaged
    and incomplete files and for pickles of anything but tensors; code in a file is never run. Changed numbers are not
    detected: these formats have no checksums.
    """
    file, *shards = weight_files(path)
    tensors = {}
    for part in shards or [file]:
        tensors |= read_safetensors(part) if part.suffix == ".safetensors" else _read_pickle(part)
    return tensors, file


def weight_files(path: str | Path) -> list[Path]:
    """Every file that read_tensors(path) reads: the single file, or the index and its shards, sorted."""
    file = Path(path)
    if file.is_dir():
        names = [name for name in WEIGHT_FILE_NAMES if os.path.lexists(file / name)]  # a dangling link is an error
        if not names:
            raise InputError(f"{path}: expected one of {', '.join(WEIGHT_FILE_NAMES)}, found none of them")
        file = file / names[0]
    return [file, *map(file.with_name, read_index(file))] if file.suffix == ".json" else [file]


def read_index(index: Path) -> list[str]:
    """The names of an index's shards, sorted. Which of them holds a tensor, and their size, is read from the shards."""
    with reading(index):
        shards = set(field(read_json(index), "weight_map", dict, index).values())
        for shard in shards:  # no path: shards must be in the index's folder
            if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", shard):
                raise InputError(f"expected the name of a weights file in the same folder, found {shard!r}")
    return sorted(shards)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch.save file, memory-mapped if the container allows it; see read_tensors."""
    with open_to_read(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unusual pickles; the result is checked below
        # torch.save does not compress, but other programs do, and compressed entries cannot be mapped.
        mapped = zipfile.is_zipfile(file) and not any(e.compress_type for e in zipfile.ZipFile(file).infolist())
        content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        if not content or not all(isinstance(name, str) for name in content):
            raise InputError("expected {name: tensor}")
        tensors = {name: tensor.detach() for name, tensor in content.items()}
        # A damaged file may declare more than it fills: the rest would be uninitialized memory.
        storages = [tensor.untyped_storage() for tensor in tensors.values()]
        declared = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        if declared > os.path.getsize(path):
            raise InputError(f"declares {declared} bytes of tensors, more than the file has")
    return tensors


def copy_strict(module: nn.Module, tensors: dict[str, Tensor], names: dict[str, str], where: str | Path) -> None:
    """Assigns `tensors` to the module's parameters and persistent buffers.

    `names` maps each name in module.state_dict() to the name of its tensor. Missing, unexpected and misshapen tensors
    raise an InputError that starts with `where` and names them; then the module is unchanged. Those of parts that no
    model here has, `names.IGNORED`, are left out.

    Tensors are not copied: parameters take their dtype and device, so the module may be on the meta device. Parameters
    with the same tensor name become one parameter (tied). Buffers that are not persistent stay unchanged.
    """
    targets = module.state_dict(keep_vars=True)
    problems = {
        "missing": sorted(set(names.values()) - tensors.keys()),
        "unexpected": sorted(name for name in tensors.keys() - set(names.values()) if not IGNORED.fullmatch(name)),
        "mismatched": [
            f"{names[name]} is {_kind(tensors[names[name]])}, expected {_kind(target)} for {name}"
            for name, target in targets.items()
            if names.get(name) in tensors and _kind(tensors[names[name]]) != _kind(target)
        ],
        "without a counterpart": sorted(targets.keys() ^ names.keys()),
    }
    if texts := [f"{kind}: {', '.join(items):.300}" for kind, items in problems.items() if items]:
        raise InputError(f"{where}: tensors do not fit the model: {'; '.join(texts)}")

    parameters: dict[str, nn.Parameter] = {}
    for name, target in targets.items():
        owner, _, attribute = name.rpartition(".")
        value = tensors[names[name]]
        if isinstance(target, nn.Parameter):
            value = parameters.setdefault(names[name], nn.Parameter(value, target.requires_grad))
        setattr(module.get_submodule(owner), attribute, value)


def _kind(tensor: Tensor) -> str:
    """What a tensor must have in common with its target: the shape, and the dtype unless both are floats."""
    return f"{list(tensor.shape)} of {'floats' if tensor.is_floating_point() else tensor.dtype}"


def drop_tied_copy(tensors: dict[str, Tensor], embeddings: str) -> None:
    """Removes the head if it equals the embeddings: some public files hold the tied tensor twice."""
    head = find_prefix(tensors, "lm_head.weight") + "lm_head.weight"
    a, b = tensors.get(head), tensors.get(embeddings)
    if a is not None and b is not None and a.dtype == b.dtype and a.equal(b):
        del tensors[head]
