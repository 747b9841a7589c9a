"""The tensors of a public model, from every kind of file it is published in.

safetensors files are read by `weights.py`, torch pickles by torch, which runs no code out of them.
"""

from pathlib import Path

import torch
from torch import Tensor

from weights import InputError, read_safetensors


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], Path]:
    """A model's folder or one weights file -> {name: tensor}, and the file that errors should name."""
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if file.suffix == ".safetensors":
        return read_safetensors(file), file
    if not file.is_file():
        raise InputError(f"{file}: expected a file, found none")
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True), file
