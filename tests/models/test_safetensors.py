"""Reading and writing safetensors files, against the safetensors package and with damaged files.

Tensors must be equal to the bit. Every random choice has its seed in the test.
"""

import json
import math

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from models.safetensors import DTYPES, read_safetensors, read_with_metadata, write_safetensors
from tests.common.helpers import refused
from tests.tiny import bits

METADATA = {"format": "pt", "a": "ü\n"}


def examples() -> dict[str, torch.Tensor]:
    """A tensor of each dtype (seed 0); special floats; no elements, no axes, many axes; other layouts; a gradient."""
    generator = torch.Generator().manual_seed(0)
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {name: (torch.randn(3, 5, generator=generator) * 50).to(dtype) for name, dtype in DTYPES.items()}
    tensors["special"] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    tensors["empty"] = torch.zeros(0, 4, dtype=torch.float16)
    tensors["scalar"] = torch.tensor(2.5, dtype=torch.float64)
    tensors["größe / 'x'"] = torch.ones((1,) * 9, dtype=torch.bfloat16)
    return tensors | {"t": base.T, "strided": base[::2, 1::2], "wide": base[:1].expand(3, 6), "p": nn.Parameter(base)}


def container(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# ------------------------------------------------------------------- reference: safetensors


def test_reads_files_of_the_package(tmp_path):
    """Also those of older versions, whose headers are not padded, so that the data is not aligned."""
    expected = {name: tensor.detach().contiguous() for name, tensor in examples().items()}
    raw = safetensors.torch.save(expected, METADATA)
    length = int.from_bytes(raw[:8], "little")
    for spaces in range(8):
        path = tmp_path / f"{spaces}"
        path.write_bytes(container(raw[8 : 8 + length].rstrip() + b" " * spaces, raw[8 + length :]))
        read = read_safetensors(path)
        assert bits(read) == bits(expected)
        assert all(t.data_ptr() % t.dtype.itemsize == 0 for t in read.values())
        assert read_with_metadata(path)[1] == METADATA


def test_the_package_reads_our_files(tmp_path):
    """Equal input gives equal bytes, whatever its order."""
    path = tmp_path / "ours"
    write_safetensors(path, examples(), METADATA)
    expected = {name: tensor.detach().contiguous() for name, tensor in examples().items()}
    for read in (safetensors.torch.load_file, read_safetensors):
        assert bits(read(path)) == bits(expected)
    with safe_open(path, "pt") as file:
        assert file.metadata() == METADATA == read_with_metadata(path)[1]
    write_safetensors(tmp_path / "b", dict(reversed(examples().items())), dict(reversed(METADATA.items())))
    assert path.read_bytes() == (tmp_path / "b").read_bytes()


def test_order_of_header_and_data_may_differ(tmp_path):
    """Valid, but easily refused by mistake: an empty tensor at the offset of another one."""
    header = {"b": entry("U8", [2], 1, 3), "a": entry("U8", [1], 0, 1), "e": entry("U8", [0], 0, 0)}
    (tmp_path / "f").write_bytes(container(header, bytes([7, 8, 9])))
    read = read_safetensors(tmp_path / "f")
    assert {name: t.tolist() for name, t in read.items()} == {"b": [8, 9], "a": [7], "e": []}
    assert bits(read) == bits(safetensors.torch.load_file(tmp_path / "f"))


# ------------------------------------------------------------------ damaged and malicious files

F32 = entry("F32", [2], 0, 8)
DAMAGED = {
    "empty": b"", "length of 2**64 - 1": b"\xff" * 8 + b"{}",
    "no offsets": container({"w": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "hole": container({"a": F32, "b": entry("F32", [2], 12, 20)}, bytes(20)),
    "overlap": container({"a": F32, "b": entry("F32", [2], 4, 12)}, bytes(12)),
    "bytes left over": container({"w": F32}, bytes(9)),
    "terminal escapes": container({"\x1b[2J\r\n\u202e\ud800": entry("X", [], 0, 0)}),
    **{fault: container({"w": entry(*fields)}, bytes(8)) for fault, fields in {
        "8-bit floats": ("F8_E4M3", [8], 0, 8), "size to be inferred": ("F32", [-1], 0, 8),
        "negative sizes": ("F32", [-1, -2], 0, 8), "size 2.0": ("F32", [2.0], 0, 8),
        "size and offsets differ": ("F32", [3], 0, 8)}.items()},
    "2**64 elements, which overflow to 0": container({"w": entry("U8", [2**32] * 2, 0, 0)}),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_damaged_files_are_refused(tmp_path, fault):
    (tmp_path / "bad").write_bytes(DAMAGED[fault])
    with refused(str(tmp_path / "bad")):
        read_safetensors(tmp_path / "bad")
