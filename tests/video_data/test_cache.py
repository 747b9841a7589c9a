"""The caches against what they keep: frames of videos made here, and arithmetic in place of a ViT.

Rows are compared to the bit, with `read_frames` or with a cache that was made without a break. What is decoded is
counted in a file, because workers do it; they are forked, so that what is patched here is patched there.
"""

import errno
import io
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_video import write_video

import cache
from cache import cached_features, cached_frames, frame_keys
from corpora import Clip
from pixels import Pixels
from video import plain_view, read_frames
from weights import InputError


@pytest.fixture(autouse=True)
def forked():
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def some_clips(tmp_path, count=5) -> list[Clip]:
    paths = [write_video(tmp_path / f"{i}.mp4", list(range(i, 80, 4))) for i in range(count)]
    return [Clip(p.name, p, (f"caption {i}", "another", "a third")) for i, p in enumerate(paths)]


def change(clip: Clip) -> None:
    """Other frames under another time stamp, whatever the clock's resolution."""
    write_video(clip.path, [0, 5, 10])
    os.utime(clip.path, ns=(0, 12345))


def quiet(_: str) -> None:
    pass


@pytest.fixture
def decoded(tmp_path, monkeypatch) -> Callable[[], list[str]]:
    """A function that tells which files were decoded since it was last asked; `decoded.pids` are the workers."""
    log, real = tmp_path / "decoded.log", cache.read_frames

    def logged(path, *args):
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {path.name}\n")
        return real(path, *args)

    def ask() -> list[str]:
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        ask.pids = {int(pid) for pid, _ in lines}
        return sorted(name for _, name in lines)

    monkeypatch.setattr(cache, "read_frames", logged)
    return ask


def child(work: Callable[[], object]) -> int:
    """Runs `work` in a forked process; its exit code is 0 if that ends well."""
    if (pid := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] == "Z":  # nobody reaps orphans here
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.01)
    return False


def known(clips: list[Clip], count: int, view: int | Pixels) -> dict[bytes, bytes]:
    """The rows' keys on disk -> the bytes they vouch for, in the clips' order."""
    size = plain_view(view).size
    keys = cache._Rows(Path("x"), frame_keys(clips, count, view), (count, 3, size, size), np.uint8).keys
    return {k.tobytes(): read_frames(c.path, count, view).numpy().tobytes() for k, c in zip(keys, clips, strict=True)}


