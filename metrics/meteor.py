"""METEOR 1.5 for English, as caption papers report it, without Java.

The words of a hypothesis are aligned with those of a reference: `meteor_match.py` finds which may be paired,
`meteor_align.py` which are. Precision and recall count matched words, weighted by matcher and by content or function
word. Their weighted harmonic mean F_mean is reduced by a penalty for matches that are scattered over many chunks:

    score = F_mean * (1 - gamma * fragmentation^beta),   fragmentation = chunks / matched words

Of several references the best one counts. The corpus score comes from the summed counts of all segments; it is not the
mean of their scores. A segment is one hypothesis with its references.

Behaviour of the Java program, kept here: if all references score 0, the counts of the first one enter the corpus; the
chunk of a segment that matches perfectly does not. One thing is not kept: the Java program compares 32-bit hashes of
words, so that it takes "gelato" for "variants".

References
[1] Denkowski and Lavie, Meteor Universal: Language Specific Translation Evaluation for Any Target Language, WMT 2014.
[2] Banerjee and Lavie, METEOR: An Automatic Metric for MT Evaluation with Improved Correlation with Human Judgments,
    ACL workshop 2005.
"""

import numpy as np

from . import meteor_text
from .inputs import InputError
from .meteor_align import align, count_chunks, span_mask
from .meteor_match import EXACT, PARAPHRASE, STEM, SYNONYM, Hypothesis, Lexicon
from .meteor_text import Prefixes

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.20, 0.60, 0.75  # [1] for English; DELTA: content against function words
MATCHER_WEIGHTS = (1.0, 0.6, 0.8, 0.6)  # exact, stem, synonym, paraphrase
NUM_COUNTS = 23
HYP_WORDS, REF_WORDS, HYP_FUNCTION, REF_FUNCTION = range(4)
CHUNKS, HYP_MATCHED, REF_MATCHED = 20, 21, 22
ROUNDING_MARGIN = 1 + 1e-9
MAX_PAIRS = 100_000  # words of a hypothesis times words of a reference; 300 equal words take six seconds


# --- from counts to a score ---------------------------------------------------------------------------------------


def count_alignment(alignment, hypothesis, reference):
    """The 23 counts of an alignment of two Texts (list of int).

    0-3: words of hypothesis and reference, function words of both. 4-19: for each matcher, matched content words of
    hypothesis and reference, matched function words of both. 20-22: chunks, matched words of both.
    """
    counts = [len(hypothesis.words), len(reference.words)]
    counts += [hypothesis.function_mask.bit_count(), reference.function_mask.bit_count()] + [0] * (NUM_COUNTS - 4)
    for match in alignment:
        hyp_function = (hypothesis.function_mask & span_mask(match.hyp_start, match.hyp_length)).bit_count()
        ref_function = (reference.function_mask & span_mask(match.ref_start, match.ref_length)).bit_count()
        first = 4 + 4 * match.matcher
        counts[first] += match.hyp_length - hyp_function
        counts[first + 1] += match.ref_length - ref_function
        counts[first + 2] += hyp_function
        counts[first + 3] += ref_function
        counts[HYP_MATCHED] += match.hyp_length
        counts[REF_MATCHED] += match.ref_length
    counts[CHUNKS] = count_chunks(alignment)
    return counts


def weigh_words(content, function):
    """Weighted number of words."""
    return DELTA * content + (1 - DELTA) * function


def weigh_matches(counts, side):
    """Weighted matched words of the hypothesis (side 0) or the reference (side 1)."""
    total = 0.0
    for first, kind_weight in (4, DELTA), (6, 1 - DELTA):  # content words, function words
        for matcher, weight in enumerate(MATCHER_WEIGHTS):
            total += weight * kind_weight * counts[first + 4 * matcher + side]
    return total


def f_mean(precision, recall):
    return 1.0 / ((1.0 - ALPHA) / precision + ALPHA / recall)


def is_perfect(counts):
    all_matched = counts[HYP_MATCHED] == counts[HYP_WORDS] and counts[REF_MATCHED] == counts[REF_WORDS]
    return all_matched and counts[CHUNKS] == 1


