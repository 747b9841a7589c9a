"""The caches against what they keep: frames of videos made here, and arithmetic in place of a ViT."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_video import write_video

from cache import cached_features, cached_frames
from corpora import Clip
from video import read_frames
from weights import InputError


def some_clips(tmp_path, count=5) -> list[Clip]:
    paths = [write_video(tmp_path / f"{i}.mp4", list(range(i, 80, 4))) for i in range(count)]
    return [Clip(p.name, p, (f"caption {i}", "another", "a third")) for i, p in enumerate(paths)]


def test_the_cache_holds_read_frames_and_is_made_again_when_a_file_changes(tmp_path):
    clips, told = some_clips(tmp_path), []
    path = tmp_path / "cache/x.frames"
    cache = cached_frames(clips, path, 4, 32, 1, report=told.append)
    for clip, frames in zip(clips, cache, strict=True):
        assert np.array_equal(frames, read_frames(clip.path, 4, 32))
    cached_frames(clips, path, 4, 32, 1, report=told.append)
    assert len(told) == 1
    write_video(clips[2].path, [0, 5])
    cache = cached_frames(clips, path, 4, 32, 1, report=told.append)
    assert len(told) == 2 and np.array_equal(cache[2], read_frames(clips[2].path, 4, 32))


def test_a_disk_too_small_for_a_cache_is_said_before_any_work(tmp_path, monkeypatch):
    """Five clips of four frames of 32 x 32 are 61,440 bytes; features of 100 fp16 numbers a frame are 4,000."""
    clips, usage = some_clips(tmp_path), type(shutil.disk_usage(tmp_path))
    frames = cached_frames(clips, tmp_path / "there.frames", 4, 32, 1)

    def features(path: Path):
        encode = lambda x: torch.zeros(*x.shape[:2], 100, dtype=torch.float16)  # noqa: E731
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


def test_a_bad_clip_is_named_and_no_cache_is_left(tmp_path):
    clips = some_clips(tmp_path)
    clips[3].path.write_bytes(b"")
    with pytest.raises(InputError, match=r"3\.mp4: an empty file"):
        cached_frames(clips, tmp_path / "cache/x.frames", 4, 32, 1)
    assert list((tmp_path / "cache").iterdir()) == []
