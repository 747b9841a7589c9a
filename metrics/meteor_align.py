"""METEOR 1.5's aligner: which words of a hypothesis and a reference are paired.

A match pairs a run of hypothesis words with a run of reference words; a chunk is a row of
matches that follow one another in both. Matches that nothing competes with are placed first. For
the rest a beam search walks the reference from left to right and prefers, in this order: many
matched words, few chunks, little distance between the positions of matched words.

The reference's behaviour, kept here although it looks unintended:
- A match sets each of two integer totals to `int(total + length * weight)`, with weight 0.5 for
  everything but exact matches. So a stem, synonym or paraphrase match of one word adds nothing.
- The distance of a match is added to the path it was copied from, not to the path that has it.
- Exactly 40 paths are kept, ties in the order they were made.

References
[1] Denkowski and Lavie, Meteor Universal: Language Specific Translation Evaluation for Any Target
    Language, WMT 2014 (section 2: alignment).
"""

from collections import namedtuple

BEAM = 40
EXACT = 0

# Reference words start..start+length-1, hypothesis words at..at+size-1, module 0..3.
Match = namedtuple("Match", "start length at size module")


def span(start, length):
    """Bit mask of `length` positions from `start`."""
    return ((1 << length) - 1) << start


class Path:
    """A partial alignment: matches by reference position, and what the search compares."""

    __slots__ = ("hyp", "ref", "chunks", "distance", "next", "end", "matches", "in_hyp", "in_ref")

    def __init__(self, fixed):
        self.hyp = self.ref = self.chunks = self.distance = self.next = 0
        self.end = -1  # where the last match ended in the hypothesis, -1 after a skipped word
        self.matches = {match.start: match for match in fixed}
        self.in_hyp = self.in_ref = 0
        for match in fixed:
            self.in_hyp |= span(match.at, match.size)
            self.in_ref |= span(match.start, match.length)

    def copy(self):
        other = Path.__new__(Path)
        for name in Path.__slots__:
            setattr(other, name, getattr(self, name))
        other.matches = dict(self.matches)
        return other

    def rank(self):
        return -(self.hyp + self.ref), self.chunks, self.distance

    def is_free(self, match):
        taken = self.in_hyp & span(match.at, match.size)
        return not (taken or self.in_ref & span(match.start, match.length))

    def add(self, match):
        """Takes a match that stands at `next`."""
        weight = 1.0 if match.module == EXACT else 0.5
        self.hyp = int(self.hyp + match.size * weight)
        self.ref = int(self.ref + match.length * weight)
        if self.end not in (-1, match.at):
            self.chunks += 1
        self.next = match.start + match.length
        self.end = match.at + match.size

    def place(self, match):
        """Adds a match that the path does not have yet."""
        self.matches[match.start] = match
        self.in_hyp |= span(match.at, match.size)
        self.in_ref |= span(match.start, match.length)
        self.add(match)

    def skip(self):
        """Leaves the reference word at `next` unmatched."""
        if self.end != -1:
            self.chunks += 1
            self.end = -1
        self.next += 1


def uncontested(matches, hyp_length):
    """Matches that are alone at their place and share no word with any other.

    matches: for each reference position the list of Matches that start there.
    """
    ref_cover, hyp_cover = [0] * len(matches), [0] * hyp_length
    for place in matches:
        for match in place:
            for i in range(match.start, match.start + match.length):
                ref_cover[i] += 1
            for i in range(match.at, match.at + match.size):
                hyp_cover[i] += 1
    return [
        match
        for place in matches
        if len(place) == 1
        for match in place
        if all(n == 1 for n in ref_cover[match.start : match.start + match.length])
        and all(n == 1 for n in hyp_cover[match.at : match.at + match.size])
    ]


def advance(path, position, matches):
    """Paths that `path` becomes at one reference position, in the order the search keeps."""
    if path.in_ref >> position & 1:
        if position >= path.next:
            match = path.matches.get(path.next)
            if match is None:
                return []
            path.add(match)
            path.distance += abs(match.start - match.at)
        return [path]
    grown = []
    for match in matches[position]:
        if path.is_free(match):
            other = path.copy()
            other.place(match)
            path.distance += abs(match.start - match.at)
            grown.append(other)
    path.skip()
    return [*grown, path]


def align(matches, hyp_length):
    """The alignment of one hypothesis and one reference: Matches sorted by reference position.

    matches: for each reference position the list of Matches that start there, in order of discovery
    (the order decides ties).
    """
    paths = [Path(uncontested(matches, hyp_length))]
    for position in range(len(matches)):
        paths = sorted(paths, key=Path.rank)[:BEAM]
        paths = [new for path in paths for new in advance(path, position, matches)] or paths[:1]
    paths = sorted(paths, key=Path.rank)[:BEAM]
    for path in paths:
        path.chunks += path.end != -1
    best = min(paths, key=Path.rank)
    return [best.matches[start] for start in sorted(best.matches)]


def count_chunks(alignment):
    """Chunks of a finished alignment: runs of matches that follow one another in both texts."""
    chunks, ref_end, hyp_end = 0, -1, -1
    for match in alignment:
        if (match.start, match.at) != (ref_end, hyp_end):
            chunks += 1
        ref_end, hyp_end = match.start + match.length, match.at + match.size
    return chunks
