"""A video file becomes the few frames that a captioner reads.

PyAV [1] reads the video. Frames are chosen by time, or by index where a file has no times: the clip's time span is cut
into T equal segments, and each contributes the frame displayed at its centre, as in Temporal Segment Networks [2].

In MP4 and Matroska, H.264 frames that no other frame refers to are decoded only where they are selected: T = 16 frames
of a real MSR-VTT clip (1280 x 720, a keyframe every 26 to 128 frames) are read 2.6 times faster. Seeking to the
keyframe before each selected frame as well was only 1.1 times faster still, so the code does not seek.

Shapes: T frames, S side in pixels.

References
[1] https://pyav.org/docs/stable/
[2] https://arxiv.org/abs/1608.00859, sec. 3.1
[3] transformers, models/smolvlm/video_processing_smolvlm.py
[4] ISO/IEC 14496-12, track header; FFmpeg, libavutil/display.h
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from torch import Tensor

from common.errors import InputError, reading
from common.preprocessing import Preprocessing

MAX_BUFFERED_BYTES = 512 * 2**20  # of frames, or of a file whose packets are all read first
MAX_PIXELS = 2**25  # of a frame, decoded or resized, 8192 x 4096: a damaged header may claim 65535 x 65535
LIMITS = {"max_pixels": str(MAX_PIXELS)}
# FFmpeg knows more kinds of side data than PyAV 18, which fails on a frame with one of them: take them for an old kind.
Type._missing_ = classmethod(lambda cls, number: Type.PANSCAN)

# --------------------------------------------------------------------------------------- decoding


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The file and the video stream that players show: the default one, else the first, but no cover picture. FFmpeg's
    errors become InputErrors."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: expected a file")  # a pipe can be read only once, and one without a writer never
    try:
        # "file:" so that FFmpeg does not take a name with a colon in it for a URL
        with av.open(f"file:{path}", options=LIMITS, metadata_errors="replace") as container:
            if container.format.name in ("concat", "hls"):
                raise InputError(f"{path}: is a list of other files, expected a video")
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            stream = max(streams, key=lambda s: bool(s.disposition & Disposition.default), default=None)
            if stream is None or stream.codec_context is None:
                raise InputError(f"{path}: has no video stream, or one whose codec the installed FFmpeg lacks")
            stream.codec_context.options = LIMITS
            stream.codec_context.thread_count = 1  # the worker processes are the parallel part
            yield container, stream
    except av.error.FFmpegError as error:
        raise InputError(f"{path}: cannot be read as a video: {error.strerror}") from error


def iter_packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet | None]:
    """The stream's packets up to the first damage between two of them, then None, which flushes the decoder."""
    with suppress(av.error.InvalidDataError):
        yield from (packet for packet in container.demux(stream) if packet.size)
    yield None


def decode_frames(path: str | Path) -> Iterator[tuple[float, av.VideoFrame]]:
    """(time in seconds, frame) of each frame, in the decoder's order, which is the order of display.

    Times may step back, above all in AVI files. Frames that do not decode, or only with concealed errors, are skipped.
    Raises InputError if the file is not a video, has no video stream, or none of its frames can be decoded.
    """
    frame = None
    with open_video(path) as (container, stream):
        duration = float(1 / (stream.average_rate or stream.guessed_rate or 25))
        time = -duration
        for packet in iter_packets(container, stream):
            try:
                frames = stream.codec_context.decode(packet)
            except av.error.MemoryError:
                raise
            except av.error.FFmpegError:
                continue
            for frame in (f for f in frames if not f.is_corrupt):
                time = time + duration if frame.pts is None else float(frame.pts * stream.time_base)
                yield time, frame
    if frame is None:
        raise InputError(f"{path}: none of its frames can be decoded")


