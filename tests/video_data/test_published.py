"""Fetching and unpacking a dataset from a server of this machine, which publishes what was packed here."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_hub import Server

import published
from weights import InputError


def tar(**files: bytes | str) -> bytes:
    """An archive of files, or of links to a path that is given as text."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            if isinstance(content, str):
                entry.type, entry.linkname, content = tarfile.SYMTYPE, content, b""
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def zipped(**files: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def deflated() -> bytes:
    """An archive whose compressed bytes are none."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", b"some words, " * 99)
    content = bytearray(packed.getvalue())
    content[31:40] = b"\xff" * 9
    return bytes(content)


DEFLATED = deflated()


@pytest.fixture
def server(monkeypatch):
    server = Server()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    names = {"msvd": ["a.txt", "v.tar"], "msrvtt": ["c.zip"]}
    monkeypatch.setattr(published, "ADDRESSES", {k: [f"{server.url}/{n}" for n in v] for k, v in names.items()})
    yield server
    server.close()


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name[0] != "."}


def test_a_dataset_is_fetched_and_unpacked_once(server, tmp_path):
    server.files |= {"/a.txt": b"words", "/v.tar": tar(**{"Clips/x.avi": b"1", "Clips/y.avi": b"22"}),
                     "/c.zip": zipped(**{"M/z.mp4": b"333"})}  # fmt: skip
    published.download("msvd", tmp_path / "d")
    published.download("msrvtt", tmp_path / "d")
    whole = {"a.txt": b"words", "Clips/x.avi": b"1", "Clips/y.avi": b"22", "M/z.mp4": b"333"}
    assert files(tmp_path / "d") == whole
    asked = len(server.requests)
    published.download("msrvtt", tmp_path / "d")
    assert files(tmp_path / "d") == whole and len(server.requests) == asked


@pytest.mark.parametrize("name, content", [
    ("v.tar", tar(**{"../out": b"x"})), ("v.tar", tar(**{"Clips": "/etc"})), ("v.tar", b"no archive"),
    ("v.tar", tar(**{"Clips/x.avi": b"1" * 3000})[:1500]), ("v.tar", tar(**{"a\0b": b"1"})[:900]),
    ("c.zip", DEFLATED), ("c.zip", b"PK no archive"), ("c.zip", zipped(x=b"1" * 99)[:-30]),
    ("c.zip", zipped(x=b"1").replace(b"\x14\x00\x00\x00", b"\x63\x00\x00\x00")),  # of a later version
    ("c.zip", zipped(x=b"1").replace(b"\x14\x00\x00\x00\x00", b"\x14\x00\x01\x00\x00")),  # encrypted
])  # fmt: skip
def test_a_bad_archive_is_one_line_and_leaves_nothing(server, tmp_path, name, content):
    root = tmp_path / "d"
    (root / "there").mkdir(parents=True)
    server.files |= {"/a.txt": b"words", f"/{name}": content}
    with pytest.raises(InputError, match=name) as error:
        published.download("msvd" if name == "v.tar" else "msrvtt", root)
    assert str(error.value).isprintable()
    assert set(files(root)) <= {"a.txt", name} and not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["d"] and not list(root.glob(".unpacking*"))


def test_what_is_there_stays_and_what_was_cut_short_is_finished(server, tmp_path):
    """A folder of the user's, and of an archive's two entries one that a first try had moved already."""
    server.files |= {"/a.txt": b"words", "/v.tar": tar(**{"A/x": b"1", "Clips/y": b"2", "z": b"3"})}
    for name in ("A", "Clips"):
        (tmp_path / name).mkdir()
    (tmp_path / "Clips/mine").write_bytes(b"4")
    told = []
    published.download("msvd", tmp_path, told.append)
    assert files(tmp_path) == {"a.txt": b"words", "Clips/mine": b"4", "z": b"3"}
    assert sum("stays as it is" in line for line in told) == 2


def test_nothing_is_published_of_one_s_own(tmp_path):
    with pytest.raises(InputError, match="--download: nothing is published of 'folder', only of msvd, msrvtt"):
        published.download("folder", tmp_path)
