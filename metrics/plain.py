"""BLEU and CIDEr-D with dictionaries and loops. Read this file first.

The scorers in `bleu.py` and `cider.py` compute the same numbers with arrays, ten times faster; tests hold the two
versions equal. Constants and conventions are those of pycocoevalcap, the code of [3], which caption papers use.

Input of every function: tokenized captions, words separated by spaces. references: for each video a list of str;
hypotheses: for each video one str. Every function returns (corpus score, list of scores per video).

References
[1] Papineni et al., BLEU: a Method for Automatic Evaluation of Machine Translation, ACL 2002.
[2] Vedantam et al., CIDEr: Consensus-based Image Description Evaluation, CVPR 2015.
[3] Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, arXiv 1504.00325, 2015.
"""

from collections import Counter
from math import exp, hypot, log

ORDERS = (1, 2, 3, 4)  # n of the n-grams
SMALL, TINY = 1e-9, 1e-15  # BLEU: added to every divisor and to every dividend
SIGMA = 6.0  # CIDEr-D: width of the length penalty, in bigrams


def count_ngrams(words, n):
    """Counter of the tuples of n successive words."""
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


# --- BLEU ---------------------------------------------------------------------------------------------------------


def count_matches(references, hypothesis):
    """What BLEU sums over a corpus: [c, r, matches of n = 1..4, totals of n = 1..4] of one video.

    c: words of the hypothesis. r: words of the reference closest in length, the shorter one of two [1, "best match
    length"]. matches: clipped counts. totals: n-grams of the hypothesis.
    """
    words, references = hypothesis.split(), [reference.split() for reference in references]
    _, r = min((abs(len(reference) - len(words)), len(reference)) for reference in references)
    matches = []
    for n in ORDERS:
        reference_counts = [count_ngrams(reference, n) for reference in references]
        clipped = 0
        for ngram, count in count_ngrams(words, n).items():
            clipped += min(count, max(counts[ngram] for counts in reference_counts))  # [1] Count_clip
        matches.append(clipped)
    totals = [max(len(words) - n + 1, 0) for n in ORDERS]
    return [len(words), r, *matches, *totals]


def bleu_from_counts(c, r, *counts):
    """[BLEU-1, ..., BLEU-4] = BP * (p_1 * ... * p_n)^(1/n), the geometric mean with w_n = 1/n [1]."""
    ratio = (c + TINY) / (r + SMALL)
    brevity_penalty = exp(1 - 1 / ratio) if ratio < 1 else 1.0  # [1] BP
    product, scores = 1.0, []
    for n, matches, total in zip(ORDERS, counts[:4], counts[4:], strict=True):
        product *= (matches + TINY) / (total + SMALL)  # [1] p_n, modified n-gram precision
        scores.append(brevity_penalty * product ** (1 / n))
    return scores


def plain_bleu(references, hypotheses):
    """BLEU-1 to BLEU-4 (0..1): (list of 4, per video a list of 4). The corpus score comes from summed counts."""
    counts = [count_matches(*video) for video in zip(references, hypotheses, strict=True)]
    total = [sum(column) for column in zip(*counts, strict=True)]
    return bleu_from_counts(*total), [bleu_from_counts(*row) for row in counts]


# --- CIDEr-D ------------------------------------------------------------------------------------------------------


def document_frequencies(references):
    """N-gram -> number of videos that have it in at least one reference."""
    frequencies = Counter()
    for group in references:
        frequencies.update({ngram for text in group for n in ORDERS for ngram in count_ngrams(text.split(), n)})
    return frequencies


def tf_idf(caption, n, frequencies, num_videos):
    """[2] g^n, the vector of one caption: n-gram -> count * ln(videos / document frequency).

    The idf is of the scored set. Counts are not divided by the caption's length: the cosine cancels it.
    """
    counts = count_ngrams(caption.split(), n)
    return {ngram: count * (log(num_videos) - log(max(1, frequencies[ngram]))) for ngram, count in counts.items()}


def similarity(hypothesis, reference):
    """Clipped cosine of two vectors: (min(h, s) . s) / (|h| |s|), 0 if one is empty."""
    dot = sum(min(x, reference[ngram]) * reference[ngram] for ngram, x in hypothesis.items() if ngram in reference)
    norms = hypot(*hypothesis.values()) * hypot(*reference.values())
    return dot / norms if norms else 0.0


def cider_of_video(references, hypothesis, frequencies, num_videos):
    """CIDEr-D (0..10) of a video in a set of `num_videos`, whose document frequencies are given.

    [2] For a hypothesis h, CIDEr-D_n = 10/m * sum over its m references s of
        exp(-(l(h) - l(s))^2 / (2 sigma^2)) * (min(g^n(h), g^n(s)) . g^n(s)) / (|g^n(h)| |g^n(s)|)
    and CIDEr-D is its mean over n = 1..4. In pycocoevalcap the length l is the number of bigrams.
    """
    total, vectors = 0.0, [tf_idf(hypothesis, n, frequencies, num_videos) for n in ORDERS]
    for reference in references:
        bigrams = [max(len(caption.split()) - 1, 0) for caption in (hypothesis, reference)]
        length_penalty = exp(-((bigrams[0] - bigrams[1]) ** 2) / (2 * SIGMA**2))
        for n, h in zip(ORDERS, vectors, strict=True):
            total += length_penalty * similarity(h, tf_idf(reference, n, frequencies, num_videos))
    return 10 * total / (len(references) * len(ORDERS))


def plain_cider(references, hypotheses):
    """CIDEr-D (0..10): (mean over videos, list over videos). One video alone scores 0, because every idf is ln 1."""
    frequencies = document_frequencies(references)
    scores = [cider_of_video(s, h, frequencies, len(references)) for s, h in zip(references, hypotheses, strict=True)]
    return sum(scores) / len(scores), scores
