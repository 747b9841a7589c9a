"""From clips to batches: frames are decoded once and kept on the disk, and each epoch draws its examples from those.

    ROOT/train-32x224-1a2b3c4d/KEY                      frames (M, 3, S, S), uint8
    ROOT/train-32x224-1a2b3c4d-times/KEY                M + 1 seconds, float64, where the model's prompt states times
    ROOT/train-32x224-1a2b3c4d-features-5e6f7a8b/KEY    features (M, ...), bf16: the ViT's hidden states

KEY is a hash of everything that the array depends on. A file is written under a temporary name, flushed and renamed, so
a file called KEY is complete. After a kill at any moment, the next call continues with the missing clips. Two processes
may fill one folder at once; they do the same work twice. Nothing is deleted: files of clips that have changed stay
until you delete the folder.

Training samples T of the M frames of a clip: each epoch shows other frames and the next captions. Where M = T, each
epoch shows the same frames.

Shapes: B clips, T frames, M stored frames per clip, S side in pixels, K captions per clip, L tokens of the longest
caption with its EOS.
"""

import hashlib
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.cli import Progress
from common.errors import InputError
from common.files import check_disk_space, format_bytes, replace_atomically
from common.preprocessing import Preprocessing
from video_data.annotations import Clip
from video_data.video import read_clip, sample_positions

READER_VERSION = 3  # raise this when `read_frames` chooses or converts frames differently
IGNORE_INDEX = -100  # the default ignore_index of torch's cross_entropy

# -------------------------------------------------------------------------------------- processes


def _start_worker() -> None:
    torch.set_num_threads(1)  # the processes are the parallel part
    parent = multiprocessing.parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # no orphan goes on


