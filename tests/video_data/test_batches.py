"""Processes, caches and batches.

References: `read_frames`, to the bit; arithmetic instead of a ViT; enumeration of what is drawn.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.preprocessing import Preprocessing
from tests.common.helpers import ROOT, refused
from tests.video_data.test_video import write_video
from video_data import batches
from video_data.annotations import Clip
from video_data.batches import ClipCache, run_in_processes
from video_data.video import read_clip, read_frames

SIZE = Preprocessing(32, 32)


# -------------------------------------------------------------------------------------- processes


def square(number: int) -> tuple[int, int]:
    return number**2, torch.get_num_threads()


def end_process(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_are_in_order_and_each_process_has_one_thread():
    """torch's random numbers are those of a run whose cache is complete. A process that is killed is an InputError."""
    torch.manual_seed(0)
    assert run_in_processes("squares", square, [(n,) for n in range(12)]) == [(n * n, 1) for n in range(12)]
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert run_in_processes("squares", square, []) == [] and drawn == torch.rand(1)
    with refused("a.mp4, or one after it: its process died"):
        run_in_processes("tasks", end_process, [("a.mp4",)] * 3)


CORES = len(os.sched_getaffinity(0))  # those that processes of their own may use
SLEEP = """
import os, pathlib, sys, time
from common import cli
from video_data.batches import run_in_processes
def sleep(name):
    (pathlib.Path(sys.argv[1]) / str(os.getpid())).touch()
    time.sleep(60)
cli.run(lambda: run_in_processes("tasks", sleep, [("a",)] * 9))
"""


