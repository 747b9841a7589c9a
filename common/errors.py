"""The one exception that users see, and memory that runs out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY_ERRORS = "allocate memory|out of memory|could not create a primitive"  # the last one is oneDNN's


class InputError(ValueError):
    """Input that cannot be used: one line that names the file, the field and what was expected.

    The scripts print it as `error: ...` and exit with code 2.
    """

    def __init__(self, message: str):
        # Names come out of files that may be damaged or hostile: a line break, a terminal escape
        # or a megabyte of text in one must not reach the user's screen.
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__(message if len(message) <= 2000 else message[:2000] + " ...")


@contextmanager
def naming(where: str | Path) -> Iterator[None]:
    """An InputError in the block gets the place that its values came from."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def is_out_of_memory(error: Exception) -> bool:
    """torch has no error of its own for a CPU without memory."""
    return isinstance(error, MemoryError) or re.search(MEMORY_ERRORS, str(error)) is not None


def memory_line(error: Exception, during: str = "") -> str:
    """One line: what was being done, and what the allocator says, which often has the size."""
    reason = (str(error).splitlines() or ["no more is known"])[0]
    return "out of memory: " + (f"{during}: {reason}" if during else reason)


@contextmanager
def memory_for(during: str) -> Iterator[None]:
    """Raises an InputError that says what was being done if an allocation in the block fails."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(memory_line(error, during)) from error
