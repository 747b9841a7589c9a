"""Captions that people would agree with: the last phase of a run trains on the CIDEr of the captioner's own captions.

Cross-entropy asks for every caption that people wrote. What an unsure captioner then writes is the safe one, "a man
is talking", which scores little. So in the last epochs it draws M captions c_1, ..., c_M of each clip itself, each gets
its CIDEr r_m against what people wrote, and those that beat the others of their clip become more likely:

    loss = - mean of r_m      d loss = - mean of (r_m - b_m) d log p(c_m)      b_m: mean of the others' r

This is the policy gradient of [1] with the baseline of [2]. p is the distribution that the captions are drawn from, at
the temperature of `sample`, but for the tokens that `--token-dropout` hides in the gradient alone. CIDEr is that of
`metrics/plain.py`, of captions as they are trained on, split at spaces.

Shapes: B clips, M samples of each, L tokens of the longest one.

References
[1] Self-critical sequence training, https://arxiv.org/abs/1612.00563
[2] A better variant of self-critical sequence training, https://arxiv.org/abs/2003.09971
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metrics.plain import cider_of_video, document_frequencies
from models.generation import sample
from video_data.annotations import Clip
from video_data.batches import IGNORE_INDEX, Batch, normalize_caption

SAMPLES = 5  # M


class CiderLoss:
    """The loss of captions that are drawn for training clips. The idf of CIDEr is that of their captions."""

    def __init__(self, clips: Sequence[Clip]):
        self.references = [[normalize_caption(caption) for caption in clip.captions] for clip in clips]
        self.frequencies = document_frequencies(self.references)

    def cider(self, clip: int, caption: str) -> float:
        return cider_of_video(self.references[clip], normalize_caption(caption), self.frequencies, len(self.references))

    def terms(self, batch: Batch) -> int:
        return SAMPLES * len(batch.clips)

    def __call__(self, captioner, batch: Batch) -> Tensor:
        """The loss, summed over clips and samples."""
        drawn = captioner.generate_ids(batch.frames, batch.times, partial(sample, count=SAMPLES))
        rows, eos_ids = [ids for of_clip in drawn for ids in of_clip], captioner.lm.config.eos_ids  # B M of them
        texts = captioner.tokenizer.decode([[i for i in ids if i not in eos_ids] for ids in rows])
        ciders = torch.tensor([self.cider(batch.clips[i // SAMPLES], text) for i, text in enumerate(texts)])
        ciders = ciders.unflatten(0, (-1, SAMPLES))  # (B, M)
        gains = (ciders - ciders.mean(1, keepdim=True)) * SAMPLES / (SAMPLES - 1)  # r - b
        labels = pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True, padding_value=IGNORE_INDEX)
        loss = captioner(batch.frames, labels.unflatten(0, ciders.shape), batch.times, gains)  # -sum of (r - b) log p
        return loss - loss.detach() - ciders.sum()  # its value is -sum of r, its gradient that of the line above