def run_in_processes(what: str, function: Callable, tasks: Sequence[tuple]) -> list:
    """[function(*task) for task in tasks], by one process per core. Reports the time left.

    All processes end at once if one of them fails or dies, or at Ctrl-C. The first item of a task is its name: Raises
    InputError with the name of the first unfinished task if a process dies, as for a lack of memory.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    results, progress = [], Progress(len(tasks))
    with ProcessPoolExecutor(max(1, min(cores, len(tasks))), initializer=_start_worker) as pool:
        try:
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is for this process
            futures = [pool.submit(function, *task) for task in tasks]  # pool.map cancels what a dead pool sets
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for future in futures:
                results.append(future.result())
                progress.report(what, len(results))
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.kill()
            if isinstance(error, BrokenProcessPool):
                raise InputError(f"{tasks[len(results)][0]}, or one after it: its process died") from error
            raise
    return results


# ------------------------------------------------------------------------------------------ caches


def cache_folder(dataset: str, root: Path) -> Path:
    """The folder for a dataset's caches: .cache in its own folder `root`, or one that no other dataset shares in the
    folder that the environment variable QADAPTER_FRAMES names."""
    if cache := os.environ.get("QADAPTER_FRAMES"):
        return Path(cache) / f"{dataset}-{_hash(str(root.resolve()))[:8]}"
    return root / ".cache"  # hidden folders are not searched for videos


def _hash(*content) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class ClipCache:
    """Arrays of one shape and dtype, one per clip: cache[i] is read from the file folder/keys[i]."""

    folder: Path
    keys: list[str]
    shape: tuple[int, ...]  # of one clip's array
    dtype: type
    times: "ClipCache | None" = None  # when each stored frame is displayed, and the duration of the video (M + 1,)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.read(i, range(self.shape[0]))

    def read(self, i: int, indices: Sequence[int]) -> np.ndarray:
        """cache[i][indices]: for a training step twice as fast as mapping 64 files. Raises InputError."""
        rows, num_bytes = np.empty((len(indices), *self.shape[1:]), self.dtype), 0
        with suppress(FileNotFoundError), open(self.folder / self.keys[i], "rb", buffering=0) as file:
            for row, index in zip(rows[..., None], indices, strict=True):  # a row of times is a number, not an array
                file.seek(int(index) * row.nbytes)
                num_bytes += file.readinto(row)
        if num_bytes < rows.nbytes:
            raise InputError(f"{self.folder / self.keys[i]}: was deleted or cut short; start again to make it anew")
        if self.dtype is np.float64 and not ((rows >= 0) & (rows < 1e9)).all():  # seconds
            raise InputError(f"{self.folder / self.keys[i]}: is damaged, delete it and start again")
        return rows

    @property
    def clip_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def missing(self) -> list[int]:
        """Clips whose file is absent or has the wrong size, or that of their times."""
        paths = [self.folder / key for key in self.keys]
        untimed = set(() if self.times is None else self.times.missing())
        return [i for i, p in enumerate(paths)
                if i in untimed or not p.is_file() or p.stat().st_size != self.clip_bytes]

    def select(self, i: int) -> "ClipCache":
        """The cache of one clip."""
        return replace(self, keys=[self.keys[i]], times=self.times and self.times.select(i))

    def write(self, i: int, array: np.ndarray) -> None:
        """Raises InputError when the disk is full, read-only and so on."""
        assert (array.shape, array.dtype) == (self.shape, self.dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_atomically(self.folder / self.keys[i]) as file:
            file.write(np.ascontiguousarray(array))


def check_space(caches: Mapping[str, Sequence[ClipCache]]) -> None:
    """Prints the size of what is missing in all caches of a dataset: {"frames": [cache, ...], ...}. Raises InputError
    if the disk lacks the space for all of them together."""
    needed = {what: sum(len(cache.missing()) * cache.clip_bytes for cache in group) for what, group in caches.items()}
    if total := sum(needed.values()):
        root = next(cache for group in caches.values() for cache in group).folder.parent
        root.mkdir(parents=True, exist_ok=True)
        sizes = ", ".join(f"{what} {format_bytes(size)}" for what, size in needed.items() if size)
        print(f"cache: {sizes}, go into {root}")
        check_disk_space(root, total, f"{root}, {sizes}")


def frames_cache(clips: list[Clip], root: Path, split: str, count: int, preprocessing: Preprocessing,
                 with_times: bool = False) -> ClipCache:
    """M = `count` frames of each clip, at the segment centres: uint8 (M, 3, S, S); as it is on the disk now."""
    p, size = preprocessing, preprocessing.size
    settings = [*p.shape, p.resize, p.squash, p.interpolation, p.longest_edge]  # what uint8 frames depend on
    files = [[clip.id, stat.st_size, stat.st_mtime_ns] for clip in clips for stat in [clip.path.stat()]]
    keys = [_hash(READER_VERSION, *file, count, *settings) for file in files]
    folder = root / f"{split}-{count}x{size}-{_hash(*settings)[:8]}"
    times = ClipCache(folder.with_name(f"{folder.name}-times"), keys, (count + 1,), np.float64) if with_times else None
    return ClipCache(folder, keys, (count, 3, *p.shape), np.uint8, times)


def _decode_clip(path: Path, cache: ClipCache, preprocessing: Preprocessing) -> str | None:
    """Fills the cache of one clip. Runs in another process: nothing large is sent between processes. Returns what is
    wrong with the video, if anything is."""
    try:
        frames, times = read_clip(path, cache.shape[0], preprocessing)
    except InputError as error:
        return str(error)
    if cache.times is not None:
        cache.times.write(0, np.array(times))
    return cache.write(0, frames.numpy())


def fill_frames(cache: ClipCache, clips: list[Clip], preprocessing: Preprocessing) -> None:
    """Decodes the clips that a `frames_cache` lacks. Raises InputError for clips that cannot be decoded, all of them at
    once, and for a process that dies. Clips that are done stay."""
    tasks = [(clips[i].path, cache.select(i), preprocessing) for i in cache.missing()]
    if errors := list(filter(None, run_in_processes("frames", _decode_clip, tasks))):
        raise InputError(f"{len(errors)} clips cannot be read: {'; '.join(errors)}")


def features_cache(frames: ClipCache, key: Any, shape: tuple[int, ...]) -> ClipCache:
    """Features of cached frames, `shape` (M, ...) per clip; as they are on the disk now. `key` (JSON) names all that
    they depend on except the frames."""
    folder = frames.folder.with_name(f"{frames.folder.name}-features-{_hash(key)[:8]}")
    return ClipCache(folder, [_hash(frames_key, key) for frames_key in frames.keys], shape, np.uint16, frames.times)


def fill_features(cache: ClipCache, frames: ClipCache, encode: Callable[[Tensor], Tensor],
                  images_per_batch: int) -> None:
    """Computes what a `features_cache` lacks from cached frames: bf16, as uint16, since numpy has no bf16.

    encode: uint8 (B, M, 3, S, S) -> bf16 (B, M, ...), about `images_per_batch` images at a time. Clips that are done
    stay.
    """
    missing, batch_size = cache.missing(), max(1, images_per_batch // frames.shape[0])
    progress = Progress(len(missing))
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        features = encode(torch.from_numpy(np.stack([frames[i] for i in batch])))  # (B, M, ...)
        for i, array in zip(batch, features.view(torch.uint16).numpy(), strict=True):
            cache.write(i, array)
        progress.report("features", start + len(batch))


# --------------------------------------------------------------------------- examples and batches


def normalize_caption(caption: str) -> str:
    """Lower case, single spaces, no quotes around the caption and no punctuation at its ends."""
    return " ".join(caption.lower().split()).strip(" \"'`.,;:!?")


def to_tensor(inputs: np.ndarray) -> Tensor:
    """Frames uint8, or the bits of bf16 features as a cache stores them -> a tensor of the same memory."""
    tensor = torch.from_numpy(inputs)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


class Batch(NamedTuple):
    """A process's share of the clips of a step, on the CPU."""

    frames: Tensor  # (B, T, 3, S, S) uint8 or features (B, T, ...) bf16
    labels: Tensor  # (B, K, L), padded with IGNORE_INDEX
    times: Tensor | None  # (B, T + 1), see `TrainingExamples.times`
    clips: list[int]  # their places in the training split


