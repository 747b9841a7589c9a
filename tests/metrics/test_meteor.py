"""METEOR 1.5, against what its Java program printed through pycocoevalcap 1.2 (tests/golden).

Stems, normalised lines and the 23 counts of a segment are compared for equality, scores within 1e-9. The tables are
those of an installed pycocoevalcap; the first run compiles its paraphrases into the user's cache. Tests of that cache
use small tables made here, and a cache folder of their own.
"""

import gzip
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_ptb import CORPORA, golden, random_texts

from metrics import InputError, meteor, meteor_data, meteor_paraphrases, meteor_text, porter2, ptb, score
from metrics.meteor_align import Match, align, count_chunks
from metrics.meteor_match import Hypothesis, Lexicon

COLLISION = "hard066"  # two words with one 32-bit hash are equal to the reference, and different here
TOLERANCE = 1e-9


@pytest.fixture(scope="session")
def tables():
    found = meteor_data.load()
    assert found.modules() == ["exact", "stem", "synonym", "paraphrase"], "needs an installed pycocoevalcap"
    return found


def texts_of(refs, hyps, tables):
    """A Lexicon's Texts of tokenised captions: (list of lists, list, the Lexicon)."""
    split = [[tuple(text.split()) for text in group] for group in refs], [tuple(text.split()) for text in hyps]
    lexicon = Lexicon(tables, {words for group in split[0] for words in group}, set(split[1]))
    found = [[lexicon.texts[words] for words in group] for group in split[0]], [lexicon.texts[w] for w in split[1]]
    return *found, lexicon


# --- words ------------------------------------------------------------------------------------------------------


def test_stems():
    cases = golden("stem_golden")
    assert len(cases) == 2575
    assert {word: porter2.stem(word) for word in cases} == cases


def test_stems_of_the_algorithm_s_description():
    """The words by which Porter2's own text explains its first steps."""
    cases = (
        "ties tie cries cri gas gas this this gaps gap kiwis kiwi hoping hope hopping hop by by say say cry cri".split()
    )
    assert [porter2.stem(word) for word in cases[::2]] == cases[1::2]


def test_normalisation(tables):
    cases = golden("meteor_norm_golden")
    assert len(cases) == 625
    for case in cases:
        assert meteor_text.normalize(case["input"], tables.words.prefixes) == case["normalized"], case
        assert meteor_text.words(case["input"], tables.words.prefixes) == case["words_lower"], case


def test_tables_are_whole(tables):
    """Sizes of the published tables: 5,274,084 paraphrases of 43,139 words, 147,306 entries of synonyms."""
    assert len(tables.paraphrases.left) == len(tables.paraphrases.right) == 5_274_084
    assert len(tables.paraphrases.words) == 43_139
    assert len(tables.words.synsets) == 147_306
    assert {"the", "'s", "-lrb-"} <= tables.words.function
    assert tables.words.meanings("automobile") & tables.words.meanings("cars")


def test_base_forms(tables):
    """The first ending that leaves a word of the table; none for words in "ss" and of one or two letters."""
    cases = "ladies lady boxes box churches church women woman taller tall tallest tall grass grass as as".split()
    cases = dict(zip(cases[::2], cases[1::2], strict=True)) | {"running": "", "xyzs": ""}
    assert {word: tables.words.base(word) for word in cases} == cases


# --- counts and scores --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORPORA)
def test_counts_and_scores(name, tables):
    """23 counts of each segment as integers, its score, and the corpus score, here without the collision."""
    data = golden(f"golden_{name}")
    expected = data["scores"]["METEOR"]
    ids = [key for key in data["ids"] if key != COLLISION]
    kept = [key != COLLISION for key in data["ids"]]
    refs, hyps = [data["refs_tok"][key] for key in ids], [data["hyps_tok"][key] for key in ids]
    total, scores, counts = meteor.score(refs, hyps, tables)
    theirs = np.array(expected["stats"])[kept]
    assert (theirs == theirs.round()).all()
    np.testing.assert_array_equal(counts, theirs.astype(int))
    np.testing.assert_allclose(scores, np.array(expected["seg"])[kept], rtol=0, atol=TOLERANCE)
    assert abs(total - meteor.score_counts(meteor.add_up(theirs.tolist()))) < TOLERANCE
    assert abs(meteor.score_counts(meteor.add_up(expected["stats"])) - expected["corpus"]) < TOLERANCE


