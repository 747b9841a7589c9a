"""Reading and replacing files, checksums, locks, free space, and the exception of one line.

References: hashlib for checksums; the file system itself. Random bytes have their seed in the test.
"""

import hashlib
import os
import random
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from common import files
from common.errors import InputError
from common.files import (
    acquire_lock,
    check_disk_space,
    format_bytes,
    open_to_read,
    replace_atomically,
    sha256_of,
    sync_folder,
)
from tests.common.helpers import ROOT, refused, run_python


def test_an_input_error_is_one_short_line():
    assert str(InputError("a\nb\x1b[2J\ud800\u202eß")) == r"a\nb\x1b[2J\ud800\u202eß"
    assert len(str(InputError("n" * 1_000_000))) < 2100


def read_all(path: Path) -> bytes:
    with open_to_read(path) as file:
        return file.read()


@pytest.mark.parametrize("read", [read_all, sha256_of])
def test_what_is_not_a_file_is_refused(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "pipe"):
        with refused(str(path), "expected a file"):
            read(path)


def test_sha256_of(tmp_path):
    """Reference: hashlib on 2.5 MB of random bytes, seed 0."""
    content = random.Random(0).randbytes(2_500_000)
    (tmp_path / "f").write_bytes(content)
    assert read_all(tmp_path / "f") == content
    assert sha256_of(tmp_path / "f") == hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------------------- atomic replacement


def replace(path: Path, content: bytes = b"new" * 100_000) -> None:
    with replace_atomically(path) as file:
        file.write(content)


def test_an_exception_in_the_block_keeps_the_old_file(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"old")
    for failure in (RuntimeError("boom"), KeyboardInterrupt(), OSError("of a socket, not of this file")):
        with pytest.raises(type(failure)) as error:
            with replace_atomically(path) as file:
                file.write(b"new" * 100_000)
                raise failure
        assert error.value is failure
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_system_call_keeps_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "state"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with refused(f"cannot write {path}: No space left on device"):
        replace(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_file(tmp_path):
    """A limit on file sizes simulates a full disk: early and late failures, and torch.save, which raises RuntimeError
    for it."""
    pytest.importorskip("resource")
    (tmp_path / "w").write_bytes(b"old")
    code = """
import resource, sys, torch
from common.errors import InputError
from common.files import replace_atomically
from models.safetensors import write_safetensors
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
def early(): write_safetensors(sys.argv[1], {"w": torch.zeros(1_000_000)})
def late(): write_safetensors(sys.argv[1], {f"w{i}": torch.zeros(250) for i in range(150)})
def torch_save():
    with replace_atomically(sys.argv[1]) as file: torch.save(torch.zeros(1_000_000), file)
for save in early, late, torch_save:
    try: save()
    except InputError as error: print(error)
"""
    lines = run_python(code, tmp_path / "w").splitlines()
    assert lines == [f"cannot write {tmp_path / 'w'}: File too large"] * 3
    assert (tmp_path / "w").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "w"]


def test_the_order_of_system_calls_survives_a_power_cut(tmp_path, monkeypatch):
    """The data is flushed, then the file renamed, then the folder flushed ([1] in files.py)."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, r=real: (calls.append(n), r(*args))[1])
    replace(tmp_path / "w")
    assert calls == ["fsync", "replace", "fsync"]
    sync_folder(tmp_path / "missing")  # not an error: some file systems cannot flush folders
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


# ------------------------------------------------------------------------- locks and free space


def test_a_lock_is_held_until_its_process_ends(tmp_path):
    """Another process holds the lock, then is killed."""
    code = "import sys; from pathlib import Path; from common.files import acquire_lock\n"
    code += "assert acquire_lock(Path(sys.argv[1]), wait=False) is not None; print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"held\n"
        assert acquire_lock(tmp_path / "lock", wait=False) is None
        child.kill()
        descriptor = acquire_lock(tmp_path / "lock", wait=True)
    os.close(descriptor)


def test_too_little_disk_space_is_refused(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(0, 0, 250_000))
    check_disk_space(tmp_path, 250_000, "a file")
    with refused(f"a file: needs 300.0 kB, the disk of {tmp_path} has 250.0 kB free"):
        check_disk_space(tmp_path, 300_000, "a file")


def test_format_bytes():
    assert [format_bytes(n) for n in (0, 999, 1000, 1_234_567, 2_200_000_000, 10**16)] == [
        "0 bytes", "999 bytes", "1.0 kB", "1.2 MB", "2.2 GB", "10000.0 TB",
    ]  # fmt: skip
