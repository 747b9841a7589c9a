"""Weights on disk <-> named tensors, strictly: whatever does not fit is an error, never a warning.

From top to bottom: the one error that users see, files (atomic writes, checksums, JSON), the
safetensors format, and the copy of named tensors into a module.

A safetensors file [1] is 8 bytes of header length n (little-endian), n bytes of JSON, then data:

    {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...,
     "__metadata__": {"any": "strings"}}

Offsets count from the first byte after the header. Together the tensors cover the data exactly:
no overlap, no hole, nothing behind the last one.

[1] The section "Format" of the README at https://github.com/huggingface/safetensors
[2] T. Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014: why a new file is
    flushed to the disk before it is renamed over the old one, and the folder after that.
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
from reprlib import repr as short  # at most a line, however long or deep the value is
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes, far above any model's; more is damage or an attack on memory
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
    """A file to read; what the system refuses becomes an InputError."""
    if not os.path.isfile(path):  # a pipe would keep us waiting for ever
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
    real = Path(os.path.realpath(path))  # a link stays a link
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
    sync_folder(real.parent)


def sync_folder(folder: Path) -> None:
    """Files that were renamed in the folder, or made, have their names on the disk after this [2]."""
    with suppress(OSError):  # some systems cannot
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


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


def _parse_object(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_double_names)
    # ValueError: no UTF-8, no JSON (its text says line and column), a number of 5000 digits.
    # RecursionError: a hundred thousand brackets.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {short(value)}")
    return value


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; InputError when it holds anything else or a name twice."""
    with _open(path) as file:
        return _parse_object(file.read(), str(path))


_KINDS = {
    int: "a whole number", float: "a number", str: "a string", bool: "true or false",
    list: "a list", dict: "an object",
}  # fmt: skip


def field(
    config: dict[str, Any], name: str, kind: type, where: str | Path, default: Any = REQUIRED
) -> Any:
    """config[name], checked to be of `kind`: int, float, str, bool, list or dict.

    A whole number passes as a float and comes back as one; true and false are not numbers. Without
    a default the field must be there; with one, null counts as absent, as in public configs.
    Raises InputError, which `where` begins: the file, or the file and the part of it.
    """
    value = config.get(name)
    if value is None and default is not REQUIRED:
        return default
    if name not in config:
        raise InputError(f"{where}: field {name!r} is missing, expected {_KINDS[kind]}")
    if kind is float and type(value) is int and abs(value) <= 2**53:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise InputError(f"{where}: field {name!r}: expected {_KINDS[kind]}, found {short(value)}")
    return value


def bounded(config: dict[str, Any], name: str, kind: type, where: str | Path, least: float, most: float,
            default: Any = REQUIRED) -> Any:  # fmt: skip
    """A number from `least` to `most`, read as `field` reads it; no model in use is beyond the bounds given here."""
    value = field(config, name, kind, where, default)
    if not least <= value <= most:
        limit = f"at least {least:g}" if value < least else f"at most {most:g}"
        raise InputError(f"{where}: {name} is {short(value)}, expected {limit}")
    return value


# ---------------------------------------------------------------------------------- safetensors


