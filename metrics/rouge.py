"""ROUGE-L as caption papers report it: F (beta 1.2) of the longest common subsequence.

Behaviour of pycocoevalcap, kept here: precision and recall are each the best over all references, taken independently,
so they may come from two different references. Words are split at every single space, so two spaces enclose an empty
word and an empty caption is one empty word.

References
[1] Lin, ROUGE: A Package for Automatic Evaluation of Summaries, ACL workshop 2004.
[2] Hyyro, Bit-Parallel LCS-length Computation Revisited, AWOCA 2004.
"""

import numpy as np

BETA = 1.2  # above 1, recall weighs more than precision


def position_masks(words):
    """word -> bit mask of its positions in `words`."""
    masks = {}
    for i, word in enumerate(words):
        masks[word] = masks.get(word, 0) | 1 << i
    return masks


def lcs_length(masks, length, words):
    """Length of the longest common subsequence of `words` y and the `length` words x behind `masks` [2].

    The textbook fills a table: c[i][j] = c[i-1][j-1] + 1 if x_i = y_j, else max(c[i][j-1], c[i-1][j]). Here `row` is
    one row of it: a zero bit at i means that the LCS with the first i + 1 words of x is one longer than with the first
    i.
    """
    row = all_ones = (1 << length) - 1
    for word in words:
        mask = masks.get(word)
        if mask:
            matches = row & mask
            row = (row + matches) | (row - matches)
    return length - (row & all_ones).bit_count()


def score_video(references, hypothesis):
    """ROUGE-L, 0..1, of one tokenized hypothesis (str) against its references (list of str)."""
    words = hypothesis.split(" ")
    masks = position_masks(words)
    precision = recall = 0.0
    for reference in set(references):
        reference_words = reference.split(" ")
        lcs = lcs_length(masks, len(words), reference_words)
        precision = max(precision, lcs / len(words))
        recall = max(recall, lcs / len(reference_words))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)  # [1] F_lcs


def score(references, hypotheses):
    """ROUGE-L of tokenized captions, for each video a list of str and one str: (mean, per-video scores (V,))."""
    per_video = np.array([score_video(r, h) for r, h in zip(references, hypotheses, strict=True)])
    return float(np.mean(per_video)), per_video
