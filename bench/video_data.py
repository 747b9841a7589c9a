"""Benchmarks of reading video for `bench.py`: a clip's T frames through `video.read_frames` beside two other ways; and
an epoch's frames from the cache beside decoding them, with what a training step waits for its batch.

PyAV: every frame decoded and made pixels, then the wanted ones picked: the same pixels are asserted. decord: the same
indices asked of `VideoReader.get_batch`, resized by it. decord's resize is another, so frames are compared at native
size; how many of them are the wanted ones is told, since it finds others in some AVI files. Opening the file is
part of every turn, and each has one thread.

Letters: T frames, S side in pixels.
"""

import importlib.util
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

import data
import video
from bench_models import by_turns
from cache import cached_frames
from corpora import Clip

T, S = 16, 224
CLIPS = ("clips/12727.mp4", "clips/walk.mkv", "clips/realshort.mp4", "msvd/YouTubeClips/*.avi")  # of QADAPTER_REAL


def make_clips(folder: Path) -> list[Path]:
    """Ten seconds of H.264 each, a smooth random picture (seed 0) that moves: with B-frames, and without in an AVI."""
    size, paths = (360, 640), []
    coarse = np.random.default_rng(0).integers(0, 256, (10, 36, 3), np.uint8)
    smooth = av.VideoFrame.from_ndarray(coarse, format="rgb24").reformat(1280, 360, interpolation="BICUBIC")
    picture = smooth.to_ndarray()
    for name, options in (("made.mp4", {"g": "250"}), ("made.avi", {"g": "60", "bf": "0"})):
        paths.append(folder / name)
        with av.open(str(paths[-1]), "w") as container:
            stream = container.add_stream("libx264", rate=30, options=options)
            stream.height, stream.width = size
            for i in range(300):
                window = np.ascontiguousarray(picture[:, 2 * i : 2 * i + 640])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(window, format="rgb24")))
            container.mux(stream.encode())
    return paths


def picked(path: Path) -> tuple[list[int], np.ndarray, int]:
    """-> the indices of the T frames at the segments' centres, in a plain decode; these at native size, uint8
    (T, H, W, 3); how many frames there are."""
    both = list(video.decode(path))
    indices = video.shown_at(sorted(time for time, _ in both), video.moments(T, None))
    native = [both[i][1].to_ndarray(format="rgb24", interpolation="BICUBIC") for i in indices]
    return indices, np.stack(native), len(both)


def with_pyav(path: Path, indices: list[int]) -> np.ndarray:
    """All frames become pixels, those wanted are picked: uint8 (T, 3, S, S)."""
    view, reformat = video.plain_view(S), VideoReformatter()
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        pixels = [video.to_pixels(frame, view, reformat) for frame in container.decode(video=0)]
    return np.ascontiguousarray(np.stack([pixels[i] for i in indices]).transpose(0, 3, 1, 2))


def with_decord(path: Path, indices: list[int], height: int, width: int) -> np.ndarray:
    import decord

    short = min(height, width)
    height, width = S * height // short, S * width // short
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), width=width, height=height, num_threads=1)
    top, left = (height - S) // 2, (width - S) // 2
    pixels = reader.get_batch(indices).asnumpy()[:, top : top + S, left : left + S]
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def decode_rows(path: Path, repeats: int) -> list[dict]:
    indices, native, count = picked(path)
    height, width = native.shape[1:3]
    clip = f"{path.name}, {T} of {count} frames, {width} x {height} to {S}, 1 thread"

    def ours():
        return video.read_frames(path, T, S).numpy()

    found = ours()
    assert np.array_equal(found, with_pyav(path, indices)), f"{path}: the pixels differ from PyAV's"
    rows = [by_turns(f"{clip}: all by PyAV", ours, partial(with_pyav, path, indices), repeats, right=f"{T} of {T}")]
    if importlib.util.find_spec("decord") is None:
        return rows
    import decord

    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        far = np.abs(reader.get_batch(indices).asnumpy().astype(int) - native)
        right = far.mean((1, 2, 3)) < 1  # of 255: another frame is farther, a rounding nearer
        figures = {"right": f"{right.sum()} of {T}", "largest difference": int(far[right].max(initial=0))}
        other = with_decord(path, indices, height, width)
        figures["mean, resized"] = float(np.abs(other[right].astype(int) - found[right]).mean())
    except decord.DECORDError:
        return rows + [{"what": f"{clip}: decord", "right": "an error"}]
    theirs = partial(with_decord, path, indices, height, width)
    return rows + [by_turns(f"{clip}: decord", ours, theirs, repeats, **figures)]


