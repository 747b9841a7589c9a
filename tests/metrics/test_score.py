"""All caption metrics together, against pycocoevalcap 1.2: its printed figures (tests/golden), figures published
with a set of captions, and, where Java is there, the program itself on captions that are new in every run.

Scores of corpora and of single videos agree within 1e-9 (METEOR without one video, whose words collide in a 32-bit
hash of the reference); seeds are in the tests' names or docstrings.
"""

import json
import os
import random
import shutil
import unicodedata

import numpy as np
import pytest
from test_meteor import COLLISION, TOLERANCE
from test_ptb import CORPORA, golden, random_texts

import metrics
from metrics import InputError, bleu, cider, ngrams, rouge, score

NAMES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"]
QUICK = ("BLEU", "ROUGE_L", "CIDEr")
PUBLISHED = {
    "Bleu_1": "0.5793995754573356",
    "Bleu_2": "0.40439129741018104",
    "Bleu_3": "0.2785363856619147",
    "Bleu_4": "0.1908290437674253",
    "METEOR": "0.195254671778",
    "ROUGE_L": "0.39625269357570847",
    "CIDEr": "0.5997905185184199",
}


def near(found, expected, tolerance=TOLERANCE, where=""):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=str(where))


# --- the reference's figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORPORA)
def test_golden_corpora(name):
    """From raw captions to every corpus and every video's score."""
    data = golden(f"golden_{name}")
    found = score(data["refs"], data["hyps"])
    assert list(found.corpus) == NAMES and list(found.per_video) == data["ids"]
    for metric, expected in data["scores"].items():
        ids = [key for key in data["ids"] if metric != "METEOR" or key != COLLISION]
        theirs = dict(zip(data["ids"], expected["seg"], strict=True))
        near([found.per_video[key][metric] for key in ids], [theirs[key] for key in ids], where=metric)
        if len(ids) == len(data["ids"]):
            near(found.corpus[metric], expected["corpus"], where=metric)


EDGES = golden("golden_edge_tokenized")


@pytest.mark.parametrize("name", EDGES)
def test_golden_edges(name):
    """Nine tiny corpora that are tokenised already; where the reference raises, so does this."""
    assert len(EDGES) == 9
    refs, hyps, expected = EDGES[name]["refs"], EDGES[name]["hyps"], EDGES[name]["scores"]
    chosen = metrics.METRICS
    if isinstance(expected["CIDEr"], str):
        with pytest.raises(ValueError, match="every reference is empty"):
            score(refs, hyps, tokenizer="none")
        with pytest.raises(ValueError, match="every reference is empty"):
            cider.score(ngrams.count(list(refs.values()), [text for (text,) in hyps.values()]))
        chosen = [metric for metric in chosen if metric != "CIDEr"]
    found = score(refs, hyps, tokenizer="none", metrics=chosen)
    columns = {metric: [row[metric] for row in found.per_video.values()] for metric in found.corpus}
    for n in range(4):
        near(found.corpus[f"Bleu_{n + 1}"], expected["Bleu"][0][n])
        near(columns[f"Bleu_{n + 1}"], expected["Bleu"][1][n])
    for metric, key in ("METEOR", "METEOR"), ("ROUGE_L", "Rouge"), ("CIDEr", "CIDEr"):
        if metric in found.corpus:
            near(found.corpus[metric], expected[key][0], where=metric)
            near(columns[metric], expected[key][1], where=metric)


def test_published_figures(real):
    """1,000 images, to every printed digit that a double holds (CaptionMetrics' coco-fakecap; already tokenised)."""
    refs, hyps = (json.loads((real / "coco-fakecap" / f"{name}.json").read_text()) for name in ("gts", "res"))
    found = score(refs, hyps, tokenizer="none")
    assert found.signature.startswith("videos:1000|") and "tok:none" in found.signature
    for name, digits in PUBLISHED.items():
        printed = len(digits.split(".")[1])
        near(found.corpus[name], float(digits), max(0.5 * 10**-printed, 1e-15), name)


def random_captions(seed: int) -> tuple[dict, dict]:
    """40 videos of 1 to 8 captions: words of the golden captions, shuffled, cut, spliced, with marks between them."""
    rng, data = random.Random(seed), golden("golden_vttlike") | {"more": golden("golden_msvdlike")["refs"]}
    pool = [text for refs in (data["refs"], data["more"]) for group in refs.values() for text in group]
    marks = ", . ! ? ... ; 's n't - / !!".split() + [" -", " (x)", '"', " 3", " 1,000", " 10:30", " &"]

    def tell(words):
        words = [word for word in words if rng.random() > 0.15]
        for _ in range(rng.choice((0, 0, 1, 2, 4))):
            words.insert(rng.randrange(len(words) + 1), rng.choice(rng.choice(pool).split()))
        words = [word + rng.choice(marks) if rng.random() < 0.06 else word for word in words]
        if rng.random() < 0.2:
            rng.shuffle(words)
        text = " ".join(words)
        return rng.choice((str, str, str.capitalize, str.upper, str.title))(text)

    refs, hyps = {}, {}
    for i in range(40):
        base = [*rng.choice(pool).split(), *(rng.choice(pool).split() if rng.random() < 0.3 else [])]
        *refs[f"v{i}"], hyps[f"v{i}"] = [tell(base) for _ in range(rng.randrange(2, 10))]
    return refs, hyps


