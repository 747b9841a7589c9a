"""What is computed once and kept on disk: the frames of clips, and what the frozen ViT makes of them.

Letters: M candidate frames kept of a clip, S side in pixels.
"""

import hashlib
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from corpora import Clip
from download import check_room
from pixels import Pixels
from video import plain_view, read_frames
from weights import read_json, replace_atomically


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
