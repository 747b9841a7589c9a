"""CIDEr as caption papers report it: CIDEr-D with n = 1..4, sigma 6, times 10. Read `plain.py` first.

A caption is four vectors of count times idf, one for each n. The idf of an n-gram comes from the scored videos. So a
score depends on the whole set, and a set of one video scores 0. CIDEr-D clips the hypothesis' counts to the
reference's and penalizes a difference in length.

Behaviour of pycocoevalcap, kept here: the length of a caption is its number of *bigrams*, which only changes the
distance from an empty caption, whose similarity is 0 anyway. A caption of fewer than four words has no 4-grams, so
even a perfect one cannot reach 10.

Shapes: V videos, R references of all videos, D distinct n-grams of one n.

References
[1] Vedantam et al., CIDEr: Consensus-based Image Description Evaluation, CVPR 2015.
[2] Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, arXiv 1504.00325, 2015.
"""

import numpy as np

from .inputs import InputError
from .ngrams import MAX_N, find_sorted, sum_by_index

SIGMA = 6.0


def inverse_document_frequency(references, num_videos):
    """ln(videos) - ln(videos with the n-gram in a reference, at least 1): (D,)."""
    ngram = np.unique(references.key()) % references.num_distinct  # once per video
    return np.log(num_videos) - np.log(np.maximum(np.bincount(ngram, minlength=references.num_distinct), 1))


def clipped_cosine(counts, n):
    """Clipped cosine similarity of each reference with its video's hypothesis, for one n: (R,)."""
    references, hypotheses = counts.tables[n - 1]
    idf = inverse_document_frequency(references, counts.num_videos)
    ref_value = references.count * idf[references.ngram]
    hyp_value = hypotheses.count * idf[hypotheses.ngram]
    ref_norm = np.sqrt(sum_by_index(references.row, ref_value**2, counts.num_references))  # (R,)
    hyp_norm = np.sqrt(sum_by_index(hypotheses.video, hyp_value**2, counts.num_videos))  # (V,)
    index, is_found = find_sorted(hypotheses.key(), references.key())
    product = np.minimum(hyp_value[index[is_found]], ref_value[is_found]) * ref_value[is_found]
    dot = sum_by_index(references.row[is_found], product, counts.num_references)  # (R,)
    norms = ref_norm * hyp_norm[counts.video[: counts.num_references]]
    return np.divide(dot, norms, out=np.zeros_like(dot), where=norms != 0)


def score(counts):
    """CIDEr, 0..10, of NgramCounts: (corpus score, per-video scores (V,)).

    Raises InputError if every reference is empty (pycocoevalcap fails there too).
    """
    num_references = counts.num_references
    if not counts.length[:num_references].any():
        raise InputError("CIDEr: every reference is empty, expected at least one word")
    video = counts.video[:num_references]  # (R,)
    bigrams = np.maximum(counts.length - 1, 0)
    difference = (bigrams[num_references:][video] - bigrams[:num_references]).astype(float)
    length_penalty = np.exp(-(difference**2) / (2 * SIGMA**2))
    similarity = sum(clipped_cosine(counts, n) for n in range(1, MAX_N + 1)) / MAX_N  # (R,)
    per_video = sum_by_index(video, similarity * length_penalty, counts.num_videos) / np.bincount(video) * 10  # (V,)
    return float(np.mean(per_video)), per_video