def test_two_spaces_of_a_hypothesis_are_one(tables):
    """A comma after a comma goes only after two spaces, of which the wrapper leaves one (as the reference prints)."""
    _, _, counts = meteor.score([["a , b"], ["a,  ,b"]], ["a,  ,b", "a , b"], tables)
    assert counts[0].tolist() == [3, 3, 2, 2, 0, 0, 2, 2] + [0] * 12 + [1, 2, 2]
    assert counts[1, :2].tolist() == [3, 4]  # references keep theirs


def test_corpus_score_is_not_the_mean(tables):
    total, scores, _ = meteor.score([["a man runs"], ["the dog barks at a big cat"]], ["a man runs", "cat"], tables)
    assert scores[0] == 1.0 and abs(total - scores.mean()) > 0.01


def test_bound_spares_no_better_reference(tables):
    """Every pair's score is at most its bound, and the best is the one found without bounds; 200 segments, seed 3."""
    data, rng = golden("golden_msvdlike"), random.Random(3)
    pool = [text for key in data["ids"] for text in data["refs_tok"][key]]
    refs, hyps = [rng.choices(pool, k=6) for _ in range(200)], rng.choices(pool, k=200)
    refs = [[*group, *data["refs_tok"][key][:4]] for group, key in zip(refs, data["ids"] * 2, strict=False)]
    refs, hyps, lexicon = texts_of(refs, hyps, tables)
    skipped = 0
    for group, text in zip(refs, hyps, strict=True):
        hypothesis, best = Hypothesis(text, group, lexicon), (None, -1.0)
        for reference in group:
            counts = meteor.count(align(hypothesis.matches(reference), len(text.words)), text, reference)
            value, bound = meteor.score_counts(counts), meteor.upper_bound(hypothesis, reference)
            assert value <= bound
            best = (counts, value) if value > best[1] else best
            skipped += bound < best[1]
        assert meteor.segment(hypothesis, group) == best
    assert skipped > 200  # the bound spares alignments at all


def test_order_of_references(tables):
    """A segment's score does not depend on it, 150 segments, seed 4; with only zeros the first one's counts stand."""
    data, rng = golden("golden_msvdlike"), random.Random(4)
    refs, hyps = [data["refs_tok"][key] for key in data["ids"]], [data["hyps_tok"][key] for key in data["ids"]]
    mixed = [rng.sample(group, len(group)) for group in refs]
    np.testing.assert_array_equal(meteor.score(refs, hyps, tables)[1], meteor.score(mixed, hyps, tables)[1])
    assert meteor.score([["one", "two words"]], ["xyz"], tables)[2][0, 1] == 1
    assert meteor.score([["two words", "one"]], ["xyz"], tables)[2][0, 1] == 2


def test_identical_captions(tables):
    total, scores, counts = meteor.score([["a man runs", "x"], ["cat"]], ["a man runs", "cat"], tables)
    assert total == 1.0 and (scores == 1.0).all()
    assert counts[:, 20:].tolist() == [[1, 3, 3], [1, 1, 1]]


def test_no_random_string_breaks_it(tables):
    """10,000 random strings (seeds 5 and 6), raw and tokenised, against others and against themselves."""
    hyps, refs = random_texts(10_000, seed=5), random_texts(10_000, seed=6)
    refs = [[a, b] for a, b in zip(refs, hyps[1:] + hyps[:1], strict=True)]
    for change in (list, ptb.captions):
        _, scores, counts = meteor.score([change(group) for group in refs], change(hyps), tables)
        assert ((scores >= 0) & (scores <= 1)).all() and (counts >= 0).all()
    same = [text for text in ptb.captions(hyps) if text.strip()]
    _, scores, counts = meteor.score([[text] for text in same], same, tables)
    # The wrapper takes "|||" and double spaces out of hypotheses alone; the tokenizer leaves none of them.
    assert (scores[counts[:, 0] > 0] == 1.0).all()


