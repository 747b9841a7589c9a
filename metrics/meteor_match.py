"""METEOR 1.5's matchers: which words and phrases of a hypothesis and a reference may be paired.

Four matchers, in this order: equal words, equal stems, a common synonym set, an entry of the paraphrase table. Several
may match one word; the aligner chooses. Whether two words match depends on these two words alone. So everything is
looked up once, in a `Lexicon` of the whole corpus. A `Hypothesis` then knows, for every word or phrase of its
references, where it matches.

References
[1] Denkowski and Lavie, Meteor Universal: Language Specific Translation Evaluation for Any Target Language, WMT 2014
    (section 2: matching).
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .meteor_align import Match, span_mask
from .porter2 import stem

EXACT, STEM, SYNONYM, PARAPHRASE = range(4)
NO_MATCHES = (0, 0, 0)


def set_bits(mask):
    """Positions of the one bits, ascending."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


@dataclass(frozen=True)
class Text:
    """A caption as ids.

    words: ids of its words. function_mask: bit mask of its function words. phrases: (start, length, node) of those
    phrases of the paraphrase table in it that may match something.
    """

    words: tuple
    function_mask: int
    phrases: tuple = ()


class Lexicon:
    """The words and phrases of a corpus, and which of them match.

    related_words[w]: list of (word id, matcher) that word w matches by stem or synonym. Paraphrases of phrase n, as
    (entry, node): left_sides[n] of the entries that have n on the right, right_sides[n] of those that have n on the
    left. Only entries with one side in a reference and the other in a hypothesis are kept.
    """

    def __init__(self, tables, references, hypotheses):
        """tables: meteor_data.Tables; references, hypotheses: distinct captions, tuples of words."""
        self.word_ids, self.related_words = {}, []
        self.left_sides, self.right_sides = defaultdict(list), defaultdict(list)
        captions = [*references, *hypotheses]
        for caption in captions:
            for word in caption:
                self.word_ids.setdefault(word, len(self.word_ids))
        self.relate_words(tables.words)
        phrases = [()] * len(captions)
        if tables.paraphrases is not None:
            phrases = self.relate_phrases(tables.paraphrases, captions, len(references))
        function_words = tables.words.function_words if tables.words is not None else ()
        self.texts = {}  # caption -> Text
        for caption, caption_phrases in zip(captions, phrases, strict=True):
            function_mask = 0
            for i, word in enumerate(caption):
                function_mask |= (word in function_words) << i
            words = tuple([self.word_ids[word] for word in caption])
            self.texts[tuple(caption)] = Text(words, function_mask, caption_phrases)

    def relate_words(self, word_tables):
        """Fills `related_words`: pairs of different words with equal stems or a common synonym set."""
        by_stem, by_synset, synsets = defaultdict(list), defaultdict(list), []
        for word, word_id in self.word_ids.items():
            by_stem[stem(word)].append(word_id)
            synsets.append(word_tables.synset_ids(word) if word_tables is not None else ())
            for synset in synsets[-1]:
                by_synset[synset].append(word_id)
        for word, word_id in self.word_ids.items():
            related = [(other, STEM) for other in by_stem[stem(word)] if other != word_id]
            synonyms = {other for synset in synsets[word_id] for other in by_synset[synset]}
            related += [(other, SYNONYM) for other in synonyms if other != word_id]
            self.related_words.append(related)

    def relate_phrases(self, paraphrases, captions, num_references):
        """Fills `left_sides` and `right_sides`; returns each caption's phrases that occur in one of them."""
        caption, start, length, node = paraphrases.find_phrases(captions)
        in_reference = np.zeros(paraphrases.num_nodes(), bool)
        in_hypothesis = np.zeros(paraphrases.num_nodes(), bool)
        in_reference[node[caption < num_references]] = True
        in_hypothesis[node[caption >= num_references]] = True
        left, right = paraphrases.left, paraphrases.right
        is_useful = in_reference[left] & in_hypothesis[right]
        is_useful |= in_hypothesis[left] & in_reference[right]
        entries = np.flatnonzero(is_useful)
        columns = entries.tolist(), left[entries].tolist(), right[entries].tolist()
        for entry, left_node, right_node in zip(*columns, strict=True):
            self.right_sides[left_node].append((entry, right_node))
            self.left_sides[right_node].append((entry, left_node))
        is_matchable = np.zeros(paraphrases.num_nodes(), bool)
        is_matchable[left[entries]] = is_matchable[right[entries]] = True
        keep = is_matchable[node]
        phrases, shared = [[] for _ in captions], {}
        owner, *columns = [column[keep].tolist() for column in (caption, start, length, node)]
        for index, phrase in zip(owner, zip(*columns, strict=True), strict=True):
            phrases[index].append(shared.setdefault(phrase, phrase))  # many are equal: one object each
        return [tuple(caption_phrases) for caption_phrases in phrases]


