"""The caches against what they store: frames of generated videos, and arithmetic in place of a ViT.

Arrays are compared with those of `read_frames`, to the bit. Workers log each clip that they decode. They are forked, so
they inherit functions that are patched here.
"""

import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.errors import InputError
from common.preprocessing import Preprocessing
from tests.common.test_workers import exit_code, has_ended, run_in_child
from tests.video_data.test_video import write_video
from video_data import cache
from video_data.cache import ClipCache, cached_features, cached_frames
from video_data.datasets import Clip
from video_data.video import read_frames


@pytest.fixture(autouse=True)
def fork_start_method():
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def make_clips(folder: Path, count: int = 5) -> list[Clip]:
    paths = [write_video(folder / f"{i}.mp4", list(range(i, 80, 4))) for i in range(count)]
    return [Clip(path.name, path, ("a caption",)) for path in paths]


def ignore(_: str) -> None:
    pass


def fill(clips: list[Clip], folder: Path, split="train", count=4, size=32, workers=1, report=ignore) -> ClipCache:
    return cached_frames(clips, folder / "cache", split, count, size, workers, report)


def check_frames(frames: ClipCache, clips: list[Clip], size=32) -> None:
    assert len(frames) == len(clips)
    for array, clip in zip(frames, clips, strict=True):
        assert np.array_equal(array, read_frames(clip.path, frames.shape[0], size))


@pytest.fixture
def decoded(tmp_path, monkeypatch) -> Callable[[], list[str]]:
    """A function that returns the files decoded since its last call; `decoded.pids` are the workers."""
    log, real = tmp_path / "decoded.log", cache.read_frames

    def logged(path, *args):
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {path.name}\n")
        return real(path, *args)

    def read_log() -> list[str]:
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        read_log.pids = {int(pid) for pid, _ in lines}
        return sorted(name for _, name in lines)

    monkeypatch.setattr(cache, "read_frames", logged)
    return read_log


# ------------------------------------------------------------------------------------------- files


def test_arrays_are_stored_as_raw_bytes_and_mapped_read_only(tmp_path):
    stored = ClipCache(tmp_path, ["a", "b", "c"], (2, 3), np.uint16)
    assert stored.missing() == [0, 1, 2]
    stored.write(1, np.arange(6, dtype=np.uint16).reshape(3, 2).T)
    assert (tmp_path / "b").read_bytes() == np.array([0, 2, 4, 1, 3, 5], np.uint16).tobytes()
    assert stored[1].tolist() == [[0, 2, 4], [1, 3, 5]] and isinstance(stored[1], np.memmap)
    assert not stored[1].flags.writeable and stored.missing() == [0, 2] and len(stored) == 3
    (tmp_path / "c").write_bytes(bytes(11))
    assert stored.missing() == [0, 2]
    assert stored.read(1, [1, 0, 1]).tolist() == [[1, 3, 5], [0, 2, 4], [1, 3, 5]]
    with pytest.raises(InputError, match="c: was cut short"):
        stored.read(2, [0, 1])
    with pytest.raises(FileNotFoundError):
        stored[0]
    with pytest.raises(IndexError):
        stored[3]


def test_files_of_other_keys_are_deleted_but_not_fresh_temporary_files(tmp_path):
    """A temporary file may belong to a running process; after a day, it is left over from a kill."""
    stored = ClipCache(tmp_path, ["a"], (2,), np.uint8)
    stored.write(0, np.zeros(2, np.uint8))
    (tmp_path / "folder").mkdir()
    for name in ("b", ".a.1.tmp", ".a.2.tmp"):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".a.1.tmp", (0, time.time() - cache.DAY - 60))
    stored.delete_others()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.2.tmp", "a", "folder"]


# ------------------------------------------------------------------------------------------ frames


