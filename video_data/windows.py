"""A long video, piece by piece: frames of one window of time after another.

Only the windows that are open are in memory.

`read_frames` sorts the times of a file whose times step back. Here the frames after it are not known yet, so a frame
before a step back is not displayed. A clock that begins anew, as in joined recordings, or jumps is an error.

Letters: T frames, S side in pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from torch import Tensor

from common.errors import InputError
from common.preprocessing import Preprocessing
from video_data.video import (
    convert,
    decode_stream,
    iter_packets,
    open_video,
    pixel_aspect,
    sample_positions,
    stack_pictures,
)

ONE_FRAME = 0.04  # seconds that the only frame of a video is displayed
RESTART, JUMP = 1.0, 600.0  # seconds; a clock that steps back, or on, by more is another one


@dataclass
class Window:
    """The frames displayed at the centres of T equal segments of a window, as far as they were met. Times are the
    file's."""

    start: float  # seconds
    end: float
    centres: np.ndarray  # (T,)
    pictures: list[np.ndarray] = field(default_factory=list)  # (S, S, 3) each

    def wanted(self, until: float) -> int:
        """How many more centres come before this time."""
        # 1e-9: a centre at the very start of a frame must select this frame, whatever the rounding
        return int((self.centres + 1e-9 < until).sum()) - len(self.pictures)

    def frames(self) -> Tensor:
        """uint8 (T, 3, S, S). Where the video ended within the window, its frames are repeated evenly."""
        count = len(self.centres)
        return stack_pictures([self.pictures[i * len(self.pictures) // count] for i in range(count)])


def find_bounds(path: str | Path) -> tuple[float | None, float]:
    """(start of the file, end of its pictures) in seconds of its clock, from packets, which are not decoded.

    Players count from the start of the file, where a sound may begin before the pictures. The start is None where the
    file has none; the end is infinite where packets have no times.
    """
    least, most, count = float("inf"), float("-inf"), 0
    with open_video(path) as (container, stream):
        for packet in iter_packets(container, stream):
            ticks = packet and (packet.dts if packet.pts is None else packet.pts)
            if ticks is not None and not packet.is_discard:
                time = float(ticks * stream.time_base)
                least, most, count = min(least, time), max(most, time), count + 1
        start = None if container.start_time is None else container.start_time / av.time_base
    end = most + frame_duration(most - least, count) if count else float("inf")
    return start, end


def frame_duration(span: float, count: int) -> float:
    """How long the last of `count` frames is displayed: as long as the others on average; span: from first to last."""
    return span / (count - 1) if span > 0 else ONE_FRAME


def displayed_frames(path: str | Path,
                     preprocessing: Preprocessing) -> Iterator[tuple[float, float, Callable]]:  # fmt: skip
    """(begin, end, a function that makes its picture (S, S, 3)) for each frame of a video.

    A frame is displayed from begin to end, in seconds of the file's clock; where its times step back, they stay. The
    last frame is displayed as long as the others are on average.
    """
    reformatter, count, frame = VideoReformatter(), 0, None
    with open_video(path) as (container, stream):
        aspect = pixel_aspect(stream)
        for time, following in decode_stream(path, container, stream):
            if frame is None:
                first = begin = time
            else:
                if not begin - RESTART <= time <= begin + JUMP:
                    raise InputError(f"{path}: its clock steps from {begin:.2f} s to {time:.2f} s, expected one "
                                     "recording: remux it to caption the rest")  # fmt: skip
                end = max(begin, time)
                yield begin, end, partial(convert, path, frame, preprocessing, reformatter, aspect)
                begin = end
            frame, count = following, count + 1
    end = begin + frame_duration(begin - first, count)
    yield begin, end, partial(convert, path, frame, preprocessing, reformatter, aspect)


def iter_windows(path: str | Path, length: float, stride: float, frames: int,
                 preprocessing: Preprocessing) -> Iterator[tuple[float, float, Tensor]]:  # fmt: skip
    """(start, end, frames uint8 (T, 3, S, S)) of each window of `length` seconds, one every `stride` seconds.

    Times are in seconds from the start of the file; the first window begins with the first frame. The last one ends
    with the video, and its T frames are spread over what there is. It is left out if the one before it already reaches
    the end, or if it is shorter than half a segment of a whole window. A video has at least one. Raises InputError.
    """
    file_start, file_end = find_bounds(path)
    positions, windows, count, zero = sample_positions(frames, None), [], 0, None
    for begin, end, make_picture in displayed_frames(path, preprocessing):
        if zero is None:
            first, zero = begin, begin if file_start is None else min(begin, file_start)
            opened = reached = first
        while (start := first + count * stride) < end:
            count += 1
            stop = min(start + length, file_end) if start < file_end else start + length
            if stop > opened and (count == 1 or start + length / (2 * frames) < stop):
                windows.append(Window(start, stop, start + positions * (stop - start)))
                opened = stop
        if any(window.wanted(end) for window in windows):
            picture = make_picture()
            for window in windows:
                window.pictures += [picture] * window.wanted(end)
        while windows and windows[0].end <= end:
            done = windows.pop(0)
            reached = done.end
            yield done.start - zero, done.end - zero, done.frames()
    if reached == first and not windows[0].pictures:  # a video that ends before the first centre
        windows[0].pictures.append(make_picture())
    for window in windows:  # those that end later than the video
        if window.pictures and reached < end:
            reached = min(window.end, end)
            yield window.start - zero, reached - zero, window.frames()


def format_srt_time(seconds: float) -> str:
    """"00:01:05,250"."""
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02},{milliseconds % 1000:03}"


def format_srt(number: int, start: float, end: float, text: str) -> str:
    """One subtitle of an .srt file; numbers begin with 1."""
    return f"{number}\n{format_srt_time(start)} --> {format_srt_time(end)}\n{text}\n\n"
