"""Reading and writing the safetensors format.

A safetensors file [1] is the header length n in 8 bytes (little-endian), n bytes of JSON, then the data:

    {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...,
     "__metadata__": {"any": "strings"}}

Offsets count from the first byte after the header. The tensors cover the data exactly: no overlaps, no holes, nothing
after the last tensor.

[1] The section "Format" of the README at https://github.com/huggingface/safetensors
"""

import hashlib
import json
import math
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError, reading
from common.files import field, open_to_read, parse_object, replace_atomically

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES = FLOATS | INTEGERS | {"BOOL": torch.bool}


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file [1], in the order of the header.

    The tensors are memory-mapped: data is read when it is used, and the file is closed with the last tensor. Writing
    to a tensor changes memory only. The file may be replaced meanwhile, but not shortened in place. Raises InputError
    for a file that violates the format.
    """
    return read_with_metadata(path)[0]


def read_with_metadata(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same, and the strings under `__metadata__`; {} if there are none."""
    with open_to_read(path) as file:
        # Copy on write: writing to a tensor changes memory, never the file. (torch warns of read-only memory.)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(data[:8], "little")
        if start > len(data):
            raise InputError(f"a header of {start - 8} bytes: cut short, or not a safetensors file")
        header = parse_object(data[8:start], path)
        metadata = {name: str(text) for name, text in field(header, "__metadata__", dict, path, {}).items()}
        header.pop("__metadata__", None)
        spans = sorted(entry["data_offsets"] for entry in header.values())
        if [begin for begin, _ in spans] + [len(data) - start] != [0] + [end for _, end in spans]:
            raise InputError("its tensors overlap, leave a hole or do not end where the file ends")
        tensors = {}
        for name, entry in header.items():
            with reading(f"{path}: tensor {name!r:.200}"):
                tensors[name] = _map_tensor(data, start, entry)
    return tensors, metadata


def _map_tensor(data: mmap.mmap, start: int, entry: dict[str, Any]) -> Tensor:
    """The tensor that an entry of the header describes; its offsets count from `start`."""
    if entry["dtype"] not in DTYPES:
        raise InputError(f"expected a dtype of {', '.join(DTYPES)}, found {entry['dtype']}")
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], torch.Size(entry["shape"]), entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise InputError(f"the shape {list(shape)} of {dtype} does not fill the bytes {begin} to {end}")
    if begin == end:  # torch.frombuffer rejects empty buffers
        return torch.empty(shape, dtype=dtype)
    raw = torch.frombuffer(data, dtype=torch.uint8, offset=start + begin, count=end - begin)
    if (start + begin) % dtype.itemsize:  # headers may be unpadded, but kernels need aligned tensors
        raw = raw.clone()
    return raw.view(dtype).reshape(shape)


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors of any shape, layout and device to a safetensors file [1], atomically.

    Equal tensors and metadata give equal bytes, whatever the order of the dicts. Raises InputError if the file cannot
    be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    # Wide dtypes first, so that each tensor begins at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    end = 0
    for name in names:
        dtype, shape = tensors[name].dtype, list(tensors[name].shape)
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype_names[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replace_atomically(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy())


def checksum(tensors: dict[str, Tensor]) -> str:
    """The SHA-256 of the names, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode(errors="replace"))
        digest.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
