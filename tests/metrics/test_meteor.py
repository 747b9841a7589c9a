"""METEOR 1.5, against the output of its Java program through pycocoevalcap 1.2 (golden/).

Stems and normalised lines are compared for equality, scores within 1e-9; test_score.py has those of whole corpora.
"""

import random
from unittest.mock import patch

import pytest

from metrics import InputError, meteor, meteor_align, meteor_data, meteor_text, porter2, score
from metrics.meteor_align import Match, align, extend_path
from metrics.meteor_match import Hypothesis, Lexicon
from tests.metrics.captions import TOLERANCE, golden
from tests.metrics.small_tables import write_tables


def make_texts(refs, hyps, tables):
    """Texts of tokenised captions, and their Lexicon: (list of lists, list, Lexicon)."""
    ref_words, hyp_words = [[tuple(text.split()) for text in group] for group in refs], [tuple(t.split()) for t in hyps]
    lexicon = Lexicon(tables, {words for group in ref_words for words in group}, set(hyp_words))
    ref_texts = [[lexicon.texts[words] for words in group] for group in ref_words]
    return ref_texts, [lexicon.texts[words] for words in hyp_words], lexicon


# --- words ------------------------------------------------------------------------------------------------------


def test_stems():
    cases = golden("stem_golden")
    assert {word: porter2.stem(word) for word in cases} == cases


def test_normalization(tables):
    cases = golden("meteor_norm_golden")
    for case in cases:
        assert meteor_text.normalize(case["input"], tables.words.prefixes) == case["normalized"], case
        assert meteor_text.split_words(case["input"], tables.words.prefixes) == case["words_lower"], case


# --- scores -----------------------------------------------------------------------------------------------------


def test_two_spaces_in_a_hypothesis_are_one(tables):
    """A comma after a comma is only split off after two spaces, and pycocoevalcap leaves one of them."""
    _, _, counts = meteor.score([["a , b"], ["a,  ,b"]], ["a,  ,b", "a , b"], tables)
    assert counts[0].tolist() == [3, 3, 2, 2, 0, 0, 2, 2] + [0] * 12 + [1, 2, 2]
    assert counts[1, :2].tolist() == [3, 4]  # references keep both spaces


def test_upper_bound_skips_no_better_reference(tables):
    """No score exceeds its bound, and the best reference is the one found without bounds; 200 segments, seed 3."""
    data, rng = golden("golden_msvdlike"), random.Random(3)
    pool = [text for key in data["ids"] for text in data["refs_tok"][key]]
    refs, hyps = [rng.choices(pool, k=6) for _ in range(200)], rng.choices(pool, k=200)
    refs = [[*group, *data["refs_tok"][key][:4]] for group, key in zip(refs, data["ids"] * 2, strict=False)]
    refs, hyps, lexicon = make_texts(refs, hyps, tables)
    skipped = 0
    for group, text in zip(refs, hyps, strict=True):
        hypothesis, best = Hypothesis(text, group, lexicon), (None, -1.0)
        for reference in group:
            counts = meteor.count_alignment(align(hypothesis.matches(reference), len(text.words)), text, reference)
            value, bound = meteor.score_counts(counts), meteor.upper_bound(hypothesis, reference)
            assert value <= bound
            best = (counts, value) if value > best[1] else best
            skipped += bound < best[1]
        assert meteor.score_segment(hypothesis, group) == best
    assert skipped > 200  # the bound saves alignments


# --- matchers and aligner, by hand --------------------------------------------------------------------------------


def test_synonyms_of_one_word_add_nothing():
    """The Java program truncates 0.5 to 0. So skipping a synonym ranks as high as taking it, and needs no chunk."""
    synonym = Match(0, 1, 1, 1, 2)
    assert align([[synonym], [Match(1, 1, 0, 1, 0)], []], 2) == [synonym, Match(1, 1, 0, 1, 0)]  # uncontested
    contested = [[synonym, Match(0, 1, 1, 1, 3)], [Match(1, 1, 0, 1, 0)]]
    assert align(contested, 2) == [Match(1, 1, 0, 1, 0)]