def score_counts(counts):
    """METEOR, 0..1, of 23 counts (of a segment, or summed over segments)."""
    hyp_words = weigh_words(counts[HYP_WORDS] - counts[HYP_FUNCTION], counts[HYP_FUNCTION])
    ref_words = weigh_words(counts[REF_WORDS] - counts[REF_FUNCTION], counts[REF_FUNCTION])
    hyp_matched, ref_matched = weigh_matches(counts, 0), weigh_matches(counts, 1)
    if not (hyp_words and ref_words and hyp_matched and ref_matched):
        return 0.0
    mean = f_mean(hyp_matched / hyp_words, ref_matched / ref_words)
    fragmentation = 0.0
    if not is_perfect(counts):
        fragmentation = counts[CHUNKS] / ((counts[HYP_MATCHED] + counts[REF_MATCHED]) / 2)
    return max(mean * (1.0 - GAMMA * fragmentation**BETA), 0.0)


def sum_counts(segments):
    """Counts of a corpus from the counts of its segments."""
    total = [sum(column) for column in zip(*segments, strict=True)]
    total[CHUNKS] -= sum(counts[CHUNKS] for counts in segments if is_perfect(counts))
    return total


def check_lengths(hypothesis, reference):
    """Raises InputError for captions (tuples of words) that would take too long to align."""
    if len(hypothesis) * len(reference) > MAX_PAIRS:
        sizes = " and ".join(f"{len(words)} ({' '.join(words[:5])[:40]!r} ...)" for words in (hypothesis, reference))
        raise InputError(f"METEOR: two captions have {sizes} words, expected at most {MAX_PAIRS} pairs of words")


# --- the best reference -------------------------------------------------------------------------------------------


def matchable_words(hypothesis, reference):
    """The most that any alignment could match, from the matchers alone.

    Returns (hyp_masks, ref_weights, continues). hyp_masks: bit masks of the hypothesis positions whose best match is
    exact, synonym, or of weight 0.6. ref_weights: for every reference position the weight of its best match, 0 without
    a match. continues: for every reference position whether it can continue the chunk of the position before.
    """
    size = len(reference.words)
    ref_weights, continues = [0.0] * size, [False] * size
    starts, ends = [0] * size, [0] * (size + 1)  # where matches of each reference position start and end, bit masks
    exact = synonym = other = 0
    for i, word in enumerate(reference.words):
        masks = hypothesis.word_masks.get(word)
        if masks is not None:
            exact |= masks[EXACT]
            synonym |= masks[SYNONYM]
            other |= masks[STEM]
            ref_weights[i] = MATCHER_WEIGHTS[EXACT if masks[EXACT] else SYNONYM if masks[SYNONYM] else STEM]
            starts[i] = masks[EXACT] | masks[STEM] | masks[SYNONYM]
            ends[i] = starts[i] << 1
    for start, length, node in reference.phrases:
        masks = hypothesis.paraphrase_masks.get(node)
        if masks is not None:
            starts[start] |= masks[0]
            ends[start + length - 1] |= masks[1]
            other |= masks[2]
            for i in range(start, start + length):
                ref_weights[i] = max(ref_weights[i], MATCHER_WEIGHTS[PARAPHRASE])
                continues[i] |= i > start
    for i in range(1, size):
        continues[i] |= bool(ends[i - 1] & starts[i])
    return (exact, synonym & ~exact, other & ~(exact | synonym)), ref_weights, continues


def possible_chunks(reference, ref_weights, continues):
    """Runs of reference words that one chunk could cover: [weighted words, words] of each."""
    chunks, is_open = [], False
    for i, weight in enumerate(ref_weights):
        if not weight:
            is_open = False
            continue
        value = weight * (1 - DELTA if reference.function_mask >> i & 1 else DELTA)
        if is_open and continues[i]:
            chunks[-1][0] += value
            chunks[-1][1] += 1
        else:
            chunks.append([value, 1])
            is_open = True
    return chunks


def weigh_text(text):
    """Weighted number of words of a Text."""
    function = text.function_mask.bit_count()
    return weigh_words(len(text.words) - function, function)


