"""Video: a file's frames in order of time, and the few of them that a captioner looks at.

Video is read with PyAV [1]. Frames are chosen by time, never by count: the clip's span is cut into T equal segments,
and of each the frame shown at its centre is taken (evaluation) or at a random moment (training), as Temporal Segment
Networks do [2].

Letters: T frames, S side in pixels.

References
[1] https://pyav.org/docs/stable/
[2] https://arxiv.org/abs/1608.00859, sec. 3.1
"""

import os
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from torch import Tensor

from pixels import Pixels
from weights import InputError

HELD_BYTES = 512 * 2**20  # of decoded frames; a longer video is decoded a second time instead


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