def test_ctrl_c_ends_all_processes_at_once_in_one_line(tmp_path):
    """Tasks of 60 s. As a terminal does, SIGINT goes to all processes."""
    command = [sys.executable, "-c", SLEEP, tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True) as process:
        while len(list(tmp_path.iterdir())) < min(2, CORES):
            time.sleep(0.01)
        start_time = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate() == (None, b"stopped\n") and process.returncode == 130
    assert time.monotonic() - start_time < 5
    assert not any(Path(f"/proc/{path.name}").exists() for path in tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ caches


def make_clips(folder: Path, count: int = 5) -> list[Clip]:
    paths = [write_video(folder / f"{i}.mp4", list(range(i, 80, 4))) for i in range(count)]
    return [Clip(path.name, path, ("a caption",)) for path in paths]


def fill(clips: list[Clip], folder: Path, split="train", count=4, preprocessing=SIZE, with_times=False) -> ClipCache:
    """The cache, compared with what `read_frames` reads."""
    cache = batches.frames_cache(clips, folder / "cache", split, count, preprocessing, with_times)
    batches.fill_frames(cache, clips, preprocessing)
    for array, clip in zip(cache, clips, strict=True):
        assert np.array_equal(array, read_frames(clip.path, count, preprocessing))
    return cache


@pytest.fixture
def decoded(monkeypatch) -> Callable[[], list[str]]:
    """A function that returns the files decoded, in this process, since its last call."""
    names = []

    def logged(path, *args):
        names.append(path.name)
        return read_clip(path, *args)

    monkeypatch.setattr(batches, "read_clip", logged)
    monkeypatch.setattr(batches, "run_in_processes", lambda what, function, tasks: [function(*task) for task in tasks])
    return lambda: sorted(names.pop() for _ in range(len(names)))


def test_arrays_are_stored_as_raw_bytes(tmp_path):
    """A clip is stored, another not, and a third is one byte short."""
    stored = ClipCache(tmp_path, ["a", "b", "c"], (2, 3), np.uint16)
    stored.write(1, np.arange(6, dtype=np.uint16).reshape(3, 2).T)
    assert (tmp_path / "b").read_bytes() == np.array([0, 2, 4, 1, 3, 5], np.uint16).tobytes()
    assert stored.read(1, [1, 0, 1]).tolist() == [[1, 3, 5], [0, 2, 4], [1, 3, 5]]
    (tmp_path / "c").write_bytes(bytes(11))
    assert stored.missing() == [0, 2]
    for i, name in ((2, "c"), (0, "a")):
        with refused(f"{tmp_path}/{name}: was deleted or cut short; start again to make it anew"):
            stored[i]


def test_only_new_changed_and_cut_files_are_decoded(tmp_path, decoded):
    """Other content, a new time stamp alone and a new id are changes. Adding, removing and reordering clips is not."""
    *clips, added = make_clips(tmp_path, 6)
    fill(clips, tmp_path)
    assert decoded() == [clip.id for clip in clips]
    write_video(clips[2].path, [0, 5, 10])
    os.utime(clips[2].path, ns=(0, 12345))
    os.utime(clips[1].path, ns=(0, 1))
    fill(clips, tmp_path)
    assert decoded() == ["1.mp4", "2.mp4"]
    clips = [clips[3], added, replace(clips[0], id="another"), clips[4]]
    frames = fill(clips, tmp_path)
    assert decoded() == ["0.mp4", "5.mp4"]
    path = frames.folder / frames.keys[1]
    path.write_bytes(path.read_bytes()[:-1])
    fill(clips[1:], tmp_path)
    assert decoded() == ["5.mp4"]


def test_other_settings_have_other_folders(tmp_path, decoded):
    clips, lanczos = make_clips(tmp_path, 1), Preprocessing(30, 30, True, "lanczos", longest_edge=31)
    settings = [Preprocessing(24, 30), Preprocessing(30, 30), Preprocessing(30, 31), Preprocessing(30, 31, True)]
    settings += [Preprocessing(30, 31, True, "bilinear"), lanczos, replace(lanczos, longest_edge=32)]
    settings = [("train", 3, each) for each in settings] + [("train", 4, lanczos), ("val", 3, lanczos)]
    assert len({fill(clips, tmp_path, *each).folder for each in settings}) == len(decoded()) == 9
    fill(clips, tmp_path, "val", 3, replace(lanczos, mean=(0, 0, 0)))
    assert decoded() == []  # uint8 frames do not depend on the mean


def test_all_bad_clips_are_named_at_once_and_the_others_are_kept(tmp_path, decoded):
    clips = make_clips(tmp_path)
    for i in (1, 3):
        clips[i].path.write_bytes(b"no video")
    for expected in ([clip.id for clip in clips], ["1.mp4", "3.mp4"]):
        with refused("2 clips cannot be read: ", f"{tmp_path}/1.mp4: ", f"; {tmp_path}/3.mp4: "):
            fill(clips, tmp_path)
        assert decoded() == expected


def test_the_space_for_all_caches_is_checked_before_any_work(tmp_path, monkeypatch, capsys):
    """By hand: 5 clips of 4 frames of 32 x 32 are 61,440 bytes, 5 of 2 frames 30,720; features of 100 bf16 numbers for
    each of 5 clips are 1,000."""
    clips, usage, root = make_clips(tmp_path), type(shutil.disk_usage(tmp_path)), tmp_path / "cache"
    frames = [batches.frames_cache(clips, root, split, count, SIZE) for split, count in (("train", 4), ("val", 2))]
    planned = {"frames": frames, "features": [batches.features_cache(frames[0], "key", (100,))]}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 93_159))
    with refused("cache, frames 92.2 kB, features 1.0 kB: needs 93.2 kB", " 93.2 kB free"):
        batches.check_space(planned)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 93_160))
    batches.check_space(planned)
    assert f"cache: frames 92.2 kB, features 1.0 kB, go into {root}" in capsys.readouterr().out
    batches.fill_frames(frames[0], clips, SIZE)
    batches.check_space(planned)
    assert "cache: frames 30.7 kB, features 1.0 kB" in capsys.readouterr().out


