"""CIDEr as caption papers report it, which is CIDEr-D (n = 1..4, sigma 6, times 10).

A caption is four vectors, one an n-gram order, of count times idf; the idf of an n-gram comes
from the videos being scored, so a score depends on the set, and a set of one video scores 0.
CIDEr-D clips the hypothesis' counts to the reference's and punishes a difference in length.

The reference's behaviour, kept here: the "length" of a caption is its number of *bigrams*, which
changes nothing but the distance from an empty caption, whose similarity is 0 anyway; and captions of
fewer than four words have no 4-grams, so even a perfect one cannot reach 10.

References
[1] Vedantam et al., CIDEr: Consensus-based Image Description Evaluation, CVPR 2015 (CIDEr-D:
    section 5).
[2] Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, arXiv 1504.00325,
    2015.
"""

import numpy as np

from .ngrams import ORDERS, find, sums

SIGMA = 6.0


def idf(corpus, order):
    """ln(videos) - ln(videos that have the gram in a reference, at least 1): (distinct grams,)."""
    references, _ = corpus.split(order)
    size = max(references.size, 1)
    seen = np.unique(corpus.owner[references.row] * size + references.gram) % size
    return np.log(corpus.videos) - np.log(np.maximum(np.bincount(seen, minlength=size), 1))


def similarity(corpus, order):
    """Clipped cosine of each reference with its video's hypothesis, one order: (references,)."""
    weight = idf(corpus, order)
    references, hypotheses = corpus.split(order)
    size = max(references.size, 1)
    r_value = references.count * weight[references.gram]
    h_value = hypotheses.count * weight[hypotheses.gram]
    r_norm = np.sqrt(sums(references.row, r_value**2, corpus.references))
    h_video = corpus.owner[hypotheses.row]
    h_norm = np.sqrt(sums(h_video, h_value**2, corpus.videos))

    owner = corpus.owner[references.row]
    at, found = find(h_video * size + hypotheses.gram, owner * size + references.gram)
    product = np.minimum(h_value[at[found]], r_value[found]) * r_value[found]
    dot = sums(references.row[found], product, corpus.references)
    norms = r_norm * h_norm[corpus.owner[: corpus.references]]
    return np.divide(dot, norms, out=np.zeros_like(dot), where=norms != 0)


def score(corpus):
    """CIDEr of an `ngrams.Corpus`: (corpus score, per-video scores (videos,)), 0..10.

    Raises ValueError where every reference is empty (the reference fails there too).
    """
    count = corpus.references
    if not corpus.length[:count].any():
        raise ValueError("CIDEr: every reference is empty, expected at least one word")
    owner = corpus.owner[:count]
    bigrams = np.maximum(corpus.length - 1, 0)
    apart = (bigrams[count:][owner] - bigrams[:count]).astype(float)
    near = np.exp(-(apart**2) / (2 * SIGMA**2))
    mean = sum(similarity(corpus, n) for n in range(1, ORDERS + 1)) / ORDERS
    per_video = sums(owner, mean * near, corpus.videos) / np.bincount(owner) * 10
    return float(np.mean(per_video)), per_video
