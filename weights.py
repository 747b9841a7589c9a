"""Weights on disk <-> named tensors, strictly: whatever does not fit is an error, never a warning.

Read from top to bottom: the one error users see, files (atomic writes, checksums, JSON configs),
the safetensors format, and the copy of named tensors into a module.

A safetensors file [1] is 8 bytes of header length n (little-endian), n bytes of JSON, then data:

    {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...,
     "__metadata__": {"any": "strings"}}

Offsets count from the first byte after the header. Together the tensors cover the data exactly:
no overlap, no hole, nothing behind the last one.

[1] The format section of the README at https://github.com/huggingface/safetensors
[2] T. Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014: why a new file is
    flushed to the disk before it is renamed over the old one, and the folder after.
"""

import hashlib
import io
import json
import math
import mmap
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the reference implementation refuses longer ones too
REQUIRED = object()


class InputError(ValueError):
    """What a user gave cannot be used; one line that names the file, the field, the expectation.

    Scripts print it as `error: ...` and exit with 2.
    """

    def __init__(self, message: str):
        # Names come out of files that may be damaged or hostile: a line break, a terminal escape
        # or a megabyte of text in one must not reach the user's screen.
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__(message if len(message) <= 2000 else message[:2000] + " ...")


# ---------------------------------------------------------------------------------------- files