def test_features_continue_where_they_were_stopped(tmp_path):
    """Random frames, seed 0; 2 x the mean of each frame in bf16, exact. Stopped in the seventh clip, continued in other
    batches; another key makes all again."""
    tensor = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (10, 2, 3, 8, 8), np.uint8))
    frames, sizes = ClipCache(tmp_path / "frames", [f"key{i}" for i in range(10)], (2, 3, 8, 8), np.uint8), []
    for i, array in enumerate(tensor.numpy()):
        frames.write(i, array)

    def encode(x: torch.Tensor, limit: int = 100) -> torch.Tensor:
        sizes.append(len(x))
        if sum(sizes) > limit:
            raise KeyboardInterrupt
        return (x.double().mean((2, 3, 4)) * 2).bfloat16()[..., None]

    features = batches.features_cache(frames, "key", (2, 1))
    with pytest.raises(KeyboardInterrupt):
        batches.fill_features(features, frames, lambda x: encode(x, 6), 6)
    for key, images, expected in (("key", 8, [4]), ("key", 2, []), ("other", 16, [8, 2])):
        sizes.clear()
        features = batches.features_cache(frames, key, (2, 1))
        batches.fill_features(features, frames, encode, images)
        assert sizes == expected
        assert np.array_equal(np.stack(list(features)), encode(tensor).view(torch.uint16))


def test_datasets_have_separate_cache_folders(tmp_path, monkeypatch):
    monkeypatch.delenv("QADAPTER_FRAMES", raising=False)
    assert batches.cache_folder("msvd", Path("a")) == Path("a/.cache")
    monkeypatch.setenv("QADAPTER_FRAMES", str(tmp_path))
    folders = [batches.cache_folder(name, Path(root)) for name, root in (("msvd", "a"), ("msvd", "b"), ("folder", "a"))]
    assert len({*folders}) == 3 and {folder.parent for folder in folders} == {tmp_path}


# --------------------------------------------------------------------------- examples and batches


CHARACTERS = SimpleNamespace(encode=lambda text: [ord(c) for c in text])  # a tokenizer: one token per character


def test_randomness_is_the_documented_one(tmp_path):
    """Frames and captions recomputed from the generators [seed, 2, clip, epoch] and [seed, 1, clip, cycle]. K = 2 of 3
    captions: over 3 epochs each occurs twice, and none twice before all have occurred. 3 clips with 6 cached frames of
    2 x 2; all pixels of frame j of clip i are 6 i + j."""
    clips = [Clip(f"{i}", Path(f"{i}.mp4"), (f"caption {i}", "another", "a third")) for i in range(3)]
    cache = ClipCache(tmp_path, ["0", "1", "2"], (6, 3, 2, 2), np.uint8)
    for i in range(3):
        levels = np.arange(6 * i, 6 * i + 6, dtype=np.uint8)
        cache.write(i, levels[:, None, None, None] * np.ones((3, 2, 2), np.uint8))
    examples = batches.TrainingExamples(clips, cache, CHARACTERS, 3, 2, seed=5, eos_id=7, max_tokens=40)
    for clip, epoch in ((0, 0), (2, 4)):
        positions = (np.arange(3) + np.random.default_rng([5, 2, clip, epoch]).uniform(0, 1, 3)) / 3
        found = examples.read([(clip, epoch)]).frames[0, :, 0, 0, 0].tolist()
        assert found == [6 * clip + int(p * 6) for p in positions]
    for clip in range(3):
        cycles = [np.random.default_rng([5, 1, clip, cycle]).permutation(3) for cycle in (0, 1)]
        sampled = [ids for epoch in range(3) for ids in examples.sample_captions(clip, epoch)]
        assert sampled == [examples.captions[clip][i] for cycle in cycles for i in cycle]
    labels = examples.read([(0, 0), (1, 0)]).labels  # (2, 2, L)
    expected = examples.sample_captions(0, 0) + examples.sample_captions(1, 0)
    for row, ids in zip(labels.flatten(0, 1).tolist(), expected, strict=True):
        assert row == ids + [-100] * (len(row) - len(ids))


