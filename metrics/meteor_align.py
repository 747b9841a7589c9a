"""METEOR 1.5's aligner: which words of a hypothesis and a reference are paired.

A match pairs successive hypothesis words with successive reference words. A chunk is a sequence of matches that follow
one another in both texts. Matches that compete with no other match are placed first. For the rest a beam search walks
the reference from left to right. It prefers, in this order: many matched words, few chunks, a small distance between
the positions of matched words.

Behaviour of the Java program, kept here although it looks unintended:
- A match sets each of two integer totals to `int(total + length * weight)`, with weight 0.5 for everything but exact
  matches. So a stem, synonym or paraphrase match of one word adds nothing.
- The distance of a match is added to the path it was copied from, not to the path that has the match.
- Exactly 40 paths are kept. Ties keep the order in which paths were made.

References
[1] Denkowski and Lavie, Meteor Universal: Language Specific Translation Evaluation for Any Target Language, WMT 2014
    (section 2: alignment).
"""

from collections import namedtuple

BEAM_SIZE = 40
EXACT = 0

# Reference words ref_start..ref_start + ref_length - 1 and hypothesis words hyp_start..hyp_start + hyp_length - 1,
# matched by matcher 0..3 (meteor_match.py).
Match = namedtuple("Match", "ref_start ref_length hyp_start hyp_length matcher")


def span_mask(start, length):
    """Bit mask of `length` positions from `start`."""
    return ((1 << length) - 1) << start


class Path:
    """A partial alignment: matches by reference position, and the values that the search compares."""

    def __init__(self, placed):
        """placed: matches that every path has; `add` counts them when the search reaches them."""
        self.hyp_total = self.ref_total = 0  # weighted matched words, truncated to integers
        self.chunks = self.distance = 0
        self.ref_next = 0  # the next reference position to decide
        self.hyp_end = -1  # where the last match ended in the hypothesis, -1 after a skipped word
        self.placed = {match.ref_start: match for match in placed}  # shared by all paths
        self.chosen = None  # the other matches, the last one first: (match, (match, ... None))
        self.hyp_mask = self.ref_mask = 0  # positions taken by matches
        for match in placed:
            self.hyp_mask |= span_mask(match.hyp_start, match.hyp_length)
            self.ref_mask |= span_mask(match.ref_start, match.ref_length)

    def copy(self):
        other = Path.__new__(Path)
        other.__dict__.update(self.__dict__)
        return other

    def sort_key(self):
        return -(self.hyp_total + self.ref_total), self.chunks, self.distance

    def is_free(self, match):
        hyp_overlap = self.hyp_mask >> match.hyp_start & (1 << match.hyp_length) - 1
        return not (hyp_overlap or self.ref_mask >> match.ref_start & (1 << match.ref_length) - 1)

    def alignment(self):
        """Matches sorted by reference position."""
        matches, chosen = list(self.placed.values()), self.chosen
        while chosen:
            match, chosen = chosen
            matches.append(match)
        return sorted(matches)

    def add(self, match):
        """Counts a match that starts at `ref_next` and moves behind it."""
        weight = 1.0 if match.matcher == EXACT else 0.5
        self.hyp_total = int(self.hyp_total + match.hyp_length * weight)
        self.ref_total = int(self.ref_total + match.ref_length * weight)
        if self.hyp_end not in (-1, match.hyp_start):
            self.chunks += 1
        self.ref_next = match.ref_start + match.ref_length
        self.hyp_end = match.hyp_start + match.hyp_length

    def place(self, match):
        """Adds a match that the path does not have yet."""
        self.chosen = match, self.chosen
        self.hyp_mask |= span_mask(match.hyp_start, match.hyp_length)
        self.ref_mask |= span_mask(match.ref_start, match.ref_length)
        self.add(match)

    def skip(self):
        """Leaves the reference word at `ref_next` unmatched."""
        if self.hyp_end != -1:
            self.chunks += 1
            self.hyp_end = -1
        self.ref_next += 1


def uncontested_matches(matches, num_hyp_words):
    """Matches that share no word with any other.

    matches: for each reference position the list of Matches that start there.
    """
    ref_uses, hyp_uses = [0] * len(matches), [0] * num_hyp_words
    all_matches = [match for matches_here in matches for match in matches_here]
    for match in all_matches:
        for i in range(match.ref_start, match.ref_start + match.ref_length):
            ref_uses[i] += 1
        for i in range(match.hyp_start, match.hyp_start + match.hyp_length):
            hyp_uses[i] += 1
    return [
        match
        for match in all_matches
        if set(ref_uses[match.ref_start : match.ref_start + match.ref_length]) == {1}
        and set(hyp_uses[match.hyp_start : match.hyp_start + match.hyp_length]) == {1}
    ]


def extend_path(path, position, matches):
    """The paths that `path` becomes at one reference position, in the order that the search keeps.

    Paths that cannot be among the next BEAM_SIZE are left out. Of matches of one kind all have the same totals and
    chunks, and each has at least the distance of the one before. So only the first BEAM_SIZE of a kind count. Without
    this a word that is repeated 300 times takes a minute.
    """
    if path.ref_mask >> position & 1:
        if position >= path.ref_next:
            match = path.placed.get(path.ref_next)
            if match is None:
                return []
            path.add(match)
            path.distance += abs(match.ref_start - match.hyp_start)
        return [path]
    extended, counts = [], {}
    for match in matches[position]:
        if path.is_free(match):
            kind = match.matcher, match.ref_length, match.hyp_length, path.hyp_end in (-1, match.hyp_start)
            counts[kind] = counts.get(kind, 0) + 1
            if counts[kind] <= BEAM_SIZE:
                other = path.copy()
                other.place(match)
                extended.append(other)
            path.distance += abs(match.ref_start - match.hyp_start)
    path.skip()
    return [*extended, path]


def align(matches, num_hyp_words):
    """The alignment of one hypothesis and one reference: Matches sorted by reference position.

    matches: for each reference position the list of Matches that start there, in the order in which they were found,
    which decides ties.
    """
    paths = [Path(uncontested_matches(matches, num_hyp_words))]
    for position in range(len(matches)):
        paths = sorted(paths, key=Path.sort_key)[:BEAM_SIZE]
        paths = [new for path in paths for new in extend_path(path, position, matches)] or paths[:1]
    paths = sorted(paths, key=Path.sort_key)[:BEAM_SIZE]
    for path in paths:
        path.chunks += path.hyp_end != -1
    return min(paths, key=Path.sort_key).alignment()


def count_chunks(alignment):
    """Chunks of a finished alignment: sequences of matches that follow one another in both texts."""
    chunks, ref_end, hyp_end = 0, -1, -1
    for match in alignment:
        if (match.ref_start, match.hyp_start) != (ref_end, hyp_end):
            chunks += 1
        ref_end, hyp_end = match.ref_start + match.ref_length, match.hyp_start + match.hyp_length
    return chunks
