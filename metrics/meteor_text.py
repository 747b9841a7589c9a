"""METEOR's own normalisation of English text, which runs after the Penn Treebank tokenizer.

It splits off punctuation once more, in other ways: "n't" becomes "n" "'t", "well-known" becomes two words, "p.m."
loses its dots. Each step replaces from left to right without overlap, so in "a-b-c" only the first hyphen goes:
"a b-c". METEOR lower-cases the result and compares words.

References
[1] Denkowski and Lavie, Meteor Universal: Language Specific Translation Evaluation for Any Target Language, WMT 2014.
[2] Koehn et al., Moses: Open Source Toolkit for Statistical Machine Translation, ACL 2007. The non-breaking prefixes of
    its tokenizer decide what happens to a dot.
"""

import re
from dataclasses import dataclass
from sys import intern

ALPHA = (
    "A-Za-z\u0160\u017d\u0161\u017e\u0178\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017e\u0400-\u04ff"
    "\u0500-\u0527\ua640-\ua66e\ua67e-\ua697\u1d00-\u1d7f"
)
ALNUM = ALPHA + "0-9"
ELLIPSIS_DOT = "\0"  # stands for each dot of a run of dots until the end
STEPS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (f"([^{ALNUM} \t\n\x0b\f\r.'`,\u2018\u2019-])", r" \1 "),
        (r"\.\.+", lambda match: f" {ELLIPSIS_DOT * len(match.group())} "),
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
UNICODE_SPACES = re.compile("[ \u00a0\u2000-\u200a\u202f\u205f\u3000]+")
JAVA_SPACES = re.compile("[ \t\n\x0b\f\r]+")
WORD_SEPARATORS = re.compile("[ \t\n\r\f]+")
ASCII_WORDS = re.compile("[A-Za-z0-9 ]*")  # text that no step changes


@dataclass(frozen=True)
class Prefixes:
    """Non-breaking prefixes: abbreviations that keep their dot, always or only before a digit. Case-sensitive."""

    always: frozenset = frozenset()
    before_digit: frozenset = frozenset()


def normalize_final_dot(word, next_word, prefixes):
    """A word that ends in a dot, with the dot removed, kept or split off."""
    prefix = word[:-1]
    if "." in prefix and HAS_ALPHA.search(prefix):
        return word.replace(".", "")
    if prefix in prefixes.always or re.match("[a-z]", next_word):
        return word
    if prefix in prefixes.before_digit and re.match("[0-9]", next_word):
        return word
    return prefix + " ."


def normalize(line, prefixes):
    """One caption as METEOR sees it, case kept (str -> str)."""
    if ASCII_WORDS.fullmatch(line):
        return " ".join(line.split())
    line = f" {line} "
    for pattern, replacement in STEPS:
        line = pattern.sub(replacement, line)
    words = [word for word in JAVA_SPACES.split(line) if word]
    for i, word in enumerate(words):
        if word.endswith(".") and len(word) > 1:
            words[i] = normalize_final_dot(word, words[i + 1] if i + 1 < len(words) else "", prefixes)
    return UNICODE_SPACES.sub(" ", " ".join(words).replace(ELLIPSIS_DOT, ".")).strip(" ")


def split_words(line, prefixes):
    """Lower-cased words of a caption (list of str). Equal words are one object, which saves memory."""
    return [intern(word) for word in WORD_SEPARATORS.split(normalize(line, prefixes).lower()) if word]
