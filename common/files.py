"""Files and JSON: reading, atomic replacement, checksums, locks, free space.

References
[1] T. Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014: why a new file is flushed to the disk
    before it is renamed over the old one, and the folder after that.
"""

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from reprlib import repr as short  # at most a line, however long or deep the value is
from typing import Any, BinaryIO

from common.errors import InputError, reading, writing

REQUIRED = object()
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", list: "a list",
              dict: "an object"}

# ----------------------------------------------------------------------------------------- files


@contextmanager
def open_to_read(path: str | Path) -> Iterator[BinaryIO]:
    """A regular file, opened to be parsed in the block, where `reading` turns what damage raises into an InputError."""
    if not os.path.isfile(path):  # reading a pipe would block for ever
        raise InputError(f"{path}: expected a file, found {'a folder' if os.path.isdir(path) else 'none'}")
    with reading(path), open(path, "rb") as file:
        yield file


@contextmanager
def replace_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write that becomes `path` when the block ends without an exception [1].

    Whenever the program or the machine stops, `path` is the complete old file or the complete new one. After an
    exception the old file stays and no temporary file is left. The block only writes: see `writing`.
    """
    real = Path(os.path.realpath(path))  # a link stays a link
    temporary = real.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with writing(path):
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, real)
    except BaseException:  # Ctrl-C too
        with suppress(OSError):
            os.unlink(temporary)
        raise
    with suppress(OSError):  # some file systems cannot flush a folder
        descriptor = os.open(real.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    """The file's SHA-256 in hex. Raises InputError if it cannot be read."""
    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_of(path: str | Path) -> str:
    """A SHA-256 that tells files of weights apart without reading gigabytes: of the size and of 256 pieces of 64 KiB at
    equal distances, which is the whole file up to 16 MiB."""
    piece, count = 2**16, 256
    with open_to_read(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for i in range(count):
            file.seek(max(i * piece, i * (size - piece) // (count - 1)))  # the last one ends where the file ends
            digest.update(file.read(piece))
    return digest.hexdigest()


def acquire_lock(path: Path, wait: bool) -> int | None:
    """Locks the file `path` for this process. Returns a file descriptor that holds the lock until it is closed.

    If another process holds it, returns None, or with `wait` the lock as soon as that process ends. The system releases
    the lock however the process ends. lockf and not flock: a forked child does not inherit it.
    """
    import fcntl  # not on Windows

    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o644)  # a pipe is an error, not a wait
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # POSIX allows either
        os.close(descriptor)
        return None
    return descriptor


def check_disk_space(folder: Path, needed: int, what: str) -> None:
    """Raises an InputError that begins with `what` if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{what}: needs {format_bytes(needed)}, the disk of {folder} has {format_bytes(free)} free")


def format_bytes(count: int) -> str:
    """1234567 -> "1.2 MB"."""
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:.{min(power, 1)}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


# ------------------------------------------------------------------------------------------ JSON


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(result := dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice in one object")
    return result


def parse_object(text: bytes, where: str | Path) -> dict[str, Any]:
    """The JSON object in UTF-8 bytes. Raises an InputError that begins with `where` for anything else."""
    with reading(where):
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique_names)
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {short(value)}")
    return value


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError for anything else, and for a name that occurs twice."""
    with open_to_read(path) as file:
        return parse_object(file.read(), path)


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The JSON objects in the lines of a file. Raises InputError for a line that is damaged.

    The last line is left out if it is damaged: a process that was killed may have written half of it.
    """
    with open_to_read(path) as file:
        lines = file.read().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(parse_object(line, f"{path}: line {number}"))
        except InputError:
            if number < len(lines):
                raise
    return rows


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Writes a JSON object atomically. Raises InputError if the disk refuses."""
    with replace_atomically(path) as file:
        file.write((json.dumps(content, indent=1, default=str) + "\n").encode())


def field(config: dict[str, Any], name: str, kind: type, where: str | Path, default: Any = REQUIRED,
          least: float = -math.inf, most: float = math.inf) -> Any:
    """config[name], checked: of `kind` int, float, str, bool, list or dict; a number from `least` to `most`.

    A whole number is accepted as a float and returned as one. true and false are not numbers. Without a default the
    field is required; with one, null counts as absent, as in public configs. Raises an InputError that begins with
    `where`: the file, or the file and the part of it.
    """
    value = config.get(name)
    if value is None and default is not REQUIRED:
        return default
    if name not in config:
        raise InputError(f"{where}: field {name!r} is missing, expected {TYPE_NAMES[kind]}")
    if kind is float and type(value) is int and abs(value) <= 2**53:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise InputError(f"{where}: field {name!r}: expected {TYPE_NAMES[kind]}, found {short(value)}")
    if kind in (int, float) and not least <= value <= most:
        raise InputError(f"{where}: field {name!r}: expected {least:g} to {most:g}, found {short(value)}")
    return value


def one_of(config: dict[str, Any], name: str, choices: Iterable[str], where: str | Path, default=REQUIRED) -> str:
    """The string config[name], which must be one of `choices`. For the rest see `field`."""
    value = field(config, name, str, where, default)
    if value not in choices:
        raise InputError(f"{where}: {name} is {short(value)}, expected {' or '.join(choices)}")
    return value
