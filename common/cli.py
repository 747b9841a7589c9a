"""The command line: argument types, one-line errors with exit code 2, signals, the time that a job still takes."""

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from common.errors import InputError, printable

REPORT_EVERY = 5  # seconds
# torch has no exception of its own for a CPU without memory; the last one is oneDNN's.
MEMORY_ERRORS = "allocate memory|out of memory|could not create a primitive"


class Parser(argparse.ArgumentParser):
    """An argument parser that shows an example first, accepts no abbreviations and reports an error in one line."""

    def __init__(self, description: str, example: str | None = None):
        super().__init__(usage=example, description=description, allow_abbrev=False)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")


def number(kind: type, least: float, most: float = 2**31) -> Callable[[str], float]:
    """An argparse type: a number of `kind` int or float from `least` to `most`."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            if least <= (value := kind(text)) <= most:
                return value
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"expected a {what} from {least:g} to {most:g}, found {text!r:.40}")

    return parse


def text(value: str) -> str:
    """An argparse type: text that is not empty and can be written as UTF-8."""
    if not value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise argparse.ArgumentTypeError(f"expected Unicode text that is not empty, found {value!r:.40}")
    return value


def path(value: str) -> Path:
    """An argparse type: no empty path, which would be the working folder."""
    return Path(text(value))


def print_error(message: str) -> None:
    """Prints on the standard error. What takes it may be full; the exit code tells the error, too."""
    with suppress(OSError):
        print(printable(message), file=sys.stderr)
    flush(sys.stderr)


def flush(stream: TextIO) -> None:
    """Writes what is buffered. What a full disk or a gone reader does not take is dropped; else the interpreter would
    try again at its end, and exit with 120."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def set_signals(handler) -> None:
    """Ctrl-C and SIGTERM call the handler from now on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _interrupt(number: int, _) -> None:
    """Raises KeyboardInterrupt, once: a second signal must not disturb what is written after the first."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(main: Callable[[], int | None]) -> None:
    """Runs a script. Its exit code is that of main; 2 after an InputError, an OSError or a lack of memory; 130 after
    Ctrl-C or SIGTERM; 141 if the reader of its output, such as `head`, has gone.

    Each line of the output is flushed, so that a log file has it at once.
    """
    for name in ("stdin", "stdout", "stderr"):  # one that the caller has closed; else the next file gets its number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # file names need not be UTF-8
    sys.stderr.reconfigure(errors="backslashreplace")
    set_signals(_interrupt)
    code, message = 0, ""
    try:
        code = main() or 0
        sys.stdout.flush()
    except InputError as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt:
        code, message = 130, "stopped"
    except BrokenPipeError:
        code = 141
    except OSError as error:
        code, message = 2, f"error: {error.filename or 'input or output'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]  # often the size
        if not (isinstance(error, MemoryError) or re.search(MEMORY_ERRORS, str(error))):
            raise
        code, message = 2, f"error: out of memory; smaller batches or fewer beams may help {reason and f'({reason})'}"
    flush(sys.stdout)
    if message:
        print_error(message)
    set_signals(signal.SIG_IGN)  # another one must not interrupt the exit
    sys.exit(code)


@contextmanager
def deferred_interrupts(repeatable: bool) -> Iterator[list[int]]:
    """Inside the block a first Ctrl-C or SIGTERM is only appended to the yielded list: a run stops between two steps,
    never inside one. A second one interrupts at once, unless `repeatable`: torchrun sends its processes a signal that
    they have received from the terminal already."""
    received: list[int] = []

    def receive(number: int, _) -> None:
        received.append(number)
        if not repeatable:
            signal.signal(number, signal.default_int_handler)

    set_signals(receive)
    yield received
    set_signals(signal.default_int_handler)  # not in a `finally`: after an exception the process ends


def format_seconds(seconds: float) -> str:
    """65.2 -> "0:01:05"."""
    return str(timedelta(seconds=int(seconds)))


class Progress:
    """Speed and time left of a job of `total` steps or clips, of which `done` are done when it begins. The time left is
    that of all that is to come, at the mean pace since the start."""

    def __init__(self, total: int, done: int = 0):
        self.total, self.first = total, done
        self.first_time = time.monotonic()
        self.restart(done)

    def restart(self, done: int) -> None:
        """Measures the speed from here on. Called after a validation, which is no part of the steps."""
        self.last, self.last_time = done, time.monotonic()

    def update(self, done: int) -> tuple[float, float]:
        """Steps per second since the last call, and the seconds that the rest takes."""
        now = time.monotonic()
        speed = (done - self.last) / (now - self.last_time)
        self.restart(done)
        return speed, (now - self.first_time) / (done - self.first) * (self.total - done)

    def report(self, what: str, done: int) -> None:
        """Prints how many clips are done and how long the rest takes, at most every REPORT_EVERY seconds."""
        if time.monotonic() - self.last_time >= REPORT_EVERY:
            _, left = self.update(done)
            print(f"{what}: {done}/{self.total} clips, {format_seconds(left)} left")
