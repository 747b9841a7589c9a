"""Reading and replacing files, fingerprints, and fields of JSON; tests/models/test_hub.py has locks.

References: hashlib for checksums; the file system itself. Random bytes have their seed in the test.
"""

import hashlib
import math
import os
import random
from pathlib import Path

import pytest

from common import files
from common.errors import InputError
from common.files import field, fingerprint_of, read_json, read_json_lines, sha256_of, write_json
from tests.common.helpers import refused


def read_all(path: Path) -> bytes:
    with files.open_to_read(path) as file:
        return file.read()


@pytest.mark.parametrize("read", [read_all, sha256_of, fingerprint_of, read_json, read_json_lines])
def test_what_is_not_a_file_is_refused(tmp_path, read):
    """Reading a pipe would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "pipe"):
        with refused(str(path), "expected a file"):
            read(path)


def test_checksums(tmp_path):
    """Reference: hashlib on 2.5 MB of random bytes, seed 0. A fingerprint notices any byte of a file up to 16 MiB, and
    the size, the begin and the end of a larger one."""
    content, path = random.Random(0).randbytes(2_500_000), tmp_path / "f"
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()
    found = {fingerprint_of(path)}
    for at in (0, 65_536, 2_000_000, 2_499_999):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        found.add(fingerprint_of(path))
    with open(path, "wb") as file:
        for size, last in ((30_000_000, b""), (30_000_001, b""), (30_000_001, b"x")):
            file.truncate(size)
            file.seek(size - 1)
            file.write(last)
            file.flush()
            found.add(fingerprint_of(path))
    assert len(found) == 8


# ---------------------------------------------------------------------------- atomic replacement


def replace(path: Path, content: bytes = b"new" * 100_000) -> None:
    with files.replace_atomically(path) as file:
        file.write(content)


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("failure", [RuntimeError("boom"), KeyboardInterrupt(), FULL])
def test_an_exception_in_the_block_keeps_the_old_file(tmp_path, failure):
    path = tmp_path / "state"
    path.write_bytes(b"old")
    with pytest.raises(InputError if failure is FULL else type(failure)) as error:
        with files.replace_atomically(path) as file:
            file.write(b"new" * 100_000)
            raise failure
    assert error.value is failure or str(error.value) == f"cannot write {path}: No space left on device"
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_order_of_system_calls_survives_a_power_cut(tmp_path, monkeypatch):
    """The data is flushed, then the file renamed, then the folder flushed ([1] in files.py)."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, r=real: (calls.append(n), r(*args))[1])
    replace(tmp_path / "w")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_target_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "w", tmp_path / "folder"):
        with refused(f"cannot write {path}: "):
            replace(path)
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_link_stays_a_link_and_permissions_follow_the_umask(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    replace(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "real").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_format_bytes():
    found = [files.format_bytes(n) for n in (0, 999, 1000, 1_234_567, 2_200_000_000, 10**16)]
    assert found == ["0 bytes", "999 bytes", "1.0 kB", "1.2 MB", "2.2 GB", "10000.0 TB"]


# ------------------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize("content, word", [
    (b"", "line 1 column 1"), (b'{\n "a": 1,\n "b" 2}', "line 3 column 6"), (b'{"a": "\xff"}', "utf-8"),
    (b"[1]", "expected a JSON object, found [1]"), (b'{"a": {"b": 1, "b": 2}}', "occurs twice"),
    (b"[" * 100_000, "recursion"),
])
def test_what_is_not_a_json_object_is_refused(tmp_path, content, word):
    (tmp_path / "config.json").write_bytes(content)
    with refused(f"{tmp_path}/config.json: ", word):
        read_json(tmp_path / "config.json")


def test_json_is_read_as_it_is_written(tmp_path):
    """A byte order mark, which some editors of Windows write, is skipped."""
    write_json(tmp_path / "a.json", {"a": "é", "path": tmp_path, "l": [1, 0.5, None]})
    assert read_json(tmp_path / "a.json") == {"a": "é", "path": str(tmp_path), "l": [1, 0.5, None]}
    (tmp_path / "b.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_json(tmp_path / "b.json") == {"a": "é"}


@pytest.mark.parametrize("bad", [b"[]", b"3", b"", b"\xff\xfe", b'{"step": 1, "lo\xffss": 1}', b'{"step": 1'])
def test_a_damaged_line_is_named_unless_it_is_the_last(bad, tmp_path):
    path, good = tmp_path / "log.jsonl", b'{"step": 1}'
    path.write_bytes(b"\n".join([good, bad, good]))
    with refused(f"{path}: line 2: "):
        read_json_lines(path)
    path.write_bytes(b"\n".join([good, bad]))
    assert read_json_lines(path) == [{"step": 1}]


def test_a_field_is_checked():
    config = {"n": 3, "x": 0.5, "s": "a", "b": True, "l": [1], "d": {}, "null": None}
    for name, kind in {"n": int, "x": float, "s": str, "b": bool, "l": list, "d": dict}.items():
        assert field(config, name, kind, "f") is config[name]
    number = field(config, "n", float, "f")
    assert number == 3.0 and type(number) is float
    assert field(config, "missing", int, "f", 7) == 7 and field(config, "null", int, "f", None) is None
    assert field(config, "n", int, "f", 7, 3, 3) == 3
    for least, most, words in ((4, 9, "expected 4 to 9, found 3"), (1, 2, "expected 1 to 2, found 3")):
        with refused(f"f: field 'n': {words}"):
            field(config, "n", int, "f", least=least, most=most)


@pytest.mark.parametrize("value, kind, expected", [
    (True, int, "a whole number, found True"), (1.0, int, "a whole number, found 1.0"),
    (math.nan, float, "a number, found nan"), (10**400, float, "a number, found 1000"), (None, dict, "an object"),
])
def test_a_field_of_another_type_is_refused(value, kind, expected):
    with refused("m/config.json: field 'width'", expected):
        field({"width": value}, "width", kind, "m/config.json")
    if value is not None:  # a default is for missing fields, not for wrong ones
        with refused("'width'"):
            field({"width": value}, "width", kind, "m/config.json", None)
    with refused("'width' is missing"):
        field({}, "width", kind, "m/config.json")