class Hypothesis:
    """A hypothesis ready to be matched with some references.

    word_masks[w]: for a reference's word w, bit masks of the positions that it matches: [exact, stem, synonym].
    paraphrases[n]: paraphrase matches of a reference's phrase n, as (second_pass, entry, hyp_start, hyp_length).
    paraphrase_masks[n]: of these matches, bit masks of [first words, positions after the last words, all words].
    """

    def __init__(self, text, references, lexicon):
        """text: the hypothesis; references: all that it may be matched with; Texts of `lexicon`."""
        self.text = text
        self.word_masks, self.paraphrases, self.paraphrase_masks = {}, defaultdict(list), {}
        ref_words = {word for reference in references for word in reference.words}
        for position, word in enumerate(text.words):
            self.add_word_match(word, EXACT, position)
            for other, matcher in lexicon.related_words[word]:
                if other in ref_words:
                    self.add_word_match(other, matcher, position)
        ref_nodes = {node for reference in references for _, _, node in reference.phrases}
        for start, length, node in text.phrases:
            # METEOR first looks for phrases of the reference on the table's left side, by length and entry, then for
            # phrases of the hypothesis on that side, by position, length and entry.
            for entry, other in lexicon.left_sides.get(node, ()):
                if other in ref_nodes:
                    self.paraphrases[other].append((0, entry, start, length))
            for entry, other in lexicon.right_sides.get(node, ()):
                if other in ref_nodes:
                    self.paraphrases[other].append((1, entry, start, length))
        for node, paraphrases in self.paraphrases.items():
            masks = self.paraphrase_masks[node] = [0, 0, 0]
            for _, _, start, length in paraphrases:
                masks[0] |= 1 << start
                masks[1] |= 1 << start + length
                masks[2] |= span_mask(start, length)

    def add_word_match(self, word, matcher, position):
        masks = self.word_masks.setdefault(word, [0, 0, 0])
        masks[matcher] |= 1 << position

    def paraphrase_matches(self, reference):
        """Paraphrase Matches with a reference (a Text).

        Those that start at one position are in the order in which METEOR finds them.
        """
        ordered = []
        for ref_start, ref_length, node in reference.phrases:
            for second_pass, entry, start, length in self.paraphrases.get(node, ()):
                order = (1, start, length, entry) if second_pass else (0, ref_length, entry, start)
                ordered.append((order, Match(ref_start, ref_length, start, length, PARAPHRASE)))
        return [match for _, match in sorted(ordered)]

    def matches(self, reference):
        """For each position of the reference (a Text) the list of Matches that start there, in METEOR's order."""
        matches = [[] for _ in reference.words]
        matchers = (EXACT,) if reference.words == self.text.words else (EXACT, STEM, SYNONYM)
        for ref_start, word in enumerate(reference.words):
            masks = self.word_masks.get(word, NO_MATCHES)
            for matcher in matchers:
                matches[ref_start] += [Match(ref_start, 1, start, 1, matcher) for start in set_bits(masks[matcher])]
        if len(matchers) > 1:
            for match in self.paraphrase_matches(reference):
                matches[match.ref_start].append(match)
        return matches
