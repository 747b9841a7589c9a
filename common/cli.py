"""The command line: argument types, one-line errors with exit code 2, the time that a job still takes."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from common.errors import InputError, explain_out_of_memory

REPORT_EVERY = 5  # seconds


class Parser(argparse.ArgumentParser):
    """An argument parser that shows an example first, accepts no abbreviations and reports an error in one line."""

    def __init__(self, description: str, example: str | None = None):
        super().__init__(usage=example, description=description, allow_abbrev=False)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")


def number(kind: type, least: float, most: float = 2**31, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a number of `kind` int or float from `least` (or above it) to `most`."""

    what = "whole number" if kind is int else "number"
    limits = f"above {least:g} and at most {most:g}" if above else f"from {least:g} to {most:g}"

    def parse(text: str) -> float:
        with suppress(ValueError):
            value = kind(text)
            if least <= value <= most and not (above and value == least):
                return value
        raise argparse.ArgumentTypeError(f"expected a {what} {limits}, found {text!r:.40}")

    return parse


def path(text: str) -> Path:
    """An argparse type: a path. Path("") would be the current folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a path, found {text!r}")
    return Path(text)


def folder(text: str) -> Path:
    """An argparse type: the path of a folder, which may be missing."""
    if (found := path(text)).exists() and not found.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, found the file {text}")
    return found


def printable(text: object) -> str:
    """A text for the terminal: control characters, which file names may contain, are escaped; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


def print_error(message: str) -> None:
    """Prints on the standard error. What takes it may be full; the exit code tells the error, too."""
    with suppress(OSError):
        print(printable(message), file=sys.stderr, flush=True)


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
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    code, message = 0, ""
    try:
        with explain_out_of_memory():
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
    try:
        sys.stdout.flush()
    except OSError:  # the disk is full, or the reader gone: else the interpreter would try again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message:
        print_error(message)
    for number in (signal.SIGINT, signal.SIGTERM):  # another one must not interrupt the exit
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def format_seconds(seconds: float) -> str:
    """65.2 -> "1:05"; from an hour on h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TimeLeft:
    """Prints how many clips of a job are done and how long the rest takes, at most every REPORT_EVERY seconds."""

    def __init__(self, what: str, total: int):
        self.what, self.total = what, total
        self.start = self.last_report = time.monotonic()

    def update(self, done: int) -> None:
        """`done` clips of `total` are done."""
        now = time.monotonic()
        if now - self.last_report >= REPORT_EVERY:
            left = format_seconds((now - self.start) / done * (self.total - done))
            print(f"{self.what}: {done}/{self.total} clips, {left} left")
            self.last_report = now