@contextmanager
def _open(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file for reading; what the system refuses becomes an InputError."""
    if not os.path.isfile(path):  # also keeps us from waiting for ever on a pipe
        found = "a folder" if os.path.isdir(path) else "none"
        raise InputError(f"{path}: expected a file, found {found}")
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Target(io.FileIO):
    """Remembers a failed write: torch.save makes a RuntimeError about positions of a full disk."""

    failure: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


@contextmanager
def replace_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write that becomes `path` only when the block ends well [2].

    Whenever the program or the machine stops, `path` is the whole old file or the whole new one.
    After an exception in the block the old file stays and no temporary file is left.
    Raises InputError "cannot write PATH: reason" when the disk is full, read-only and so on.
    """
    real = Path(os.path.realpath(path))  # a link keeps pointing to where it points
    temporary = real.with_name(f".{real.name}.{secrets.token_hex(8)}.tmp")
    try:
        target = _Target(temporary, "xb")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    file = io.BufferedWriter(target)
    try:
        yield file
        try:
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(temporary, real)
        except OSError as error:
            target.failure = error
            raise
    except BaseException as error:  # Ctrl-C too
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            os.unlink(temporary)
        if target.failure is not None:
            reason = target.failure.strerror or target.failure
            raise InputError(f"cannot write {path}: {reason}") from error
        raise
    with suppress(OSError):  # the new file is in place; some systems cannot sync a folder
        folder = os.open(real.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sha256_of(path: str | Path) -> str:
    """The file's SHA-256 in hex. Raises InputError when it cannot be read."""
    digest = hashlib.sha256()
    with _open(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _no_double_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {name!r:.200} occurs twice in one object")
        result[name] = value
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _parse_object(text: bytes, where: str) -> dict[str, Any]:
    """JSON bytes -> dict. Stricter than json.loads: UTF-8 only, no double names, no NaN."""
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_no_double_names,
            parse_constant=_no_constant,
        )
    # RecursionError: a hundred thousand brackets. The text of a syntax error has line and column.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {value!r:.80}")
    return value


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError when it is missing or anything else."""
    with _open(path) as file:
        return _parse_object(file.read(), str(path))


_KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false",
          list: "a list", dict: "an object"}  # fmt: skip


def field(
    config: dict[str, Any], name: str, kind: type, where: str | Path, default: Any = REQUIRED
) -> Any:
    """config[name], checked to be of `kind` (one of int, float, str, bool, list, dict).

    A whole number passes as a float and comes back as one; true and false are not numbers. Without
    a default the field must be there; with one, null counts as absent, as public configs use it.
    `where` names the file in the InputError.
    """
    value = config.get(name)
    if value is None and default is not REQUIRED:
        return default
    if name not in config:
        raise InputError(f"{where}: field {name!r} is missing, expected {_KINDS[kind]}")
    if kind is float and type(value) is int and abs(value) <= 2**53:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise InputError(f"{where}: field {name!r}: expected {_KINDS[kind]}, found {value!r:.80}")
    return value


# ---------------------------------------------------------------------------------- safetensors


def _read_header(path: str | Path) -> tuple[mmap.mmap, dict[str, str], dict[str, tuple]]:
    """-> the mapped file, its metadata, {name: (dtype, shape, first byte, count of bytes)}."""
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise InputError(f"{path}: expected a safetensors file, found only {size} bytes")
        # Private and copy-on-write: torch may write to its tensors, and the file never changes.
        data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    length = int.from_bytes(data[:8], "little")
    if length > min(size - 8, MAX_HEADER):
        raise InputError(
            f"{path}: expected a header of at most {min(size - 8, MAX_HEADER)} bytes, "
            f"the file says {length}: cut short, or not a safetensors file"
        )
    text = data[8 : 8 + length]
    if not text.startswith(b"{"):
        raise InputError(f"{path}: header: expected a JSON object, found {text[:20]!r}")
    header = _parse_object(text, f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path}: __metadata__: expected an object of strings")

    start = 8 + length
    entries = {
        name: _check_entry(entry, start, f"{path}: tensor {name!r:.200}")
        for name, entry in header.items()
    }
    end, last = start, "the header"
    for name, (_, _, first, count) in sorted(entries.items(), key=lambda e: (e[1][2], e[1][3])):
        if first != end:
            kind = "overlaps" if first < end else "leaves a hole behind"
            raise InputError(
                f"{path}: tensor {name!r:.200} {kind} {last}: expected its data at "
                f"{end - start}, found at {first - start}"
            )
        end, last = first + count, f"{name!r:.200}"
    if end != size:
        kind = "cut short" if end > size else "bytes left over"
        raise InputError(f"{path}: {kind}: expected {end} bytes by the header, found {size}")
    return data, metadata, entries


def _are_sizes(value: Any) -> bool:
    # type() and not isinstance: true is an int to Python.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_entry(entry: Any, start: int, where: str) -> tuple[torch.dtype, list[int], int, int]:
    """One tensor's line of the header -> dtype, shape, first byte in the file, count of bytes."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: expected an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{where}: expected a dtype of {', '.join(DTYPES)}, found {dtype!r:.80}")
    if not _are_sizes(shape) or len(shape) > 64:  # torch's own limit in most operations
        raise InputError(f"{where}: expected a shape of at most 64 sizes, found {shape!r:.80}")
    itemsize = DTYPES[dtype].itemsize
    # Strides of an empty tensor multiply the other sizes, so a 0 does not excuse a huge one.
    if math.prod(max(d, 1) for d in shape) * itemsize >= 2**63:
        raise InputError(f"{where}: expected less than 2**63 bytes, found shape {shape!r:.80}")
    count = math.prod(shape) * itemsize
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != count:
        raise InputError(
            f"{where}: expected data_offsets [begin, begin + {count}] for {dtype} {shape!r:.80}, "
            f"found {offsets!r:.80}"
        )
    return DTYPES[dtype], shape, start + offsets[0], count


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file [1], in the header's order.

    The data stays on the disk until it is touched, and the file is closed when the last tensor
    goes. Writing to a tensor changes memory only. Do not shorten the file meanwhile: replacing it
    (`replace_atomically`) is safe. Raises InputError when the file is not as the format demands.
    """
    data, _, entries = _read_header(path)
    tensors = {}
    for name, (dtype, shape, first, count) in entries.items():
        if count == 0:  # torch.frombuffer refuses empty ones
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        raw = torch.frombuffer(data, dtype=torch.uint8, offset=first, count=count)
        if first % dtype.itemsize:  # old writers did not pad the header; kernels want alignment
            raw = raw.clone()
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """The strings under `__metadata__`, {} when there are none. Raises as read_safetensors does."""
    return _read_header(path)[1]


def write_safetensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes tensors of any shape and device as a safetensors file [1], atomically.

    The same tensors and metadata give the same bytes, whatever the order of the dicts. Raises
    InputError when the disk refuses, ValueError for what the format cannot hold.
    """
    header: dict[str, Any] = {}
    if metadata:
        if not all(isinstance(s, str) for item in metadata.items() for s in item):
            raise ValueError("metadata must map strings to strings")
        header["__metadata__"] = dict(sorted(metadata.items()))
    # Wide dtypes first: then each tensor starts at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES or name == "__metadata__":
            raise ValueError(f"cannot store tensor {name!r} of {tensor.dtype} as safetensors")
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with replace_atomically(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy())


# ------------------------------------------------------------------------- tensors -> a module


def _first_five(items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(items[:5]) + more


def copy_strict(
    module: nn.Module,
    tensors: dict[str, Tensor],
    names: dict[str, str],
    where: str | Path,
    ignored: Iterable[str] = (),
) -> None:
    """Puts `tensors` into the module's parameters and persistent buffers, by assignment.

    `names` maps each name in module.state_dict() to the name of its tensor. Each must be there and
    of the same shape, and every tensor must be used or be listed in `ignored`; otherwise an
    InputError names them and nothing is changed. The module may live on the meta device: it takes
    the tensors themselves, so their dtype and device, and no second copy is made. Parameters that
    name the same tensor become one parameter (tied). Buffers that are not persistent stay as they
    are: on the meta device it is the module that must fill them.
    """
    targets = module.state_dict(keep_vars=True)
    unknown = [f"{n} (for {names[n]})" for n in names if n not in targets]
    unset = [n for n in targets if n not in names]
    absent = dict.fromkeys(s for s in names.values() if s not in tensors)
    extra = sorted(set(tensors) - set(names.values()) - set(ignored))
    misfits = []
    for name, target in targets.items():
        tensor = tensors.get(names.get(name))
        if tensor is None:
            continue
        if tensor.shape != target.shape:
            shapes = f"{list(tensor.shape)}, expected {list(target.shape)}"
            misfits.append(f"{names[name]} has shape {shapes} for {name}")
        elif tensor.dtype != target.dtype and not (
            tensor.is_floating_point() and target.is_floating_point()
        ):
            misfits.append(f"{names[name]} is {tensor.dtype}, expected {target.dtype} for {name}")
    problems = {
        "missing": absent,
        "unexpected": extra,
        "misfit": misfits,
        "no tensor named for": unset,
        "the model has no": unknown,
    }
    if any(problems.values()):
        text = "; ".join(f"{kind}: {_first_five(p)}" for kind, p in problems.items() if p)
        raise InputError(f"{where}: tensors do not fit the model: {text}")

    made: dict[str, nn.Parameter] = {}
    for name, target in targets.items():
        owner, _, leaf = name.rpartition(".")
        value = tensors[names[name]]
        if isinstance(target, nn.Parameter):
            value = made.setdefault(names[name], nn.Parameter(value, target.requires_grad))
        setattr(module.get_submodule(owner), leaf, value)
