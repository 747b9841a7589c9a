"""The PTB tokenizer, against what Stanford's PTBTokenizer printed through pycocoevalcap 1.2 (tests/golden).

Tokens and captions are compared for equality; random strings come from fixed seeds.
"""

import json
import random
import unicodedata
from pathlib import Path

import pytest

from metrics import ptb
from metrics.inputs import LINE_BREAKS

GOLDEN = Path(__file__).parent / "golden"
CORPORA = ("msvdlike", "vttlike", "hard", "single")


def golden(name: str):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def random_texts(count: int, seed: int) -> list[str]:
    """Strings of 0 to 40 characters: half plain ASCII, half with anything that Python allows in a string."""
    rng = random.Random(seed)
    pieces = ["n't", "'s", "http://", "www.", ".com", "etc.", "1/2", ":-)", "&amp;", "<b>", "--", "...", "can", "ot"]
    ascii_only = [chr(code) for code in range(128)]

    def char(wide: bool) -> str:
        kind = rng.random()
        if kind < 0.2:
            return rng.choice(pieces)
        if wide and kind < 0.6:
            return chr(rng.choice((rng.randrange(0x300), rng.randrange(0x3000), rng.randrange(0x110000))))
        return " " if kind < 0.7 else rng.choice(ascii_only)

    return ["".join(char(i % 2 == 1) for _ in range(rng.randrange(41))) for i in range(count)]


def test_lines_become_the_reference_s_tokens_and_captions():
    """Each line as a file of its own and, since a plain caption after it changes nothing there, before another."""
    cases = golden("ptb_golden")
    assert len(cases) == 338
    wrong = []
    for case in cases:
        tokens = ptb.tokenize([case["input"], "x"])[0]
        caption = ptb.captions([case["input"], "x"])[0]
        if (" ".join(tokens), caption) != (case["tokens"], case["caption"]):
            wrong.append((case, tokens, caption))
    assert not wrong


def test_lines_that_affect_each_other():
    """All but the cases with a line break inside a caption, where this tokenizer keeps the captions apart."""
    cases = golden("ptb_context")
    assert len(cases) == 48
    same = [case for case in cases if not any(LINE_BREAKS.search(line) for line in case["lines"])]
    assert len(same) == 44
    for case in same:
        assert [" ".join(tokens) for tokens in ptb.tokenize(case["lines"])] == case["tokens"], case
        assert ptb.captions(case["lines"]) == case["captions"], case


@pytest.mark.parametrize("name", CORPORA)
def test_corpora_become_the_reference_s_captions(name):
    """References are one file to the tokenizer, hypotheses another, both in the order of the videos."""
    data = golden(f"golden_{name}")
    ids = data["ids"]
    flat = [text for key in ids for text in data["refs"][key]]
    assert ptb.captions(flat) == [text for key in ids for text in data["refs_tok"][key]]
    assert ptb.captions([data["hyps"][key] for key in ids]) == [data["hyps_tok"][key] for key in ids]


def test_initials_end_a_sentence_before_some_words_only():
    """The reference's closed list of words that open a sentence; "On" and names are not in it."""
    for word in "The A An As At He She It If In Then There They This We When".split():
        assert ptb.captions(["Vitamin C.", f"{word} dog runs."])[0] == "vitamin c", word
    for word in "On Dogs Most the this".split():
        assert ptb.captions(["Vitamin C.", f"{word} dog runs."])[0] == "vitamin c.", word


def test_plain_captions_take_the_short_way_to_the_same_tokens():
    """The short way of plain lines against the lexer itself, on 3,000 random lines of words, seed 1."""
    rng = random.Random(1)
    words = "a man cannot gonna gotta wanna lemme gimme wannabe gimmes runs c i cat  in the etc inc vs mr".split(" ")
    lines = [" ".join(rng.choices(words, k=rng.randrange(8))) for _ in range(3000)]
    assert sum(bool(ptb.PLAIN.fullmatch(line)) and not ptb.SPLIT.search(line) for line in lines) > 500
    assert ptb.tokenize(lines) == [ptb.tokenize_line(line) for line in lines]


@pytest.mark.parametrize("gap", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\u2028", "\u2029"])
def test_line_breaks_in_a_caption_are_spaces(gap):
    """Unlike in the reference, where they shift all later captions to other videos."""
    assert ptb.captions([f"A man{gap}runs.", "A dog."]) == ["a man runs", "a dog"]


def test_no_random_string_breaks_it():
    """10,000 random strings, seed 2: one line of lower-case tokens each, the same with another line before them."""
    texts = random_texts(10_000, seed=2)
    captions = ptb.captions(texts)
    assert len(captions) == len(texts)
    assert ptb.captions(["A man runs .", *texts])[1:] == captions
    for text, caption in zip(texts, captions, strict=True):
        assert caption == caption.lower() and "\n" not in caption, text
        assert not set(caption.split(" ")) & ptb.PUNCTUATION, text


def test_unicode():
    """Composed letters stay one word in any script; characters without a rule vanish and split what they were in."""
    accented = "Señora Zoë привет мир καλημέρα 東京 naïve café"
    assert ptb.captions([accented]) == [unicodedata.normalize("NFC", accented).lower()]
    assert ptb.captions(["a\U0001f600b \u200bc"]) == ["a b c"]