# --- the aligner, by hand -----------------------------------------------------------------------------------------


def test_aligner_prefers_matches_then_chunks():
    """hyp "a b a c", ref "a c": the second "a" stands before "c", one chunk instead of two."""
    matches = [[Match(0, 1, 0, 1, 0), Match(0, 1, 2, 1, 0)], [Match(1, 1, 3, 1, 0)]]
    found = align(matches, 4)
    assert [match.at for match in found] == [2, 3] and count_chunks(found) == 1


def test_one_word_synonyms_add_nothing():
    """The reference truncates 0.5 to 0, so skipping a lone synonym ranks as high as taking it, and needs no chunk."""
    synonym = Match(0, 1, 1, 1, 2)
    assert align([[synonym], [Match(1, 1, 0, 1, 0)], []], 2) == [synonym, Match(1, 1, 0, 1, 0)]  # placed beforehand
    contested = [[synonym, Match(0, 1, 1, 1, 3)], [Match(1, 1, 0, 1, 0)]]
    assert align(contested, 2) == [Match(1, 1, 0, 1, 0)]


@pytest.mark.parametrize(
    ("hypothesis", "reference", "expected"),
    [
        ("man of dog in dog car the man of a is , , man a running on",
         "of man on of cars car a of cars , in , ,", 0.2391819673725708),
        ("a running runs car running cars runs , car a , on man",
         "on on car car dog a man runs man car car runs a dog runs runs running", 0.24740075802152425),
    ],
)  # fmt: skip
def test_forty_paths_are_kept(tables, hypothesis, reference, expected):
    """Captions whose alignment another beam changes: 41 paths give 0.231111 for the first, 39 give 0.235332 for the
    second. Reference: the Java program, tolerance 1e-9."""
    _, rows, _ = meteor.score([[reference]], [hypothesis], tables)
    assert abs(rows[0] - expected) <= TOLERANCE


# --- small tables and the cache -----------------------------------------------------------------------------------

PAIRS = [
    ("a lot of", "many"),
    ("a lot of", "lots of"),
    ("kid", "youngster"),
    ("émigré", "exile"),
    ("a b c d e f g", "alphabet"),
]


def write_tables(folder: Path, pairs=PAIRS) -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / meteor_data.JAR, "w") as archive:
        archive.writestr("function/english.words", "a\nthe\nof\n")
        archive.writestr("nonbreaking/english.prefixes", "# comment\nMr\nNo #NUMERIC_ONLY#\n")
        archive.writestr("synonym/english.synsets", "car\n00000001 00000002\nautomobile\n00000001\nrun\n00000003\n")
        archive.writestr("synonym/english.exceptions", "run\nran running\n")
    text = "".join(f"0.5\n{left}\n{right}\n" for left, right in pairs)
    (folder / meteor_data.PARAPHRASES).write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))
    return folder


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder of small tables that METEOR_DATA names, with an empty cache at tmp_path/"cache"."""
    folder = write_tables(tmp_path / "tables")
    monkeypatch.setenv("METEOR_DATA", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(meteor_data, "last_loaded", {})
    return folder


def load_again(**options):
    meteor_data.last_loaded.clear()
    return meteor_data.load(**options)


def compiled_files(tmp_path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.*"))


def as_pairs(table) -> list[tuple[str, str]]:
    """The entries of compiled Paraphrases, read back through `find`."""
    words = sorted(table.words, key=table.words.get)
    captions = [text.split() for pair in PAIRS for text in pair]
    caption, start, length, node = table.find(captions)
    spelled = {n: " ".join(captions[c][s : s + k]) for c, s, k, n in zip(caption, start, length, node, strict=True)}
    assert set(words) == {word for text in captions for word in text}
    return [(spelled[left], spelled[right]) for left, right in zip(table.left, table.right, strict=True)]


def test_small_tables_match_as_they_say(small):
    found = load_again()
    assert as_pairs(found.paraphrases) == PAIRS
    _, _, counts = meteor.score([["a lot of dogs ran"]], ["many dogs running"], found)
    assert counts[0].tolist()[:4] == [3, 5, 0, 2]
    assert counts[0, 4:20].reshape(4, 4).tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 2]]
    assert found.words.prefixes.always == {"Mr"} and found.words.prefixes.before_digit == {"No"}


def test_matches_come_in_the_order_of_the_modules(small):
    """Ties are decided by it: phrases of the reference on the table's left side come before the others."""
    write_tables(small, pairs=[("y", "q"), ("q", "x"), ("q", "y x")])
    (((text,),), (hypothesis,), lexicon) = texts_of([["q"]], ["y x"], load_again())
    (found,) = Hypothesis(hypothesis, [text], lexicon).matches(text)
    assert [(match.at, match.size) for match in found] == [(1, 1), (0, 2), (0, 1)]


