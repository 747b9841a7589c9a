"""Clips, their captions and their frames: from video files to batches.

Video is read with PyAV [1]. Frames are chosen by time, never by count: the clip's span is cut into T
equal segments, and of each the frame shown at its centre is taken (evaluation) or at a random moment
(training), as Temporal Segment Networks do [2]. Training draws its moments from M > T frames kept of
each clip, so that a video is decoded once.

Letters: B clips, T frames, M candidate frames kept of a clip, S side in pixels, K captions a clip,
L tokens of the longest caption with its EOS.

References
[1] https://pyav.org/docs/stable/
[2] https://arxiv.org/abs/1608.00859, sec. 3.1
"""

import hashlib
import json
import math
import os
import time
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from torch import Tensor

import shapes
from download import check_room
from model import IGNORED, LONGEST
from pixels import Pixels
from weights import InputError, field, read_json, replace_atomically

HELD_BYTES = 512 * 2**20  # of decoded frames; a longer video is decoded a second time instead


@dataclass(frozen=True)
class Clip:
    """One video file and what people said of it."""

    id: str
    path: Path
    captions: tuple[str, ...]


# ------------------------------------------------------------------------------------------- video


def decode(path: str | Path) -> Iterator[tuple[float, av.VideoFrame]]:
    """The video's frames in order of display with their times in seconds.

    What does not decode, or decodes with holes patched up, is passed over. Raises InputError, naming
    the file, where it is no video, has no video stream, or nothing in it decodes.
    """
    try:
        if os.path.getsize(path) == 0:
            raise InputError(f"{path}: an empty file, expected a video")
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise InputError(f"{path}: has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise InputError(f"{path}: its video codec is not known here")
            stream.codec_context.thread_count = 1  # the workers are the parallel part
            step = float(1 / (stream.average_rate or stream.guessed_rate or 25))
            count = 0
            for frame in _frames(container, stream):
                yield (count * step if frame.time is None else frame.time), frame
                count += 1
            if count == 0:
                raise InputError(f"{path}: no frame of it can be decoded")
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{path}: cannot be read as a video: {error.strerror or error}") from error


def _frames(container, stream) -> Iterator[av.VideoFrame]:
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.InvalidDataError:  # damaged between packets: what came before is good
            return
        if packet is None:
            return
        try:
            yield from (frame for frame in packet.decode() if not frame.is_corrupt)
        except av.error.InvalidDataError:
            continue


def moments(count: int, rng: np.random.Generator | None) -> np.ndarray:
    """`count` places in [0, 1): the centre of each of as many equal segments, or a random point in it."""
    inside = np.full(count, 0.5) if rng is None else rng.uniform(0, 1, count)
    return (np.arange(count) + inside) / count


def shown_at(times: list[float], places: np.ndarray) -> list[int]:
    """Indices of the frames on screen at `places` of the clip's span; `times` are the frames' own, sorted.

    The last frame is taken to stay as long as the frames before it did on average.
    """
    span = times[-1] - times[0]
    span += span / max(1, len(times) - 1)
    # A hair's breadth: a place that falls on a frame's very start belongs to that frame.
    return [max(0, bisect_right(times, times[0] + p * span + 1e-9) - 1) for p in places]


def to_pixels(frame: av.VideoFrame, view: Pixels, reformat: VideoReformatter) -> np.ndarray:
    """A decoded frame upright, resized as `view` says, its centre cut out: uint8 (S, S, 3)."""
    width = height = view.resize
    if not view.squash:  # the longer side is rounded down, as torchvision and transformers do
        width, height = (view.resize * n // min(frame.width, frame.height) for n in (frame.width, frame.height))
    how = {"bicubic": Interpolation.BICUBIC, "bilinear": Interpolation.BILINEAR}[view.interpolation]
    picture = reformat.reformat(frame, width, height, "rgb24", interpolation=how, threads=1)
    top, left = (height - view.size) // 2, (width - view.size) // 2
    pixels = picture.to_ndarray()[top : top + view.size, left : left + view.size]
    return np.rot90(pixels, round(frame.rotation / 90))


def plain_view(view: int | Pixels) -> Pixels:
    """Of an S alone: the short side becomes S, and the centre is cut out."""
    return view if isinstance(view, Pixels) else Pixels(view, view)


def read_frames(path: str | Path, frames: int, view: int | Pixels, rng: np.random.Generator | None = None) -> Tensor:
    """`frames` frames of a video, uint8 (T, 3, S, S): segment centres, or jittered by `rng`.

    `view` is how a frame becomes S x S, `vit.pixels`, or S alone. A clip with fewer frames than asked for shows
    some of them more than once. Raises InputError.
    """
    view = plain_view(view)
    times, held, weight = [], [], 0
    for moment, frame in decode(path):
        times.append(moment)
        weight += 2 * frame.width * frame.height
        if weight <= HELD_BYTES:
            held.append(frame)
        else:
            held.clear()
    order = sorted(range(len(times)), key=times.__getitem__)  # some files' times step back
    chosen = [order[i] for i in shown_at(sorted(times), moments(frames, rng))]
    if len(held) != len(times):
        wanted = set(chosen)
        again = {i: frame for i, (_, frame) in enumerate(decode(path)) if i in wanted}
    else:
        again = held
    reformat = VideoReformatter()
    pictures = np.stack([to_pixels(again[i], view, reformat) for i in chosen])  # (T, S, S, 3)
    # numpy makes the copy: torch would wake all cores for it, in every worker
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))  # (T, 3, S, S)


