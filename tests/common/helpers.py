"""Helpers for tests: errors of one line, and code in a process of its own."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import InputError

ROOT = Path(__file__).resolve().parent.parent.parent


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """The block raises an InputError of one printable line that contains the words."""
    with pytest.raises(InputError) as error:
        yield
    text = str(error.value)
    assert text.isprintable(), text
    for word in words:
        assert word in text, f"expected {word!r} in: {text}"


def run_python(code: str, *arguments: str | Path) -> str:
    """Runs code in a new interpreter, for measuring its memory or limiting it; returns its output."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout
