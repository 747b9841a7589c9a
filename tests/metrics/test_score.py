"""All caption metrics together, against the recorded scores of pycocoevalcap 1.2 (golden/).

Corpus and per-video scores agree within 1e-9, METEOR without the video of the hash collision.
"""

import numpy as np
import pytest

import metrics
from metrics import InputError, score
from tests.metrics.captions import COLLISION, CORPORA, TOLERANCE, golden, random_strings

NAMES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"]
WITHOUT_METEOR = ("BLEU", "ROUGE_L", "CIDEr")
EDGES = golden("golden_edge_tokenized")


def assert_close(actual, expected, tolerance=TOLERANCE, where=""):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance, err_msg=str(where))


def column(scores, name, ids=None):
    """One metric's per-video scores."""
    return [scores.per_video[key][name] for key in (scores.per_video if ids is None else ids)]


# --- recorded scores of pycocoevalcap -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORPORA)
def test_golden_corpora(name):
    """From raw captions to the scores of the corpus and of every video."""
    data = golden(f"golden_{name}")
    scores = score(data["refs"], data["hyps"])
    assert list(scores.corpus) == NAMES and list(scores.per_video) == data["ids"]
    for metric, expected in data["scores"].items():
        ids = [key for key in data["ids"] if metric != "METEOR" or key != COLLISION]
        expected_of = dict(zip(data["ids"], expected["seg"], strict=True))
        assert_close(column(scores, metric, ids), [expected_of[key] for key in ids], where=metric)
        if len(ids) == len(data["ids"]):
            assert_close(scores.corpus[metric], expected["corpus"], where=metric)


@pytest.mark.parametrize("name", EDGES)
def test_golden_edges(name):
    """Nine tiny corpora that are already tokenised. Where pycocoevalcap raises an error, so does this."""
    assert len(EDGES) == 9
    refs, hyps, expected = EDGES[name]["refs"], EDGES[name]["hyps"], EDGES[name]["scores"]
    names = metrics.METRICS
    if isinstance(expected["CIDEr"], str):
        with pytest.raises(ValueError, match="every reference is empty"):
            score(refs, hyps, tokenizer="none")
        names = [metric for metric in names if metric != "CIDEr"]
    scores = score(refs, hyps, tokenizer="none", metrics=names)
    expected |= {f"Bleu_{n + 1}": (expected["Bleu"][0][n], expected["Bleu"][1][n]) for n in range(4)}
    for metric, value in scores.corpus.items():
        corpus, per_video = expected["Rouge" if metric == "ROUGE_L" else metric]
        assert_close([value, *column(scores, metric)], [corpus, *per_video], where=metric)


# --- properties ---------------------------------------------------------------------------------------------------


def test_random_strings():
    """1,000 random strings, seeds 10 and 11: every score is finite and within its range."""
    refs, hyps = random_strings(1000, seed=10), random_strings(1000, seed=11)
    for tokenizer in metrics.TOKENIZERS:
        scores = score({i: [text] for i, text in enumerate(refs)}, dict(enumerate(hyps)), tokenizer=tokenizer)
        for row in scores.per_video.values():
            assert all(0 <= value <= (10 + 1e-9 if name == "CIDEr" else 1) for name, value in row.items())


# --- options, errors, signature -----------------------------------------------------------------------------------

REFS = {"v1": ["a man runs"], "v2": ["a dog"]}


@pytest.mark.parametrize(("refs", "hyps", "message"), [
    (REFS, {"v1": "a", "v2": "b", "v3": "c"}, "hypotheses: id 'v3' has no references in references"),
    (REFS, {"v1": "a"}, "hypotheses: id 'v2' has no hypothesis"),
    (REFS | {1: ["x"], "1": ["y"]}, {"v1": "a", "v2": "b", "1": "c"}, "references: id '1' occurs twice"),
    ({}, {}, "references: has no videos"),
    (REFS | {"v2": []}, {"v1": "a", "v2": "b"}, "references, id 'v2': expected a list of at least one caption"),
    (REFS | {"v2": ["a", None]}, {"v1": "a", "v2": "b"}, "id 'v2', caption 2: expected one string, found NoneType"),
    (REFS, {"v1": ["a", "b"], "v2": "b"}, "hypotheses, id 'v1': expected one string, found list"),
])
def test_bad_captions_are_named(refs, hyps, message):
    with pytest.raises(InputError) as caught:
        score(refs, hyps, metrics=WITHOUT_METEOR)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    for options in {"tokenizer": "moses"}, {"metrics": ["SPICE"]}, {"metrics": "BLEU"}:
        with pytest.raises(InputError, match=f"{next(iter(options))}: is "):
            score(refs, hyps, **options)


def test_ids_line_breaks_and_notes():
    """Ids are compared as text, line breaks are spaces, and one video has a note about CIDEr."""
    scores = score({7: ["a man\nruns"], "8": ["a dog"]}, {"7": ["a man runs"]}, subset=True, metrics=WITHOUT_METEOR)
    assert list(scores.per_video) == [7] and scores.per_video[7]["ROUGE_L"] == 1.0
    assert scores.signature == f"videos:1/2|refs:1|tok:ptb|cider:d,n4,s6|v:{metrics.VERSION}"
    assert scores.notes[0] == "scored 1 of 2 videos" and "CIDEr is 0" in scores.notes[1]