def test_only_new_and_changed_clips_are_decoded(tmp_path, decoded):
    """Other content, a new time stamp alone and a new id are changes. Adding, removing and reordering clips is not."""
    *clips, added = make_clips(tmp_path, 6)
    frames = fill(clips, tmp_path)
    check_frames(frames, clips)
    assert decoded() == [clip.id for clip in clips]
    check_frames(fill(clips, tmp_path), clips)
    assert decoded() == []

    old = frames[2]
    expected = old.tobytes()
    write_video(clips[2].path, [0, 5, 10])
    os.utime(clips[2].path, ns=(0, 12345))
    check_frames(fill(clips, tmp_path), clips)
    assert decoded() == ["2.mp4"] and old.tobytes() == expected  # an array that is open stays valid
    os.utime(clips[1].path, ns=(0, 1))
    check_frames(fill(clips, tmp_path), clips)
    assert decoded() == ["1.mp4"]
    clips[0] = replace(clips[0], id="another")
    check_frames(fill(clips, tmp_path), clips)
    assert decoded() == ["0.mp4"] and len(list(frames.folder.iterdir())) == 5

    clips = [clips[3], added, clips[0], clips[4]]
    check_frames(fill(clips, tmp_path), clips)
    assert decoded() == ["5.mp4"] and len(list(frames.folder.iterdir())) == 4
    check_frames(fill(clips[1:], tmp_path), clips[1:])
    assert decoded() == []


def test_a_file_of_the_wrong_size_is_made_again(tmp_path, decoded):
    clips = make_clips(tmp_path, 2)
    frames = fill(clips, tmp_path)
    path = frames.folder / frames.keys[1]
    path.write_bytes(path.read_bytes()[:-1])
    decoded()
    check_frames(fill(clips, tmp_path), clips)
    assert decoded() == ["1.mp4"]


def test_other_settings_have_other_folders(tmp_path, decoded):
    clips, folders = make_clips(tmp_path, 2), set()
    settings = [(4, Preprocessing(24, 30)), (3, Preprocessing(24, 30)), (3, Preprocessing(30, 30)),
                (3, Preprocessing(30, 31)), (3, Preprocessing(30, 31, True)),
                (3, Preprocessing(30, 31, True, "bilinear"))]  # fmt: skip
    settings += [(3, Preprocessing(30, 30, True, "lanczos", longest_edge=edge)) for edge in (31, 32)]
    for count, preprocessing in settings:
        frames = fill(clips, tmp_path, count=count, size=preprocessing)
        check_frames(frames, clips, preprocessing)
        assert decoded() == ["0.mp4", "1.mp4"]
        assert frames.folder.name.startswith(f"train-{count}x{preprocessing.size}-")
        folders.add(frames.folder)
    assert len(folders) == 8
    for count, preprocessing in settings:
        fill(clips, tmp_path, count=count, size=preprocessing)
    fill(clips, tmp_path, count=3, size=replace(preprocessing, mean=(0, 0, 0)))
    assert decoded() == []  # uint8 frames do not depend on the mean
    assert fill(clips, tmp_path, split="val").folder != fill(clips, tmp_path).folder


@pytest.mark.parametrize("workers", [1, 3, 0])
def test_the_number_of_workers_changes_nothing(tmp_path, workers):
    clips = make_clips(tmp_path, 11)
    check_frames(fill(clips, tmp_path, workers=workers), clips)


def test_a_clip_that_cannot_be_decoded_is_named_and_the_others_are_kept(tmp_path, decoded, monkeypatch):
    """Of five clips the fourth is empty. The three before it are not decoded again and need no space."""
    clips, usage = make_clips(tmp_path), type(shutil.disk_usage(tmp_path))
    content = clips[3].path.read_bytes()
    clips[3].path.write_bytes(b"")
    for expected in (["0.mp4", "1.mp4", "2.mp4", "3.mp4"], ["3.mp4"]):
        with pytest.raises(InputError, match=r"3\.mp4: an empty file"):
            fill(clips, tmp_path)
        assert set(expected) <= set(decoded()) <= {*expected, "4.mp4"}
    clips[3].path.write_bytes(content)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2 * 12_288))
    check_frames(fill(clips, tmp_path), clips)
    assert {"3.mp4"} <= set(decoded()) <= {"3.mp4", "4.mp4"}


