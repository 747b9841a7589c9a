"""Helpers for tests of models: files as published, and comparisons of tensors."""

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

CONFIGS = Path(__file__).parent / "configs"  # config.json files of published models, shortened


def write_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """A .pth file, or model.safetensors in a folder."""
    if path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})


def change_json(path: Path, **fields) -> None:
    """Sets fields of a JSON file; None removes them."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def last_field(fields: dict) -> str:
    """The name of the last field, or of the last one in it: {"rope_scaling": {"factor": 0.5}} -> "factor"."""
    *_, (name, value) = fields.items()
    return last_field(value) if isinstance(value, dict) and value else name


def assert_near(found: Tensor, expected: Tensor, atol: float = 1e-5, min_std: float = 0.1) -> None:
    assert expected.std() > min_std  # the tolerance is absolute, so the values must not be small
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