def test_second_pass_finds_shorter_phrases_first(small):
    """Table phrases of the hypothesis that begin at one word come by length: "y" before "y x"."""
    write_tables(small, pairs=[("y x", "q"), ("y", "q")])
    (((text,),), (hypothesis,), lexicon) = texts_of([["q"]], ["y x"], load_again())
    (found,) = Hypothesis(hypothesis, [text], lexicon).matches(text)
    assert [(match.at, match.size) for match in found] == [(0, 1), (0, 2)]


def test_tables_of_another_folder_are_not_those_in_memory(small, tmp_path):
    """Two folders in one process, nothing cleared between them."""
    other = write_tables(tmp_path / "other", pairs=[("boat", "ship")])
    for folder, word in ((small, "alphabet"), (other, "boat"), (small, "alphabet")):
        words = meteor_data.load(str(folder)).paraphrases.words
        assert {"alphabet", "boat"} & set(words) == {word}


def test_bars_in_a_reference_make_two_of_it(small):
    """As in the reference program's protocol. "x" alone is the best of x, y: score of one exact word of two."""
    whole = score({"a": ["x", "y"], "b": ["q w"]}, {"a": "x y", "b": "q"}, tokenizer="none", metrics=["METEOR"])
    barred = score({"a": ["x ||| y"], "b": ["q w"]}, {"a": "x y", "b": "q"}, tokenizer="none", metrics=["METEOR"])
    assert barred.corpus == whole.corpus and barred.per_video == whole.per_video
    assert round(barred.per_video["a"]["METEOR"], 4) == 0.3478 and round(barred.corpus["METEOR"], 4) == 0.2667


def test_equal_captions_are_matched_exactly_only(small):
    (((text,),), (hypothesis,), lexicon) = texts_of([["car automobile"]], ["car automobile"], load_again())
    assert Hypothesis(hypothesis, [text], lexicon).matches(text) == [[Match(0, 1, 0, 1, 0)], [Match(1, 1, 1, 1, 0)]]


def test_compiled_once_and_reused(small, tmp_path, monkeypatch):
    told = []
    first = load_again(tell=told.append)
    (compiled,) = compiled_files(tmp_path)  # and nothing beside it
    assert len(told) == 1 and str(compiled) in told[0]
    monkeypatch.setattr(meteor_paraphrases, "compile_table", lambda path: pytest.fail("compiled again"))
    second = load_again(tell=told.append)
    assert len(told) == 1 and as_pairs(second.paraphrases) == as_pairs(first.paraphrases)
    assert isinstance(second.paraphrases.left.base, np.memmap)
    assert meteor_data.load(tell=print) is second


