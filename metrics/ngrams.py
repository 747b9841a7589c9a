"""N-grams of a corpus as sparse integer arrays, counted once and shared by BLEU and CIDEr.

Read `plain.py` first: its dictionaries hold the same counts. Here every caption is a row: first all references, video
by video, then one hypothesis per video. Words get integer ids, and so does every distinct n-gram: an n-gram is the
pair ((n-1)-gram id, word id), renumbered from 0 by `np.unique`. For every n this gives a table of (row, n-gram, count)
triples. The question which n-grams a reference and its hypothesis share becomes a sort and a binary search.

Shapes: V videos, R references of all videos, R + V rows, K entries of a table. Integers are int64.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np

MAX_N = 4


@dataclass(frozen=True)
class NgramTable:
    """Counts of one n: n-gram `ngram[k]` occurs `count[k]` times in caption `row[k]`, sorted by (row, ngram)."""

    row: np.ndarray  # (K,)
    video: np.ndarray  # (K,) the video of each row
    ngram: np.ndarray  # (K,)
    count: np.ndarray  # (K,)
    num_distinct: int  # n-grams are 0..num_distinct - 1

    def key(self):
        """One number for each (video, n-gram): (K,)."""
        return self.video * self.num_distinct + self.ngram


@dataclass(frozen=True)
class NgramCounts:
    """N-gram tables of references and hypotheses. Rows below `num_references` are references."""

    num_videos: int  # V
    num_references: int  # R
    video: np.ndarray  # (R + V,) the video of each row, 0..V - 1
    length: np.ndarray  # (R + V,) words of each row
    tables: tuple  # tables[n - 1]: NgramTables of n, (references, hypotheses)


def find_sorted(sorted_keys, keys):
    """(index, is_found): the position of each of `keys` (K,) in `sorted_keys`, and whether it is there (bool)."""
    if not len(sorted_keys):
        return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
    index = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return index, sorted_keys[index] == keys


def sum_by_index(index, values, size):
    """Sums of the `values` (K,) of each `index` (K,): (size,) float64. np.bincount alone gives integers if K = 0."""
    return np.bincount(index, values, size).astype(np.float64)


def count_ngrams(references, hypotheses):
    """NgramCounts (n = 1..4) of tokenized captions.

    references: for each video a list of str; hypotheses: for each video one str. Words come from `str.split()`, so a
    no-break space separates words, as in pycocoevalcap.
    """
    num_videos, word_ids, words, length = len(hypotheses), {}, [], []
    for caption in chain(chain.from_iterable(references), hypotheses):
        caption_words = caption.split()
        words += [word_ids.setdefault(word, len(word_ids)) for word in caption_words]
        length.append(len(caption_words))
    words, length, num_references = np.array(words, np.int64), np.array(length, np.int64), len(length) - num_videos
    video = np.concatenate([np.repeat(np.arange(num_videos), [len(r) for r in references]), np.arange(num_videos)])
    row = np.repeat(np.arange(len(length)), length)
    words_left = np.repeat(np.cumsum(length), length) - np.arange(len(words))  # to the end of the caption
    tables = []
    ngram, num_distinct = words, max(len(word_ids), 1)  # of the n-gram that starts at each word
    for n in range(1, MAX_N + 1):
        start = np.flatnonzero(words_left >= n)
        if n > 1:
            pair = ngram[start] * len(word_ids) + words[start + n - 1]
            distinct, inverse = np.unique(pair, return_inverse=True)
            ngram, num_distinct = np.zeros(len(words), np.int64), max(len(distinct), 1)
            ngram[start] = inverse.reshape(-1)
        key, count = np.unique(row[start] * num_distinct + ngram[start], return_counts=True)
        rows, ngrams = np.divmod(key, num_distinct)
        first = np.searchsorted(rows, num_references)
        columns = rows, video[rows], ngrams, count
        parts = [column[:first] for column in columns], [column[first:] for column in columns]
        tables.append(tuple(NgramTable(*part, num_distinct) for part in parts))
    return NgramCounts(num_videos, num_references, video, length, tuple(tables))