def vouched(path: Path, rows: dict[bytes, bytes]) -> list[bytes]:
    """The keys that stand on disk, each one's row compared with what is known of it."""
    index, held = path.with_name(path.name + ".keys"), path if path.exists() else path.with_name(path.name + ".part")
    if not index.exists() or not held.exists():
        return []
    keys, data = index.read_bytes(), held.read_bytes()
    size = len(next(iter(rows.values())))
    found = []
    for i in range(len(data) // size):
        if (key := keys[32 * i : 32 * i + 32]) in rows:
            assert data[size * i : size * i + size] == rows[key]
            found.append(key)
    return found


def test_the_cache_holds_read_frames_and_is_made_again_when_a_file_changes(tmp_path, decoded):
    """Against read_frames, to the bit; a new time stamp alone and a new id count as changes. Maps made before stay."""
    clips, told = some_clips(tmp_path), []
    path = tmp_path / "cache/x.frames"
    frames = cached_frames(clips, path, 4, 32, 1, report=told.append)
    for clip, row in zip(clips, frames, strict=True):
        assert np.array_equal(row, read_frames(clip.path, 4, 32))
    assert decoded() == [c.id for c in clips] and len(told) == 1
    cached_frames(clips, path, 4, 32, 1, report=told.append)
    assert decoded() == [] and len(told) == 1

    before = frames.tobytes()
    change(clips[2])
    again = cached_frames(clips, path, 4, 32, 1, report=told.append)
    assert len(told) == 2 and np.array_equal(again[2], read_frames(clips[2].path, 4, 32))
    assert decoded() == ["2.mp4"] and frames.tobytes() == before
    os.utime(clips[1].path, ns=(0, 1))
    cached_frames(clips, path, 4, 32, 1, quiet)
    assert decoded() == ["1.mp4"]
    clips[0] = replace(clips[0], id="another")
    cached_frames(clips, path, 4, 32, 1, quiet)
    assert decoded() == ["0.mp4"]


def test_other_settings_and_other_clips_make_all_again(tmp_path, decoded):
    """Each setting in turn under one path, against read_frames, to the bit."""
    clips, path, base = some_clips(tmp_path, 2), tmp_path / "x.frames", Pixels(24, 30)
    cached_frames(clips, path, 4, base, 1, quiet)
    assert len(decoded()) == 2
    asked = [(3, base), (3, Pixels(30, 30)), (3, Pixels(30, 31)), (3, Pixels(30, 31, True)),
             (3, Pixels(30, 31, True, "bilinear"))]  # fmt: skip
    for count, view in asked:
        frames = cached_frames(clips, path, count, view, 1, quiet)
        assert decoded() == ["0.mp4", "1.mp4"]
        assert all(np.array_equal(f, read_frames(c.path, count, view)) for f, c in zip(frames, clips, strict=True))
    cached_frames(clips, path, 3, replace(asked[-1][1], mean=(0, 0, 0)), 1, quiet)
    assert decoded() == []  # bytes are kept as they are decoded
    assert cached_frames(clips[:1], path, *asked[-1], 1, quiet).shape == (1, 3, 3, 30, 30)
    assert decoded() == ["0.mp4"]
    assert not path.with_name("x.frames.part").exists()


def test_caches_of_the_former_layout_are_made_again(tmp_path, decoded):
    """A file of the right size with a note beside it, in which nothing is right."""
    clips, path = some_clips(tmp_path, 2), tmp_path / "x.frames"
    path.write_bytes(bytes(2 * 4 * 3 * 32 * 32))
    path.with_suffix(".json").write_text('{"sha256 of sources": "0", "shape": [2, 4, 3, 32, 32]}')
    frames = cached_frames(clips, path, 4, 32, 1, quiet)
    assert decoded() == ["0.mp4", "1.mp4"] and np.array_equal(frames[1], read_frames(clips[1].path, 4, 32))


def test_a_write_that_is_taken_in_pieces_is_gone_on_with(tmp_path):
    """As of a disk that is nearly full: a file that takes 7 bytes at a time."""

    class Narrow(io.FileIO):
        def write(self, data) -> int:
            return super().write(memoryview(data)[:7])

    with Narrow(tmp_path / "x", "wb") as file:
        cache._write(file, 3, bytes(range(100)))
    assert (tmp_path / "x").read_bytes() == bytes(3) + bytes(range(100))


@pytest.mark.parametrize("workers", [1, 3, 0])
def test_the_number_of_workers_changes_nothing(tmp_path, workers):
    """Eleven clips, more than two for each worker, against read_frames, to the bit."""
    clips = some_clips(tmp_path, 11)
    frames = cached_frames(clips, tmp_path / "x.frames", 2, 32, workers, quiet)
    assert frames.tobytes() == b"".join(known(clips, 2, 32).values())


def test_a_disk_too_small_for_a_cache_is_said_before_any_work(tmp_path, monkeypatch):
    """Five clips of four frames of 32 x 32 are 61,440 bytes; features of 100 bf16 numbers a frame are 4,000."""
    clips, usage = some_clips(tmp_path), type(shutil.disk_usage(tmp_path))
    frames = cached_frames(clips, tmp_path / "there.frames", 4, 32, 1)

    def features(path: Path):
        encode = lambda x: torch.zeros(*x.shape[:2], 100, dtype=torch.bfloat16)  # noqa: E731
        return cached_features(frames, path, "key", encode, images=8)

    for free, made in ((61_439, False), (61_440, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
        if made:
            cached_frames(clips, tmp_path / "x.frames", 4, 32, 1)
        else:
            with pytest.raises(InputError, match=r"x\.frames, .*needs 61\.4 kB, .* 61\.4 kB free"):
                cached_frames(clips, tmp_path / "x.frames", 4, 32, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 3_999))
    with pytest.raises(InputError, match=r"y\.features, .*needs 4\.0 kB"):
        features(tmp_path / "y.features")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 4_000))
    assert features(tmp_path / "y.features").shape == (5, 4, 100)
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_bad_clip_is_named_and_the_good_ones_are_kept(tmp_path, decoded, monkeypatch):
    """Of five clips the fourth is empty: the three before it are not decoded again, nor is room asked for them."""
    clips, usage = some_clips(tmp_path), type(shutil.disk_usage(tmp_path))
    path, good = tmp_path / "cache/x.frames", clips[3].path.read_bytes()
    clips[3].path.write_bytes(b"")
    for expected in (["0.mp4", "1.mp4", "2.mp4", "3.mp4"], ["3.mp4"]):
        with pytest.raises(InputError, match=r"3\.mp4: an empty file"):
            cached_frames(clips, path, 4, 32, 1, quiet)
        assert not path.exists() and set(expected) <= set(decoded()) <= {*expected, "4.mp4"}
    clips[3].path.write_bytes(good)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2 * 12_288))
    frames = cached_frames(clips, path, 4, 32, 1, quiet)
    assert decoded() == ["3.mp4", "4.mp4"] and frames.tobytes() == b"".join(known(clips, 4, 32).values())


