"""N-grams of a corpus as sparse integer arrays, counted once and shared by BLEU and CIDEr.

Every caption is a *row*: first all references, video by video, then one hypothesis a video.
Words get integer ids, and so does every distinct n-gram: an n-gram is the pair ((n-1)-gram id,
word id), renumbered from 0 by `np.unique`. What is left is, for every n, a table of (row, gram,
count) triples, and a question such as "which n-grams do this reference and its hypothesis share"
is a sort and a binary search.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np

ORDERS = 4


@dataclass(frozen=True)
class Table:
    """Counts of one n-gram order: `count[k]` times gram `gram[k]` in caption `row[k]`.

    Sorted by (row, gram); all arrays of one length, int64. `size` is the number of distinct grams.
    """

    row: np.ndarray
    gram: np.ndarray
    count: np.ndarray
    size: int


@dataclass(frozen=True)
class Corpus:
    """N-gram tables of references and hypotheses; rows below `references` are references.

    `owner[row]` is the row's video (0..videos-1), `length[row]` its number of words, `tables[n-1]`
    the counts of order n.
    """

    videos: int
    references: int
    owner: np.ndarray
    length: np.ndarray
    tables: tuple

    def split(self, order):
        """(references, hypotheses) of one order: Tables whose `row` is still the caption's row."""
        table = self.tables[order - 1]
        cut = np.searchsorted(table.row, self.references)
        return (
            Table(table.row[:cut], table.gram[:cut], table.count[:cut], table.size),
            Table(table.row[cut:], table.gram[cut:], table.count[cut:], table.size),
        )


def find(sorted_keys, keys):
    """Position of each of `keys` in `sorted_keys`, and whether it is there (bool)."""
    if not len(sorted_keys):
        return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return at, sorted_keys[at] == keys


def sums(index, values, size):
    """Sum of `values` for each `index` in 0..size-1 (np.bincount alone gives integers if empty)."""
    return np.bincount(index, values, size).astype(np.float64)


def count(references, hypotheses):
    """Counts the n-grams (n = 1..4) of tokenised captions.

    references: list (videos) of lists of str; hypotheses: list (videos) of str. Words are what
    `str.split()` gives, so a no-break space separates words here, as in the reference.
    """
    videos, ids, flat, length = len(hypotheses), {}, [], []
    for caption in chain(chain.from_iterable(references), hypotheses):
        words = [ids.setdefault(word, len(ids)) for word in caption.split()]
        flat += words
        length.append(len(words))
    words, length = np.array(flat, np.int64), np.array(length, np.int64)
    owner = np.concatenate([np.repeat(np.arange(videos), [len(r) for r in references]), np.arange(videos)])
    row = np.repeat(np.arange(len(length)), length)
    left = np.repeat(np.cumsum(length), length) - np.arange(len(words))  # words to the end
    tables = []
    gram, size = words, len(ids)
    for order in range(1, ORDERS + 1):
        start = np.flatnonzero(left >= order)
        if order > 1:
            pair = gram[start] * len(ids) + words[start + order - 1]
            distinct, inverse = np.unique(pair, return_inverse=True)
            gram, size = np.zeros(len(words), np.int64), len(distinct)
            gram[start] = inverse.reshape(-1)
        key, times = np.unique(row[start] * max(size, 1) + gram[start], return_counts=True)
        tables.append(Table(key // max(size, 1), key % max(size, 1), times, size))
    return Corpus(videos, len(length) - videos, owner, length, tuple(tables))
