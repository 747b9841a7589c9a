"""Video: a file's frames in order of time, and the few of them that a captioner looks at.

Video is read with PyAV [1]. Frames are chosen by time, never by count: the clip's span is cut into T equal segments,
and of each the frame shown at its centre is taken (evaluation) or at a random moment (training), as Temporal Segment
Networks do [2].

H.264 frames that no other is made from are decoded only where wanted: T = 16 frames of a real MSR-VTT clip (1280 x 720,
a keyframe every 26 to 128 frames) come 2.6 times sooner. Seeking to the keyframe before each wanted frame as well was
1.1 times faster still, and alone it was 1.1, 1.1 and 1.3 times faster on three MSVD clips: not worth its code.

Letters: T frames, S side in pixels.

References
[1] https://pyav.org/docs/stable/
[2] https://arxiv.org/abs/1608.00859, sec. 3.1
"""

import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from pixels import Pixels
from weights import InputError

HELD_BYTES = 512 * 2**20  # of decoded frames; a longer video is decoded a second time instead
MOST_PIXELS = 2**25  # of a frame, decoded or resized, 8192 x 4096: a damaged header may claim 65535 x 65535


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its first stream of moving pictures. What FFmpeg raises within becomes an InputError."""
    try:
        if os.path.getsize(path) == 0:
            raise InputError(f"{path}: an empty file, expected a video")
        limits = {"max_pixels": str(MOST_PIXELS)}
        # "file:" lest a name with a colon in it is taken for an address
        with av.open(f"file:{path}", options=limits, metadata_errors="replace") as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise InputError(f"{path}: has no video stream")
            context = streams[0].codec_context
            if context is None:
                raise InputError(f"{path}: its video codec is not known here")
            if context.width * context.height > MOST_PIXELS:
                size = f"{context.width} x {context.height}"
                raise InputError(f"{path}: its frames are {size} pixels, expected at most {MOST_PIXELS} in all")
            context.options = limits
            context.thread_count = 1  # the workers are the parallel part
            yield container, streams[0]
    except InputError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read as a video: {reason}") from error


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet | None]:
    """The stream's packets, those before it where the file is damaged between two; at last None, which makes the
    decoder give what it holds back."""
    try:
        yield from (packet for packet in container.demux(stream) if packet.size)
    except av.error.InvalidDataError:
        pass
    yield None


def decode(path: str | Path) -> Iterator[tuple[float, av.VideoFrame]]:
    """The video's frames as the decoder gives them, which is in order of display, with their times in seconds.

    Times may step back, in AVI files above all. What does not decode, or decodes with holes patched up, is passed
    over. Raises InputError, naming the file, where it is no video, has no video stream, or nothing in it decodes.
    """
    with _opened(path) as (container, stream):
        yield from _decoded(path, container, stream)


def _decoded(path: str | Path, container: InputContainer, stream: VideoStream) -> Iterator[tuple[float, av.VideoFrame]]:
    step = float(1 / (stream.average_rate or stream.guessed_rate or 25))
    moment = None
    for packet in _packets(container, stream):
        try:
            frames = stream.codec_context.decode(packet)
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError:
            continue
        for frame in (f for f in frames if not f.is_corrupt):
            if frame.pts is not None:
                moment = float(frame.pts * stream.time_base)
            else:
                moment = 0.0 if moment is None else moment + step
            yield moment, frame
    if moment is None:
        raise InputError(f"{path}: no frame of it can be decoded")


def _tells_times(container: InputContainer, stream: VideoStream) -> bool:
    """Whether it is H.264 in MP4 or Matroska, which tell when each frame is shown before anything is decoded."""
    return stream.codec_context.name == "h264" and bool({"mp4", "matroska"} & set(container.format.name.split(",")))


def _sparing(container: InputContainer, stream: VideoStream, places: np.ndarray) -> list[av.VideoFrame] | None:
    """The frames on screen at `places`, with as few others decoded as possible, of a file that tells times.

    H.264 marks frames that no other is made from. Only those are left out, and what follows the last wanted frame,
    so the rest decodes as ever. None where anything is odd: a time missing or told twice, damage, frames out of order,
    a wanted frame that does not come.
    """
    context, packets = stream.codec_context, list(_packets(container, stream))
    # A clip cut out of the middle of a video begins with what cannot be decoded.
    first = next((i for i, packet in enumerate(packets) if packet and packet.is_keyframe), 0)
    stamps = [packet.pts for packet in packets[first:-1] if not packet.is_discard]
    if not stamps or None in stamps:
        return None
    stamps.sort()
    chosen = [stamps[i] for i in shown_at([float(s * stream.time_base) for s in stamps], places)]
    wanted, found, last = {stamps[0], *chosen}, {}, stamps[0] - 1
    end = 1 + max(i for i, packet in enumerate(packets[:-1]) if packet.pts in wanted)
    try:
        for i, packet in enumerate([*packets[:end], None]):
            whole = packet is None or packet.pts in wanted
            context.skip_frame = "NONKEY" if i < first else "DEFAULT" if whole else "NONREF"
            for frame in context.decode(packet):
                if frame.is_corrupt or frame.pts is None or frame.pts <= last:
                    return None
                last = frame.pts
                found |= {last: frame} if last in wanted else {}
    except av.error.FFmpegError:
        return None
    return [found[stamp] for stamp in chosen] if len(found) == len(wanted) else None


def _all(path: str | Path, decoded: Iterator[tuple[float, av.VideoFrame]], places: np.ndarray) -> list[av.VideoFrame]:
    """The same of any file, all of whose frames are `decoded`."""
    times, held, weight = [], [], 0
    for moment, frame in decoded:
        times.append(moment)
        weight += frame.width * frame.height * frame.format.padded_bits_per_pixel // 8
        if weight <= HELD_BYTES:
            held.append(frame)
        else:
            held.clear()
    # The k-th frame is shown at the k-th time. Where frames' own times step back, it is the times that are wrong.
    chosen = shown_at(sorted(times), places)
    if len(held) < len(times):
        wanted = set(chosen)
        held = {i: frame for i, (_, frame) in enumerate(decode(path)) if i in wanted}
    return [held[i] for i in chosen]


def moments(count: int, rng: np.random.Generator | None) -> np.ndarray:
    """`count` places in [0, 1): the centre of each of as many equal segments, or a random point in it."""
    inside = np.full(count, 0.5) if rng is None else rng.uniform(0, 1, count)
    return (np.arange(count) + inside) / count


def shown_at(times: list[float], places: np.ndarray) -> list[int]:
    """Indices of the frames on screen at `places` of the clip's span; `times` are the frames' own, sorted.

    The last frame is taken to stay as long as the frames before it did on average.
    """
    if times[0] == times[-1]:  # none are told
        times = range(len(times))
    span = times[-1] - times[0]
    span += span / max(1, len(times) - 1)
    # A hair's breadth: a place that falls on a frame's very start belongs to that frame.
    return [max(0, bisect_right(times, times[0] + p * span + 1e-9) - 1) for p in places]


def to_pixels(frame: av.VideoFrame, view: Pixels, reformat: VideoReformatter) -> np.ndarray:
    """A decoded frame upright, resized as `view` says, its centre cut out: uint8 (S, S, 3)."""
    width = height = view.resize
    if not view.squash:  # the longer side is rounded down, as torchvision and transformers do
        width, height = (view.resize * n // min(frame.width, frame.height) for n in (frame.width, frame.height))
    if width * height > MOST_PIXELS:
        raise ValueError(f"{frame.width} x {frame.height} would become {width} x {height}, too many")
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
    view, places = plain_view(view), moments(frames, rng)
    with _opened(path) as (container, stream):
        if _tells_times(container, stream) and os.path.getsize(path) <= HELD_BYTES:  # all packets are held
            chosen = _sparing(container, stream, places)
        else:
            chosen = _all(path, _decoded(path, container, stream), places)
    chosen = chosen or _all(path, decode(path), places)
    reformat = VideoReformatter()
    try:
        pictures = np.stack([to_pixels(frame, view, reformat) for frame in chosen])  # (T, S, S, 3)
    except (av.error.FFmpegError, ValueError) as error:
        raise InputError(f"{path}: its frames cannot be made pixels: {error}") from error
    # numpy makes the copy: torch would wake all cores for it, in every worker
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))  # (T, 3, S, S)
