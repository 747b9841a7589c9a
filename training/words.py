"""The words before the captions: visual tokens first learn to point at the words that people use for a clip.

Through a frozen language model the adapter learns slowly which clip is which: for thousands of steps the safe caption,
"a man is talking", is nearly as likely as the right one. So for a few epochs (the W of `--epochs W E C`) the
language model stays out of it. A visual token v_n points at a word w as far as it has the direction of the word's
embedding e_w, and a clip has a word if any of its tokens points there:

    s_w = log f_w + log sum_n exp(a cos(v_n, e_w - e))    e: mean embedding of all words, f_w: mean of p_w over clips
    loss = - sum_w p_w log softmax(s)_w                   p_w: in how many captions of the clip w is, times its idf,
                                                          divided by the sum of that over all words

Only what the method trains anyway is trained; nothing is added to it.

Shapes: B clips, N visual tokens, C width of the language model, W words: tokens neither too rare nor too usual.
"""

import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError
from video_data.batches import Batch

MIN_CLIPS, MAX_SHARE = 8, 0.6  # a word is in so many clips at least, and in less than this share of all
SHARPNESS = 34.0  # a: when it was trained as well, it ended here


def count_words(captions: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    """Token ids of the captions of each clip -> the words (W,), and p of each clip (clips, W). Raises InputError if
    fewer than two tokens are words."""
    counts = [Counter(token for caption in clip for token in set(caption)) for clip in captions]
    clips_with = Counter(token for count in counts for token in count)
    words = sorted(token for token, n in clips_with.items() if MIN_CLIPS <= n < MAX_SHARE * len(captions))
    if len(words) < 2:
        raise InputError(f"--epochs: words: expected tokens in captions of {MIN_CLIPS} clips or more, and of less than "
                         f"{MAX_SHARE:.0%} of the {len(captions)}, found {len(words)}")
    idf = torch.tensor([math.log(len(captions) / clips_with[word]) for word in words])
    shares = torch.tensor([[count[word] for word in words] for count in counts], dtype=torch.float32) * idf
    return torch.tensor(words), F.normalize(shares, p=1, dim=1)


def word_scores(visual: Tensor, words: Tensor, prior: Tensor) -> Tensor:
    """Visual tokens (B, N, C, or more: what deeper blocks read), embeddings of the words (W, C), f (W,) -> s (B, W)."""
    directions = F.normalize(words - words.mean(0), dim=-1)
    cosines = F.normalize(visual[..., : words.shape[1]].float(), dim=-1) @ directions.T  # (B, N, W)
    return (SHARPNESS * cosines).logsumexp(1) + prior.clamp(min=1e-6).log()


class WordLoss:
    """The loss of batches of training clips, whose captions are given as token ids."""

    def __init__(self, captioner, captions: list[list[list[int]]]):
        words, self.targets = count_words(captions)
        device = captioner.prefix_scale.device
        self.embeddings = captioner.lm.embed(words.to(device)).detach().float()
        self.prior = self.targets.mean(0).to(device)

    def terms(self, batch: Batch) -> int:
        return len(batch.clips)

    def __call__(self, captioner, batch: Batch) -> Tensor:
        """The loss, summed over the clips."""
        visual = torch.cat(captioner.encode(batch.frames), dim=1)  # (B, N, C)
        log_p = word_scores(visual, self.embeddings, self.prior).log_softmax(-1)  # (B, W)
        return -(self.targets[batch.clips].to(log_p.device) * log_p).sum()
