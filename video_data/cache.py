"""Frames of clips, and their features (the ViT's hidden states after the adapted blocks): computed once and kept on the
disk, one file per clip.

    ROOT/train-32x224-1a2b3c4d/KEY                      frames (M, 3, S, S), uint8
    ROOT/train-32x224-1a2b3c4d-features-5e6f7a8b/KEY    features (M, ...), bf16

KEY is a hash of everything that the array depends on. A file is written under a temporary name, flushed and renamed, so
a file called KEY is complete. After a kill at any moment, the next call continues with the missing clips. Two processes
may fill one folder at once; they do the same work twice. Before a folder is filled, files of other keys are deleted, as
well as temporary files that are a day old. Newer ones may belong to a process that is still running.

Letters: B clips, M candidate frames per clip, S side in pixels.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.cli import TimeLeft, format_seconds
from common.errors import InputError
from common.files import check_disk_space, format_bytes, replace_atomically
from common.preprocessing import Preprocessing
from common.workers import worker_pool
from video_data.datasets import Clip
from video_data.video import as_preprocessing, read_frames

READER_VERSION = 3  # raise this when `read_frames` chooses or converts frames differently
DAY = 24 * 3600  # seconds
MAX_NAMED = 100  # clips in one error


def _hash(*content) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class ClipCache:
    """Arrays of one shape and dtype, one per clip: cache[i] is mapped from the file folder/keys[i]."""

    folder: Path
    keys: list[str]
    shape: tuple[int, ...]  # of one clip's array
    dtype: type

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> np.memmap:
        return np.memmap(f"{self.folder}/{self.keys[i]}", self.dtype, "r", shape=self.shape)

    def read(self, i: int, indices: Sequence[int]) -> np.ndarray:
        """cache[i][indices], read into memory: for a training step twice as fast as mapping 64 files."""
        rows = np.empty((len(indices), *self.shape[1:]), self.dtype)
        with open(f"{self.folder}/{self.keys[i]}", "rb", buffering=0) as file:
            for row, index in zip(rows, indices, strict=True):
                file.seek(int(index) * row.nbytes)
                if file.readinto(row) != row.nbytes:
                    raise InputError(f"{file.name}: was cut short; it is made again by the next call")
        return rows

    @property
    def clip_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def missing(self) -> list[int]:
        """Clips whose file is absent or has the wrong size."""
        paths = [self.folder / key for key in self.keys]
        return [i for i, p in enumerate(paths) if not p.is_file() or p.stat().st_size != self.clip_bytes]

    def write(self, i: int, array: np.ndarray) -> None:
        """Raises InputError when the disk is full, read-only and so on."""
        assert (array.shape, array.dtype) == (self.shape, self.dtype)
        with replace_atomically(self.folder / self.keys[i]) as file:
            file.write(np.ascontiguousarray(array))

    def delete_others(self) -> None:
        """Deletes files of other keys, and temporary files that are a day old."""
        for path in set(self.folder.iterdir()) - {self.folder / key for key in self.keys}:
            with suppress(FileNotFoundError):  # another process was faster
                if path.is_file() and (path.suffix != ".tmp" or time.time() - path.stat().st_mtime > DAY):
                    path.unlink()


def _make_room(caches: Sequence[ClipCache]) -> int:
    """Creates the folders of incomplete caches and deletes files of other keys in them; -> the bytes still missing."""
    needed = 0
    for cache in caches:
        if missing := cache.missing():
            cache.folder.mkdir(parents=True, exist_ok=True)
            cache.delete_others()
            needed += len(missing) * cache.clip_bytes
    return needed


def check_space(caches: Mapping[str, Sequence[ClipCache]], root: Path, report: Callable = print) -> None:
    """Reports the size of what is missing in all caches of the folder `root`: {"frames": [cache, ...], ...}.

    Deletes files of other keys first. Raises InputError if the disk lacks the space for all of them together.
    """
    if needed := {what: size for what, group in caches.items() if (size := _make_room(group))}:
        sizes = ", ".join(f"{what} {format_bytes(size)}" for what, size in needed.items())
        report(f"cache: {sizes}, go into {root}")
        check_disk_space(root, sum(needed.values()), f"{root}, {sizes}")


def _fill(cache: ClipCache, what: str, make: Callable[[list[int]], Iterator[int]], report: Callable) -> None:
    """Runs make(missing clips), which writes their files and yields the number of clips done after equal pieces of
    work. Reports the time left."""
    if not (missing := cache.missing()):
        return
    total, needed = len(missing), _make_room([cache])
    check_disk_space(cache.folder, needed, f"{cache.folder}, {what}")
    report(f"{what}: {total} clips, {format_bytes(needed)}, go into {cache.folder}")
    start_time, time_left = time.monotonic(), TimeLeft(what, total, report)
    with closing(make(missing)) as counts:  # ends the workers after any exception
        for done in counts:
            time_left.update(done)
    report(f"{what}: {total}/{total} clips in {format_seconds(time.monotonic() - start_time)}")


def _decode_clip(cache: ClipCache, path: Path, preprocessing: Preprocessing) -> str | None:
    """Runs in a worker, which writes the file itself: nothing large is sent between processes. -> what is wrong with
    the video, if anything is."""
    try:
        frames = read_frames(path, cache.shape[0], preprocessing)
    except InputError as error:
        return str(error)
    cache.write(0, frames.numpy())
    return None


def _report_bad(errors: list[str]) -> None:
    """Raises InputError if there are any: all in one line, so that they can be mended at once."""
    if errors:
        more = f"; and {len(errors) - MAX_NAMED} more" if len(errors) > MAX_NAMED else ""
        count = f"{len(errors)} clips: " if len(errors) > 1 else ""
        raise InputError(count + "; ".join(sorted(errors)[:MAX_NAMED]) + more)


def _decode_clips(cache: ClipCache, missing: list[int], clips: list[Clip], preprocessing: Preprocessing,
                  workers: int) -> Iterator[int]:  # fmt: skip
    workers = min(workers or os.cpu_count() or 1, len(missing))
    with worker_pool(workers) as pool:
        paths, errors = {}, []
        try:
            for i in missing:
                clip_cache = replace(cache, keys=[cache.keys[i]])  # small enough to be sent to a worker
                paths[pool.submit(_decode_clip, clip_cache, clips[i].path, preprocessing)] = clips[i].path
            for done, future in enumerate(as_completed(paths), start=1):
                errors += [error] if (error := future.result()) else []
                if done % workers == 1 % workers:  # one clip of each worker since the last time
                    yield done
        except BrokenProcessPool as error:
            lost = [str(path) for future, path in paths.items() if isinstance(future.exception(), BrokenProcessPool)]
            names = ", ".join(lost[:workers])  # tasks start in this order
            raise InputError(f"{names}: a process that decoded one of these died") from error
    _report_bad(errors)


def frames_cache(clips: list[Clip], root: Path, split: str, count: int, preprocessing: Preprocessing) -> ClipCache:
    """The cache that `cached_frames` fills, as it is now."""
    size = preprocessing.size
    settings = [size, preprocessing.resize, preprocessing.squash, preprocessing.interpolation]  # of uint8 frames
    if preprocessing.longest_edge is not None:
        settings.append(preprocessing.longest_edge)
    files = [[clip.id, stat.st_size, stat.st_mtime_ns] for clip in clips for stat in [clip.path.stat()]]
    keys = [_hash(READER_VERSION, *file, count, *settings) for file in files]
    return ClipCache(root / f"{split}-{count}x{size}-{_hash(*settings)[:8]}", keys, (count, 3, size, size), np.uint8)


def cached_frames(clips: list[Clip], root: Path, split: str, count: int, preprocessing: int | Preprocessing,
                  workers: int, report: Callable = print) -> ClipCache:  # fmt: skip
    """M = `count` frames of each clip, at the segment centres: uint8 (M, 3, S, S). Each clip is decoded only once.

    `workers` processes decode what is missing; 0: one per core. Raises InputError for clips that cannot be decoded,
    all of them at once, for a worker that dies, and lack of space. Clips that are done stay.
    """
    preprocessing = as_preprocessing(preprocessing)
    cache = frames_cache(clips, root, split, count, preprocessing)
    _fill(cache, "frames", lambda missing: _decode_clips(cache, missing, clips, preprocessing, workers), report)
    return cache


def features_cache(frames: ClipCache, key: Any, shape: tuple[int, ...]) -> ClipCache:
    """The cache that `cached_features` fills, as it is now. `shape` is that of one clip's features."""
    folder = frames.folder.with_name(f"{frames.folder.name}-features-{_hash(key)[:8]}")
    keys = [_hash(frames_key, key) for frames_key in frames.keys]
    return ClipCache(folder, keys, shape, np.uint16)


def cached_features(frames: ClipCache, key: Any, shape: tuple[int, ...], encode: Callable[[torch.Tensor], torch.Tensor],
                    images_per_batch: int, report: Callable = print) -> ClipCache:  # fmt: skip
    """Features of the cached frames, bf16 of `shape` (M, ...), as uint16: numpy has no bf16, so these are its bits.

    encode: uint8 (B, M, 3, S, S) -> bf16 (B, M, ...), about `images_per_batch` images at a time. `key` (JSON) names
    all that the features depend on except the frames. Raises InputError for lack of space. Clips that are done stay.
    """
    cache = features_cache(frames, key, shape)
    batch_size = max(1, images_per_batch // frames.shape[0])

    def make(missing: list[int]) -> Iterator[int]:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            features = encode(torch.from_numpy(np.stack([frames[i] for i in batch])))
            for i, array in zip(batch, features.view(torch.uint16).numpy(), strict=True):
                cache.write(i, array)
            yield start + len(batch)

    _fill(cache, "features", make, report)
    return cache
