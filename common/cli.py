"""How the scripts talk: flags, one-line errors with exit code 2, and times that a person can read."""

import argparse
import os
import sys
from collections.abc import Callable

import parallel
from weights import InputError


class Parser(argparse.ArgumentParser):
    """An argument parser that shows every default, takes no abbreviations and complains in one line."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")


def at_least(least: int, most: int = 2**31) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""

    def whole(text: str) -> int:
        if not text.lstrip("-").isdecimal() or not least <= int(text[:12]) <= most:
            limit = f" and at most {most}" if most < 2**31 else ""
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}{limit}, found {text!r}")
        return int(text)

    return whole


def number(least: float, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number from `least` on, or `above` it."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (value > least if above else value >= least) or value == float("inf"):
            kind = "above" if above else "of at least"
            raise argparse.ArgumentTypeError(f"expected a number {kind} {least:g}, found {text!r}")
        return value

    return parse


def tell(message: str) -> None:
    if parallel.may_speak():
        print(message, file=sys.stderr)


def run(main: Callable[[], int | None]) -> None:
    """Runs a script: its exit code is main's, 2 after bad input, 130 after Ctrl-C."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    sys.stderr.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
        sys.stdout.flush()
    except InputError as error:
        tell(f"error: {error}")
        code = 2
    except KeyboardInterrupt:
        tell("stopped")
        code = 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        tell(f"error: {error.filename or 'input or output'}: {error.strerror or error}")
        code = 2
    sys.exit(code)


def clock(seconds: float) -> str:
    """65.2 -> "1:05"; an hour and more as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
