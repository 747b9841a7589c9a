"""Benchmark of reading video: T frames of a clip through `read_frames` beside plain PyAV.

PyAV decodes and converts every frame, then takes those at the same times; the pixels must be equal. Each turn opens the
file and uses one thread.

Letters: T frames, S side in pixels.
"""

import os
import tempfile
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from bench.measure import compare_in_turns
from common.preprocessing import Preprocessing
from video_data.video import decode_frames, frame_to_rgb, frames_at, read_frames, sample_positions

T, S = 16, 224
CLIPS = ("clips/12727.mp4", "clips/walk.mkv", "clips/realshort.mp4", "msvd/YouTubeClips/*.avi")  # in QADAPTER_REAL


def make_clip(path: Path) -> None:
    """Writes ten seconds of FFmpeg's test picture as H.264 with B-frames."""
    picture = "testsrc2=size=640x360:rate=30:duration=10"
    with av.open(picture, format="lavfi") as source, av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, width=640, height=360)
        for frame in source.decode(video=0):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_with_pyav(path: Path, indices: list[int]) -> np.ndarray:
    """Converts every frame, then selects: uint8 (T, 3, S, S)."""
    preprocessing, reformatter = Preprocessing(S, S), VideoReformatter()
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [frame_to_rgb(frame, preprocessing, reformatter) for frame in container.decode(video=0)]
    return np.ascontiguousarray(np.stack([frames[i] for i in indices]).transpose(0, 3, 1, 2))


def compare_clip(path: Path, repeats: int) -> dict:
    """frames/s: the T frames that are returned, per second."""
    times = sorted(time for time, _ in decode_frames(path))
    indices = frames_at(times, sample_positions(T, None))
    ours, theirs = partial(read_frames, path, T, S), partial(read_with_pyav, path, indices)
    assert np.array_equal(ours().numpy(), theirs()), f"{path}: the pixels differ from PyAV's"
    row = compare_in_turns(f"{path.name}, {T} of {len(times)} frames at {S}, 1 thread", ours, theirs, repeats)
    return row | {"frames/s": T / row["wall s"]}


def compare_reading(repeats: int) -> list[dict]:
    """Real clips where the environment variable QADAPTER_REAL names a folder of them, else one that is made."""
    with tempfile.TemporaryDirectory() as folder:
        if real := os.environ.get("QADAPTER_REAL"):
            paths = [path for pattern in CLIPS for path in sorted(Path(real).glob(pattern))]
        else:
            make_clip(Path(folder, "made.mp4"))
            paths = [Path(folder, "made.mp4")]
        return [compare_clip(path, repeats) for path in paths]