def test_a_worker_that_dies_is_told_with_its_clip(tmp_path, monkeypatch):
    """As when the system runs out of memory and kills one; nothing waits for it."""
    clips, real = some_clips(tmp_path, 3), cache.read_frames
    monkeypatch.setattr(cache, "read_frames", lambda p, *a: os._exit(9) if p.name == "1.mp4" else real(p, *a))
    with pytest.raises(InputError, match=r"1\.mp4: .*died"):
        cached_frames(clips, tmp_path / "x.frames", 4, 32, 1, quiet)


def test_a_disk_that_fills_up_loses_nothing(tmp_path, decoded, monkeypatch):
    """The fourth row is written in part, then the disk is full: one line; three rows are not decoded again."""
    clips, path, real, rows = some_clips(tmp_path), tmp_path / "x.frames", cache._write, []

    def full(file, offset, data):
        if file.name.endswith(".part"):
            rows.append(offset)
            if len(rows) == 4:
                real(file, offset, memoryview(data)[:100])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, offset, data)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_write", full)
        with pytest.raises(InputError, match=r"^cannot write \S*x\.frames: No space left on device$"):
            cached_frames(clips, path, 4, 32, 1, quiet)
    decoded()
    frames = cached_frames(clips, path, 4, 32, 1, quiet)
    assert decoded() == ["3.mp4", "4.mp4"] and frames.tobytes() == b"".join(known(clips, 4, 32).values())


def test_a_file_that_may_not_grow_is_told_in_one_line(tmp_path):
    """The system's own refusal, under a limit on file sizes, in a process of its own."""
    import resource

    clips = some_clips(tmp_path, 2)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(InputError, match=r"^cannot write \S*x\.frames: File too large$"):
            cached_frames(clips, tmp_path / "x.frames", 4, 32, 1, quiet)

    assert exit_code(child(work)) == 0


def test_random_kills_lose_nothing_and_spoil_nothing(tmp_path, decoded, monkeypatch):
    """20 SIGKILLs after delays of seed 0 against a cache made without a break, to the bit.

    After each, every key on disk vouches for the right bytes, no worker is left, and what is vouched for is not
    decoded again. Rows are written in two halves 2 ms apart, so that writes are hit too.
    """
    clips = some_clips(tmp_path, 4)
    for i in range(4, 20):
        os.link(clips[i % 4].path, tmp_path / f"{i}.mp4")
        clips.append(Clip(f"{i}.mp4", tmp_path / f"{i}.mp4", ("",)))
    path, rows, rng = tmp_path / "x.frames", known(clips, 2, 32), np.random.default_rng(0)
    names = dict(zip(rows, (c.id for c in clips), strict=True))
    real = cache._write

    def slowly(file, offset, data):
        half = len(data) // 2
        real(file, offset, memoryview(data)[:half])
        time.sleep(0.002 if file.name.endswith(".part") else 0)
        real(file, offset + half, memoryview(data)[half:])

    def work():
        cache._write, cache.FLUSH = slowly, 0.02
        cached_frames(clips, path, 2, 32, 2, quiet)

    kills = midway = 0
    while kills < 20:
        before = {names[key] for key in vouched(path, rows)}
        pid = child(work)
        time.sleep(rng.uniform(0, 0.2))
        os.kill(pid, signal.SIGKILL)
        killed = exit_code(pid) == -signal.SIGKILL
        kills += killed
        assert not before & set(decoded())
        assert all(gone(pid, 5) for pid in decoded.pids)
        after = vouched(path, rows)
        assert before <= {names[key] for key in after}
        midway += killed and 0 < len(after) < 20
        if path.exists():
            for file in tmp_path.glob("x.frames*"):
                file.unlink()
    assert midway >= 5
    assert cached_frames(clips, path, 2, 32, 2, quiet).tobytes() == b"".join(rows.values())


