"""The plain scorers of plain.py against the fast ones of bleu.py, rouge.py and cider.py, and against pycocoevalcap.

All scores agree within 1e-13, the rounding error of sums taken in another order. LCS lengths are integers and equal.
"""

import random
from math import exp, sqrt

import numpy as np
import pytest

from metrics import bleu, cider, ngrams, plain, rouge
from tests.metrics.captions import CORPORA, golden

TOLERANCE = 1e-13
EDGES = golden("golden_edge_tokenized")


def random_corpus(seed, num_videos=30):
    """Tokenised captions of 0 to 12 words over 7 words, so that words repeat and captions share n-grams."""
    rng = random.Random(seed)
    words = ["a", "the", "man", "dog", "runs", "is", "x"]
    lengths = (0, 0, 1, 2, 3, 4, 5, 6, 8, 12)

    def caption():
        return " ".join(rng.choices(words, weights=(5, 4, 3, 2, 2, 1, 1), k=rng.choice(lengths)))

    references = [[caption() for _ in range(rng.randint(1, 6))] for _ in range(num_videos)]
    # Every third hypothesis is one of the references.
    hypotheses = [rng.choice(group) if i % 3 == 0 else caption() for i, group in enumerate(references)]
    return references, hypotheses


def golden_corpus(name):
    data = golden(f"golden_{name}")
    return [data["refs_tok"][key] for key in data["ids"]], [data["hyps_tok"][key] for key in data["ids"]]


def edge_corpus(name):
    return list(EDGES[name]["refs"].values()), [text for (text,) in EDGES[name]["hyps"].values()]


def has_words(references):
    return any(text.split() for group in references for text in group)


def assert_close(actual, expected):
    for actual_part, expected_part in zip(actual, expected, strict=True):  # corpus, per video
        np.testing.assert_allclose(actual_part, expected_part, rtol=0, atol=TOLERANCE)


def assert_plain_equals_fast(references, hypotheses):
    counts = ngrams.count_ngrams(references, hypotheses)
    corpus, per_video = bleu.score(counts)
    assert_close(plain.plain_bleu(references, hypotheses), (corpus, per_video.T))
    assert_close(plain.plain_rouge_l(references, hypotheses), rouge.score(references, hypotheses))
    if has_words(references):  # else the fast CIDEr raises an error
        assert_close(plain.plain_cider(references, hypotheses), cider.score(counts))


@pytest.mark.parametrize("name", CORPORA)
def test_golden_corpora(name):
    """Against the fast scorers, and against what pycocoevalcap printed."""
    references, hypotheses = golden_corpus(name)
    assert_plain_equals_fast(references, hypotheses)
    expected = golden(f"golden_{name}")["scores"]
    bleu_expected = [expected[f"Bleu_{n}"] for n in range(1, 5)]
    corpus, per_video = [row["corpus"] for row in bleu_expected], np.transpose([row["seg"] for row in bleu_expected])
    assert_close(plain.plain_bleu(references, hypotheses), (corpus, per_video))
    for metric, scorer in ("ROUGE_L", plain.plain_rouge_l), ("CIDEr", plain.plain_cider):
        assert_close(scorer(references, hypotheses), (expected[metric]["corpus"], expected[metric]["seg"]))


@pytest.mark.parametrize("name", EDGES)
def test_golden_edges(name):
    assert_plain_equals_fast(*edge_corpus(name))


@pytest.mark.parametrize("seed", range(20))
def test_random_corpora(seed):
    assert_plain_equals_fast(*random_corpus(seed))


@pytest.mark.parametrize("seed", range(20, 30))
def test_random_corpora_of_one_video(seed):
    assert_plain_equals_fast(*random_corpus(seed, num_videos=1))


@pytest.mark.parametrize(
    ("references", "hypotheses"),
    [
        pytest.param([["a man runs"], ["a dog"]], ["", ""], id="empty hypotheses"),
        pytest.param([["", "a man runs"], [""]], ["a man", "a dog"], id="empty references"),
        pytest.param([["a man runs fast"]], ["a man runs fast"], id="one video"),
        pytest.param([["the cat is on the mat"], ["a dog"]], ["the the the the the the the", "dog dog"], id="repeated"),
        pytest.param([["man"], ["a dog"], ["a cat runs"]], ["man", "a dog", "a cat runs"], id="fewer than 4 words"),
        pytest.param([["a b c", "a b c d e"], ["x"]], ["a b c d", "x"], id="two references equally close in length"),
        pytest.param([["a  b", " a"], ["c\u00a0d"]], ["a b ", "c d"], id="spaces"),
    ],
)
def test_edge_cases(references, hypotheses):
    assert_plain_equals_fast(references, hypotheses)


@pytest.mark.parametrize("seed", range(30, 40))
def test_against_pycocoevalcap(seed):
    """BLEU, ROUGE-L and CIDEr of pycocoevalcap itself, which need no Java."""
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references, hypotheses = random_corpus(seed)
    refs, hyps = dict(enumerate(references)), {i: [text] for i, text in enumerate(hypotheses)}
    corpus, per_video = Bleu(4).compute_score(refs, hyps, verbose=0)
    assert_close(plain.plain_bleu(references, hypotheses), (corpus, np.transpose(per_video)))
    assert_close(plain.plain_rouge_l(references, hypotheses), Rouge().compute_score(refs, hyps))
    assert_close(plain.plain_cider(references, hypotheses), Cider().compute_score(refs, hyps))


def test_bleu_by_hand():
    """The example of Papineni et al.: "the" seven times has a clipped unigram precision of 2/7."""
    references = ["the cat is on the mat", "there is a cat on the mat"]
    hyp_length, ref_length, *counts = plain.count_matches(references, "the the the the the the the")
    assert (hyp_length, ref_length, counts[:4], counts[4:]) == (7, 7, [2, 0, 0, 0], [7, 6, 5, 4])


def test_rouge_l_by_hand():
    """LCS 2 ("a c") of 3 words of the hypothesis and 4 of the reference."""
    precision, recall = 2 / 3, 2 / 4
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert plain.plain_rouge_l([["a b c d"]], ["x a c"]) == (pytest.approx(expected), [pytest.approx(expected)])


def test_cider_by_hand():
    """Two videos without a common word: every idf is ln 2 and cancels. "a" counts once; lengths differ by one."""
    corpus, per_video = plain.plain_cider([["a b c d"], ["x y"]], ["a b c d a", "q"])
    cosines = 4 / (sqrt(4) * sqrt(7)), 3 / (sqrt(3) * sqrt(4)), 2 / (sqrt(2) * sqrt(3)), 1 / (sqrt(1) * sqrt(2))
    expected = 10 * exp(-1 / (2 * 6**2)) * sum(cosines) / 4
    assert per_video == [pytest.approx(expected), 0.0] and corpus == pytest.approx(expected / 2)


@pytest.mark.parametrize("seed", [12, 13])
def test_bit_parallel_lcs(seed):
    """The bit-parallel length against the recurrence, 300 random pairs of up to 80 words."""
    rng = random.Random(seed)
    for _ in range(300):
        x, y = (rng.choices("abcde", k=rng.randrange(1, 81)) for _ in range(2))
        assert rouge.lcs_length(rouge.position_masks(x), len(x), y) == plain.lcs_length(x, y)