@pytest.mark.skipif(not shutil.which("java"), reason="needs Java to run the reference")
def test_fresh_captions_beside_the_reference():
    """pycocoevalcap itself, on captions of a new seed in every run; the seed is printed, and named in a failure."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    seed = int(os.environ.get("METRICS_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"METRICS_SEED={seed}")
    refs, hyps = random_captions(seed)
    found = score(refs, hyps)
    wrapped = {key: [{"caption": text} for text in group] for key, group in refs.items()}
    refs = PTBTokenizer().tokenize(wrapped)
    hyps = PTBTokenizer().tokenize({key: [{"caption": text}] for key, text in hyps.items()})
    totals, rows = Bleu(4).compute_score(refs, hyps, verbose=0)
    expected = {f"Bleu_{n + 1}": (totals[n], rows[n]) for n in range(4)}
    for name, kind in ("METEOR", Meteor), ("ROUGE_L", Rouge), ("CIDEr", Cider):
        expected[name] = kind().compute_score(refs, hyps)
    for name, (total, row) in expected.items():
        where = f"METRICS_SEED={seed} {name}"
        near([video[name] for video in found.per_video.values()], row, where=where)
        near(found.corpus[name], total, where=where)


# --- properties ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus():
    data = golden("golden_msvdlike")
    return data["refs_tok"], data["hyps_tok"]


def test_order_of_videos(corpus):
    """All scores stay (within 1e-12: sums are taken in another order), seed 8."""
    refs, hyps = corpus
    mixed = random.Random(8).sample(list(refs), len(refs))
    one = score(refs, hyps, tokenizer="none")
    other = score({key: refs[key] for key in mixed}, dict(reversed(hyps.items())), tokenizer="none")
    assert list(other.per_video) == mixed and one.signature == other.signature
    near(list(one.corpus.values()), list(other.corpus.values()), 1e-12)
    for key, row in one.per_video.items():
        near(list(row.values()), list(other.per_video[key].values()), 1e-12, key)


def test_order_of_references(corpus):
    """Each video's scores stay, and all corpus scores but METEOR's, which takes the counts of the first of equally
    good references; seed 9."""
    refs, hyps = corpus
    rng = random.Random(9)
    one = score(refs, hyps, tokenizer="none")
    other = score({key: rng.sample(group, len(group)) for key, group in refs.items()}, hyps, tokenizer="none")
    for name in NAMES:
        near([r[name] for r in one.per_video.values()], [r[name] for r in other.per_video.values()], 1e-12, name)
        near(one.corpus[name], other.corpus[name], 1e-3 if name == "METEOR" else 1e-12, name)


def test_identical_captions():
    """BLEU nears 1 and does not reach it, METEOR and ROUGE-L are 1, CIDEr 10 where captions have four words."""
    refs = {"1": ["a man runs fast today"], "2": ["the dog barks at night"]}
    found = score(refs, {key: group[0] for key, group in refs.items()}).corpus
    assert all(0.999999999 <= found[f"Bleu_{n}"] < 1 for n in range(1, 5))
    assert found["METEOR"] == found["ROUGE_L"] == 1.0
    near(found["CIDEr"], 10.0)
    # A word that stands everywhere tells nothing apart.
    same = {key: ["a man runs fast today"] for key in "12"}
    assert score(same, {key: group[0] for key, group in same.items()}).corpus["CIDEr"] == 0.0


def test_unicode():
    """Words of any script match themselves; a composed letter and its two parts do not become one here."""
    refs = {"a": ["señora Zoë läuft schnell"], "b": ["кот сидит на столе"], "c": ["東京 の 夜 景"]}
    found = score(refs, {key: group[0].upper() for key, group in refs.items()})
    for row in found.per_video.values():
        assert row["METEOR"] == row["ROUGE_L"] == 1.0 and row["CIDEr"] > 9.99
    apart = score({"a": ["café"], "b": ["x"]}, {"a": unicodedata.normalize("NFD", "café"), "b": "x"})
    assert apart.per_video["a"]["ROUGE_L"] == 0.0


def test_random_strings_pass_through_all():
    """3,000 random strings, seeds 10 and 11: every score finite and within its range."""
    refs, hyps = random_texts(3000, seed=10), random_texts(3000, seed=11)
    for tokenizer in metrics.TOKENIZERS:
        found = score({i: [text] for i, text in enumerate(refs)}, dict(enumerate(hyps)), tokenizer=tokenizer)
        for row in found.per_video.values():
            assert all(0 <= value <= (10 + 1e-9 if name == "CIDEr" else 1) for name, value in row.items())


def test_one_right_word_is_not_nothing():
    """BLEU's constants: 3.16e-5 for one exact word; nothing for an empty caption."""
    _, rows = bleu.score(ngrams.count([["man"], ["man"]], ["man", ""]))
    near(rows[3], [3.1622776e-5, 0.0], 1e-10)


