"""Helpers for tests: errors of one line, damaged files."""

import random
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


def damaged(content: bytes, seed: int) -> bytes:
    """Cut short, or up to 40 bits flipped in the first kilobyte or anywhere."""
    rng, content = random.Random(seed), bytearray(content)
    if seed % 4 == 0:
        return bytes(content[: rng.randrange(len(content))])
    for _ in range(rng.choice([1, 2, 8, 40])):
        content[rng.randrange(min(len(content), 1000) if seed % 2 else len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)