def test_any_damage_is_seen_and_mended(small, tmp_path):
    """One bit of each byte of the compiled file flipped (seed 7), then the file cut at 80 places."""
    rng, source = random.Random(7), meteor_paraphrases.fingerprint(small / meteor_data.PARAPHRASES)
    load_again()
    (compiled,) = compiled_files(tmp_path)
    whole = compiled.read_bytes()
    arrays = {name: array.tobytes() for name, array in meteor_paraphrases.map_compiled(compiled, source).items()}
    noticed = 0
    for at in range(len(whole)):
        compiled.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        found = meteor_paraphrases.map_compiled(compiled, source)
        noticed += found is None
        # Only the padding between arrays may change unseen.
        assert found is None or {name: array.tobytes() for name, array in found.items()} == arrays, at
    assert noticed > len(whole) // 2
    for at in [*range(40), *rng.sample(range(40, len(whole) - 64), 40)]:
        compiled.write_bytes(whole[:at])
        assert meteor_paraphrases.map_compiled(compiled, source) is None, at
    assert as_pairs(load_again().paraphrases) == PAIRS
    assert compiled.read_bytes() == whole


def test_a_last_line_without_its_end_counts(small):
    text = gzip.decompress((small / meteor_data.PARAPHRASES).read_bytes())
    (small / meteor_data.PARAPHRASES).write_bytes(gzip.compress(text.removesuffix(b"\n")))
    assert as_pairs(load_again().paraphrases) == PAIRS


def test_another_source_is_compiled_anew(small, tmp_path):
    load_again()
    write_tables(small, pairs=PAIRS[:1] + [("kid", "exile")] + PAIRS[1:])
    assert len(load_again().paraphrases.left) == len(PAIRS) + 1
    one, other = compiled_files(tmp_path)
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])  # a file under another source's name does not pass for it
    other.write_bytes(contents[0])
    assert len(load_again().paraphrases.left) == len(PAIRS) + 1


def test_a_failed_write_leaves_nothing_and_costs_nothing_but_time(small, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    told = []
    with monkeypatch.context() as patch:
        patch.setattr(meteor_paraphrases.os, "replace", full)
        assert as_pairs(load_again(tell=told.append).paraphrases) == PAIRS
    assert compiled_files(tmp_path) == [] and "No space left" in told[-1]
    (tmp_path / "cache" / "caption-metrics").rmdir()
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert as_pairs(load_again().paraphrases) == PAIRS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (meteor_data.JAR, b"no zip"),
        (meteor_data.PARAPHRASES, b"no gz"),
        (meteor_data.PARAPHRASES, gzip.compress(b"0.5\nleft\n")),
        (meteor_data.PARAPHRASES, gzip.compress(b"0.5\nleft\nright\n" * 50)[:-9]),
        (meteor_data.PARAPHRASES, gzip.compress(b"")),
        (meteor_data.PARAPHRASES, gzip.compress(b"0.5\n\xff\nright\n")),
        (meteor_data.PARAPHRASES, gzip.compress(b"0.5\nleft\n\xff")),
    ],
)
def test_broken_tables_are_named(small, tmp_path, name, content):
    (small / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_again()
    assert str(caught.value).startswith(str(small / name)) and "\n" not in str(caught.value)
    assert compiled_files(tmp_path) == []


@pytest.mark.parametrize(
    ("missing", "name"),
    [(meteor_data.PARAPHRASES, "METEOR[exact,stem,synonym]"), (meteor_data.JAR, "METEOR[exact,stem,paraphrase]")],
)
def test_what_is_left_names_the_score(small, missing, name):
    (small / missing).unlink()
    meteor_data.last_loaded.clear()
    found = score({"v": ["a lot of cars"]}, {"v": "many automobiles"})
    assert name in found.corpus and name in found.per_video["v"] and "METEOR" not in found.corpus
    assert f"meteor:1.5{name[6:]}" in found.signature
    assert len(found.notes) == 2 and "install pycocoevalcap" in found.notes[0]
    with pytest.raises(InputError, match="install pycocoevalcap"):
        score({"v": ["a"]}, {"v": "a"}, strict=True)


def test_a_named_folder_without_tables(tmp_path):
    with pytest.raises(InputError, match="has neither"):
        meteor_data.load(tmp_path)