def test_rouge_takes_precision_and_recall_from_different_references():
    """LCS 2 of 2 words of the hypothesis with the long reference, 1 of 1 word of the short one: both 1."""
    assert rouge.score_one(["a b c d e f", "a"], "a b") == 1.0
    assert rouge.score_one([""], "") == 1.0 and rouge.score_one(["a"], "") == 0.0


@pytest.mark.parametrize("seed", [12, 13])
def test_lcs_is_the_textbook_one(seed):
    """The bit-parallel length against the quadratic table, 300 random pairs, up to 80 words."""
    rng = random.Random(seed)
    for _ in range(300):
        a, b = (rng.choices("abcde", k=rng.randrange(1, 81)) for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        assert rouge.lcs(rouge.positions(a), len(a), b) == table[-1, -1]


# --- what score() refuses and says --------------------------------------------------------------------------------

GOOD = {"v1": ["a man runs"], "v2": ["a dog"]}


@pytest.mark.parametrize(
    ("refs", "hyps", "says"),
    [
        (GOOD, {"v1": "a", "v2": "b", "v3": "c"}, "hypotheses: id 'v3' has no references in references"),
        (GOOD, {"v1": "a"}, "hypotheses: id 'v2' has no hypothesis"),
        (GOOD | {1: ["x"], "1": ["y"]}, {"v1": "a", "v2": "b", "1": "c"}, "references: id '1' occurs twice"),
        (GOOD, {"v1": "a", "v2": "b", 2: "c", "2": "c"}, "hypotheses: id '2' occurs twice"),
        ({}, {}, "references: has no videos"),
        (GOOD | {"v2": []}, {"v1": "a", "v2": "b"}, "references, id 'v2': has no references"),
        (GOOD | {"v2": "a dog"}, {"v1": "a", "v2": "b"}, "references, id 'v2': is a str, expected a list"),
        (GOOD | {"v2": ["a", None]}, {"v1": "a", "v2": "b"}, "references, id 'v2', caption 2: is a NoneType"),
        (GOOD, {"v1": 7, "v2": "b"}, "hypotheses, id 'v1': is a int, expected a string"),
        (GOOD, {"v1": ["a", "b"], "v2": "b"}, "hypotheses, id 'v1': has 2 captions, expected one"),
        (GOOD, ["a", "b"], "hypotheses: is a list"),
        ([["a"]], {"v1": "a"}, "references: is a list"),
        ({"v": [""]}, {"v": "a"}, "references: every reference is empty"),
    ],
)
def test_bad_captions_are_named(refs, hyps, says):
    with pytest.raises(InputError) as caught:
        score(refs, hyps, metrics=QUICK)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"tokenizer": "moses"}, {"metrics": ["SPICE"]}, {"metrics": "BLEU"}])
def test_bad_options_are_named(options):
    with pytest.raises(InputError, match=f"{next(iter(options))}: is "):
        score(GOOD, {"v1": "a", "v2": "b"}, **options)


def test_signature_and_notes():
    hyps = {"v1": "a man", "v2": "the dog"}
    found = score(GOOD | {"v2": ["a", "b"]}, hyps)
    assert found.signature == f"videos:2|refs:1-2|tok:ptb|meteor:1.5+syn+para|cider:d,n4,s6|v:{metrics.VERSION}"
    assert found.notes == ()
    part = score(GOOD, {"v1": "a man runs"}, subset=True, tokenizer="none", metrics=QUICK)
    assert part.signature == f"videos:1/2|refs:1|tok:none|cider:d,n4,s6|v:{metrics.VERSION}"
    assert part.notes[0] == "scored 1 of 2 videos" and "CIDEr is 0" in part.notes[1]
    assert list(part.per_video) == ["v1"]


def test_ids_are_text_and_line_breaks_spaces():
    found = score({7: ["a man\nruns"], "8": ["a dog"]}, {"7": ["a man runs"], 8: "a dog"}, metrics=QUICK)
    assert list(found.per_video) == [7, "8"]
    assert found.per_video[7]["ROUGE_L"] == found.per_video["8"]["ROUGE_L"] == 1.0


def test_progress_is_told():
    told = []
    score(GOOD, {"v1": "a", "v2": "b"}, tell=lambda *what: told.append(what))
    assert told[-2:] == [("METEOR", 1, 2), ("METEOR", 2, 2)]
