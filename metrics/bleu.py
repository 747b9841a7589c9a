"""BLEU-1 to BLEU-4 as caption papers report them. Read `plain.py` first; here are the same sums on arrays.

Clipped n-gram precision against all references of a video, times the brevity penalty with the reference length closest
to the hypothesis. pycocoevalcap adds two tiny constants where other programs smooth: a perfect corpus scores
0.99999999..., and a hypothesis of one right word 3.16e-5, not 0.

Shapes: V videos, R references of all videos, K entries of an n-gram table.

References
[1] Papineni et al., BLEU: a Method for Automatic Evaluation of Machine Translation, ACL 2002.
[2] Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, arXiv 1504.00325, 2015.
"""

import numpy as np

from .ngrams import MAX_N, find_sorted, sum_by_index

SMALL = 1e-9  # added to every divisor
TINY = 1e-15  # added to every dividend


def closest_lengths(counts):
    """Length of the reference closest to the hypothesis in length, the shorter one of two: (V,)."""
    lengths, video = counts.length[: counts.num_references], counts.video[: counts.num_references]  # (R,)
    difference = np.abs(lengths - counts.length[counts.num_references :][video])
    order = np.lexsort((lengths, difference, video))
    first = np.searchsorted(video[order], np.arange(counts.num_videos))
    return lengths[order][first]  # (V,)


def clipped_matches(counts, n):
    """N-grams of each hypothesis that its references have: (V,).

    An n-gram counts at most as often as in the reference that has it most often.
    """
    references, hypotheses = counts.tables[n - 1]
    order = np.lexsort((references.count, references.key()))
    key, max_count = references.key()[order], references.count[order]
    is_last = np.append(key[1:] != key[:-1], True)[: len(key)]  # of equal keys the last has the highest count
    index, is_found = find_sorted(key[is_last], hypotheses.key())
    matches = np.minimum(hypotheses.count[is_found], max_count[is_last][index[is_found]])
    return sum_by_index(hypotheses.video[is_found], matches, counts.num_videos)  # (V,)


def bleu_from_counts(matches, totals, hyp_length, ref_length):
    """BLEU-1..4 (4, V) from matched and all n-grams of the hypotheses (4, V) and lengths (V,)."""
    precision = (matches + TINY) / (totals + SMALL)
    n = np.arange(1, MAX_N + 1)[:, None]
    geometric_mean = np.cumprod(precision, axis=0) ** (1 / n)
    ratio = (hyp_length + TINY) / (ref_length + SMALL)
    return geometric_mean * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)


def score(counts):
    """BLEU, 0..1, of NgramCounts: (corpus scores (4,), per-video scores (4, V))."""
    hyp_length, ref_length = counts.length[counts.num_references :], closest_lengths(counts)
    totals = np.stack([np.maximum(hyp_length - n + 1, 0) for n in range(1, MAX_N + 1)])
    matches = np.stack([clipped_matches(counts, n) for n in range(1, MAX_N + 1)])
    per_video = bleu_from_counts(matches, totals, hyp_length, ref_length)
    sums = [np.sum(x, axis=-1, keepdims=True) for x in (matches, totals, hyp_length, ref_length)]
    return bleu_from_counts(*sums)[:, 0], per_video