def sample_positions(count: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """One position in [0, 1) per segment, of `count` equal segments: the centre, or a random one with `rng`."""
    offsets = np.full(count, 0.5) if rng is None else rng.uniform(0, 1, count)
    return (np.arange(count) + offsets) / count


def frames_at(times: list[float], positions: np.ndarray) -> tuple[list[int], list[float]]:
    """Indices of the frames displayed at `positions` in [0, 1) of the clip, and T + 1 seconds: from the first frame of
    the clip to each of them, and the duration. `times` are those of all frames, sorted.

    The last frame is assumed to be displayed for the mean duration of the others.
    """
    unit = 1
    if times[0] == times[-1]:  # the file has no times: 24 frames are taken for a second, as in [3]
        times, unit = range(len(times)), 24
    span = times[-1] - times[0]
    span += span / max(1, len(times) - 1)
    # 1e-9: a position at the very start of a frame must select this frame, whatever the rounding
    indices = [max(0, bisect_right(times, times[0] + p * span + 1e-9) - 1) for p in positions]
    # Microseconds: prompts round times down, and a difference of floats may lie just below a whole second.
    return indices, [round(x / unit, 6) for x in (*(times[i] - times[0] for i in indices), span)]


def select_frames(path: str | Path, positions: np.ndarray) -> tuple[list[av.VideoFrame], list[float]]:
    """The frames displayed at `positions` of any file, from all of its frames, and the seconds of `frames_at`. If these
    need too much memory, the file is decoded a second time."""
    times, frames, num_bytes = [], {}, 0
    for i, (time, frame) in enumerate(decode_frames(path)):
        times.append(time)
        frames[i] = frame
        num_bytes += frame.width * frame.height * frame.format.padded_bits_per_pixel // 8
        if num_bytes > MAX_BUFFERED_BYTES:
            frames.clear()
    # The k-th frame is displayed at the k-th time. Where times step back, the times are wrong, not the order of frames.
    selected, seconds = frames_at(sorted(times), positions)
    if len(frames) < len(times):
        frames = {i: frame for i, (_, frame) in enumerate(decode_frames(path)) if i in selected}
    return [frames[i] for i in selected], seconds


def skip_to_frames(container: av.container.InputContainer, stream: av.VideoStream,
                   positions: np.ndarray) -> tuple[list[av.VideoFrame], list[float]] | None:
    """The frames displayed at `positions`, decoding as few others as possible, and the seconds of `frames_at`, or None
    where that is not possible.

    It is possible where packets carry display times before decoding: H.264 in MP4 or Matroska. Skips frames that no
    other frame refers to, which H.264 marks, and everything after the last selected frame. None if the file has any
    irregularity: a missing or repeated time, damage, frames out of order, a selected frame that is not returned.
    """
    context = stream.codec_context
    has_times = context.name == "h264" and {"mp4", "matroska"} & {*container.format.name.split(",")}
    if not has_times or container.size > MAX_BUFFERED_BYTES:
        return None
    packets = list(iter_packets(container, stream))
    # A clip that was cut out of a video begins with packets that cannot be decoded.
    first = next((i for i, packet in enumerate(packets) if packet and packet.is_keyframe), 0)
    timestamps = [packet.pts for packet in packets[first:-1] if not packet.is_discard]
    if not timestamps or None in timestamps:
        return None
    timestamps.sort()
    indices, seconds = frames_at([float(t * stream.time_base) for t in timestamps], positions)
    selected = [timestamps[i] for i in indices]
    needed, frames, last = {timestamps[0], *selected}, {}, timestamps[0] - 1
    end = 1 + max(i for i, packet in enumerate(packets[:-1]) if packet.pts in needed)
    try:
        for i, packet in enumerate([*packets[:end], None]):
            decode_all = packet is None or packet.pts in needed
            context.skip_frame = "NONKEY" if i < first else "DEFAULT" if decode_all else "NONREF"
            for frame in context.decode(packet):
                if frame.is_corrupt or frame.pts is None or frame.pts <= last:
                    return None
                last = frame.pts
                if last in needed:
                    frames[last] = frame
    except av.error.FFmpegError:
        return None
    return ([frames[t] for t in selected], seconds) if len(frames) == len(needed) else None


def read_frames(path: str | Path, frames: int, preprocessing: int | Preprocessing) -> Tensor:
    """T = `frames` frames of a video, displayed at the centres of equal segments: uint8 (T, 3, S, S).

    `preprocessing`: a ViT's (`vit.preprocessing`), or S alone: the short side is resized to S, then S x S pixels are
    cropped at the centre. If the clip has fewer frames, some are repeated. Raises InputError, which names the file.
    """
    return read_clip(path, frames, preprocessing)[0]


def read_clip(path: str | Path, frames: int, preprocessing: int | Preprocessing) -> tuple[Tensor, list[float]]:
    """The same, and T + 1 seconds: when each frame is displayed, counted from the first frame of the file, and the
    duration of the video."""
    if isinstance(preprocessing, int):
        preprocessing = Preprocessing(size=preprocessing, resize=preprocessing)
    positions, reformatter = sample_positions(frames), VideoReformatter()
    with open_video(path) as (container, stream):
        aspect = stream.sample_aspect_ratio or Fraction(1)
        selected = skip_to_frames(container, stream, positions)
    selected, times = selected or select_frames(path, positions)
    with reading(path):
        return stack_pictures([frame_to_rgb(frame, preprocessing, reformatter, aspect) for frame in selected]), times


# -------------------------------------------------------------------------------------- conversion


def display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """a, b, c, d of a frame: players move its point (x, y) to (a x + c y, b x + d y) [4]."""
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    return a, b, c, d


def lies_on_its_side(matrix: tuple[int, int, int, int]) -> bool:
    """Whether rows become columns."""
    a, b, _, _ = matrix
    return abs(b) > abs(a)


def orient(picture: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """A picture (*, *, 3), turned and mirrored by quarters of a turn, as players do with a frame of this matrix."""
    a, b, c, d = matrix
    if lies_on_its_side(matrix):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def frame_to_rgb(frame: av.VideoFrame, preprocessing: Preprocessing, reformatter: VideoReformatter,
                 aspect: Fraction = Fraction(1)) -> np.ndarray:
    """A decoded frame whose pixels have this aspect, resized, cropped at its centre and upright: uint8 (S, S, 3), or as
    wide as the preprocessing says."""
    matrix = display_matrix(frame)
    if preprocessing.longest_edge is not None:  # the last step makes squares of all
        picture = resize_twice(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray(), preprocessing)
        return orient(picture, matrix)
    size, width, height = preprocessing.shape, preprocessing.width or preprocessing.resize, preprocessing.resize
    if lies_on_its_side(matrix):
        size, width, height = size[::-1], height, width
    if not preprocessing.squash:  # the longer side is rounded down, as in torchvision and transformers
        displayed_width = max(1, round(frame.width * aspect))
        short_side = min(displayed_width, frame.height)
        width, height = width * displayed_width // short_side, height * frame.height // short_side
    if width * height > MAX_PIXELS:
        raise ValueError(f"{frame.width} x {frame.height} would become {width} x {height}, too many")
    interpolation = Interpolation[preprocessing.interpolation.upper()]
    picture = reformatter.reformat(frame, width, height, "rgb24", interpolation=interpolation, threads=1)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return orient(picture.to_ndarray()[top : top + size[0], left : left + size[1]], matrix)


def resize_twice(picture: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """LANCZOS as in [3]: the longer side of (H, W, 3) to `longest_edge`, the other rounded down to an integer and up to
    an even one; then both sides to S. Both results are bytes (uint8)."""
    (height, width), longest_edge = picture.shape[:2], preprocessing.longest_edge
    if width >= height:
        height, width = int(longest_edge / (width / height)), longest_edge
        height += height % 2
    else:
        height, width = longest_edge, int(longest_edge * (width / height))
        width += width % 2
    x = torch.from_numpy(picture).permute(2, 0, 1)[None]  # (1, 3, H, W)
    for size in ((max(height, 1), max(width, 1)), (preprocessing.size, preprocessing.size)):
        x = F.interpolate(x, size, mode="lanczos", align_corners=False, antialias=True)  # (1, 3, *size), torch 2.12
    return x[0].permute(1, 2, 0).numpy()  # (S, S, 3)


def stack_pictures(pictures: Sequence[np.ndarray]) -> Tensor:
    """T pictures (S, S, 3) -> (T, 3, S, S)."""
    # numpy makes the copy: torch would wake all cores for it, in every worker
    return torch.from_numpy(np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2)))