def test_a_worker_that_dies_is_reported_with_its_clip(tmp_path, monkeypatch):
    """As when the system is out of memory and kills one. The other worker decodes another clip at that time."""
    clips, second, folder = make_clips(tmp_path, 4), tmp_path / "second", re.escape(str(tmp_path))
    second.touch()

    def read(path, *args):
        if path.name == "1.mp4":
            while not second.exists():
                time.sleep(0.01)
            os._exit(9)
        if path.name == "2.mp4":
            second.touch()
            time.sleep(60)
        return read_frames(path, *args)

    monkeypatch.setattr(cache, "read_frames", read)
    with pytest.raises(InputError, match=rf"^{folder}/1\.mp4: .*died"):
        fill(clips, tmp_path, workers=1)
    second.unlink()
    with pytest.raises(InputError, match=rf"^{folder}/1\.mp4, {folder}/2\.mp4: .*died"):
        fill(clips[1:], tmp_path, workers=2)


def test_a_write_that_fails_is_a_one_line_error(tmp_path):
    """A limit on file sizes, in a separate process. No temporary file is left."""
    import resource

    clips, folder = make_clips(tmp_path, 2), re.escape(str(tmp_path / "cache"))

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(InputError, match=rf"^cannot write {folder}/train\S*: File too large$"):
            fill(clips, tmp_path)

    assert exit_code(run_in_child(work)) == 0
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_lack_of_space_is_an_error_before_any_work(tmp_path, monkeypatch, decoded):
    """Five clips of four frames of 32 x 32 are 61,440 bytes; features of 100 bf16 numbers per frame are 4,000."""
    clips, usage = make_clips(tmp_path), type(shutil.disk_usage(tmp_path))
    encode = lambda x: torch.zeros(*x.shape[:2], 100, dtype=torch.bfloat16)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 61_439))
    with pytest.raises(InputError, match=r"train-4x32-\w{8}, frames: needs 61\.4 kB, .* 61\.4 kB free"):
        fill(clips, tmp_path)
    assert decoded() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 61_440))
    frames = fill(clips, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 3_999))
    with pytest.raises(InputError, match=r"-features-\w{8}, features: needs 4\.0 kB"):
        cached_features(frames, "key", (4, 100), encode, 8, ignore)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 4_000))
    assert cached_features(frames, "key", (4, 100), encode, 8, ignore).shape == (4, 100)


def test_the_space_for_all_caches_is_checked_and_reported_at_once(tmp_path, monkeypatch, decoded):
    """By hand: 5 clips of 4 frames of 32 x 32 are 61,440 bytes, 5 of 2 frames 30,720; features of 100 bf16 numbers for
    each of 5 clips are 1,000. A file of another key is deleted first."""
    clips, usage, reports = make_clips(tmp_path), type(shutil.disk_usage(tmp_path)), []
    size = Preprocessing(32, 32)
    root = tmp_path / "cache"
    frames = [cache.frames_cache(clips, root, split, count, size) for split, count in (("train", 4), ("val", 2))]
    planned = {"frames": frames, "features": [cache.features_cache(frames[0], "key", (100,))]}
    assert not root.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 93_159))
    with pytest.raises(InputError, match=r"cache, frames 92\.2 kB, features 1\.0 kB: needs 93\.2 kB, .* 93\.2 kB free"):
        cache.check_space(planned, root, reports.append)
    assert reports == [f"cache: frames 92.2 kB, features 1.0 kB, go into {root}"] and decoded() == []

    (frames[0].folder / "other").touch()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 93_160))
    cache.check_space(planned, root, reports.append)
    assert not (frames[0].folder / "other").exists()
    fill(clips, tmp_path, size=size)
    cache.check_space(planned, root, reports.append)
    assert reports[2] == f"cache: frames 30.7 kB, features 1.0 kB, go into {root}"
    fill(clips, tmp_path, "val", 2, size)
    cached_features(frames[0], "key", (100,), lambda x: torch.zeros(len(x), 100, dtype=torch.bfloat16), 8, ignore)
    cache.check_space(planned, root, reports.append)
    assert len(reports) == 3


