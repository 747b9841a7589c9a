"""The words before the captions: visual tokens first learn to point at the words that people use for a clip.

Through a frozen language model the adapter learns slowly which clip is which: for thousands of steps the safe caption,
"a man is talking", is nearly as likely as the right one. So for a few epochs (`--word-epochs`) the language model stays
out of it. A visual token v_n points at a word w as far as it has the direction of the word's embedding e_w, and a clip
has a word if any of its tokens points there:

    s_w = log f_w + log sum_n exp(a cos(v_n, e_w - e))    e: mean embedding of all words, f_w: mean of p_w over clips
    loss = - sum_w p_w log softmax(s)_w                   p_w: how often the clip's captions have w, times its idf

Only what the method trains anyway is trained; nothing is added to it.

Shapes: B clips, N visual tokens, C width of the language model, W words: tokens neither too rare nor too usual.
"""

import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

from common.cli import TimeLeft
from common.errors import InputError
from training.optimizer import learning_rate, make_optimizer, set_learning_rate
from video_data.batches import epoch_batches, prefetch

MIN_CLIPS, MAX_SHARE = 8, 0.6  # a word is in so many clips at least, and in less than this share of all
SHARPNESS = 34.0  # a: where it ended when it was learnt, too


def count_words(captions: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    """Token ids of the captions of each clip -> the words (W,), and p of each clip (clips, W). Raises InputError if no
    token is a word."""
    counts = [Counter(token for caption in clip for token in set(caption)) for clip in captions]
    clips_with = Counter(token for count in counts for token in count)
    words = sorted(token for token, n in clips_with.items() if MIN_CLIPS <= n < MAX_SHARE * len(captions))
    if not words:
        raise InputError(f"--word-epochs: expected tokens in captions of {MIN_CLIPS} clips or more, and of less than "
                         f"{MAX_SHARE:.0%} of the {len(captions)}, found none")
    idf = torch.tensor([math.log(len(captions) / clips_with[word]) for word in words])
    shares = torch.tensor([[count[word] for word in words] for count in counts], dtype=torch.float32) * idf
    return torch.tensor(words), F.normalize(shares, p=1, dim=1)


def word_scores(visual: Tensor, words: Tensor, prior: Tensor) -> Tensor:
    """Visual tokens (B, N, C, or more: what deeper blocks read), embeddings of the words (W, C), f (W,) -> s (B, W)."""
    directions = F.normalize(words - words.mean(0), dim=-1)
    cosines = F.normalize(visual[..., : words.shape[1]].float(), dim=-1) @ directions.T  # (B, N, W)
    return (SHARPNESS * cosines).logsumexp(1) + prior.clamp(min=1e-6).log()


def learn_words(captioner, captions, load_batch, device: torch.device, group) -> None:
    """Trains the captioner for config.word_epochs. `captions`: token ids of each clip; `load_batch`: as in train.py."""
    config = captioner.config
    words, targets = count_words(captions)
    embeddings, prior = captioner.lm.embed(words.to(device)).detach().float(), targets.mean(0).to(device)
    keys = list(epoch_batches(len(captions), config.batch_size, config.word_epochs, config.seed))
    optimizer = make_optimizer(captioner.trained(), config.weight_decay)
    time_left = TimeLeft("words", len(keys) * config.batch_size)
    trained, losses = list(captioner.trained().values()), []
    for step, (frames, *_) in enumerate(prefetch(load_batch, keys)):
        set_learning_rate(optimizer, learning_rate(step, len(keys), config.lr))
        torch.manual_seed((config.seed * 2**20 + step) * 2**10 + group.rank)  # as in train.py
        clips, size = [clip for clip, _ in group.shard(keys[step])], config.micro_batch_size or len(frames)
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for micro_frames, micro_clips in zip(frames.split(size), torch.tensor(clips).split(size), strict=True):
            visual = torch.cat(captioner.encode(micro_frames.to(device)), dim=1)  # (B, N, C)
            log_p = word_scores(visual, embeddings, prior).log_softmax(-1)  # (B, W)
            loss = -(targets[micro_clips].to(device) * log_p).sum() / config.batch_size
            loss.backward()
            total += loss.detach()
        losses.append(group.all_reduce(total.item()))
        group.all_reduce_gradients(trained)
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
        if not math.isfinite(losses[-1] + grad_norm):
            raise InputError(f"words, step {step + 1}: the loss is {losses[-1]}, its gradient's norm {grad_norm}")
        optimizer.step()
        time_left.update((step + 1) * config.batch_size)
    epoch = len(keys) // config.word_epochs
    print(f"words: {len(words)}, loss {sum(losses[:epoch]) / epoch:.3f} in the first epoch, "
          f"{sum(losses[-epoch:]) / epoch:.3f} in the last")
