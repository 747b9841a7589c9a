"""METEOR 1.5's paraphrase table: 5.3 million pairs of phrases, compiled once, then mapped.

The gz that holds them takes seconds to read, so it is compiled once into a file of plain arrays
under the user's cache folder, which later runs map into memory.

A paraphrase (left, right) is two nodes of one trie of word ids: node 0 is the empty phrase, and
child (node, word) is the position of `node * words + word` in the sorted array `keys`, plus one.

The compiled file is: 8 bytes of magic, the length and the CRC-32 of a JSON header (4 bytes each,
little-endian), the header, then arrays, each at a multiple of 64. The header names the source's
size and sha256 and the arrays' CRC-32; a file that does not agree is built again.

References
[1] Denkowski and Lavie, Meteor Universal: Language Specific Translation Evaluation for Any Target
    Language, WMT 2014 (paraphrase tables).
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

MAGIC = b"METEORP2"
BLOCK = 1 << 21  # bytes read at a time
PIECE = 1 << 18  # phrases handled at a time
LONGEST = 7  # words in a phrase, at most


@dataclass(frozen=True)
class Paraphrases:
    """The compiled paraphrases: word -> id, trie keys, and both sides as nodes, in file order."""

    words: dict
    keys: np.ndarray
    left: np.ndarray
    right: np.ndarray

    def find(self, captions):
        """Every phrase of the table that stands in a caption.

        captions: list of lists of str. Returns int32 arrays (caption, start, length, node), sorted
        by caption, start and length.
        """
        lengths = np.fromiter(map(len, captions), np.int32, len(captions))
        unknown = len(self.words)
        words = (self.words.get(word, unknown) for caption in captions for word in caption)
        ids = np.fromiter(words, np.int32, lengths.sum())
        caption = np.repeat(np.arange(len(captions), dtype=np.int32), lengths)
        first = np.cumsum(lengths, dtype=np.int32) - lengths
        at = np.arange(len(ids), dtype=np.int32)
        start = at - np.repeat(first, lengths)
        node, found = np.zeros(len(ids), np.int32), []
        for length in range(1, LONGEST + 1):
            last = at + length - 1
            inside = last < len(ids)
            at, node, last = at[inside], node[inside], last[inside]
            known = (caption[last] == caption[at]) & (ids[last] < unknown)
            at, node = at[known], node[known]
            key = node.astype(np.int64) * unknown + ids[at + length - 1]
            child = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
            there = self.keys[child] == key
            at, node = at[there], child[there].astype(np.int32) + 1
            found.append((caption[at], start[at], np.full(len(at), length, np.int32), node))
        columns = [np.concatenate(column) for column in zip(*found, strict=True)]
        order = np.lexsort((columns[2], columns[1], columns[0]))
        return [column[order] for column in columns]

    def nodes(self):
        """Nodes of the trie, the empty phrase included."""
        return len(self.keys) + 1


# --- compiling ------------------------------------------------------------------------------------


def fingerprint(path):
    """{"size": bytes, "sha256": hex} of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return {"size": os.path.getsize(path), "sha256": digest.hexdigest()}


def blocks_of_lines(path):
    """Lines of a gz, in lists of a multiple of three. Raises InputError."""
    rest, lines = b"", []
    try:
        with gzip.open(path) as file:
            while block := file.read(BLOCK):
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
        raise InputError(f"{path}: ends inside an entry, expected three lines an entry")
    yield lines


class Ids(dict):
    """Numbers its keys from 0 as they are first asked for."""

    def __missing__(self, key):
        self[key] = number = len(self)
        return number


class PhraseList:
    """Phrases as they come, kept as word ids: far less memory than the strings."""

    def __init__(self, ids):
        self.ids, self.words, self.lengths = ids, [], []

    def extend(self, phrases):
        """Adds a list of str, which is not empty."""
        words = " ".join(phrases).split(" ")
        flat = np.fromiter(map(self.ids.__getitem__, words), np.int32, len(words))
        self.words.append(flat.astype(np.min_scalar_type(len(self.ids))))
        text = np.frombuffer("\n".join(["", *phrases]).encode("utf-8"), np.uint8)
        spaces = np.add.reduceat(text == ord(" "), np.flatnonzero(text == ord("\n")), dtype=np.int8)
        self.lengths.append(spaces + np.int8(1))


def distinct(parts):
    """Sorted distinct values of all arrays."""
    merged = np.concatenate([np.unique(part) for part in parts])
    merged.sort()
    return merged[np.append(True, merged[1:] != merged[:-1])]