@pytest.mark.parametrize("case", [
    "man of dog in dog car the man of a is , , man a running on | of man on of cars car a of cars , in , ,"
    " | 0.2391819673725708",
    "a running runs car running cars runs , car a , on man | on on car car dog a man runs man car car runs a dog runs"
    " runs running | 0.24740075802152425",
])
def test_beam_size(tables, case):
    """Captions whose alignment another beam changes: 41 paths give 0.231111 for the first, 39 give 0.235332 for the
    second. The expected scores are the Java program's, tolerance 1e-9."""
    hypothesis, reference, expected = case.split(" | ")
    assert abs(meteor.score([[reference]], [hypothesis], tables)[1][0] - float(expected)) <= TOLERANCE


def all_extensions(path, position, matches):
    """`extend_path` without leaving out a path."""
    with patch.object(meteor_align, "BEAM_SIZE", 10**9):
        return extend_path(path, position, matches)


@pytest.mark.parametrize("seed", range(8))
def test_paths_that_are_left_out_change_nothing(seed):
    """50 or 60 words of a vocabulary of 1, 2 or 3, and random phrases: more than BEAM_SIZE matches at a position.
    Reference: the search that keeps all paths until it cuts the beam."""
    rng = random.Random(seed)
    hypothesis, reference = ([rng.randrange(1 + seed % 3) for _ in range(size)] for size in (60, 50))
    matches = [[] for _ in reference]
    for i, word in enumerate(reference):
        matches[i] += [Match(i, 1, k, 1, rng.choice([0, 0, 1, 2])) for k in range(60) if word == hypothesis[k]]
    for i in rng.sample(range(48), 10):
        matches[i] += [Match(i, rng.randint(1, 3), k, rng.randint(1, 3), 3) for k in rng.sample(range(57), 20)]
    found = align(matches, 60)
    with patch.object(meteor_align, "extend_path", all_extensions):
        assert align(matches, 60) == found


def test_captions_that_take_too_long_are_named(small_tables):
    """More than 100,000 pairs of equal words."""
    with pytest.raises(InputError, match="METEOR: two captions have 401 .'x x x x x' .* at most 100000 pairs"):
        meteor.score([["x " * 250]], ["x " * 401], meteor_data.load())


@pytest.mark.parametrize(("pairs", "expected"), [
    # Phrases of the reference on the table's left side come before phrases of the hypothesis on that side.
    ([("y", "q"), ("q", "x"), ("q", "y x")], [(1, 1), (0, 2), (0, 1)]),
    # Phrases of the hypothesis on the left side that start at one word come by length: "y" before "y x".
    ([("y x", "q"), ("y", "q")], [(0, 1), (0, 2)]),
])
def test_order_of_paraphrase_matches(small_tables, pairs, expected):
    """It decides ties in the aligner."""
    write_tables(small_tables, pairs)
    (((reference,),), (text,), lexicon) = make_texts([["q"]], ["y x"], meteor_data.load())
    (matches,) = Hypothesis(text, [reference], lexicon).matches(reference)
    assert [(match.hyp_start, match.hyp_length) for match in matches] == expected


def test_bars_split_a_reference_in_two(small_tables):
    """As in pycocoevalcap's protocol. "x" alone is the best of x, y: the score of one exact word of two."""
    two = score({"a": ["x", "y"], "b": ["q w"]}, {"a": "x y", "b": "q"}, tokenizer="none", metrics=["METEOR"])
    split = score({"a": ["x ||| y"], "b": ["q w"]}, {"a": "x y", "b": "q"}, tokenizer="none", metrics=["METEOR"])
    assert split.corpus == two.corpus and split.per_video == two.per_video
    assert round(split.per_video["a"]["METEOR"], 4) == 0.3478 and round(split.corpus["METEOR"], 4) == 0.2667
