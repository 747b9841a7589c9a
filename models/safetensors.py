"""Reading and writing the safetensors format.

A safetensors file [1] is the header length n in 8 bytes (little-endian), n bytes of JSON, then the data:

    {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...,
     "__metadata__": {"any": "strings"}}

Offsets count from the first byte after the header. The tensors cover the data exactly: no overlaps, no holes, nothing
after the last tensor.

[1] The section "Format" of the README at https://github.com/huggingface/safetensors
"""

import json
import math
import mmap
import os
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError
from common.files import open_to_read, parse_object, replace_atomically

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes, far more than any model needs; longer headers are damage or an attack


def _are_sizes(value: Any) -> bool:
    # type() instead of isinstance: bool is a subclass of int.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_entry(entry: Any, start: int, where: str) -> tuple[torch.dtype, list[int], int, int]:
    """One tensor's entry in the header -> dtype, shape, first byte in the file, number of bytes."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: expected an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{where}: expected a dtype of {', '.join(DTYPES)}, found {short(dtype)}")
    if not _are_sizes(shape) or len(shape) > 64:  # torch's limit in most operations
        raise InputError(f"{where}: expected a shape of at most 64 sizes, found {short(shape)}")
    # torch computes the strides of an empty tensor from its other sizes, so these count even beside a 0.
    if math.prod(max(n, 1) for n in shape) * DTYPES[dtype].itemsize >= 2**63:
        raise InputError(f"{where}: expected less than 2**63 bytes, found shape {short(shape)}")
    count = math.prod(shape) * DTYPES[dtype].itemsize
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != count:
        raise InputError(f"{where}: expected data_offsets [begin, begin + {count}] for {dtype} {short(shape)}, "
                         f"found {short(offsets)}")  # fmt: skip
    return DTYPES[dtype], shape, start + offsets[0], count


def _read_header(path: str | Path) -> tuple[mmap.mmap, dict[str, str], dict[str, tuple]]:
    """-> the memory-mapped file, its metadata, {name: (dtype, shape, first byte in the file, number of bytes)}."""
    with open_to_read(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise InputError(f"{path}: expected a safetensors file, found {size} bytes")
        # Copy on write: writing to a tensor changes memory, never the file. (torch warns of read-only memory.)
        data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    length = int.from_bytes(data[:8], "little")
    if length > min(size - 8, MAX_HEADER):
        raise InputError(f"{path}: expected a header of at most {min(size - 8, MAX_HEADER)} bytes, found {length}: "
                         "cut short or not a safetensors file")  # fmt: skip
    start = 8 + length
    if data[8:9] != b"{":  # the format forbids the leading spaces that JSON allows
        raise InputError(f"{path}: header: expected a JSON object, found {data[8:start][:20]!r}")
    header = parse_object(data[8:start], f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path}: __metadata__: expected an object of strings")
    entries = {name: _check_entry(entry, start, f"{path}: tensor {name!r:.200}") for name, entry in header.items()}
    end = start
    for name, (_, _, first, count) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if first != end:
            fault = "overlap" if first < end else "hole"
            raise InputError(f"{path}: tensor {name!r:.200}: expected its data to begin at {end - start}, where the "
                             f"previous tensor ends, found {first - start}: {fault}")  # fmt: skip
        end = first + count
    if end != size:
        fault = "cut short" if end > size else "bytes left over"
        raise InputError(f"{path}: expected {end} bytes by its header, found {size}: {fault}")
    return data, metadata, entries


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file [1], in the order of the header.

    The tensors are memory-mapped: data is read when it is used, and the file is closed with the last tensor. Writing
    to a tensor changes memory only. The file may be replaced meanwhile, but not shortened in place. Raises InputError
    for a file that violates the format.
    """
    data, _, entries = _read_header(path)
    tensors = {}
    for name, (dtype, shape, first, count) in entries.items():
        if count == 0:  # torch.frombuffer rejects empty buffers
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        raw = torch.frombuffer(data, dtype=torch.uint8, offset=first, count=count)
        if first % dtype.itemsize:  # headers may be unpadded, but kernels need aligned tensors
            raw = raw.clone()
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """The strings under `__metadata__`; {} if there are none. Raises InputError as read_safetensors does."""
    return _read_header(path)[1]


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors of any shape, layout and device to a safetensors file [1], atomically.

    Equal tensors and metadata give equal bytes, whatever the order of the dicts. Raises InputError if the file cannot
    be written, ValueError for dtypes, names and metadata that the format does not allow.
    """
    header: dict[str, Any] = {}
    if metadata:
        if not all(isinstance(text, str) for item in metadata.items() for text in item):
            raise ValueError(f"expected metadata of strings, found {short(metadata)}")
        header["__metadata__"] = dict(sorted(metadata.items()))
    # Wide dtypes first, so that each tensor begins at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    end = 0
    for name in names:
        dtype, shape = tensors[name].dtype, list(tensors[name].shape)
        if dtype not in DTYPE_NAMES or name == "__metadata__":
            raise ValueError(f"a safetensors file cannot hold {dtype} named {name!r}")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with replace_atomically(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy())
