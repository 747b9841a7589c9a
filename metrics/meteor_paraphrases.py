"""METEOR 1.5's paraphrase table: 5.3 million pairs of phrases, compiled once, then memory-mapped.

The gz that holds them takes seconds to read. So it is compiled once into a file of plain arrays in the user's cache
folder, which later runs map into memory.

A paraphrase (left, right) is two nodes of one trie of word ids. Node 0 is the empty phrase. The child of a node by a
word is the position of `node * vocabulary + word` in the sorted array `keys`, plus one.

The compiled file: 8 bytes of magic, length and CRC-32 of a JSON header (4 bytes each, little-endian), the header, then
the arrays, each aligned to 64 bytes. The header names the size and sha256 of the source and the CRC-32 of the arrays.
A file that does not agree is compiled again.

References
[1] Denkowski and Lavie, Meteor Universal: Language Specific Translation Evaluation for Any Target Language, WMT 2014
    (paraphrase tables).
"""

import gzip
import hashlib
import json
import os
import tempfile
import zlib
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from .inputs import InputError

MAGIC = b"METEORP3"
READ_SIZE = 1 << 21  # bytes read at a time
CHUNK_SIZE = 1 << 18  # phrases handled at a time
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


def fingerprint(path):
    """{"size": bytes, "sha256": hex} of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_SIZE):
            digest.update(block)
    return {"size": os.path.getsize(path), "sha256": digest.hexdigest()}


def read_line_chunks(path):
    """Yields the lines of a gz in lists whose lengths are multiples of three. Raises InputError."""
    rest, lines = b"", []
    try:
        with gzip.open(path) as file:
            while block := file.read(READ_SIZE):
                text, newline, rest = (rest + block).rpartition(b"\n")
                if newline:
                    lines += text.decode("utf-8").split("\n")
                    whole = len(lines) // 3 * 3
                    yield lines[:whole]
                    lines = lines[whole:]
            lines += [rest.decode("utf-8")] if rest else []
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}, expected METEOR's paraphrases in a gz") from error
    if len(lines) not in (0, 3):
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
        text = np.frombuffer("\n".join(["", *phrases]).encode("utf-8"), np.uint8)
        spaces = np.add.reduceat(text == ord(" "), np.flatnonzero(text == ord("\n")), dtype=np.int8)
        self.lengths.append(spaces + np.int8(1))


def sorted_unique(arrays):
    """Sorted distinct values of all arrays."""
    merged = np.concatenate([np.unique(array) for array in arrays])
    merged.sort()
    return merged[np.append(True, merged[1:] != merged[:-1])]


def build_trie(phrases, vocabulary):
    """(keys, nodes): sorted keys of the trie of a PhraseList, which is emptied, and the node (int32) of each phrase."""
    words, lengths = np.concatenate(phrases.words), np.concatenate(phrases.lengths)
    phrases.words.clear()
    first = np.cumsum(lengths, dtype=np.int32) - lengths
    node, keys, num_nodes = np.zeros(len(lengths), np.int32), [], 1
    for depth in range(int(lengths.max())):

        def child_keys(depth=depth):  # in chunks: temporaries of all phrases would double the memory
            for start in range(0, len(lengths), CHUNK_SIZE):
                longer = start + np.flatnonzero(lengths[start : start + CHUNK_SIZE] > depth)
                key = node[longer].astype(np.int64) * vocabulary + words[first[longer] + depth]
                yield longer, key

        keys.append(sorted_unique(key for _, key in child_keys()))
        for longer, key in child_keys():
            order = np.argsort(key)  # a search in ascending order is twice as fast
            node[longer[order]] = np.searchsorted(keys[-1], key[order]) + num_nodes
        num_nodes += len(keys[-1])
    return np.concatenate(keys), node


def compile_table(path):
    """Arrays of METEOR's paraphrase file: {"words", "keys", "left", "right"}. Raises InputError."""
    word_ids, repeats, previous = IdMap(), [], None
    lefts, rights = PhraseList(word_ids), PhraseList(word_ids)
    for lines in read_line_chunks(path):
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


def align64(size):
    """`size` rounded up to a multiple of 64."""
    return -(-size // 64) * 64


def write_compiled(path, source, arrays):
    """Writes the compiled file atomically. Raises OSError."""
    layout, offset, crc = {}, 0, 0
    for name, array in arrays.items():
        layout[name] = {"dtype": array.dtype.str, "length": len(array), "offset": offset}
        offset += align64(array.nbytes)
        crc = zlib.crc32(array.data, crc)
    header = json.dumps({"source": source, "arrays": layout, "crc32": crc}).encode("ascii")
    start = MAGIC + len(header).to_bytes(4, "little") + zlib.crc32(header).to_bytes(4, "little")
    body = align64(len(start) + len(header))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(start + header)
            for name, array in arrays.items():
                file.seek(body + layout[name]["offset"])
                file.write(array.data)
            file.truncate(body + offset)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def map_compiled(path, source):
    """Arrays of a compiled file, or None if it is missing, damaged or of another source."""
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError):  # missing, empty
        return None
    start = data[:16].tobytes()
    length, header_crc = (int.from_bytes(start[i : i + 4], "little") for i in (8, 12))
    header = data[16 : 16 + length].tobytes()
    if start[:8] != MAGIC or not header or len(header) < length or zlib.crc32(header) != header_crc:
        return None
    header, arrays, crc = json.loads(header), {}, 0
    body = data[align64(16 + length) :]
    for name, layout in header["arrays"].items():
        dtype = np.dtype(layout["dtype"])
        part = body[layout["offset"] : layout["offset"] + layout["length"] * dtype.itemsize]
        crc = zlib.crc32(part.data, crc)
        if len(part) == layout["length"] * dtype.itemsize:
            arrays[name] = part.view(dtype)
    return arrays if header["source"] == source and header["crc32"] == crc else None


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
    source = fingerprint(path)
    compiled = cache_folder() / f"meteor-paraphrases-{source['sha256'][:16]}.bin"
    arrays = map_compiled(compiled, source)
    if arrays is None:
        if progress:
            progress(f"compiling METEOR's paraphrases into {compiled} (once)")
        arrays = compile_table(path)
        try:
            write_compiled(compiled, source, arrays)
            arrays = map_compiled(compiled, source) or arrays
        except OSError as error:
            if progress:
                progress(f"cannot store the compiled paraphrases: {error}")
    words = arrays["words"].tobytes().decode("utf-8").split("\n")
    word_ids = dict(zip(words, range(len(words)), strict=True))
    return Paraphrases(word_ids, arrays["keys"], arrays["left"], arrays["right"])
