"""METEOR 1.5's English tables, read from where they are installed; none is part of this code.

Two files hold them, both in the folder `meteor/` of an installed pycocoevalcap: a zip (the
program's jar; nothing in it is run) with function words, non-breaking prefixes, synonyms and
irregular forms, and a gz with 5.3 million paraphrases (`meteor_paraphrases.py`).

References
[1] Denkowski and Lavie, Meteor Universal: Language Specific Translation Evaluation for Any Target
    Language, WMT 2014 (function words).
[2] Miller, WordNet: A Lexical Database for English, Communications of the ACM 38(11), 1995
    (synonyms and irregular forms).
"""

import importlib.util
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from . import meteor_paraphrases
from .inputs import InputError
from .meteor_paraphrases import Paraphrases
from .meteor_text import Prefixes

JAR = "meteor-1.5.jar"
PARAPHRASES = "paraphrase-en.gz"
last_loaded = {}  # "found": paths of the files, "tables": what was read from them
# How an English noun, verb, adjective or adverb is turned into a base form: the first that exists.
ENDINGS = (
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
    ("men", "man"), ("ies", "y"), ("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"),
    ("ed", ""), ("ing", "e"), ("ing", ""), ("er", ""), ("est", ""), ("er", "e"), ("est", "e"),
)  # fmt: skip


@dataclass(frozen=True)
class Words:
    """Tables from the zip: function words, prefixes, synonyms and irregular forms."""

    function: frozenset = frozenset()
    prefixes: Prefixes = Prefixes()
    synsets: dict = field(default_factory=dict)  # word -> ids, one string, separated by spaces
    bases: dict = field(default_factory=dict)  # irregular form -> list of base forms

    def base(self, word):
        """The form of `word` that the synonym table has, or ""."""
        if word.endswith("ss") or len(word) <= 2:
            return word
        for suffix, ending in ENDINGS:
            if word.endswith(suffix):
                stem = word[: len(word) - len(suffix)] + ending
                if stem in self.synsets:
                    return stem
        return ""

    def meanings(self, word):
        """Ids of the synonym sets of a word and of its base forms (set of str)."""
        bases = self.bases.get(word) or [self.base(word)]
        return {i for form in (word, *bases) for i in self.synsets.get(form, "").split()}


@dataclass(frozen=True)
class Tables:
    """What METEOR can use: `words` and `paraphrases` are None where their file is missing."""

    words: Words | None = None
    paraphrases: Paraphrases | None = None

    def modules(self):
        """Names of the matchers that these tables allow, in METEOR's order."""
        extra = [("synonym", self.words), ("paraphrase", self.paraphrases)]
        return ["exact", "stem"] + [name for name, table in extra if table is not None]


# --- the zip --------------------------------------------------------------------------------------


def read_words(path):
    """Words of METEOR's zip. Raises InputError where the file is no such zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            function, prefixes, synsets, exceptions = (
                archive.read(name).decode("utf-8").split("\n")
                for name in (
                    "function/english.words",
                    "nonbreaking/english.prefixes",
                    "synonym/english.synsets",
                    "synonym/english.exceptions",
                )
            )
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path}: {error}, expected METEOR 1.5's jar") from error
    entries = [line.split() for line in prefixes if line.strip() and not line.startswith("#")]
    bases = {}
    for base, forms in zip(exceptions[0::2], exceptions[1::2], strict=False):
        for form in forms.split():
            bases.setdefault(form, []).append(base)
    return Words(
        function=frozenset(word.strip() for word in function if word.strip()),
        prefixes=Prefixes(
            always=frozenset(entry[0] for entry in entries if len(entry) == 1),
            before_digit=frozenset(entry[0] for entry in entries if len(entry) > 1),
        ),
        synsets=dict(zip(synsets[0::2], synsets[1::2], strict=False)),
        bases=bases,
    )


# --- where the files are --------------------------------------------------------------------------


def folders(given=None):
    """Folders to look in: the one given, else METEOR_DATA's, else an installed pycocoevalcap's."""
    chosen = given or os.environ.get("METEOR_DATA")
    if chosen:
        return [Path(chosen, part) for part in ("", "data", "meteor", "meteor/data")]
    package = importlib.util.find_spec("pycocoevalcap")
    places = package.submodule_search_locations if package else None
    return [Path(place, part) for place in places or () for part in ("meteor", "meteor/data")]


def locate(given=None):
    """Paths of the zip and the gz, None for what is missing.

    Raises InputError for a folder that was named and has neither.
    """
    places = folders(given)
    found = [next((place / name for place in places if (place / name).is_file()), None) for name in (JAR, PARAPHRASES)]
    if not any(found) and (given or os.environ.get("METEOR_DATA")):
        raise InputError(f"{places[0]}: has neither {JAR} nor {PARAPHRASES}, METEOR's tables")
    return found


def load(given=None, tell=None):
    """Tables found in `folders(given)`; the last ones are kept in memory for the next call.

    tell: called with one line of text before something that takes long. Raises InputError where a
    file is there but broken.
    """
    jar, paraphrases = found = locate(given)
    if last_loaded.get("found") != found:
        last_loaded["tables"] = Tables(
            words=read_words(jar) if jar else None,
            paraphrases=meteor_paraphrases.load(paraphrases, tell) if paraphrases else None,
        )
        last_loaded["found"] = found
    return last_loaded["tables"]
