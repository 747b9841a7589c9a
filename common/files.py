"""Files: atomic replacement, flushing, checksums, locks, free space.

References
[1] T. Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014: why a new file is flushed to the disk
    before it is renamed over the old one, and the folder after that.
"""

import hashlib
import io
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from common.errors import InputError


@contextmanager
def open_to_read(path: str | Path) -> Iterator[BinaryIO]:
    """A regular file, opened to be read. Raises InputError where the system refuses."""
    if not os.path.isfile(path):  # reading a pipe would block for ever
        found = "a folder" if os.path.isdir(path) else "none"
        raise InputError(f"{path}: expected a file, found {found}")
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


class _RecordingFile(io.FileIO):
    """Keeps the OSError of a failed write: torch.save replaces that of a full disk by a RuntimeError."""

    failure: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


@contextmanager
def replace_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write that becomes `path` when the block ends without an exception [1].

    Whenever the program or the machine stops, `path` is the complete old file or the complete new one.
    After an exception in the block the old file stays and no temporary file is left.
    Raises InputError "cannot write PATH: reason" when the disk is full, read-only and so on.
    """
    real = Path(os.path.realpath(path))  # a link stays a link
    temporary = real.with_name(f".{real.name}.{secrets.token_hex(8)}.tmp")
    try:
        raw = _RecordingFile(temporary, "xb")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    file = io.BufferedWriter(raw)
    try:
        yield file
        try:
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(temporary, real)
        except OSError as error:
            raw.failure = error
            raise
    except BaseException as error:  # Ctrl-C too
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            os.unlink(temporary)
        if raw.failure is not None:
            reason = raw.failure.strerror or raw.failure
            raise InputError(f"cannot write {path}: {reason}") from error
        raise
    sync_folder(real.parent)


def sync_folder(folder: Path) -> None:
    """Flushes the names of files that were created or renamed in the folder [1]."""
    with suppress(OSError):  # some file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    """The file's SHA-256 in hex. Raises InputError when it cannot be read."""
    digest = hashlib.sha256()
    with open_to_read(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def acquire_lock(path: Path, wait: bool) -> int | None:
    """Locks the file `path` for this process; -> a file descriptor that holds the lock until it is closed.

    Where another process holds it: None, or with `wait` the lock as soon as that process ends. The system releases
    the lock however the process ends. lockf and not flock: a forked child does not inherit it.
    """
    import fcntl  # not on Windows

    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # POSIX allows either
        os.close(descriptor)
        return None
    return descriptor


def check_disk_space(folder: Path, needed: int, what: str) -> None:
    """Raises an InputError that starts with `what` if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{what}: needs {format_bytes(needed)}, the disk of {folder} has {format_bytes(free)} free")


def format_bytes(count: int) -> str:
    """1234567 -> "1.2 MB"."""
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:.{min(power, 1)}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
