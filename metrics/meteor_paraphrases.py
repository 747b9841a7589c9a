"""METEOR 1.5's paraphrase table: 5.3 million pairs of phrases, compiled once.

The gz that holds them takes seconds to read. So it is compiled once into a file of plain arrays in the user's cache
folder, which later runs read.

A paraphrase (left, right) is two nodes of one trie of word ids. Node 0 is the empty phrase. The child of a node by a
word is the position of `node * vocabulary + word` in the sorted array `keys`, plus one.

The compiled file is an npz of the arrays and of the sha256 of the source. A file that is damaged (each array has a
CRC-32) or of another source is compiled again.

References
[1] Denkowski and Lavie, Meteor Universal: Language Specific Translation Evaluation for Any Target Language, WMT 2014
    (paraphrase tables).
"""

import gzip
import hashlib
import os
import tempfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from .inputs import DAMAGE, InputError, reading

READ_SIZE = 1 << 21  # characters read at a time
MAX_PHRASE_WORDS = 7


@dataclass(frozen=True)
class Paraphrases:
    """The compiled table: word -> id, keys of the trie, and both sides of every entry as nodes, in file order."""

    word_ids: dict
    keys: np.ndarray  # int64
    left: np.ndarray  # (entries,) int32
    right: np.ndarray  # (entries,) int32

    def find_phrases(self, captions):
        """Every phrase of the table that occurs in a caption.

        captions: list of lists of str. Returns int32 arrays (caption, start, length, node), sorted by caption, start
        and length.
        """
        lengths = np.fromiter(map(len, captions), np.int32, len(captions))
        unknown = len(self.word_ids)
        words = (self.word_ids.get(word, unknown) for caption in captions for word in caption)
        ids = np.fromiter(words, np.int32, lengths.sum())
        caption = np.repeat(np.arange(len(captions), dtype=np.int32), lengths)
        caption_start = np.cumsum(lengths, dtype=np.int32) - lengths
        first = np.arange(len(ids), dtype=np.int32)  # first words of the phrases that still match
        start = first - np.repeat(caption_start, lengths)  # position of each word in its caption
        node, phrases = np.zeros(len(ids), np.int32), []
        for length in range(1, MAX_PHRASE_WORDS + 1):
            last = first + length - 1
            is_inside = last < len(ids)
            first, node, last = first[is_inside], node[is_inside], last[is_inside]
            is_known = (caption[last] == caption[first]) & (ids[last] < unknown)
            first, node = first[is_known], node[is_known]
            key = node.astype(np.int64) * unknown + ids[first + length - 1]
            index = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
            is_found = self.keys[index] == key
            first, node = first[is_found], index[is_found].astype(np.int32) + 1
            phrases.append((caption[first], start[first], np.full(len(first), length, np.int32), node))
        columns = [np.concatenate(column) for column in zip(*phrases, strict=True)]
        order = np.lexsort((columns[2], columns[1], columns[0]))
        return [column[order] for column in columns]

    def num_nodes(self):
        """Nodes of the trie, the empty phrase included."""
        return len(self.keys) + 1


# --- compiling ----------------------------------------------------------------------------------------------------


def read_entries(path):
    """Yields the lines of a gz, three for each entry, in lists of whole entries. Raises InputError."""
    rest = ""
    with reading(path, "METEOR's paraphrases in a gz"):
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            while block := file.read(READ_SIZE):
                lines = (rest + block).split("\n")
                whole = (len(lines) - 1) // 3 * 3  # the last line may go on in the next block
                yield lines[:whole]
                rest = "\n".join(lines[whole:])
    if rest:
        lines = rest.removesuffix("\n").split("\n")
        if len(lines) != 3:
            raise InputError(f"{path}: ends inside an entry, expected three lines per entry")
        yield lines


class IdMap(dict):
    """Numbers its keys from 0, in the order of their first lookup."""

    def __missing__(self, key):
        self[key] = number = len(self)
        return number


class PhraseList:
    """Phrases stored as word ids, which takes far less memory than strings."""

    def __init__(self, word_ids):
        self.word_ids, self.words, self.lengths = word_ids, [], []

    def extend(self, phrases):
        """Adds a list of str, which must not be empty."""
        words = " ".join(phrases).split(" ")
        ids = np.fromiter(map(self.word_ids.__getitem__, words), np.int32, len(words))
        self.words.append(ids.astype(np.min_scalar_type(len(self.word_ids))))
        self.lengths.append(np.fromiter((text.count(" ") + 1 for text in phrases), np.int8, len(phrases)))


