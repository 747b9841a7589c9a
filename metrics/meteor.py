"""METEOR 1.5 for English, as caption papers report it, without Java.

A hypothesis' words are aligned with a reference's (`meteor_match.py` says which may be paired,
`meteor_align.py` which are). Precision and recall count matched words, by how they matched and
whether they are content or function words; their weighted harmonic mean F is cut by a penalty for
matches scattered over many chunks: F (1 - gamma (chunks / matched words)^beta). Of several references
the best counts. The corpus score comes from the summed counts of all segments and is not the mean of
their scores.

The reference's behaviour, kept here: where all references score 0 the first one's counts enter the
corpus; the chunk of a segment that matches perfectly does not. One thing is not kept: the reference
compares 32-bit hashes of words, so that to it "gelato" equals "variants".

References
[1] Denkowski and Lavie, Meteor Universal: Language Specific Translation Evaluation for Any Target
    Language, WMT 2014.
[2] Banerjee and Lavie, METEOR: An Automatic Metric for MT Evaluation with Improved Correlation with
    Human Judgments, ACL workshop 2005.
"""

import numpy as np

from . import meteor_text
from .meteor_align import align, count_chunks, span
from .meteor_match import EXACT, PARAPHRASE, STEM, SYNONYM, Hypothesis, Lexicon
from .meteor_text import Prefixes

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.20, 0.60, 0.75
WEIGHTS = (1.0, 0.6, 0.8, 0.6)  # exact, stem, synonym, paraphrase
COUNTS = 23
CHUNKS, HYP_MATCHED, REF_MATCHED = 20, 21, 22
ROUNDING = 1 + 1e-9


# --- from counts to a score -----------------------------------------------------------------------


def count(alignment, hypothesis, reference):
    """The 23 counts of an alignment of two Texts (list of int).

    Lengths and function words: hypothesis, reference; then for each module content words of the
    hypothesis and the reference, function words of both; then chunks and matched words of both.
    """
    counts = [len(hypothesis.words), len(reference.words)]
    counts += [hypothesis.function.bit_count(), reference.function.bit_count()] + [0] * (COUNTS - 4)
    for match in alignment:
        hyp_function = (hypothesis.function & span(match.at, match.size)).bit_count()
        ref_function = (reference.function & span(match.start, match.length)).bit_count()
        first = 4 + 4 * match.module
        counts[first] += match.size - hyp_function
        counts[first + 1] += match.length - ref_function
        counts[first + 2] += hyp_function
        counts[first + 3] += ref_function
        counts[HYP_MATCHED] += match.size
        counts[REF_MATCHED] += match.length
    counts[CHUNKS] = count_chunks(alignment)
    return counts


def weighted(content, function):
    return DELTA * content + (1 - DELTA) * function


def matched(counts, side):
    """Weighted matched words of the hypothesis (side 0) or the reference (side 1)."""
    total = 0.0
    for module, weight in enumerate(WEIGHTS):
        total += weight * DELTA * counts[4 + 4 * module + side]
    for module, weight in enumerate(WEIGHTS):
        total += weight * (1 - DELTA) * counts[6 + 4 * module + side]
    return total


def harmonic(precision, recall):
    return 1.0 / ((1.0 - ALPHA) / precision + ALPHA / recall)


def is_perfect(counts):
    return counts[HYP_MATCHED] == counts[0] and counts[REF_MATCHED] == counts[1] and counts[CHUNKS] == 1


def score_counts(counts):
    """METEOR, 0..1, of 23 counts (of a segment, or summed over segments)."""
    hyp_words = weighted(counts[0] - counts[2], counts[2])
    ref_words = weighted(counts[1] - counts[3], counts[3])
    hyp_matched, ref_matched = matched(counts, 0), matched(counts, 1)
    if not (hyp_words and ref_words and hyp_matched and ref_matched):
        return 0.0
    mean = harmonic(hyp_matched / hyp_words, ref_matched / ref_words)
    scattered = 0.0
    if not is_perfect(counts):
        scattered = counts[CHUNKS] / ((counts[HYP_MATCHED] + counts[REF_MATCHED]) / 2)
    return max(mean * (1.0 - GAMMA * scattered**BETA), 0.0)


def add_up(segments):
    """Counts of a corpus from those of its segments."""
    total = [0] * COUNTS
    for counts in segments:
        for i, number in enumerate(counts):
            total[i] += number
        if is_perfect(counts):
            total[CHUNKS] -= counts[CHUNKS]
    return total


# --- the best reference ---------------------------------------------------------------------------


