"""The plain scorers of plain.py against the fast ones of bleu.py and cider.py, and all against pycocoevalcap.

All scores agree within 1e-13, the rounding error of sums taken in another order.
"""

import random
from math import exp, sqrt

import numpy as np
import pytest

from metrics import bleu, cider, ngrams, plain, rouge
from tests.metrics.captions import golden


def random_corpus(seed, num_videos=30):
    """Captions of 0 to 12 words over 7 words, so that words repeat and captions share n-grams."""
    rng = random.Random(seed)
    words = ["a", "the", "man", "dog", "runs", "is", "x"]
    lengths = (0, 0, 1, 2, 3, 4, 5, 6, 8, 12)

    def caption():
        return " ".join(rng.choices(words, weights=(5, 4, 3, 2, 2, 1, 1), k=rng.choice(lengths)))

    references = [[caption() for _ in range(rng.randint(1, 6))] for _ in range(num_videos)]
    # Every third hypothesis is one of the references.
    return references, [rng.choice(group) if i % 3 == 0 else caption() for i, group in enumerate(references)]


def edge_corpora():
    for data in golden("golden_edge_tokenized").values():
        if any(text.split() for group in data["refs"].values() for text in group):  # else CIDEr is refused
            yield list(data["refs"].values()), [text for (text,) in data["hyps"].values()]


def assert_close(actual, expected):
    for actual_part, expected_part in zip(actual, expected, strict=True):  # corpus, per video
        np.testing.assert_allclose(actual_part, expected_part, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("references", "hypotheses"), [*edge_corpora(), *map(random_corpus, range(20))])
def test_scores(references, hypotheses):
    """pycocoevalcap's BLEU, ROUGE-L and CIDEr need no Java."""
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    refs, hyps = dict(enumerate(references)), {i: [text] for i, text in enumerate(hypotheses)}
    counts = ngrams.count_ngrams(references, hypotheses)
    corpus, per_video = Bleu(4).compute_score(refs, hyps, verbose=0)
    assert_close(plain.plain_bleu(references, hypotheses), (corpus, np.transpose(per_video)))
    assert_close(bleu.score(counts), (corpus, per_video))
    assert_close(rouge.score(references, hypotheses), Rouge().compute_score(refs, hyps))
    expected = Cider().compute_score(refs, hyps)
    assert_close(plain.plain_cider(references, hypotheses), expected)
    assert_close(cider.score(counts), expected)


def test_bleu_by_hand():
    """The example of Papineni et al.: "the" seven times has a clipped unigram precision of 2/7."""
    references = ["the cat is on the mat", "there is a cat on the mat"]
    hyp_length, ref_length, *counts = plain.count_matches(references, "the the the the the the the")
    assert (hyp_length, ref_length, counts[:4], counts[4:]) == (7, 7, [2, 0, 0, 0], [7, 6, 5, 4])


def test_cider_by_hand():
    """Two videos without a common word: every idf is ln 2 and cancels. "a" counts once; lengths differ by one."""
    corpus, per_video = plain.plain_cider([["a b c d"], ["x y"]], ["a b c d a", "q"])
    cosines = 4 / (sqrt(4) * sqrt(7)), 3 / (sqrt(3) * sqrt(4)), 2 / (sqrt(2) * sqrt(3)), 1 / (sqrt(1) * sqrt(2))
    expected = 10 * exp(-1 / (2 * 6**2)) * sum(cosines) / 4
    assert per_video == [pytest.approx(expected), 0.0] and corpus == pytest.approx(expected / 2)
