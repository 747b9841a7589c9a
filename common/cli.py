"""The command line: argument types, one-line errors with exit code 2, times in minutes and seconds."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from common.errors import InputError


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults, accepts no abbreviations and reports an error in one line."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip

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


def number(least: float, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number of at least `least`, or above it."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (value > least if above else value >= least) or value == float("inf"):
            kind = "above" if above else "of at least"
            raise argparse.ArgumentTypeError(f"expected a finite number {kind} {least:g}, found {text!r:.40}")
        return value

    return parse


def path(text: str) -> Path:
    """An argparse type: a path. Path("") would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found ''")
    return Path(text)


def run(main: Callable[[], int | None], should_report: Callable[[], bool] = lambda: True) -> None:
    """Runs a script. Its exit code is that of main; 2 after an InputError, 130 after Ctrl-C.

    `should_report` decides whether this process prints the error: of several processes one is enough.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        code, message = 2, f"error: {error.filename or 'input or output'}: {error.strerror or error}"
    if message and should_report():
        print(message, file=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # another Ctrl-C must not interrupt the exit
    sys.exit(code)


def format_seconds(seconds: float) -> str:
    """65.2 -> "1:05"; from an hour on h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
