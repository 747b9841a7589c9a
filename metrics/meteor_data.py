"""METEOR 1.5's English tables, read from where they are installed. None of them is part of this code.

Two files hold them, both in the folder `meteor/` of an installed pycocoevalcap: a zip (the program's jar; nothing in
it is run) with function words, non-breaking prefixes, synonyms and irregular forms, and a gz with 5.3 million
paraphrases (`meteor_paraphrases.py`).

References
[1] Denkowski and Lavie, Meteor Universal: Language Specific Translation Evaluation for Any Target Language, WMT 2014
    (function words).
[2] Miller, WordNet: A Lexical Database for English, Communications of the ACM 38(11), 1995 (synonyms, irregular forms
    and rules of detachment).
"""

import importlib.util
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from . import meteor_paraphrases
from .inputs import InputError, reading
from .meteor_paraphrases import Paraphrases
from .meteor_text import Prefixes

JAR = "meteor-1.5.jar"
PARAPHRASES = "paraphrase-en.gz"
last_loaded = {}  # "files": paths that `find_files` returned, "tables": Tables that were read from them
# (suffix, replacement) for English nouns, verbs, adjectives and adverbs. The first one that leads to a known word wins.
DETACHMENT_RULES = [
    rule.split(":")
    for rule in "s: ses:s xes:x zes:z ches:ch shes:sh men:man ies:y s: ies:y es:e es: ed:e ed: ing:e ing: er: est:"
    " er:e est:e".split()
]


@dataclass(frozen=True)
class WordTables:
    """Tables from the zip: function words, non-breaking prefixes, synonyms and irregular forms."""

    function_words: frozenset = frozenset()
    prefixes: Prefixes = Prefixes()
    synsets: dict = field(default_factory=dict)  # word -> ids of synonym sets, one string, separated by spaces
    irregular_forms: dict = field(default_factory=dict)  # irregular form -> list of base forms

    def base_form(self, word):
        """The form of `word` that the synonym table has, or ""."""
        if word.endswith("ss") or len(word) <= 2:
            return word
        for suffix, replacement in DETACHMENT_RULES:
            if word.endswith(suffix):
                base = word[: len(word) - len(suffix)] + replacement
                if base in self.synsets:
                    return base
        return ""

    def synset_ids(self, word):
        """Ids of the synonym sets of a word and of its base forms (set of str)."""
        bases = self.irregular_forms.get(word) or [self.base_form(word)]
        return {i for form in (word, *bases) for i in self.synsets.get(form, "").split()}


@dataclass(frozen=True)
class Tables:
    """The tables that METEOR can use. `words` or `paraphrases` is None if its file is missing."""

    words: WordTables | None = None
    paraphrases: Paraphrases | None = None

    def matchers(self):
        """Names of the matchers that these tables allow, in METEOR's order."""
        optional = [("synonym", self.words), ("paraphrase", self.paraphrases)]
        return ["exact", "stem"] + [name for name, table in optional if table is not None]


# --- the zip ------------------------------------------------------------------------------------------------------


def read_word_tables(path):
    """WordTables from METEOR's zip. Raises InputError for any other file."""
    names = "function/english.words", "nonbreaking/english.prefixes", "synonym/english.synsets"
    with reading(path, "METEOR 1.5's jar"), zipfile.ZipFile(path) as archive:
        function_words, prefixes, synsets, exceptions = (
            archive.read(name).decode("utf-8").split("\n") for name in (*names, "synonym/english.exceptions")
        )
    prefix_lines = [line.split() for line in prefixes if line.strip() and not line.startswith("#")]
    irregular_forms = {}
    for base, forms in zip(exceptions[0::2], exceptions[1::2], strict=False):
        for form in forms.split():
            irregular_forms.setdefault(form, []).append(base)
    return WordTables(
        function_words=frozenset(word.strip() for word in function_words if word.strip()),
        prefixes=Prefixes(
            always=frozenset(fields[0] for fields in prefix_lines if len(fields) == 1),
            before_digit=frozenset(fields[0] for fields in prefix_lines if len(fields) > 1),
        ),
        synsets=dict(zip(synsets[0::2], synsets[1::2], strict=False)),
        irregular_forms=irregular_forms,
    )


# --- where the files are ------------------------------------------------------------------------------------------


def search_folders(folder=None):
    """Folders to look in: `folder`, else the environment's METEOR_DATA, else an installed pycocoevalcap's."""
    folder = folder or os.environ.get("METEOR_DATA")
    if folder:
        return [Path(folder, part) for part in ("", "data", "meteor", "meteor/data")]
    package = importlib.util.find_spec("pycocoevalcap")
    locations = package.submodule_search_locations if package else None
    return [Path(location, part) for location in locations or () for part in ("meteor", "meteor/data")]


def find_files(folder=None):
    """[path of the zip, path of the gz], None for a missing one.

    Raises InputError if a folder was named, by argument or by METEOR_DATA, and has neither.
    """
    folders = search_folders(folder)
    files = [next((path / name for path in folders if (path / name).is_file()), None) for name in (JAR, PARAPHRASES)]
    if not any(files) and (folder or os.environ.get("METEOR_DATA")):
        raise InputError(f"{folders[0]}: has neither {JAR} nor {PARAPHRASES}, METEOR's tables")
    return files


def load(folder=None, progress=None):
    """Tables from the files in `search_folders(folder)`. The last ones stay in memory for the next call.

    progress: called with one line of text before something that takes long. Raises InputError for a damaged file.
    """
    jar, paraphrases = files = find_files(folder)
    if last_loaded.get("files") != files:
        last_loaded["tables"] = Tables(
            words=read_word_tables(jar) if jar else None,
            paraphrases=meteor_paraphrases.load(paraphrases, progress) if paraphrases else None,
        )
        last_loaded["files"] = files
    return last_loaded["tables"]