@pytest.mark.parametrize("begun", ["a file changed", "other settings", "part changed"])
def test_every_kill_point_is_safe(tmp_path, decoded, monkeypatch, begun):
    """A process is killed before its first, second, third, ... step on the disk, or half-way through a write or copy.

    Every key on disk then vouches for the right bytes, old or new, and the next call ends with those of read_frames,
    having decoded what no key vouched for. So does a call for what there was before, with the changed file put back.
    """
    clips, start, path = some_clips(tmp_path, 3), tmp_path / "start", tmp_path / "now/x.frames"
    start.mkdir()
    old = clips[1].path.read_bytes(), clips[1].path.stat().st_mtime_ns
    view = Pixels(16, 17) if begun == "other settings" else Pixels(16, 16)
    rows = known(clips, 2, view)
    before = b"".join(rows.values())
    if begun != "part changed":
        cached_frames(clips, start / "x.frames", 2, view, 1, quiet)
    else:
        clips[2].path.rename(tmp_path / "aside")
        clips[2].path.write_bytes(b"")
        with pytest.raises(InputError):
            cached_frames(clips, start / "x.frames", 2, 16, 1, quiet)
        os.replace(tmp_path / "aside", clips[2].path)
    change(clips[1])
    wanted = known(clips, 2, 16)
    rows |= wanted
    steps = 0

    def work(last: int):
        left = last

        def deadly(real, half):
            def step(*args, **named):
                nonlocal left
                left -= 1
                if left == 0:
                    half(*args)
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **named)

            return step

        def half_a_write(file, offset, data, real=cache._write):
            real(file, offset, memoryview(data)[: len(data) // 2])

        def half_a_copy(source, target):
            target.write_bytes(source.read_bytes()[:1500])

        cache._write = deadly(cache._write, half_a_write)
        shutil.copyfile = deadly(shutil.copyfile, half_a_copy)
        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, deadly(getattr(os, name), lambda *_: None))
        cache.FLUSH = 0
        cached_frames(clips, path, 2, 16, 1, quiet)

    while True:
        shutil.rmtree(path.parent, ignore_errors=True)
        shutil.copytree(start, path.parent)
        code = exit_code(child(partial(work, steps + 1)))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        steps += 1
        decoded()
        there = vouched(path, rows)
        shutil.copytree(path.parent, tmp_path / "back", dirs_exist_ok=True)
        missing = [c.id for c, key in zip(clips, wanted, strict=True) if key not in there]
        assert cached_frames(clips, path, 2, 16, 1, quiet).tobytes() == b"".join(wanted.values())
        assert decoded() == missing

        changed = clips[1].path.read_bytes()
        clips[1].path.write_bytes(old[0])
        os.utime(clips[1].path, ns=(0, old[1]))
        assert cached_frames(clips, tmp_path / "back/x.frames", 2, view, 1, quiet).tobytes() == before
        decoded()
        shutil.rmtree(tmp_path / "back")
        clips[1].path.write_bytes(changed)
        os.utime(clips[1].path, ns=(0, 12345))
    assert steps >= 10


def test_two_processes_at_once_make_one_cache(tmp_path, decoded):
    """Both end well, the second says that it waits, and each clip is decoded once."""
    clips, path, told = some_clips(tmp_path, 6), tmp_path / "x.frames", tmp_path / "told"
    real = cache._write

    def slowly(*args):
        time.sleep(0.02)
        real(*args)

    def report(line: str) -> None:
        with open(told, "a") as file:
            file.write(line + "\n")

    def work():
        cache._write = slowly
        frames = cached_frames(clips, path, 4, 32, 1, report)
        assert frames.tobytes() == b"".join(known(clips, 4, 32).values())

    pids = [child(work), child(work)]
    assert [exit_code(pid) for pid in pids] == [0, 0]
    assert decoded() == [f"{i}.mp4" for i in range(6)]
    assert told.read_text().count("waiting for another process") == 1


@pytest.fixture
def sleepy(tmp_path, monkeypatch) -> Callable[[float], Path]:
    """Workers that sleep so long for each clip; they note their ids in the file, and whether they were interrupted."""
    notes = tmp_path / "notes"

    def note(word: object) -> None:
        with open(notes, "a") as file:
            file.write(f"{word}\n")

    def sleep(*_):
        note(os.getpid())
        try:
            time.sleep(sleepy.seconds)
        except KeyboardInterrupt:
            note("interrupted")
        return torch.zeros(4, 3, 32, 32, dtype=torch.uint8)

    def sleepy(seconds: float) -> Path:
        sleepy.seconds = seconds
        monkeypatch.setattr(cache, "read_frames", sleep)
        return notes

    return sleepy


def two_notes(path: Path) -> list[int]:
    while not path.exists() or len(path.read_text().split()) < 2:
        time.sleep(0.01)
    return [int(word) for word in path.read_text().split()]


@pytest.mark.parametrize("whom", ["all", "the parent"])
def test_ctrl_c_ends_at_once_without_a_word_of_the_workers(tmp_path, capfd, sleepy, whom):
    """Two workers in the middle of clips of 20 s; all is over within 3 s, and nothing is printed."""
    clips, notes = some_clips(tmp_path, 4), sleepy(20)

    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            cached_frames(clips, tmp_path / "x.frames", 4, 32, 2, quiet)
        except KeyboardInterrupt:
            os._exit(130)

    parent = child(work)
    workers = two_notes(notes)
    begun = time.monotonic()
    if whom == "all":  # as a terminal does, in an order in which the workers would have time to complain
        for pid in workers:
            os.kill(pid, signal.SIGINT)
        time.sleep(0.1)
    os.kill(parent, signal.SIGINT)
    assert exit_code(parent) == 130 and time.monotonic() - begun < 3
    assert all(gone(pid, 1) for pid in workers)
    assert "".join(capfd.readouterr()) == "" and two_notes(notes) == workers


def test_orphans_end_by_themselves_and_hold_nothing_up(tmp_path, sleepy, monkeypatch):
    """The parent is killed while two workers decode for a second more: the next call need not wait for them."""
    notes, clips, path, told = sleepy(1), some_clips(tmp_path, 4), tmp_path / "x.frames", []
    parent = child(lambda: cached_frames(clips, path, 4, 32, 2, quiet))
    workers = two_notes(notes)
    os.kill(parent, signal.SIGKILL)
    assert exit_code(parent) == -signal.SIGKILL
    monkeypatch.setattr(cache, "read_frames", read_frames)
    frames = cached_frames(clips, path, 4, 32, 2, told.append)
    assert frames.tobytes() == b"".join(known(clips, 4, 32).values()) and len(told) == 1
    assert all(gone(pid, 5) for pid in workers)


def test_features_go_on_where_they_were_stopped(tmp_path):
    """2 x the mean of each frame in bf16, exact; stopped in the seventh clip, gone on with in other batches."""
    frames = np.random.default_rng(0).integers(0, 256, (10, 2, 3, 8, 8), np.uint8)
    expected = (torch.from_numpy(frames).double().mean((2, 3, 4)) * 2).bfloat16().view(torch.uint16).numpy()
    path, seen, told = tmp_path / "x.features", [], []

    def encode(x: torch.Tensor, last: int = 100) -> torch.Tensor:
        seen.append(len(x))
        if sum(seen[1:]) > last:  # the first call is for the shape
            raise KeyboardInterrupt
        return (x.double().mean((2, 3, 4)) * 2).bfloat16()

    with pytest.raises(KeyboardInterrupt):
        cached_features(frames, path, "key", lambda x: encode(x, 6), images=6, report=told.append)
    assert not path.exists() and told[0] == f"features: 40 bytes go into {path}" and "to go" in told[1]
    for key, images, fresh in (("key", 8, [4]), ("key", 2, []), ("other", 16, [8, 2])):
        seen.clear()
        features = cached_features(frames, path, key, encode, images, quiet)
        assert features.dtype == np.uint16 and np.array_equal(features, expected) and seen[1:] == fresh
    seen.clear()
    frames[[3, 7]] += 1
    expected[[3, 7]] = encode(torch.from_numpy(frames[[3, 7]])).view(torch.uint16).numpy()
    keys = ["changed" if i in (3, 7) else "other" for i in range(10)]
    features = cached_features(frames, path, keys, encode, 8, quiet)
    assert seen[2:] == [2] and np.array_equal(features, expected)