def compare_reading(repeats: int) -> list[dict]:
    """A row a clip and other way; the frames a second are those wanted, ours."""
    with tempfile.TemporaryDirectory() as folder:
        if real := os.environ.get("QADAPTER_REAL"):
            paths = [path for name in CLIPS for path in sorted(Path(real).glob(name))]
        else:
            paths = make_clips(Path(folder))
        rows = [row for path in paths for row in decode_rows(path, repeats)]
    return [row | ({"frames/s": T / row["wall s"]} if "wall s" in row else {}) for row in rows]


# ------------------------------------------------------------------------------------------- the cache


class Words:
    """A tokenizer that takes no time."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[3] * 12 for _ in texts]


def eight_frames(path: Path) -> np.ndarray:
    return video.read_frames(path, 8, S).numpy()


def epoch_row(folder: Path, sources: list[Path], repeats: int) -> dict:
    """The batches of an epoch of 48 clips, 8 of 16 kept frames each: from the cache, and decoded by 2 processes."""
    clips = []
    for i in range(48):
        link = folder / f"{i}{sources[i % len(sources)].suffix}"
        link.symlink_to(sources[i % len(sources)].resolve())
        clips.append(Clip(link.name, link, ("a caption",)))
    begun = time.perf_counter()
    frames = cached_frames(clips, folder / "clips.frames", 16, S, 2, report=lambda line: None)
    first = time.perf_counter() - begun
    for clip, kept in zip(clips[: len(sources)], frames, strict=False):
        assert np.array_equal(kept, video.read_frames(clip.path, 16, S)), f"{clip.path}: another cache"
    examples = data.Examples(clips, frames, Words(), 8, 1, 0, 2)

    def ours():
        for batch in data.order(48, 8, 1, 0):
            data.collate([examples[key] for key in batch])

    def theirs():
        with ProcessPoolExecutor(2) as pool:
            list(pool.map(eight_frames, [clip.path for clip in clips]))

    what = f"an epoch's frames of 48 clips at {S}: decoded anew by 2 processes"
    return by_turns(what, ours, theirs, repeats, **{"first time, s": first})


def waiting_row(folder: Path, steps: int) -> dict:
    """Training steps of the demo on its ViT's outputs, the quickest there are: how long each waits for its batch."""
    from lm import CausalLM
    from model import AdapterConfig, Captioner
    from tokens import load_tokenizer
    from vit import ViT

    torch.manual_seed(0)
    vit, lm = ViT.from_pretrained("backbones/tiny-vit"), CausalLM.from_pretrained("backbones/tiny-lm")
    captioner = Captioner(vit, lm, load_tokenizer(Path(__file__).parent / "backbones/tiny-lm"), AdapterConfig())
    pixels = torch.randint(256, (1, 16, 3, vit.pixels.size, vit.pixels.size), dtype=torch.uint8)
    with torch.no_grad():
        features = captioner.block_outputs(pixels).view(torch.uint16).numpy()
    kept = np.memmap(folder / "features", np.uint16, "w+", shape=(64 * steps, *features.shape[1:]))
    kept[:] = features
    clips = [Clip(str(i), folder, ("a caption",)) for i in range(len(kept))]
    examples = data.Examples(clips, kept, Words(), 8, 1, 0, 2)
    optimizer = torch.optim.AdamW(captioner.trained().values(), 1e-3)

    def train(frames: torch.Tensor, targets: torch.Tensor) -> None:
        total, count = captioner(frames, targets)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()

    waits, ends = [], [time.perf_counter()]
    load = lambda keys: data.collate([examples[key] for key in keys])  # noqa: E731
    for frames, targets in data.ahead(load, data.order(len(kept), 64, 1, 0)):
        waits.append(time.perf_counter() - ends[-1])
        train(frames, targets)
        ends.append(time.perf_counter())
    load([(i, 0) for i in range(64)])
    loading = time.perf_counter() - ends[-1]
    alone = [time.perf_counter()]
    for _ in range(steps):
        train(frames, targets)
        alone.append(time.perf_counter())
    step, wait = statistics.median(np.diff(ends)[2:]), statistics.median(waits[2:])
    return {"what": "a training step of the demo, 64 clips' features", "step, ms": 1e3 * step, "waits, ms": 1e3 * wait,
            "nothing to load, ms": 1e3 * statistics.median(np.diff(alone)[2:]),
            "loading alone, ms": 1e3 * loading}  # fmt: skip


def compare_cache(repeats: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        if real := os.environ.get("QADAPTER_REAL"):
            paths = sorted(Path(real).glob(CLIPS[-1]))
        else:
            paths = make_clips(Path(folder))
        return [epoch_row(Path(folder), paths, repeats), waiting_row(Path(folder), 16)]
