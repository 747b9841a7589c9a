"""The PTB tokenizer, against the output of Stanford's PTBTokenizer through pycocoevalcap 1.2 (golden/).

Tokens and captions are compared for equality; test_score.py scores the golden corpora from raw captions. Random strings
come from fixed seeds.
"""

import random

import pytest

from metrics import ptb
from metrics.inputs import LINE_BREAKS
from tests.metrics.captions import golden, random_strings


@pytest.mark.parametrize("name, count", [("ptb_golden", 338), ("ptb_rules", 100)])
def test_golden_lines(name, count):
    """Every line as a file of its own. There it is followed by a plain caption, which changes nothing.

    ptb_golden: captions of all kinds. ptb_rules: the shortest texts that tell rarer rules apart (apostrophes, spaces
    and letters that are not ASCII, soft hyphens, U+0085, links, tags), found with random captions.
    """
    cases = golden(name)
    assert len(cases) == count
    for case in cases:
        lines = [case["input"], "x"]
        found = " ".join(ptb.tokenize(lines)[0]), ptb.tokenize_captions(lines)[0]
        assert found == (case["tokens"], case["caption"]), case


def test_golden_lines_that_affect_each_other():
    """All cases but those with a line break inside a caption, where this tokenizer keeps the captions apart."""
    cases = [case for case in golden("ptb_context") if not any(map(LINE_BREAKS.search, case["lines"]))]
    assert len(cases) == 47
    for case in cases:
        assert [" ".join(tokens) for tokens in ptb.tokenize(case["lines"])] == case["tokens"], case
        assert ptb.tokenize_captions(case["lines"]) == case["captions"], case


def test_initials_end_a_sentence_only_before_some_words():
    """Stanford's closed list of words that open a sentence. "On" and names are not in it."""
    for word in "The A An As At He She It If In Then There They This We When".split():
        assert ptb.tokenize_captions(["Vitamin C.", f"{word} dog runs."])[0] == "vitamin c", word
    for word in "On Dogs Most the this".split():
        assert ptb.tokenize_captions(["Vitamin C.", f"{word} dog runs."])[0] == "vitamin c.", word


def test_shortcut_for_lower_case_words():
    """The shortcut for captions of lower-case words gives the lexer's tokens: 3,000 random lines, seed 1."""
    rng = random.Random(1)
    words = "a man cannot gonna gotta wanna lemme gimme wannabe gimmes runs c i cat  in the etc inc vs mr".split(" ")
    lines = [" ".join(rng.choices(words, k=rng.randrange(8))) for _ in range(3000)]
    assert sum(bool(ptb.LOWER_CASE_WORDS.fullmatch(line)) and not ptb.SPLIT_WORDS.search(line) for line in lines) > 500
    assert ptb.tokenize(lines) == [ptb.tokenize_line(line) for line in lines]


def test_random_strings():
    """3,000 random strings, seed 2: one line of lower-case tokens each, unchanged by another line before them."""
    texts = random_strings(3_000, seed=2)
    captions = ptb.tokenize_captions(texts)
    assert len(captions) == len(texts)
    assert ptb.tokenize_captions(["A man runs .", *texts])[1:] == captions
    for text, caption in zip(texts, captions, strict=True):
        assert caption == caption.lower() and "\n" not in caption, text
        assert not set(caption.split(" ")) & ptb.PUNCTUATION, text
