"""Helpers for tests: errors of one line."""

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