def trie(phrases, vocabulary):
    """Sorted keys of the trie of a PhraseList (emptied), and the node (int32) of each phrase."""
    flat, lengths = np.concatenate(phrases.words), np.concatenate(phrases.lengths)
    phrases.words.clear()
    first = np.cumsum(lengths, dtype=np.int32) - lengths
    node, keys, nodes = np.zeros(len(lengths), np.int32), [], 1
    for depth in range(int(lengths.max())):

        def steps(depth=depth):  # a piece at a time: temporaries of all phrases would double memory
            for at in range(0, len(lengths), PIECE):
                longer = at + np.flatnonzero(lengths[at : at + PIECE] > depth)
                key = node[longer].astype(np.int64) * vocabulary + flat[first[longer] + depth]
                yield longer, key

        keys.append(distinct(key for _, key in steps()))
        for longer, key in steps():
            order = np.argsort(key)  # a search in ascending order is twice as fast
            node[longer[order]] = np.searchsorted(keys[-1], key[order]) + nodes
        nodes += len(keys[-1])
    return np.concatenate(keys), node


def compile_table(path):
    """Arrays of METEOR's paraphrase file: {"words", "keys", "left", "right"}. Raises InputError."""
    ids, repeats, previous = Ids(), [], None
    lefts, rights = PhraseList(ids), PhraseList(ids)
    for lines in blocks_of_lines(path):
        opening = []
        for left, entries in groupby(lines[1::3]):  # the file is grouped by left
            if left != previous:
                opening.append(left)
                repeats.append(0)
                previous = left
            repeats[-1] += len(list(entries))
        if opening:
            lefts.extend(opening)
        if lines:
            rights.extend(lines[2::3])
    if not ids:
        raise InputError(f"{path}: is empty, expected METEOR's paraphrases")
    entries = sum(map(len, rights.lengths))
    rights.words += lefts.words
    rights.lengths += lefts.lengths
    keys, node = trie(rights, len(ids))
    return {
        "words": np.frombuffer("\n".join(ids).encode("utf-8"), np.uint8),
        "keys": keys,
        "left": np.repeat(node[entries:], repeats),
        "right": node[:entries],
    }


# --- the compiled file ----------------------------------------------------------------------------


def padded(size):
    """The next multiple of 64."""
    return -(-size // 64) * 64


def write_compiled(path, source, arrays):
    """Writes the compiled file beside `path` and renames it. Raises OSError."""
    layout, at, check = {}, 0, 0
    for name, array in arrays.items():
        layout[name] = {"dtype": array.dtype.str, "length": len(array), "at": at}
        at += padded(array.nbytes)
        check = zlib.crc32(array.data, check)
    header = json.dumps({"source": source, "arrays": layout, "crc32": check}).encode("ascii")
    start = MAGIC + len(header).to_bytes(4, "little") + zlib.crc32(header).to_bytes(4, "little")
    body = padded(len(start) + len(header))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(start + header)
            for name, array in arrays.items():
                file.seek(body + layout[name]["at"])
                file.write(array.data)
            file.truncate(body + at)
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.unlink(beside)


def map_compiled(path, source):
    """Arrays of a compiled file, or None where it is missing, damaged or of another source."""
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError):  # missing, empty
        return None
    start = data[:16].tobytes()
    length, check = (int.from_bytes(start[at : at + 4], "little") for at in (8, 12))
    header = data[16 : 16 + length].tobytes()
    if start[:8] != MAGIC or not header or len(header) < length or zlib.crc32(header) != check:
        return None
    header, arrays, check = json.loads(header), {}, 0
    body = data[padded(16 + length) :]
    for name, layout in header["arrays"].items():
        kind = np.dtype(layout["dtype"])
        part = body[layout["at"] : layout["at"] + layout["length"] * kind.itemsize]
        check = zlib.crc32(part.data, check)
        if len(part) == layout["length"] * kind.itemsize:
            arrays[name] = part.view(kind)
    return arrays if header["source"] == source and header["crc32"] == check else None


def cache_folder():
    """Where compiled tables are kept: below XDG_CACHE_HOME, LOCALAPPDATA or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    home = os.path.expanduser("~")  # stays "~" for a user without one
    return Path(base or (f"{home}/.cache" if home != "~" else tempfile.gettempdir())) / "caption-metrics"


def load(path, tell=None):
    """Paraphrases of METEOR's gz, from the cache or compiled into it (some ten seconds).

    tell: called with one line of text before compiling. Where the cache cannot be written, the
    tables live in memory for this run only.
    """
    source = fingerprint(path)
    compiled = cache_folder() / f"meteor-paraphrases-{source['sha256'][:16]}.bin"
    arrays = map_compiled(compiled, source)
    if arrays is None:
        if tell:
            tell(f"compiling METEOR's paraphrases into {compiled} (once)")
        arrays = compile_table(path)
        try:
            write_compiled(compiled, source, arrays)
            arrays = map_compiled(compiled, source) or arrays
        except OSError as error:
            if tell:
                tell(f"cannot keep the compiled paraphrases: {error}")
    words = arrays["words"].tobytes().decode("utf-8").split("\n")
    ids = dict(zip(words, range(len(words)), strict=True))
    return Paraphrases(ids, arrays["keys"], arrays["left"], arrays["right"])
