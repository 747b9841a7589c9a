"""From clips to batches: each epoch shows other frames of a clip and the next of its captions.

Training samples T of the M frames that are cached per clip (`cache.py`), so a video is decoded only once. Where M = T,
each epoch shows the same frames.

Letters: B clips, T frames, M cached frames per clip, S side in pixels, K captions per clip, L tokens of the longest
caption with its EOS.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from video_data.cache import ClipCache
from video_data.datasets import Clip
from video_data.video import sample_positions

IGNORE_INDEX = -100  # the default ignore_index of torch's cross_entropy

Example = tuple[np.ndarray, list[list[int]]]  # frames (T, 3, S, S) or features (T, ...); token ids of K captions


def normalize_caption(caption: str) -> str:
    """Lower case, single spaces, no quotes around the caption and no punctuation at its ends."""
    return " ".join(caption.lower().split()).strip(" \"'`.,;:!?")


class TrainingExamples:
    """Training examples by (clip, epoch): T jittered frames or their features, and K captions as token ids.

    All randomness depends on (seed, epoch, clip) alone, so a resumed run draws the same. The captions of a clip are
    drawn without replacement until all have been used.
    """

    def __init__(self, clips: list[Clip], cache: ClipCache, tokenizer, num_frames: int, num_captions: int,
                 seed: int, eos_id: int, max_tokens: int):  # fmt: skip
        """cache[i] holds M frames or features of clips[i]. Captions longer than `max_tokens` are truncated."""
        self.cache, self.num_frames, self.num_captions, self.seed = cache, num_frames, num_captions, seed
        encoded = [[tokenizer.encode(normalize_caption(caption)) for caption in clip.captions] for clip in clips]
        self.captions = [[[*ids[:max_tokens], eos_id] for ids in captions] for captions in encoded]
        self.num_truncated = sum(len(ids) > max_tokens for captions in encoded for ids in captions)

    def sample_captions(self, clip: int, epoch: int) -> list[list[int]]:
        """Token ids of the K captions of this clip in this epoch."""
        captions, sampled = self.captions[clip], []
        for draw in range(epoch * self.num_captions, (epoch + 1) * self.num_captions):
            cycle, i = divmod(draw, len(captions))  # each cycle goes through all captions once
            permutation = np.random.default_rng([self.seed, 1, clip, cycle]).permutation(len(captions))
            sampled.append(captions[permutation[i]])
        return sampled

    def __getitem__(self, key: tuple[int, int]) -> Example:
        clip, epoch = key
        rng = np.random.default_rng([self.seed, 2, clip, epoch])
        indices = (sample_positions(self.num_frames, rng) * self.cache.shape[0]).astype(int)
        return self.cache.read(clip, indices), self.sample_captions(clip, epoch)


def to_tensor(inputs: np.ndarray) -> Tensor:
    """Frames uint8, or the bits of bf16 features as `cached_features` stores them -> a tensor of the same memory."""
    tensor = torch.from_numpy(inputs)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def collate(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """-> frames (B, T, 3, S, S) uint8 or features (B, T, ...) bf16, and labels (B, K, L) padded with IGNORE_INDEX."""
    length = max(len(ids) for _, captions in examples for ids in captions)
    labels = [[ids + [IGNORE_INDEX] * (length - len(ids)) for ids in captions] for _, captions in examples]
    # Not torch.stack: in the thread of `prefetch` it starts threads of its own, and a step takes twice as long.
    return to_tensor(np.stack([frames for frames, _ in examples])), torch.tensor(labels)


def prefetch(load: Callable, keys: Iterable) -> Iterator:
    """load(key) for each key, in order. While one result is used, another thread loads the next."""
    with ThreadPoolExecutor(1) as executor:
        pending = None
        for key in keys:
            following = executor.submit(load, key)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def epoch_batches(num_clips: int, batch_size: int, epochs: int, seed: int,
                  first_step: int = 0) -> Iterator[list[tuple[int, int]]]:  # fmt: skip
    """Batches of (clip, epoch) keys. Each epoch is shuffled anew; its last incomplete batch is dropped."""
    steps = num_clips // batch_size
    for step in range(first_step, epochs * steps):
        epoch, i = divmod(step, steps)
        permutation = np.random.default_rng([seed, 3, epoch]).permutation(num_clips)
        yield [(int(clip), epoch) for clip in permutation[i * batch_size : (i + 1) * batch_size]]
