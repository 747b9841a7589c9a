"""From clips to batches: each turn of a clip shows other moments of it and the next of its captions.

Training draws its T moments from M > T frames kept of each clip (`cache.py`), so that a video is decoded once.

Letters: B clips, T frames, M candidate frames kept of a clip, S side in pixels, K captions a clip, L tokens of the
longest caption with its EOS.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from corpora import Clip, load
from model import IGNORED, LONGEST
from video import moments, read_frames

__all__ = ["Clip", "Examples", "ahead", "collate", "load", "order", "read_frames"]


def clean(caption: str) -> str:
    """A caption as it is learnt: in lower case, in single spaces, without quotes around it and a sign at its end."""
    return " ".join(caption.lower().split()).strip(" \"'`.,;:!?")


class Examples:
    """Training examples by (clip, epoch): T jittered frames, or the bits of their features in bf16, and K captions as
    target ids.

    Everything random is drawn from (seed, epoch, clip) alone, so it is the same whenever a run goes on.
    The captions of a clip are dealt like cards: none comes again before all have come.
    """

    def __init__(self, clips: list[Clip], cache: np.ndarray, tokenizer, frames: int, captions: int, seed: int,
                 eos_id: int):  # fmt: skip
        self.cache, self.frames, self.k, self.seed = cache, frames, captions, seed
        encoded = [tokenizer.encode([clean(caption) for caption in clip.captions]) for clip in clips]
        self.ids = [[[*ids[:LONGEST], eos_id] for ids in group] for group in encoded]
        self.cut = sum(len(ids) > LONGEST for group in encoded for ids in group)  # captions that were too long

    def deal(self, clip: int, epoch: int) -> list[list[int]]:
        """The K captions of this clip's turn in this epoch."""
        ids, hand = self.ids[clip], []
        for turn in range(epoch * self.k, (epoch + 1) * self.k):
            pack, place = divmod(turn, len(ids))
            hand.append(ids[np.random.default_rng([self.seed, 1, clip, pack]).permutation(len(ids))[place]])
        return hand

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, list[list[int]]]:
        clip, epoch = key
        rng = np.random.default_rng([self.seed, 2, clip, epoch])
        places = moments(self.frames, rng) * self.cache.shape[1]  # of M candidates
        return self.cache[clip, places.astype(int)], self.deal(clip, epoch)


def collate(examples: list[tuple[np.ndarray, list[list[int]]]]) -> tuple[Tensor, Tensor]:
    """-> frames (B, T, 3, S, S) uint8 or features bf16, targets (B, K, L) padded with -100."""
    length = max(len(ids) for _, hand in examples for ids in hand)
    targets = [[ids + [IGNORED] * (length - len(ids)) for ids in hand] for _, hand in examples]
    # Not torch.stack: in the thread of `ahead` it would start threads of its own, and a step would take twice as long.
    frames = torch.from_numpy(np.stack([frames for frames, _ in examples]))
    return frames.view(torch.bfloat16) if frames.dtype == torch.uint16 else frames, torch.tensor(targets)


def ahead(load: Callable, keys: Iterable) -> Iterator:
    """load(key) of each key, in order; while one is used, another thread loads the next."""
    with ThreadPoolExecutor(1) as reader:
        last = None
        for key in keys:
            this = reader.submit(load, key)
            if last is not None:
                yield last.result()
            last = this
        if last is not None:
            yield last.result()


def order(clips: int, batch: int, epochs: int, seed: int, first_step: int = 0) -> Iterator[list[tuple[int, int]]]:
    """Batches of (clip, epoch), each epoch shuffled anew, its last incomplete batch left out."""
    steps = clips // batch
    for step in range(first_step, epochs * steps):
        epoch, i = divmod(step, steps)
        shuffled = np.random.default_rng([seed, 3, epoch]).permutation(clips)
        yield [(int(c), epoch) for c in shuffled[i * batch : (i + 1) * batch]]
