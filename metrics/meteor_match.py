"""METEOR 1.5's matchers: which words and phrases of a hypothesis and a reference may be paired.

Four modules, in this order: equal words, equal stems, common synonym sets, entries of the
paraphrase table. A word may be matched by several; the aligner chooses. Whether two words match
depends on the two words alone, so everything is looked up once for the words of the whole
corpus, and a `Hypothesis` then knows, for every word or phrase of its references, where it matches.

References
[1] Denkowski and Lavie, Meteor Universal: Language Specific Translation Evaluation for Any Target
    Language, WMT 2014 (section 2: matching).
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .meteor_align import Match, span
from .porter2 import stem

EXACT, STEM, SYNONYM, PARAPHRASE = range(4)
NO_WORDS = (0, 0, 0)


def positions(mask):
    """Positions of the one bits, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


@dataclass(frozen=True)
class Text:
    """A caption: ids of its words, which of them are function words (bit mask), and the phrases of
    the paraphrase table in it that may match something, as (start, length, node)."""

    words: tuple
    function: int
    phrases: tuple = ()


class Lexicon:
    """The corpus' words and phrases, and which of them match.

    related[w]: list of (word id, module) that word w matches as stem or synonym. lefts[n],
    rights[n]: paraphrases of phrase n, as (entry, node): entries where n is the right side and
    where it is the left side. Only entries with one side in a reference and one in a hypothesis.
    """

    def __init__(self, tables, references, hypotheses):
        """tables: meteor_data.Tables; references, hypotheses: distinct captions, lists of words."""
        self.ids, self.related = {}, []
        self.lefts, self.rights = defaultdict(list), defaultdict(list)
        captions = [*references, *hypotheses]
        for caption in captions:
            for word in caption:
                self.ids.setdefault(word, len(self.ids))
        self.relate(tables.words)
        phrases = [()] * len(captions)
        if tables.paraphrases is not None:
            phrases = self.paraphrase(tables.paraphrases, captions, len(references))
        function = tables.words.function if tables.words is not None else ()
        self.texts = {}
        for caption, found in zip(captions, phrases, strict=True):
            mask = sum(1 << i for i, word in enumerate(caption) if word in function)
            text = Text(tuple([self.ids[word] for word in caption]), mask, found)
            self.texts[tuple(caption)] = text

    def relate(self, words):
        """Fills `related`: pairs of different words with one stem or a common synonym set."""
        by_stem, by_meaning, meanings = defaultdict(list), defaultdict(list), []
        for word, number in self.ids.items():
            by_stem[stem(word)].append(number)
            meanings.append(words.meanings(word) if words is not None else ())
            for meaning in meanings[-1]:
                by_meaning[meaning].append(number)
        for word, number in self.ids.items():
            same = [(other, STEM) for other in by_stem[stem(word)] if other != number]
            synonyms = {other for meaning in meanings[number] for other in by_meaning[meaning]}
            same += [(other, SYNONYM) for other in synonyms if other != number]
            self.related.append(same)

    def paraphrase(self, table, captions, references):
        """Fills `lefts` and `rights`; returns each caption's phrases that stand in one of them."""
        caption, start, length, node = table.find(captions)
        in_reference = np.zeros(table.nodes(), bool)
        in_hypothesis = np.zeros(table.nodes(), bool)
        in_reference[node[caption < references]] = True
        in_hypothesis[node[caption >= references]] = True
        left, right = table.left, table.right
        wanted = in_reference[left] & in_hypothesis[right]
        wanted |= in_hypothesis[left] & in_reference[right]
        entries = np.flatnonzero(wanted)
        for entry, a, b in zip(entries.tolist(), left[entries].tolist(), right[entries].tolist(), strict=True):
            self.rights[a].append((entry, b))
            self.lefts[b].append((entry, a))
        useful = np.zeros(table.nodes(), bool)
        useful[left[entries]] = useful[right[entries]] = True
        keep = useful[node]
        phrases, known = [[] for _ in captions], {}
        for at, *phrase in zip(*[column[keep].tolist() for column in (caption, start, length, node)], strict=True):
            phrase = tuple(phrase)
            phrases[at].append(known.setdefault(phrase, phrase))  # many are alike: one object each
        return [tuple(found) for found in phrases]


class Hypothesis:
    """A hypothesis ready to be matched with some references.

    words[w]: positions (bit masks) where a reference's word w matches, by module (exact, stem,
    synonym). phrases[n]: paraphrase matches of a reference's phrase n, as (order, at, size), where
    `order` sorts the matches of one reference position as METEOR finds them. reach[n]: bit masks of
    where those matches start, where the words after them are, and all they cover.
    """

    def __init__(self, text, references, lexicon):
        """text: the hypothesis; references: all that it may be matched with; Texts of `lexicon`."""
        self.text = text
        self.words, self.phrases, self.reach = {}, defaultdict(list), {}
        there = {word for reference in references for word in reference.words}
        for i, word in enumerate(text.words):
            self.note(word, EXACT, i)
            for other, module in lexicon.related[word]:
                if other in there:
                    self.note(other, module, i)
        there = {node for reference in references for _, _, node in reference.phrases}
        for at, size, node in text.phrases:
            # METEOR looks first for phrases of the reference on the table's left side, by length
            # and entry, then for phrases of the hypothesis there, by position, length and entry.
            for entry, other in lexicon.lefts.get(node, ()):
                if other in there:
                    self.phrases[other].append((0, entry, at, size))
            for entry, other in lexicon.rights.get(node, ()):
                if other in there:
                    self.phrases[other].append((1, entry, at, size))
        for node, found in self.phrases.items():
            reach = self.reach[node] = [0, 0, 0]
            for _, _, at, size in found:
                reach[0] |= 1 << at
                reach[1] |= 1 << at + size
                reach[2] |= span(at, size)

    def note(self, word, module, position):
        masks = self.words.setdefault(word, [0, 0, 0])
        masks[module] |= 1 << position

    def paraphrases(self, reference):
        """Paraphrase Matches with a reference (a Text), in the order METEOR finds those that start
        at one position."""
        found = []
        for start, length, node in reference.phrases:
            for second, entry, at, size in self.phrases.get(node, ()):
                order = (1, at, size, entry) if second else (0, length, entry, at)
                found.append((order, Match(start, length, at, size, PARAPHRASE)))
        return [match for _, match in sorted(found)]

    def matches(self, reference):
        """For each position of the reference the list of Matches that start there, in order."""
        found = [[] for _ in reference.words]
        modules = (EXACT,) if reference.words == self.text.words else (EXACT, STEM, SYNONYM)
        for start, word in enumerate(reference.words):
            masks = self.words.get(word, NO_WORDS)
            for module in modules:
                found[start] += [Match(start, 1, at, 1, module) for at in positions(masks[module])]
        if len(modules) > 1:
            for match in self.paraphrases(reference):
                found[match.start].append(match)
        return found