class TrainingExamples:
    """Training examples by (clip, epoch): T jittered frames or their features, and K captions as token ids.

    All randomness depends on (seed, epoch, clip) alone, so a resumed run draws the same. The captions of a clip are
    drawn without replacement until all have been used.
    """

    def __init__(self, clips: list[Clip], cache: ClipCache, tokenizer, num_frames, num_captions, seed, eos_id,
                 max_tokens):
        """cache[i] holds M frames or features of clips[i]. Captions longer than `max_tokens` are truncated."""
        self.cache, self.num_frames, self.num_captions, self.seed = cache, num_frames, num_captions, seed
        encoded = [[tokenizer.encode(normalize_caption(caption)) for caption in clip.captions] for clip in clips]
        self.captions = [[[*ids[:max_tokens], eos_id] for ids in captions] for captions in encoded]
        self.num_truncated = sum(len(ids) > max_tokens for captions in encoded for ids in captions)

    def sample_captions(self, clip: int, epoch: int) -> list[list[int]]:
        """Token ids of the K captions of this clip in this epoch."""
        captions, sampled = self.captions[clip], []
        for draw in range(epoch * self.num_captions, (epoch + 1) * self.num_captions):
            cycle, i = divmod(draw, len(captions))  # each cycle goes through all captions once
            permutation = np.random.default_rng([self.seed, 1, clip, cycle]).permutation(len(captions))
            sampled.append(captions[permutation[i]])
        return sampled

    def sample_indices(self, clip: int, epoch: int, stored: int) -> np.ndarray:
        """Which of `stored` rows are read: the M of the cache, or the frames of M pairs."""
        rng = np.random.default_rng([self.seed, 2, clip, epoch])
        return (sample_positions(self.num_frames * stored // self.cache.shape[0], rng) * stored).astype(int)

    def read(self, keys: Sequence[tuple[int, int]]) -> Batch:
        """The batch of these (clip, epoch)."""
        stored, captions = self.cache.shape[0], [self.sample_captions(*key) for key in keys]
        # Not torch.stack: in the thread of `prefetch` it starts threads of its own, and a step takes twice as long.
        inputs = np.stack([self.cache.read(key[0], self.sample_indices(*key, stored)) for key in keys])
        length = max(len(ids) for group in captions for ids in group)
        labels = [[ids + [IGNORE_INDEX] * (length - len(ids)) for ids in group] for group in captions]
        return Batch(to_tensor(inputs), torch.tensor(labels), self.times(keys), [clip for clip, _ in keys])

    def times(self, keys: Sequence[tuple[int, int]]) -> Tensor | None:
        """When the frames of these examples are displayed, and the durations (B, T + 1); None if that is not stored."""
        if self.cache.times is None:
            return None
        stored = self.cache.times.shape[0] - 1
        indices = [[*self.sample_indices(*key, stored), stored] for key in keys]
        rows = [self.cache.times.read(clip, row) for (clip, _), row in zip(keys, indices, strict=True)]
        return torch.from_numpy(np.stack(rows))


def prefetch(load: Callable, keys: Iterable) -> Iterator:
    """load(key) for each key, in order. While one result is used, another thread loads the next."""
    future = None
    with ThreadPoolExecutor(1) as executor:
        for key in keys:
            previous, future = future, executor.submit(load, key)
            if previous:
                yield previous.result()
        if future:
            yield future.result()


def epoch_batches(num_clips: int, batch_size: int, epochs: int, seed: int,
                  first_step: int = 0) -> Iterator[list[tuple[int, int]]]:
    """Batches of (clip, epoch) keys. Each epoch is shuffled anew; its last incomplete batch is dropped."""
    steps = num_clips // batch_size
    for step in range(first_step, epochs * steps):
        epoch, i = divmod(step, steps)
        permutation = np.random.default_rng([seed, 3, epoch]).permutation(num_clips)
        yield [(int(clip), epoch) for clip in permutation[i * batch_size : (i + 1) * batch_size]]
