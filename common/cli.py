"""The command line: argument types, one-line errors with exit code 2, the time that a job still takes."""

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import InputError, is_out_of_memory, memory_line

REPORT_EVERY = 5  # seconds


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not that of a flag which is unset."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults, accepts no abbreviations and reports an error in one line."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=HelpFormatter)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")


def at_least(least: int, most: int = 2**31) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        value = int(text) if re.fullmatch("-?[0-9]{1,18}", text) else None
        if value is None or not least <= value <= most:
            limit = "" if value is not None and value < least else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}{limit}, found {text!r:.40}")
        return value

    return parse


def number(least: float, most: float = sys.float_info.max, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number of at least `least`, or above it, and at most `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (value > least if above else value >= least) or value > most:
            kind, limit = "above" if above else "of at least", f" and at most {most:g}" if value > most < 1e300 else ""
            raise argparse.ArgumentTypeError(f"expected a finite number {kind} {least:g}{limit}, found {text!r:.40}")
        return value

    return parse


def path(text: str) -> Path:
    """An argparse type: a path. Path("") would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found ''")
    return Path(text)


def folder(text: str) -> Path:
    """An argparse type: the path of a folder, which may be missing."""
    if (found := path(text)).exists() and not found.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, found the file {text}")
    return found


def printable(text: object) -> str:
    """A text for the terminal: control characters, which file names may contain, are escaped; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


def open_streams() -> None:
    """Opens /dev/null for the standard streams that the caller has closed. A file that is opened later would get their
    number, and what is printed."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))


def print_error(message: str) -> None:
    """Prints on the standard error. What takes it may be full; the exit code tells the error, too."""
    with suppress(OSError):
        print(printable(message), file=sys.stderr, flush=True)


def discard_output() -> None:
    """Sends what is printed, also what could not be printed yet, to /dev/null: else the interpreter tries again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main: Callable[[], int | None], should_report: Callable[[], bool] = lambda: True) -> None:
    """Runs a script. Its exit code is that of main; 2 after an InputError, 130 after Ctrl-C.

    `should_report` decides whether this process prints the error: of several processes one is enough. Each line of the
    output is flushed, so that a log file has it at once.
    """
    open_streams()
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # file names need not be UTF-8
    sys.stderr.reconfigure(errors="backslashreplace")
    code, message = 0, ""
    try:
        code = main() or 0
        sys.stdout.flush()
    except InputError as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt:
        code, message = 130, "stopped"
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        discard_output()
        code = 141
    except OSError as error:
        code, message = 2, f"error: {error.filename or 'input or output'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code, message = 2, f"error: {memory_line(error)}"
    try:
        sys.stdout.flush()
    except OSError:  # the disk is full
        discard_output()
    if message and should_report():
        print_error(message)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # another Ctrl-C must not interrupt the exit
    sys.exit(code)


@contextmanager
def one_interrupt() -> Iterator[None]:
    """Inside the block the first Ctrl-C or SIGTERM raises KeyboardInterrupt. Others are ignored, so a `finally` in the
    block ends."""
    signals = signal.SIGINT, signal.SIGTERM

    def interrupt(*_) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:  # else the process ends, and no signal may disturb that
            for number, handler in previous.items():
                signal.signal(number, handler)


def format_seconds(seconds: float) -> str:
    """65.2 -> "1:05"; from an hour on h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TimeLeft:
    """Reports how many clips of a job are done and how long the rest takes, at most every REPORT_EVERY seconds.

    The rate is measured from the first update on: before it, workers start or a GPU warms up. An update must follow
    each equal piece of work, such as a batch, or a clip of each worker.
    """

    def __init__(self, what: str, total: int, report: Callable[[str], None] = print):
        self.what, self.total, self.report = what, total, report
        self.first: tuple[int, float] | None = None  # clips done, time
        self.last_report = time.monotonic()

    def update(self, done: int) -> None:
        """`done` clips of `total` are done."""
        now = time.monotonic()
        if self.first is None:
            self.first = done, now
        elif now - self.last_report >= REPORT_EVERY:
            seconds_per_clip = (now - self.first[1]) / (done - self.first[0])
            left = format_seconds(seconds_per_clip * (self.total - done))
            self.report(f"{self.what}: {done}/{self.total} clips, {left} left")
            self.last_report = now