def build_trie(phrases, vocabulary):
    """(keys, nodes): sorted keys of the trie of a PhraseList, and the node (int32) of each phrase."""
    words, lengths = np.concatenate(phrases.words), np.concatenate(phrases.lengths)
    phrases.words.clear()  # the memory is needed
    first = np.cumsum(lengths, dtype=np.int32) - lengths
    node, keys, num_nodes = np.zeros(len(lengths), np.int32), [], 1
    for depth in range(int(lengths.max())):
        longer = np.flatnonzero(lengths > depth)
        key = node[longer].astype(np.int64) * vocabulary + words[first[longer] + depth]
        order = np.argsort(key)
        key = key[order]
        is_new = np.append(True, key[1:] != key[:-1])
        node[longer[order]] = np.cumsum(is_new, dtype=np.int32) + (num_nodes - 1)
        keys.append(key[is_new])
        num_nodes += len(keys[-1])
    return np.concatenate(keys), node


def compile_table(path):
    """Arrays of METEOR's paraphrase file: {"words", "keys", "left", "right"}. Raises InputError."""
    word_ids, repeats, previous = IdMap(), [], None
    lefts, rights = PhraseList(word_ids), PhraseList(word_ids)
    for lines in read_entries(path):
        distinct_lefts = []
        for left, entries in groupby(lines[1::3]):  # the file is grouped by left
            if left != previous:
                distinct_lefts.append(left)
                repeats.append(0)
                previous = left
            repeats[-1] += len(list(entries))
        if distinct_lefts:
            lefts.extend(distinct_lefts)
        if lines:
            rights.extend(lines[2::3])
    if not word_ids:
        raise InputError(f"{path}: is empty, expected METEOR's paraphrases")
    num_entries = sum(map(len, rights.lengths))
    rights.words += lefts.words
    rights.lengths += lefts.lengths
    keys, node = build_trie(rights, len(word_ids))
    return {
        "words": np.frombuffer("\n".join(word_ids).encode("utf-8"), np.uint8),
        "keys": keys,
        "left": np.repeat(node[num_entries:], repeats),
        "right": node[:num_entries],
    }


# --- the compiled file --------------------------------------------------------------------------------------------


def write_compiled(path, arrays):
    """Writes the compiled file atomically. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_compiled(path, source):
    """Arrays of a compiled file, or None if it is missing, damaged or of another source."""
    if not os.path.isfile(path):  # a pipe would block for ever
        return None
    try:
        with open(path, "rb") as file, np.load(file) as content:  # np.load alone leaves a damaged file open
            arrays = dict(content)
        return arrays if arrays["source"] == source else None
    except (*DAMAGE, SyntaxError):  # numpy parses a header as Python; the file is only a copy
        return None


def cache_folder():
    """Where compiled tables are stored: below XDG_CACHE_HOME, LOCALAPPDATA or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    home = os.path.expanduser("~")  # stays "~" for a user without one
    return Path(base or (f"{home}/.cache" if home != "~" else tempfile.gettempdir())) / "caption-metrics"


def load(path, progress=None):
    """Paraphrases of METEOR's gz, from the cache or compiled into it (about ten seconds).

    progress: called with one line of text before compiling. If the cache cannot be written, the table stays in memory
    for this run only.
    """
    with open(path, "rb") as file:
        source = hashlib.file_digest(file, "sha256").hexdigest()
    compiled = cache_folder() / f"meteor-paraphrases-{source[:16]}.npz"
    arrays = read_compiled(compiled, source)
    if arrays is None:
        if progress:
            progress(f"compiling METEOR's paraphrases into {compiled} (once)")
        arrays = compile_table(path) | {"source": np.array(source)}
        try:
            write_compiled(compiled, arrays)
        except OSError as error:
            if progress:
                progress(f"cannot store the compiled paraphrases: {error}")
    words = arrays["words"].tobytes().decode("utf-8").split("\n")
    word_ids = dict(zip(words, range(len(words)), strict=True))
    return Paraphrases(word_ids, arrays["keys"], arrays["left"], arrays["right"])