def _are_sizes(value: Any) -> bool:
    # type() and not isinstance: true is an int to Python.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_entry(entry: Any, start: int, where: str) -> tuple[torch.dtype, list[int], int, int]:
    """What the header says of one tensor -> dtype, shape, first byte in the file, bytes."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: expected an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{where}: expected a dtype of {', '.join(DTYPES)}, found {short(dtype)}")
    if not _are_sizes(shape) or len(shape) > 64:  # torch's limit in most operations
        raise InputError(f"{where}: expected a shape of at most 64 sizes, found {short(shape)}")
    # Strides of an empty tensor multiply its other sizes, so a 0 does not excuse a huge one.
    if math.prod(max(n, 1) for n in shape) * DTYPES[dtype].itemsize >= 2**63:
        raise InputError(f"{where}: expected less than 2**63 bytes, found shape {short(shape)}")
    count = math.prod(shape) * DTYPES[dtype].itemsize
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != count:
        raise InputError(
            f"{where}: expected data_offsets [begin, begin + {count}] for {dtype} {short(shape)}, "
            f"found {short(offsets)}"
        )
    return DTYPES[dtype], shape, start + offsets[0], count


def _read_header(path: str | Path) -> tuple[mmap.mmap, dict[str, str], dict[str, tuple]]:
    """-> the mapped file, its metadata, {name: (dtype, shape, first byte in the file, bytes)}."""
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise InputError(f"{path}: expected a safetensors file, found {size} bytes")
        # Private: writing to a tensor changes memory, never the file. (torch warns of read-only.)
        data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    length = int.from_bytes(data[:8], "little")
    if length > min(size - 8, MAX_HEADER):
        raise InputError(
            f"{path}: expected a header of at most {min(size - 8, MAX_HEADER)} bytes, found "
            f"{length}: cut short or not a safetensors file"
        )
    start = 8 + length
    if data[8:9] != b"{":  # JSON would also allow spaces here
        raise InputError(f"{path}: header: expected a JSON object, found {data[8:start][:20]!r}")
    header = _parse_object(data[8:start], f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path}: __metadata__: expected an object of strings")
    entries = {
        name: _check_entry(entry, start, f"{path}: tensor {name!r:.200}")
        for name, entry in header.items()
    }
    end = start
    for name, (_, _, first, count) in sorted(entries.items(), key=lambda e: e[1][2:]):
        if first != end:
            fault = "overlap" if first < end else "hole"
            raise InputError(
                f"{path}: tensor {name!r:.200}: expected its data to begin at {end - start}, where "
                f"the one before ends, found {first - start}: {fault}"
            )
        end = first + count
    if end != size:
        fault = "cut short" if end > size else "bytes left over"
        raise InputError(f"{path}: expected {end} bytes by its header, found {size}: {fault}")
    return data, metadata, entries


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file [1], in the header's order.

    Data stays on the disk until it is touched; the file is let go with the last tensor. Writing to
    a tensor changes memory only. Replacing the file meanwhile is safe, shortening it in place is
    not. Raises InputError when the file is not as the format demands.
    """
    data, _, entries = _read_header(path)
    tensors = {}
    for name, (dtype, shape, first, count) in entries.items():
        if count == 0:  # torch.frombuffer refuses these
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        raw = torch.frombuffer(data, dtype=torch.uint8, offset=first, count=count)
        if first % dtype.itemsize:  # headers need not be padded, but kernels want alignment
            raw = raw.clone()
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """The strings under `__metadata__`, {} when there are none. Raises as read_safetensors does."""
    return _read_header(path)[1]


def write_safetensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes tensors of any shape, layout and device as a safetensors file [1], atomically.

    The same tensors and metadata give the same bytes, whatever the order of the dicts. Raises
    InputError when the disk refuses, ValueError for what the format cannot hold.
    """
    header: dict[str, Any] = {}
    if metadata:
        if not all(isinstance(text, str) for item in metadata.items() for text in item):
            raise ValueError(f"expected metadata of strings, found {short(metadata)}")
        header["__metadata__"] = dict(sorted(metadata.items()))
    # Wide dtypes first: then each tensor begins at a multiple of its item size.
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


# -------------------------------------------------------------------------- tensors -> a module


def copy_strict(
    module: nn.Module,
    tensors: dict[str, Tensor],
    names: dict[str, str],
    where: str | Path,
    ignored: Iterable[str] = (),
) -> None:
    """Puts `tensors` into the module's parameters and persistent buffers, by assignment.

    `names` maps each name in module.state_dict() to the name of its tensor. Each must be there and
    of the same shape, and every tensor must be used or listed in `ignored`; otherwise an
    InputError that `where` begins names them, and the module is as before.

    The module may live on the meta device: it takes the tensors themselves with their dtype and
    device, nothing is copied. Parameters that name the same tensor become one parameter (tied).
    Buffers that are not persistent stay as they are; on the meta device that is on the meta device.
    """
    targets = module.state_dict(keep_vars=True)
    misfits = []
    for name, target in targets.items():
        tensor = tensors.get(names.get(name))
        if tensor is None:
            continue
        floats = tensor.is_floating_point() and target.is_floating_point()
        if tensor.shape != target.shape:
            found, expected = list(tensor.shape), list(target.shape)
        elif not floats and tensor.dtype != target.dtype:
            found, expected = tensor.dtype, target.dtype
        else:
            continue
        misfits.append(f"{names[name]} is {found}, expected {expected} for {name}")
    problems = {
        "missing": [source for source in dict.fromkeys(names.values()) if source not in tensors],
        "unexpected": sorted(set(tensors) - set(names.values()) - set(ignored)),
        "misfit": misfits,
        "nothing named for": [name for name in targets if name not in names],
        "not in the model": [name for name in names if name not in targets],
    }
    if any(problems.values()):
        text = "; ".join(
            f"{kind}: {', '.join(items[:5])}" + f" and {len(items) - 5} more" * (len(items) > 5)
            for kind, items in problems.items()
            if items
        )
        raise InputError(f"{where}: tensors do not fit the model: {text}")

    made: dict[str, nn.Parameter] = {}
    for name, target in targets.items():
        owner, _, leaf = name.rpartition(".")
        value = tensors[names[name]]
        if isinstance(target, nn.Parameter):
            value = made.setdefault(names[name], nn.Parameter(value, target.requires_grad))
        setattr(module.get_submodule(owner), leaf, value)