def covered(hypothesis, reference):
    """What any alignment could match at most, from the matchers alone.

    Returns (hyp, ref, linked): bit masks of the hypothesis positions whose best match is exact,
    synonym, or of weight 0.6; for every reference position the weight of its best match, 0 where
    nothing matches; and whether it can continue the chunk of the position before.
    """
    size = len(reference.words)
    ref, linked, starts, ends = [0.0] * size, [False] * size, [0] * size, [0] * (size + 1)
    exact = synonym = other = 0
    for i, word in enumerate(reference.words):
        masks = hypothesis.words.get(word)
        if masks is not None:
            exact |= masks[EXACT]
            synonym |= masks[SYNONYM]
            other |= masks[STEM]
            ref[i] = WEIGHTS[EXACT if masks[EXACT] else SYNONYM if masks[SYNONYM] else STEM]
            starts[i] = masks[EXACT] | masks[STEM] | masks[SYNONYM]
            ends[i] = starts[i] << 1
    for start, length, node in reference.phrases:
        reach = hypothesis.reach.get(node)
        if reach is not None:
            starts[start] |= reach[0]
            ends[start + length - 1] |= reach[1]
            other |= reach[2]
            for i in range(start, start + length):
                ref[i] = max(ref[i], WEIGHTS[PARAPHRASE])
                linked[i] |= i > start
    for i in range(1, size):
        linked[i] |= bool(ends[i - 1] & starts[i])
    return (exact, synonym & ~exact, other & ~(exact | synonym)), ref, linked


def runs(reference, weights, linked):
    """Rows of reference words that one chunk could cover: (weighted words, words) of each."""
    found, open_run = [], False
    for i, weight in enumerate(weights):
        if not weight:
            open_run = False
            continue
        value = weight * (1 - DELTA if reference.function >> i & 1 else DELTA)
        if open_run and linked[i]:
            found[-1][0] += value
            found[-1][1] += 1
        else:
            found.append([value, 1])
            open_run = True
    return found


def upper_bound(hypothesis, reference):
    """A number that the METEOR score of the pair does not exceed, without aligning it.

    An alignment of k chunks covers at most the k heaviest rows of reference words, since a chunk
    cannot leave its row; and it has at most as much matched on the hypothesis' side as there is.
    The best over k bounds them all.
    """
    text = hypothesis.text
    masks, weights, linked = covered(hypothesis, reference)
    rows = runs(reference, weights, linked)
    if not rows:
        return 0.0
    hyp_matched, hyp_value = 0, 0.0
    for mask, weight in zip(masks, (WEIGHTS[EXACT], WEIGHTS[SYNONYM], WEIGHTS[STEM]), strict=True):
        function = (mask & text.function).bit_count()
        hyp_matched += mask.bit_count()
        hyp_value += weight * weighted(mask.bit_count() - function, function)
    precision = hyp_value / weigh(text)
    ref_words = weigh(reference)
    if len(rows) == 1 and hyp_matched == len(text.words) and rows[0][1] == len(reference.words):
        return harmonic(precision, rows[0][0] / ref_words) * ROUNDING
    values = sorted([value for value, _ in rows], reverse=True)
    sizes = sorted([size for _, size in rows], reverse=True)
    best = value = size = 0.0
    for chunks in range(1, len(rows) + 1):
        value += values[chunks - 1]
        size += sizes[chunks - 1]
        scattered = 2 * chunks / (hyp_matched + size)
        mean = harmonic(precision, value / ref_words)
        best = max(best, mean * (1.0 - GAMMA * scattered**BETA))
    return best * ROUNDING


def weigh(text):
    """Weighted length of a Text."""
    function = text.function.bit_count()
    return weighted(len(text.words) - function, function)


def segment(hypothesis, references):
    """(counts, score) of a Hypothesis against the best of several Texts, the first of equals.

    References are aligned from the highest upper bound down, until no bound reaches the best score.
    """
    bounds = [(-upper_bound(hypothesis, text), i) for i, text in enumerate(references)]
    best_counts, best_score, best_at = count([], hypothesis.text, references[0]), 0.0, 0
    for negative, i in sorted(bounds):
        if not negative or -negative < best_score:
            break
        alignment = align(hypothesis.matches(references[i]), len(hypothesis.text.words))
        counts = count(alignment, hypothesis.text, references[i])
        score = score_counts(counts)
        if score > best_score or score == best_score and i < best_at:
            best_counts, best_score, best_at = counts, score, i
    return best_counts, best_score


def score(references, hypotheses, tables, tell=None):
    """METEOR of tokenised captions.

    references: list (videos) of lists of str; hypotheses: list of str; tables: meteor_data.Tables;
    tell: called as tell("METEOR", done, total) for every video.
    Returns (corpus score, per-video scores (videos,), per-video counts (videos, 23)).
    """
    prefixes = tables.words.prefixes if tables.words is not None else Prefixes()
    # The reference's wrapper does this to hypotheses only.
    hypotheses = [text.replace("|||", "").replace("  ", " ") for text in hypotheses]
    # It puts references between these bars too, so that bars inside one make two of it.
    references = [[part for text in group for part in text.split("|||")] for group in references]
    words = {
        text: tuple(meteor_text.words(text, prefixes))
        for text in {*hypotheses, *(text for group in references for text in group)}
    }
    lexicon = Lexicon(
        tables,
        {words[text] for group in references for text in group},
        {words[text] for text in hypotheses},
    )
    segments, scores = [], []
    for group, text in zip(references, hypotheses, strict=True):
        unique = dict.fromkeys(words[reference] for reference in group)
        texts = [lexicon.texts[key] for key in unique]
        counts, value = segment(Hypothesis(lexicon.texts[words[text]], texts, lexicon), texts)
        segments.append(counts)
        scores.append(value)
        if tell:
            tell("METEOR", len(scores), len(hypotheses))
    return score_counts(add_up(segments)), np.array(scores), np.array(segments, np.int64)