# ---------------------------------------------------------------------------------------- datasets

SPLITS = ("train", "val", "test")


def load(dataset: str, root: Path, sizes: tuple[int, int, int] = (6000, 200, 500)) -> dict[str, list[Clip]]:
    """{split: clips} of a dataset; `shapes` is made under `root`, `sizes` clips a split, if not there yet."""
    if dataset != "shapes":
        raise InputError(f"dataset {dataset!r}: expected shapes")
    shapes.make(root, dict(zip(SPLITS, sizes, strict=True)))
    path = root / "captions.json"
    splits = read_json(path)
    found = {}
    for split in SPLITS:
        clips = field(splits, split, dict, path)
        if not clips:
            raise InputError(f"{path}: split {split!r} is empty, expected {{file: [caption, ...]}}")
        found[split] = [Clip(name, root / name, tuple(captions)) for name, captions in clips.items()]
    ids = [clip.id for clips in found.values() for clip in clips]
    if len(set(ids)) < len(ids):
        raise InputError(f"{path}: a clip stands in two splits, for one {max(ids, key=ids.count)!r}")
    return found


# ----------------------------------------------------------------------------------- frame storage


def _candidates(path: Path, count: int, view: Pixels) -> np.ndarray:
    return read_frames(path, count, view).numpy()


def cached_frames(clips: list[Clip], path: Path, count: int, view: int | Pixels, workers: int,
                  report=print) -> np.ndarray:  # fmt: skip
    """Decodes each clip once: M = `count` segment centres of each, uint8 (clips, M, 3, S, S), memory-mapped.

    `path` is used again as long as it was made of these files, unchanged, with this count and view.
    """
    view = plain_view(view)
    stamps = [(c.id, (s := c.path.stat()).st_size, s.st_mtime_ns) for c in clips]
    look = view.size, view.resize, view.squash, view.interpolation
    key = hashlib.sha256(json.dumps([stamps, count, *look]).encode()).hexdigest()
    note = path.with_suffix(".json")
    shape = (len(clips), count, 3, view.size, view.size)
    whole = path.exists() and path.stat().st_size == math.prod(shape)
    if not (whole and note.exists() and read_json(note).get("sha256 of sources") == key):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path.parent, math.prod(shape), f"{path}, decoded frames")
        note.unlink(missing_ok=True)
        with replace_atomically(path) as file, ProcessPoolExecutor(workers or None) as pool:
            job = partial(_candidates, count=count, view=view)
            for i, frames in enumerate(pool.map(job, [c.path for c in clips], chunksize=16), start=1):
                file.write(frames.tobytes())
                if i % 1000 == 0 or i == len(clips):
                    report(f"frames: {i}/{len(clips)} clips decoded into {path}")
        with replace_atomically(note) as file:
            file.write(json.dumps({"sha256 of sources": key, "shape": shape}).encode())
    return np.memmap(path, np.uint8, "r", shape=shape)


