"""JSON objects and their checked fields: what is accepted, and the error of one line for everything else."""

import math
import os

import pytest

from common.errors import InputError
from common.files import bounded, field, read_json
from tests.common.helpers import refused


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "line 1 column 1"),
        (b'{\n "a": 1,\n "b" 2}', "line 3 column 6"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b"[1]", "[1]"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' occurs twice"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_read_json_refuses(tmp_path, content, word):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with refused(str(path), word):
        read_json(path)


def test_a_byte_order_mark_is_skipped(tmp_path):
    """Some editors of Windows write one."""
    (tmp_path / "captions.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_json(tmp_path / "captions.json") == {"a": "é"}


def test_read_json_refuses_what_is_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "pipe"):
        with refused(str(path), "expected a file"):
            read_json(path)


def test_field():
    config = {"n": 3, "x": 0.5, "s": "a", "b": True, "l": [1], "d": {}, "null": None}
    for name, kind in {"n": int, "x": float, "s": str, "b": bool, "l": list, "d": dict}.items():
        assert field(config, name, kind, "f") is config[name]
    number = field(config, "n", float, "f")
    assert number == 3.0 and type(number) is float
    assert field(config, "missing", int, "f", 7) == 7
    assert field(config, "null", int, "f", None) is None
    assert field(config, "n", int, "f", 7) == 3


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (True, int, "a whole number, found True"),
        (True, float, "a number, found True"),
        (1.0, int, "a whole number, found 1.0"),
        ("1", int, "a whole number, found '1'"),
        (1, bool, "true or false, found 1"),
        (None, dict, "an object, found None"),
        ({}, list, "a list, found {}"),
        (math.nan, float, "a number, found nan"),
        (10**400, float, "a number, found 1000"),
        ("x" * 10_000, float, "a number, found 'xxx"),
    ],
)
def test_field_refuses(value, kind, expected):
    with refused("m/config.json", "'width'", expected):
        field({"width": value}, "width", kind, "m/config.json")
    with pytest.raises(InputError, match=r"^.{0,200}$"):
        field({"width": value}, "width", kind, "m/config.json")
    if value is not None:  # a default is for missing fields, not for wrong ones
        with refused("'width'"):
            field({"width": value}, "width", kind, "m/config.json", None)
    with refused("'width' is missing"):
        field({}, "width", kind, "m/config.json")


def test_bounded():
    config = {"n": 3, "x": 0.5}
    assert bounded(config, "n", int, "f", 3, 3) == 3
    assert bounded(config, "x", float, "f", 0, 1) == 0.5
    assert bounded(config, "missing", float, "f", 0, 1, 0.25) == 0.25
    for least, most, words in ((4, 9, "expected at least 4"), (1, 2, "expected at most 2")):
        with refused(f"f: n is 3, {words}"):
            bounded(config, "n", int, "f", least, most)
    with refused("'x'", "a whole number"):
        bounded(config, "x", int, "f", 0, 1)