def test_the_time_left_of_several_workers_is_right_from_the_first_report_on(tmp_path, monkeypatch):
    """21 clips of 10 s each for four workers that take 100 s to start, on a fake clock: they are done in fours."""
    clips, now, reports = make_clips(tmp_path, 21), 0.0, []

    def submit(*_) -> Future:
        future = Future()
        future.set_result(None)
        return future

    @contextmanager
    def worker_pool(workers: int) -> Iterator[SimpleNamespace]:
        nonlocal now
        assert workers == 4
        now += 100
        yield SimpleNamespace(submit=submit)

    def as_completed(futures: dict) -> Iterator[Future]:
        nonlocal now
        for i, future in enumerate(futures):
            now += 10 if i % 4 == 0 else 0
            yield future

    monkeypatch.setattr(cache.time, "monotonic", lambda: now)
    monkeypatch.setattr(cache, "worker_pool", worker_pool)
    monkeypatch.setattr(cache, "as_completed", as_completed)
    fill(clips, tmp_path, workers=4, report=reports.append)
    assert reports[1:] == [
        "frames: 5/21 clips, 0:40 left", "frames: 9/21 clips, 0:30 left", "frames: 13/21 clips, 0:20 left",
        "frames: 17/21 clips, 0:10 left", "frames: 21/21 clips, 0:00 left", "frames: 21/21 clips in 2:40",
    ]  # fmt: skip


def stop_and_kill(pid: int) -> list[int]:
    """SIGKILL. -> the ids of the workers that the process had."""
    os.kill(pid, signal.SIGSTOP)  # so that it starts no more of them
    workers = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    os.kill(pid, signal.SIGKILL)
    return workers


def test_all_bad_clips_are_named_at_once(tmp_path, decoded, monkeypatch):
    """Two of five: one line with both, in order; the other three are cached, and only the two are decoded again. More
    than MAX_NAMED are counted."""
    clips, folder = make_clips(tmp_path), re.escape(str(tmp_path))
    clips[3].path.write_bytes(b"")
    clips[1].path.write_bytes(b"no video")
    for names in (rf"^2 clips: {folder}/1\.mp4: cannot be read[^;]*; {folder}/3\.mp4: an empty file[^;]*$", "."):
        with pytest.raises(InputError, match=names):
            fill(clips, tmp_path, workers=2)
    assert sorted(decoded()) == sorted(["0.mp4", "1.mp4", "2.mp4", "3.mp4", "4.mp4", "1.mp4", "3.mp4"])
    monkeypatch.setattr(cache, "MAX_NAMED", 1)
    with pytest.raises(InputError, match=rf"^2 clips: {folder}/1\.mp4: [^;]*; and 1 more$"):
        fill(clips, tmp_path)


def test_random_kills_lose_nothing_and_damage_nothing(tmp_path, decoded, monkeypatch):
    """10 SIGKILLs of the parent after random delays, seed 0: from its start, or from the first decoded clip.

    After each, every file that has a key as its name has the right bytes, no worker is left, and the next call does not
    decode these clips again. Each write takes 30 ms longer, so that most kills happen between writing and renaming.
    """
    clips = make_clips(tmp_path, 4)
    for i in range(4, 20):
        os.link(clips[i % 4].path, tmp_path / f"{i}.mp4")
        clips.append(Clip(f"{i}.mp4", tmp_path / f"{i}.mp4", ("",)))
    frames = fill(clips, tmp_path, count=2)
    expected = {key: frames[i].tobytes() for i, key in enumerate(frames.keys)}
    names = dict(zip(frames.keys, (clip.id for clip in clips), strict=True))
    shutil.rmtree(frames.folder)
    decoded()
    monkeypatch.setattr(os, "fsync", lambda _: time.sleep(0.03))

    def complete() -> set[str]:
        """The clips whose files are there, compared with their bytes."""
        paths = [frames.folder / key for key in names if (frames.folder / key).exists()]
        assert all(path.read_bytes() == expected[path.name] for path in paths)
        return {names[path.name] for path in paths}

    rng, kills, midway, temporary = np.random.default_rng(0), 0, 0, 0
    while kills < 10:
        before = complete()
        pid = run_in_child(lambda: fill(clips, tmp_path, count=2, workers=2))
        deadline = time.monotonic() + 30 * (kills % 2)
        while time.monotonic() < deadline and not (tmp_path / "decoded.log").exists():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.4))
        workers = stop_and_kill(pid)
        killed = exit_code(pid) == -signal.SIGKILL
        assert all(has_ended(worker, 5) for worker in workers)
        assert not before & set(decoded())
        after = complete()
        assert before <= after
        kills, midway = kills + killed, midway + (killed and 0 < len(after) < 20)
        temporary += len(list(frames.folder.glob(".*.tmp")))
        if len(after) == 20:
            shutil.rmtree(frames.folder)
    assert midway >= 3 and temporary >= 1
    check_frames(fill(clips, tmp_path, count=2), clips)


