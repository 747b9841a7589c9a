"""The one exception that users see, and how what a damaged file raises becomes one."""

import csv
import pickle
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What parsers raise, Python's and torch's, when the bytes are not what they expect.
DAMAGE = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
          TypeError, ValueError, csv.Error, pickle.UnpicklingError, struct.error, zipfile.BadZipFile)


def printable(text: object) -> str:
    """A text as one line for the terminal: line breaks and control characters, which file names may contain, are
    escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class InputError(ValueError):
    """Input that cannot be used: one line that names the file, the field and what was expected.

    The scripts print it as `error: ...` and exit with code 2.
    """

    def __init__(self, message: str):
        # Names come out of files that may be damaged or hostile: a line break, a terminal escape
        # or a megabyte of text in one must not reach the user's screen.
        message = printable(message)
        super().__init__(message if len(message) <= 2000 else message[:2000] + " ...")


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns what a damaged file raises while it is parsed into an InputError that begins with `path`.

    For blocks that only parse: any other fault inside would look like bad input.
    """
    try:
        yield
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except DAMAGE as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        if isinstance(error, KeyError):
            reason = f"expected a field {reason}"
        elif isinstance(error, OSError):
            reason = error.strerror or reason
        else:
            reason = f"is damaged or of another kind: {type(error).__name__}: {reason}"
        raise InputError(f"{path}: {reason}") from error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns the OSError of a full disk, or of a path that cannot be written to, into "cannot write PATH: reason"."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
