"""BLEU-1 to BLEU-4 as caption papers report them.

Clipped n-gram precision against all references of a video, the brevity penalty with the
reference length closest to the hypothesis, and two tiny constants where others smooth: a perfect
corpus scores 0.99999999..., a hypothesis of one right word 3.16e-5 and not 0.

References
[1] Papineni et al., BLEU: a Method for Automatic Evaluation of Machine Translation, ACL 2002.
[2] Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, arXiv 1504.00325,
    2015.
"""

import numpy as np

from .ngrams import ORDERS, find, sums

SMALL = 1e-9  # added to every divisor
TINY = 1e-15  # added to every count that is divided


def closest_lengths(corpus):
    """The reference length closest to the hypothesis' (the shorter of two): (videos,)."""
    lengths, owner = corpus.length[: corpus.references], corpus.owner[: corpus.references]
    far = np.abs(lengths - corpus.length[corpus.references :][owner])
    order = np.lexsort((lengths, far, owner))
    first = np.searchsorted(owner[order], np.arange(corpus.videos))
    return lengths[order][first]


def clipped_matches(corpus, order):
    """N-grams of each hypothesis found in its references, each counted at most as often as in the
    reference that has it most: (videos,)."""
    references, hypotheses = corpus.split(order)
    size = max(references.size, 1)
    key = corpus.owner[references.row] * size + references.gram
    rank = np.lexsort((references.count, key))
    key, most = key[rank], references.count[rank]
    greatest = np.append(key[1:] != key[:-1], True)[: len(key)]  # the last of equal keys
    keys, most = key[greatest], most[greatest]
    video = corpus.owner[hypotheses.row]
    at, found = find(keys, video * size + hypotheses.gram)
    matched = np.minimum(hypotheses.count[found], most[at[found]])
    return sums(video[found], matched, corpus.videos)


def combine(matches, guesses, length, closest):
    """BLEU-1..4 (4, videos) from matches and guesses (4, videos), length and closest (videos,)."""
    precision = (matches + TINY) / (guesses + SMALL)
    orders = np.arange(1, ORDERS + 1)[:, None]
    scores = np.cumprod(precision, axis=0) ** (1 / orders)
    ratio = (length + TINY) / (closest + SMALL)
    return scores * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)


def score(corpus):
    """BLEU of an `ngrams.Corpus`: (corpus scores (4,), per-video scores (4, videos)), 0..1."""
    length = corpus.length[corpus.references :]
    closest = closest_lengths(corpus)
    guesses = np.stack([np.maximum(length - n, 0) for n in range(ORDERS)])
    matches = np.stack([clipped_matches(corpus, n) for n in range(1, ORDERS + 1)])
    per_video = combine(matches, guesses, length, closest)
    total = [np.sum(x, axis=-1, keepdims=True) for x in (matches, guesses, length, closest)]
    return combine(*total)[:, 0], per_video