def test_two_processes_may_fill_one_folder_at_once(tmp_path):
    clips = make_clips(tmp_path, 6)
    pids = [run_in_child(lambda: check_frames(fill(clips, tmp_path, workers=2), clips)) for _ in range(2)]
    assert [exit_code(pid) for pid in pids] == [0, 0]
    folder = fill(clips, tmp_path).folder
    assert len(list(folder.iterdir())) == 6


# ---------------------------------------------------------------------------------------- features


def make_frames(folder: Path, clips: int = 10) -> tuple[ClipCache, torch.Tensor]:
    """Random frames (clips, 2, 3, 8, 8), seed 0, cached and as a tensor."""
    frames = np.random.default_rng(0).integers(0, 256, (clips, 2, 3, 8, 8), np.uint8)
    stored = ClipCache(folder / "frames", [f"key{i}" for i in range(clips)], (2, 3, 8, 8), np.uint8)
    stored.folder.mkdir()
    for i, array in enumerate(frames):
        stored.write(i, array)
    return stored, torch.from_numpy(frames)


def mean_features(x: torch.Tensor) -> torch.Tensor:
    return (x.double().mean((2, 3, 4)) * 2).bfloat16()


def test_features_continue_where_they_were_stopped(tmp_path):
    """2 x the mean of each frame in bf16, exact. Stopped in the seventh clip, continued in other batches."""
    frames, tensor = make_frames(tmp_path)
    batches, reports = [], []

    def encode(x: torch.Tensor, limit: int = 100) -> torch.Tensor:
        batches.append(len(x))
        if sum(batches) > limit:
            raise KeyboardInterrupt
        return mean_features(x)

    with pytest.raises(KeyboardInterrupt):
        cached_features(frames, "key", (2,), lambda x: encode(x, 6), 6, reports.append)
    assert reports[0].startswith("features: 10 clips, 40 bytes, go into ")
    for key, images, expected in (("key", 8, [4]), ("key", 2, []), ("other", 16, [8, 2])):
        batches.clear()
        features = cached_features(frames, key, (2,), encode, images, ignore)
        assert features.dtype == np.uint16 and features.shape == (2,) and batches == expected
        assert np.array_equal(np.stack(list(features)), mean_features(tensor).view(torch.uint16))
        assert features.folder.parent == tmp_path and features.folder.name.startswith("frames-features-")
    batches.clear()
    keys = [f"new{i}" if i in (3, 7) else key for i, key in enumerate(frames.keys)]
    changed = replace(frames, keys=keys)
    for i in (3, 7):
        changed.write(i, np.full((2, 3, 8, 8), i, np.uint8))
    features = cached_features(changed, "other", (2,), encode, 8, ignore)
    assert batches == [2] and features[7].tolist() == torch.full((2,), 14.0).bfloat16().view(torch.uint16).tolist()
    assert len(list(features.folder.iterdir())) == 10


def test_the_reported_time_left_ignores_the_first_batch(tmp_path, monkeypatch):
    """The first batch takes 1,000 s on a fake clock, the others 10 s each: 20 s are left before the last two."""
    frames, _ = make_frames(tmp_path)
    now, reports, durations = 0.0, [], iter([1000, 10, 10, 10, 10])
    monkeypatch.setattr(cache.time, "monotonic", lambda: now)

    def encode(x: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += next(durations)
        return mean_features(x)

    cached_features(frames, "key", (2,), encode, 4, reports.append)
    assert reports[1:] == [
        "features: 4/10 clips, 0:30 left", "features: 6/10 clips, 0:20 left", "features: 8/10 clips, 0:10 left",
        "features: 10/10 clips, 0:00 left", "features: 10/10 clips in 17:20",
    ]  # fmt: skip
