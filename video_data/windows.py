"""A long video, piece by piece: frames of one window of time after another, in constant memory.

`read_frames` sorts the times of a file whose times step back. Here the frames after it are not known yet, so a frame
before a step back is not displayed; all frames of a file without times are one.

Letters: T frames, S side in pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from common.errors import InputError
from common.preprocessing import Preprocessing
from video_data.video import decode_stream, frame_to_rgb, open_video, pixel_aspect, sample_positions

ONE_FRAME = 0.04  # seconds that the only frame of a video is displayed


@dataclass
class Window:
    """The frames displayed at the centres of T equal segments of a window, as far as they were met."""

    start: float  # seconds from the first frame
    centres: np.ndarray  # (T,)
    pictures: list[np.ndarray] = field(default_factory=list)  # (S, S, 3) each

    def wanted(self, until: float) -> int:
        """How many more centres come before this time."""
        # 1e-9: a centre at the very start of a frame must select this frame, whatever the rounding
        return int((self.centres + 1e-9 < until).sum()) - len(self.pictures)

    def frames(self) -> Tensor:
        """uint8 (T, 3, S, S). Where the video ended within the window, its frames are repeated evenly."""
        count = len(self.centres)
        pictures = [self.pictures[i * len(self.pictures) // count] for i in range(count)]
        return torch.from_numpy(np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2)))  # (T, 3, S, S)


def convert(path: str | Path, *args) -> np.ndarray:
    """`frame_to_rgb`, whose failure is the file's."""
    try:
        return frame_to_rgb(*args)
    except (av.error.FFmpegError, ValueError) as error:
        raise InputError(f"{path}: its frames cannot be converted to RGB: {error}") from error


def displayed_frames(path: str | Path, preprocessing: Preprocessing) -> Iterator[tuple[float, Callable]]:
    """(time at which a frame's display ends, a function that makes its picture (S, S, 3)) for each frame of a video.

    Times are in seconds from the first frame; where they step back, they stay. The last frame is displayed as long as
    the others are on average.
    """
    reformatter, now, count, frame = VideoReformatter(), 0.0, 0, None
    with open_video(path) as (container, stream):
        aspect, first = pixel_aspect(stream), None
        for time, following in decode_stream(path, container, stream):
            first = time if first is None else first
            now, count = max(now, time - first), count + 1
            if frame is not None:
                yield now, partial(convert, path, frame, preprocessing, reformatter, aspect)
            frame = following
    last = now / (count - 1) if now else ONE_FRAME
    yield now + last, partial(convert, path, frame, preprocessing, reformatter, aspect)


def iter_windows(path: str | Path, length: float, stride: float, frames: int,
                 preprocessing: Preprocessing) -> Iterator[tuple[float, float, Tensor]]:  # fmt: skip
    """(start, end, frames uint8 (T, 3, S, S)) of each window of `length` seconds, one every `stride` seconds.

    Times are in seconds from the first frame. The last window ends with the video; it is left out if the one before
    it already reaches the end, or if no centre of a segment lies in it. A video has at least one. Raises InputError.
    """
    positions, windows, count, end, reached = sample_positions(frames, None), [], 0, 0.0, 0.0
    for end, make_picture in displayed_frames(path, preprocessing):
        while count * stride < end:
            windows.append(Window(count * stride, count * stride + positions * length))
            count += 1
        if any(window.wanted(end) for window in windows):
            picture = make_picture()
            for window in windows:
                window.pictures += [picture] * window.wanted(end)
        while windows and windows[0].start + length <= end:
            done = windows.pop(0)
            reached = done.start + length
            yield done.start, reached, done.frames()
    if reached == 0 and not windows[0].pictures:  # a video that ends before the first centre
        windows[0].pictures.append(make_picture())
    for window in windows:
        if window.pictures and reached < end:
            reached = min(window.start + length, end)
            yield window.start, reached, window.frames()


def format_srt_time(seconds: float) -> str:
    """"00:01:05,250"."""
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02},{milliseconds % 1000:03}"


def format_srt(number: int, start: float, end: float, text: str) -> str:
    """One subtitle of an .srt file; numbers begin with 1."""
    return f"{number}\n{format_srt_time(start)} --> {format_srt_time(end)}\n{text}\n\n"
