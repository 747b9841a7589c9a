"""The plain scorers of plain.py against the fast ones of bleu.py and cider.py, and all against pycocoevalcap.

All scores agree within 1e-13, the rounding error of sums taken in another order. test_score.py has texts of people.
"""

import random

import numpy as np
import pytest

from metrics import bleu, cider, ngrams, plain, rouge


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


def assert_close(actual, expected):
    for actual_part, expected_part in zip(actual, expected, strict=True):  # corpus, per video
        np.testing.assert_allclose(actual_part, expected_part, rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", range(20))
def test_scores(seed):
    """pycocoevalcap's BLEU, ROUGE-L and CIDEr need no Java."""
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references, hypotheses = random_corpus(seed)
    refs, hyps = dict(enumerate(references)), {i: [text] for i, text in enumerate(hypotheses)}
    counts = ngrams.count_ngrams(references, hypotheses)
    corpus, per_video = Bleu(4).compute_score(refs, hyps, verbose=0)
    assert_close(plain.plain_bleu(references, hypotheses), (corpus, np.transpose(per_video)))
    assert_close(bleu.score(counts), (corpus, per_video))
    assert_close(rouge.score(references, hypotheses), Rouge().compute_score(refs, hyps))
    expected = Cider().compute_score(refs, hyps)
    assert_close(plain.plain_cider(references, hypotheses), expected)
    assert_close(cider.score(counts), expected)