def cached_features(frames: np.ndarray, path: Path, key: str, encode, images: int, report=print) -> np.ndarray:
    """What the frozen ViT makes of cached frames (clips, M, 3, S, S), kept once: fp16 (clips, M, ...), memory-mapped.

    encode: uint8 tensor (B, M, 3, S, S) -> fp16 tensor (B, M, ...); it is given about so many images at a time. `path`
    is used again as long as it was made with the same `key`, which has to name all that the result depends on.
    """
    note, shape = path.with_suffix(".json"), (len(frames), *encode(torch.from_numpy(np.array(frames[:1]))).shape[1:])
    whole = path.exists() and path.stat().st_size == 2 * math.prod(shape)
    if not (whole and note.exists() and read_json(note).get("key") == key):
        report(f"features: {2 * math.prod(shape) / 1e9:.2f} GB go into {path}")
        check_room(path.parent, 2 * math.prod(shape), f"{path}, what the ViT makes of frames")
        note.unlink(missing_ok=True)
        begun, batch = time.monotonic(), max(1, images // frames.shape[1])
        with replace_atomically(path) as file:
            for i in range(0, len(frames), batch):
                file.write(encode(torch.from_numpy(np.array(frames[i : i + batch]))).numpy().tobytes())
                if i == 10 * batch:
                    left = (time.monotonic() - begun) / (i + batch) * (len(frames) - i - batch)
                    report(f"features: {left:.0f} s to go")
        with replace_atomically(note) as file:
            file.write(json.dumps({"key": key, "shape": shape}).encode())
    return np.memmap(path, np.float16, "r", shape=shape)


# --------------------------------------------------------------------------------------- batches


class Examples:
    """Training examples by (clip, epoch): T jittered frames, or their features, and K captions as target ids.

    Everything random is drawn from (seed, epoch, clip) alone, so it is the same whenever a run goes on.
    The captions of a clip are dealt like cards: none comes again before all have come.
    """

    def __init__(self, clips: list[Clip], cache: np.ndarray, tokenizer, frames: int, captions: int, seed: int,
                 eos_id: int):  # fmt: skip
        self.cache, self.frames, self.k, self.seed = cache, frames, captions, seed
        self.ids = [
            [[*ids[:LONGEST], eos_id] for ids in tokenizer.encode(list(clip.captions))] for clip in clips
        ]

    def deal(self, clip: int, epoch: int) -> list[list[int]]:
        """The K captions of this clip's turn in this epoch."""
        ids, hand = self.ids[clip], []
        for turn in range(epoch * self.k, (epoch + 1) * self.k):
            pack, place = divmod(turn, len(ids))
            hand.append(ids[np.random.default_rng([self.seed, 1, clip, pack]).permutation(len(ids))[place]])
        return hand

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, list[list[int]]]:
        clip, epoch = key
        rng = np.random.default_rng([self.seed, 2, clip, epoch])
        places = moments(self.frames, rng) * self.cache.shape[1]  # of M candidates
        return torch.from_numpy(self.cache[clip, places.astype(int)]), self.deal(clip, epoch)


def collate(examples: list[tuple[Tensor, list[list[int]]]]) -> tuple[Tensor, Tensor]:
    """-> frames (B, T, 3, S, S) uint8, targets (B, K, L) padded with -100."""
    length = max(len(ids) for _, hand in examples for ids in hand)
    targets = [[ids + [IGNORED] * (length - len(ids)) for ids in hand] for _, hand in examples]
    return torch.stack([frames for frames, _ in examples]), torch.tensor(targets)


def order(clips: int, batch: int, epochs: int, seed: int, first_step: int = 0) -> Iterator[list[tuple[int, int]]]:
    """Batches of (clip, epoch), each epoch shuffled anew, its last incomplete batch left out."""
    steps = clips // batch
    for step in range(first_step, epochs * steps):
        epoch, i = divmod(step, steps)
        shuffled = np.random.default_rng([seed, 3, epoch]).permutation(clips)
        yield [(int(c), epoch) for c in shuffled[i * batch : (i + 1) * batch]]
