"""METEOR's own normalisation of English text, which runs after the Penn Treebank tokenizer.

It splits off punctuation once more, and differently: "n't" becomes "n" "'t", "well-known" two
words, "p.m." loses its dots. Each step is a left-to-right replacement that does not overlap, so
that of "a-b-c" only the first hyphen goes: "a b-c". METEOR lower-cases what comes out and
compares words.

References
[1] Denkowski and Lavie, Meteor Universal: Language Specific Translation Evaluation for Any Target
    Language, WMT 2014.
[2] Koehn et al., Moses: Open Source Toolkit for Statistical Machine Translation, ACL 2007 (whose
    tokenizer's non-breaking prefixes decide what happens to a dot).
"""

import re
from dataclasses import dataclass
from sys import intern

ALPHA = (
    "A-Za-z\u0160\u017d\u0161\u017e\u0178\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017e\u0400-\u04ff"
    "\u0500-\u0527\ua640-\ua66e\ua67e-\ua697\u1d00-\u1d7f"
)
ALNUM = ALPHA + "0-9"
DOTS = "\0"  # stands for a dot of a run of dots until the end
STEPS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (f"([^{ALNUM} \t\n\x0b\f\r.'`,\u2018\u2019-])", r" \1 "),
        (r"\.\.+", lambda run: f" {DOTS * len(run.group())} "),
        ("([^0-9]),([^0-9])", r"\1 , \2"),
        ("([0-9]),([^0-9])", r"\1 , \2"),
        ("([^0-9]),([0-9])", r"\1 , \2"),
        ("[`\u2018\u2019]", "'"),
        ("\u201c|\u201d|''", ' " '),
        ("\u2013|--", "-"),
        (f"([{ALNUM}.])-([{ALNUM}])", r"\1 \2"),
        (f"([^{ALPHA}])'([^{ALPHA}])", r"\1 ' \2"),
        (f"([^{ALNUM}])'([{ALPHA}])", r"\1 ' \2"),
        (f"([{ALPHA}])'([^{ALPHA}])", r"\1 ' \2"),
        (f"([{ALPHA}])'([{ALPHA}])", r"\1 '\2"),
        ("([0-9])'s", r"\1 's"),
    )
]
HAS_ALPHA = re.compile(f"[{ALPHA}]")
SPACES = re.compile("[ \u00a0\u2000-\u200a\u202f\u205f\u3000]+")
JAVA_SPACE = re.compile("[ \t\n\x0b\f\r]+")
SEPARATORS = re.compile("[ \t\n\r\f]+")
PLAIN = re.compile("[A-Za-z0-9 ]*")


@dataclass(frozen=True)
class Prefixes:
    """Abbreviations after which a dot is kept: always, or only before a digit. Case-sensitive."""

    always: frozenset = frozenset()
    before_digit: frozenset = frozenset()


def final_dot(word, after, prefixes):
    """A word that ends in a dot, the dot removed, kept or split off. `after`: the next word."""
    stem = word[:-1]
    if "." in stem and HAS_ALPHA.search(stem):
        return word.replace(".", "")
    if stem in prefixes.always or re.match("[a-z]", after):
        return word
    if stem in prefixes.before_digit and re.match("[0-9]", after):
        return word
    return stem + " ."


def normalize(line, prefixes):
    """One caption as METEOR sees it, case kept (str -> str)."""
    if PLAIN.fullmatch(line):
        return " ".join(line.split())
    line = f" {line} "
    for pattern, replacement in STEPS:
        line = pattern.sub(replacement, line)
    words = [word for word in JAVA_SPACE.split(line) if word]
    for i, word in enumerate(words):
        if word.endswith(".") and len(word) > 1:
            words[i] = final_dot(word, words[i + 1] if i + 1 < len(words) else "", prefixes)
    return SPACES.sub(" ", " ".join(words).replace(DOTS, ".")).strip(" ")


def words(line, prefixes):
    """Lower-cased words of a caption, list of str; equal words are one object, which spares memory."""
    return [intern(word) for word in SEPARATORS.split(normalize(line, prefixes).lower()) if word]