def upper_bound(hypothesis, reference):
    """A number that the METEOR score of the pair does not exceed, computed without an alignment.

    An alignment of k chunks covers at most the k heaviest runs of `possible_chunks`, because a chunk cannot leave its
    run. On the hypothesis' side it matches at most all matchable words. The best over k is the bound.
    """
    text = hypothesis.text
    hyp_masks, ref_weights, continues = matchable_words(hypothesis, reference)
    runs = possible_chunks(reference, ref_weights, continues)
    if not runs:
        return 0.0
    hyp_matched, hyp_value = 0, 0.0
    weights = MATCHER_WEIGHTS[EXACT], MATCHER_WEIGHTS[SYNONYM], MATCHER_WEIGHTS[STEM]
    for mask, weight in zip(hyp_masks, weights, strict=True):
        function = (mask & text.function_mask).bit_count()
        hyp_matched += mask.bit_count()
        hyp_value += weight * weigh_words(mask.bit_count() - function, function)
    precision = hyp_value / weigh_text(text)
    ref_words = weigh_text(reference)
    if len(runs) == 1 and hyp_matched == len(text.words) and runs[0][1] == len(reference.words):
        return f_mean(precision, runs[0][0] / ref_words) * ROUNDING_MARGIN
    values = sorted([value for value, _ in runs], reverse=True)
    sizes = sorted([size for _, size in runs], reverse=True)
    best = ref_value = ref_matched = 0.0
    for chunks in range(1, len(runs) + 1):
        ref_value += values[chunks - 1]
        ref_matched += sizes[chunks - 1]
        fragmentation = 2 * chunks / (hyp_matched + ref_matched)
        mean = f_mean(precision, ref_value / ref_words)
        best = max(best, mean * (1.0 - GAMMA * fragmentation**BETA))
    return best * ROUNDING_MARGIN


def score_segment(hypothesis, references):
    """(counts, score) of a Hypothesis against the best of several Texts, the first of equals.

    References are aligned in descending order of their upper bounds, until no bound reaches the best score.
    """
    bounds = [(-upper_bound(hypothesis, text), i) for i, text in enumerate(references)]
    best_counts, best_score, best_index = count_alignment([], hypothesis.text, references[0]), 0.0, 0
    for negative_bound, i in sorted(bounds):
        if not negative_bound or -negative_bound < best_score:
            break
        alignment = align(hypothesis.matches(references[i]), len(hypothesis.text.words))
        counts = count_alignment(alignment, hypothesis.text, references[i])
        segment_score = score_counts(counts)
        if segment_score > best_score or segment_score == best_score and i < best_index:
            best_counts, best_score, best_index = counts, segment_score, i
    return best_counts, best_score


def score(references, hypotheses, tables):
    """METEOR of tokenised captions.

    references: for each video a list of str; hypotheses: for each video one str; tables: meteor_data.Tables.
    Returns (corpus score, per-video scores (V,), per-video counts (V, 23)). Raises InputError for captions that are too
    long.
    """
    prefixes = tables.words.prefixes if tables.words is not None else Prefixes()
    # pycocoevalcap does this to hypotheses only.
    hypotheses = [text.replace("|||", "").replace("  ", " ") for text in hypotheses]
    # It also joins references with "|||", so a reference that contains it becomes two.
    references = [[part for text in group for part in text.split("|||")] for group in references]
    texts = {*hypotheses, *(text for group in references for text in group)}
    words = {text: tuple(meteor_text.split_words(text, prefixes)) for text in texts}
    for group, text in zip(references, hypotheses, strict=True):
        for reference in group:
            check_lengths(words[text], words[reference])
    all_references = {words[text] for group in references for text in group}
    lexicon = Lexicon(tables, all_references, {words[text] for text in hypotheses})
    segments, scores = [], []
    for group, text in zip(references, hypotheses, strict=True):
        distinct = dict.fromkeys(words[reference] for reference in group)
        texts = [lexicon.texts[caption] for caption in distinct]
        counts, segment_score = score_segment(Hypothesis(lexicon.texts[words[text]], texts, lexicon), texts)
        segments.append(counts)
        scores.append(segment_score)
    return score_counts(sum_counts(segments)), np.array(scores), np.array(segments, np.int64)
