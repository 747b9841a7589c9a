"""The English Snowball stemmer ("Porter2") as it was until 2023, which METEOR 1.5 uses.

Later versions of the algorithm stem some words differently (added, evening, internal, ...), so a current library is no
replacement.

Vowels are a e i o u y. A "y" that opens the word or follows a vowel is a consonant, and is written Y while the steps
run. R1 is the part after the first non-vowel that follows a vowel; R2 is the same within R1. Most suffixes are removed
only if they lie in R1 or R2; r1 and r2 are the positions where those begin.

References
[1] Porter, An algorithm for suffix stripping, Program 14(3), 1980.
[2] Porter, The English (Porter2) stemming algorithm, https://snowballstem.org, 2002.
"""

import re
from functools import lru_cache

VOWEL = "[aeiouy]"
VOWEL_NONVOWEL = re.compile("[aeiouy][^aeiouy]")
DOUBLES = ("bb", "dd", "ff", "gg", "mm", "nn", "pp", "rr", "tt")
SHORT_SYLLABLE_END = re.compile("(?:^|[^aeiouy])[aeiouy][^aeiouywxY]$|^[aeiouy][^aeiouy]$")


def suffix_table(text):
    """{suffix or word: replacement} from "suffix:replacement" pairs."""
    return dict(pair.split(":") for pair in text.split())


EXCEPTIONS = suffix_table(
    "skis:ski skies:sky dying:die lying:lie tying:tie idly:idl gently:gentl ugly:ugli early:earli only:onli"
    " singly:singl sky:sky news:news howe:howe atlas:atlas cosmos:cosmos bias:bias andes:andes"
)
UNCHANGED_AFTER_1A = frozenset("inning outing canning herring earring proceed exceed succeed".split())
STEP_2 = suffix_table(
    "tional:tion enci:ence anci:ance abli:able entli:ent izer:ize ization:ize ational:ate ation:ate ator:ate alism:al"
    " aliti:al alli:al fulness:ful ousli:ous ousness:ous iveness:ive iviti:ive biliti:ble bli:ble ogi:og fulli:ful"
    " lessli:less li:"
)
STEP_3 = suffix_table("tional:tion ational:ate alize:al icate:ic iciti:ic ical:ic ful: ness: ative:")
STEP_4 = "al ance ence er ic able ible ant ement ment ent ism ate iti ous ive ize ion".split()


def region_start(word, start=0):
    """Position after the first non-vowel that follows a vowel, looked for from `start`."""
    match = VOWEL_NONVOWEL.search(word, start)
    return match.end() if match else len(word)


def find_regions(word):
    """(r1, r2): where R1 and R2 begin."""
    exception = re.match("gener|commun|arsen", word)
    r1 = exception.end() if exception else region_start(word)
    return r1, region_start(word, r1)


def longest_suffix(word, suffixes):
    """The longest of `suffixes` that ends the word, or ""."""
    return max((suffix for suffix in suffixes if word.endswith(suffix)), key=len, default="")


def step_1a(word):
    """Plurals."""
    suffix = longest_suffix(word, ("sses", "ied", "ies", "us", "ss", "s"))
    if suffix == "sses":
        return word[:-2]
    if suffix in ("ied", "ies"):
        return word[:-2] if len(word) > 4 else word[:-1]
    if suffix == "s" and re.search(VOWEL, word[:-2]):
        return word[:-1]
    return word


def step_1b(word, r1):
    """Past tenses and participles."""
    suffix = longest_suffix(word, ("eed", "eedly", "ed", "edly", "ing", "ingly"))
    stem = word[: len(word) - len(suffix)]
    if suffix in ("eed", "eedly"):
        return stem + "ee" if len(stem) >= r1 else word
    if not suffix or not re.search(VOWEL, stem):
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if stem.endswith(DOUBLES):
        return stem[:-1]
    if r1 >= len(stem) and SHORT_SYLLABLE_END.search(stem):
        return stem + "e"
    return stem


def step_2(word, r1):
    suffix = longest_suffix(word, STEP_2)
    stem = word[: len(word) - len(suffix)]
    if not suffix or len(stem) < r1:
        return word
    if suffix == "ogi" and not stem.endswith("l"):
        return word
    if suffix == "li" and not stem.endswith(tuple("cdeghkmnrt")):
        return word
    return stem + STEP_2[suffix]


def step_3(word, r1, r2):
    suffix = longest_suffix(word, STEP_3)
    stem = word[: len(word) - len(suffix)]
    if not suffix or len(stem) < (r2 if suffix == "ative" else r1):
        return word
    return stem + STEP_3[suffix]


def step_4(word, r2):
    suffix = longest_suffix(word, STEP_4)
    stem = word[: len(word) - len(suffix)]
    if not suffix or len(stem) < r2 or suffix == "ion" and not stem.endswith(("s", "t")):
        return word
    return stem


def step_5(word, r1, r2):
    stem = word[:-1]
    if word.endswith("e"):
        if len(stem) >= r2 or len(stem) >= r1 and not SHORT_SYLLABLE_END.search(stem):
            return stem
    elif word.endswith("ll") and len(stem) >= r2:
        return stem
    return word


@lru_cache(1 << 16)
def stem(word):
    """The stem of a lower-case word (str -> str)."""
    if len(word) <= 2:
        return word
    if word in EXCEPTIONS:
        return EXCEPTIONS[word]
    word = word.removeprefix("'")
    word = re.sub("(^|[aeiouy])y", r"\1Y", word)
    r1, r2 = find_regions(word)
    word = word.removesuffix(longest_suffix(word, ("'", "'s", "'s'")))
    word = step_1a(word)
    if word not in UNCHANGED_AFTER_1A:
        word = step_1b(word, r1)
        if len(word) > 2 and re.search("[^aeiouy][yY]$", word):  # step 1c
            word = word[:-1] + "i"
        word = step_5(step_4(step_3(step_2(word, r1), r1, r2), r2), r1, r2)
    return word.replace("Y", "y")