def test_times_are_stored_beside_frames(tmp_path, decoded):
    """Of a cache without times, the clips are decoded once more, and never again. A training example has the times of
    its own frames, also where a row of the cache is a pair."""
    clips = make_clips(tmp_path, 2)
    fill(clips, tmp_path, count=6)
    decoded()
    _, cache = (fill(clips, tmp_path, count=6, with_times=True) for _ in range(2))
    assert decoded() == ["0.mp4", "1.mp4"]
    times = [read_clip(clip.path, 6, SIZE)[1] for clip in clips]
    assert [row.tolist() for row in cache.times] == times
    examples = batches.TrainingExamples(clips, cache, CHARACTERS, 3, 1, seed=0, eos_id=7, max_tokens=40)
    keys = [(0, 3), (1, 0)]
    for (i, epoch), found in zip(keys, examples.times(keys).tolist(), strict=True):
        frames = examples.read([(i, epoch)]).frames[0].numpy()
        read = [[np.array_equal(frame, stored) for stored in cache[i]].index(True) for frame in frames]
        assert found == [times[i][k] for k in [*read, 6]] and len(set(read)) == 3
    pairs = batches.features_cache(cache, "key", (3, 5))
    pairs.write(1, np.zeros((3, 5), np.uint16))
    examples = batches.TrainingExamples(clips, pairs, CHARACTERS, 3, 1, seed=0, eos_id=7, max_tokens=40)
    assert examples.read([(1, 0)]).frames.shape == (1, 3, 5) and examples.times(keys).tolist() == times


def test_features_become_bf16_and_captions_are_normalized_and_truncated(tmp_path):
    """The uint16 bits of 6 bf16 feature vectors. At most 40 tokens and EOS; punctuation inside a caption stays."""
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache = ClipCache(tmp_path, ["key"], (6, 5), np.uint16)
    cache.write(0, features.view(torch.uint16).numpy())
    clips = [Clip("a", Path("a.mp4"), ('  "A man  said: hi, there!" ', "ab" * 30, "c" * 40, "d" * 41))]
    examples = batches.TrainingExamples(clips, cache, CHARACTERS, 3, 1, seed=0, eos_id=7, max_tokens=40)
    sampled = examples.read([(0, 0)]).frames
    assert sampled.dtype == torch.bfloat16 and sampled.shape == (1, 3, 5)
    assert all(any(torch.equal(vector, f) for f in features) for vector in sampled[0])
    texts = ["".join(map(chr, ids[:-1])) for ids in examples.captions[0]]
    assert texts == ["a man said: hi, there", "ab" * 20, "c" * 40, "d" * 40]
    assert examples.num_truncated == 2 and {ids[-1] for ids in examples.captions[0]} == {7}


def test_prefetch_keeps_the_order_and_loads_at_most_one_more():
    """The next item is requested before this one is used, but not a second one. An error is raised in its place."""
    requested, used = [], []

    def load(key: int) -> int:
        requested.append(key)
        return 6 // (3 - key)

    with pytest.raises(ZeroDivisionError):
        for value in batches.prefetch(load, range(9)):
            used.append(value)
            assert len(requested) <= len(used) + 1
    assert used == [2, 3, 6] and requested[:4] == [0, 1, 2, 3] and list(batches.prefetch(load, [])) == []


def test_epoch_batches_contain_each_clip_once_per_epoch_and_can_start_in_the_middle():
    every = list(batches.epoch_batches(10, 3, 2, seed=5))
    for epoch in (0, 1):
        keys = [key for batch in every[3 * epoch : 3 * epoch + 3] for key in batch]
        permutation = np.random.default_rng([5, 3, epoch]).permutation(10)
        assert keys == [(clip, epoch) for clip in permutation[:9].tolist()]
    assert list(batches.epoch_batches(10, 3, 2, seed=5, first_step=4)) == every[4:] and len(every) == 6
