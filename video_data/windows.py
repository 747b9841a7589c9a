"""A long video, one window of time after another: only the frames of one window are in memory.

Shapes: T frames, S side in pixels.
"""

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from torch import Tensor

from common.errors import InputError, reading
from common.preprocessing import Preprocessing
from video_data import video

ONE_FRAME = 0.04  # seconds that the only frame of a video is displayed
RESTART, JUMP = 1.0, 600.0  # seconds; a clock that steps back, or on, by more is another one


def find_bounds(path: str | Path) -> tuple[float, float, Fraction]:
    """(start of the file, end of its pictures, aspect of a pixel), from packets, which are not decoded.

    Seconds of the file's clock; infinite if unknown. Players count from the start of the file, where a sound may begin
    before the pictures.
    """
    with video.open_video(path) as (container, stream):
        packets = (packet for packet in video.iter_packets(container, stream) if packet and not packet.is_discard)
        ticks = [packet.dts if packet.pts is None else packet.pts for packet in packets]
        times = [float(t * stream.time_base) for t in ticks if t is not None]
        start = math.inf if container.start_time is None else container.start_time / av.time_base
        end = max(times) + frame_duration(max(times) - min(times), len(times)) if times else math.inf
        return start, end, stream.sample_aspect_ratio or Fraction(1)


def frame_duration(span: float, count: int) -> float:
    """How long the last of `count` frames is displayed: as long as the others on average; span: from first to last."""
    return span / (count - 1) if span > 0 else ONE_FRAME


def displayed_frames(path: str | Path) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """(begin, end, frame) of each frame: when it is displayed, in seconds of the file's clock.

    `read_frames` sorts times that step back. Here the frames to come are not known yet, so a frame before a step back
    is not displayed. A clock that begins anew, as in joined recordings, or jumps is an InputError.
    """
    frame, number = None, 0
    for time, following in video.decode_frames(path):
        if frame is None:
            first = begin = time
        else:
            if not begin - RESTART <= time <= begin + JUMP:
                clock = f"its clock steps from {begin:.2f} s to {time:.2f} s"
                raise InputError(f"{path}: {clock}, expected one recording: remux it to caption the rest")
            yield begin, max(begin, time), frame
            begin = max(begin, time)
        frame, number = following, number + 1
    yield begin, begin + frame_duration(begin - first, number), frame


def plan_windows(first: float, length: float, file_end: float, count: int) -> Iterator[tuple[float, float, np.ndarray]]:
    """(start, end, centres of T = `count` equal segments), one window after another from `first` on, without end: what
    packets say of the end may be wrong.

    The window in which the file should end is shortened, or left out if it is shorter than half a segment.
    """
    for k in itertools.count():
        start = first + k * length
        stop = min(start + length, file_end) if start < file_end else start + length
        if k == 0 or start + length / (2 * count) < stop:
            yield start, stop, start + video.sample_positions(count) * (stop - start)


def iter_windows(path: str | Path, length: float, frames: int,
                 preprocessing: Preprocessing) -> Iterator[tuple[float, float, Tensor, list[float]]]:
    """(start, end, frames uint8 (T, 3, S, S), T + 1 seconds: when each frame is displayed, and the duration of the
    video) of one window of `length` seconds after another. One is in memory.

    Times are in seconds from the start of the file; the first window begins with the first frame. The last one ends
    with the video, and its T frames are spread over what there is. A video has at least one. Raises InputError.
    """
    file_start, file_end, aspect = find_bounds(path)
    windows, reformatter = None, VideoReformatter()
    for begin, end, frame in displayed_frames(path):
        if windows is None:
            first, zero = begin, min(begin, file_start)
            windows = plan_windows(begin, length, file_end, frames)
            (start, stop, centres), pictures = next(windows), []  # ((S, S, 3), seconds) each, at the first centres
        while start < end:
            # 1e-9: a centre at the very start of a frame must select this frame, whatever the rounding
            if due := int((centres + 1e-9 < end).sum()) - len(pictures):
                with reading(path):
                    pictures += [(video.frame_to_rgb(frame, preprocessing, reformatter, aspect), begin - zero)] * due
            if stop > end:
                break
            known_end = stop if math.isinf(file_end) else max(stop, file_end)
            yield start - zero, stop - zero, *spread(pictures, frames, known_end - zero)
            (start, stop, centres), pictures = next(windows), []
    if start == first and not pictures:  # a video that ends before the first centre
        with reading(path):
            pictures.append((video.frame_to_rgb(frame, preprocessing, reformatter, aspect), begin - zero))
    if pictures:  # the window ends later than the video
        yield start - zero, min(stop, end) - zero, *spread(pictures, frames, end - zero)


def spread(pictures: list[tuple[np.ndarray, float]], count: int, duration: float) -> tuple[Tensor, list[float]]:
    """uint8 (T, 3, S, S) of T = `count` pictures or fewer, which are repeated evenly; their times, and the duration."""
    pictures, times = zip(*(pictures[i * len(pictures) // count] for i in range(count)), strict=True)
    return video.stack_pictures(pictures), [round(x, 6) for x in (*times, duration)]


def format_srt(number: int, start: float, end: float, text: str) -> str:
    """One subtitle of an .srt file; numbers begin with 1."""

    def clock(seconds: float) -> str:  # "00:01:05,250"
        ms = round(1000 * seconds)
        return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02},{ms % 1000:03}"

    return f"{number}\n{clock(start)} --> {clock(end)}\n{text}\n\n"
