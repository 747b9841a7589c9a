"""ROUGE-L as caption papers report it: longest common subsequence of words, F with beta 1.2.

The reference's behaviour, kept here: precision and recall are each the best over all references,
taken independently (they may come from two different ones), and words are split at every single
space, so two spaces hold an empty word and an empty caption is one empty word.

References
[1] Lin, ROUGE: A Package for Automatic Evaluation of Summaries, ACL workshop 2004.
[2] Hyyro, Bit-Parallel LCS-length Computation Revisited, AWOCA 2004.
"""

import numpy as np

BETA = 1.2


def positions(words):
    """word -> bit mask of where it stands in `words`."""
    masks = {}
    for i, word in enumerate(words):
        masks[word] = masks.get(word, 0) | 1 << i
    return masks


def lcs(masks, length, words):
    """Length of the longest common subsequence of `words` and the text behind `masks` [2].

    A zero bit in `row` at i says that the LCS with the first i+1 words is one longer than with i.
    """
    row = full = (1 << length) - 1
    for word in words:
        mask = masks.get(word)
        if mask:
            step = row & mask
            row = (row + step) | (row - step)
    return length - (row & full).bit_count()


def score_one(references, hypothesis):
    """ROUGE-L of one tokenised hypothesis (str) against its references (list of str), 0..1."""
    words = hypothesis.split(" ")
    masks = positions(words)
    precision = recall = 0.0
    for reference in set(references):
        other = reference.split(" ")
        common = lcs(masks, len(words), other)
        precision = max(precision, common / len(words))
        recall = max(recall, common / len(other))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def score(references, hypotheses):
    """ROUGE-L of lists over videos (references: lists of str): (mean, per-video scores)."""
    per_video = np.array([score_one(r, h) for r, h in zip(references, hypotheses, strict=True)])
    return float(np.mean(per_video)), per_video
