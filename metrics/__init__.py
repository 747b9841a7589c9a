"""Caption metrics in Python and numpy, without Java, equal to those of pycocoevalcap 1.2.

    import metrics
    scores = metrics.score({"v1": ["a man runs", "a man is running"]}, {"v1": "a man runs"})
    scores.corpus["CIDEr"], scores.per_video["v1"]["Bleu_4"], scores.signature

BLEU-1..4, METEOR 1.5, ROUGE-L and CIDEr (which is CIDEr-D), after the Penn Treebank tokenizer. The folder imports
nothing of the project and can be copied elsewhere. `python -m metrics` scores files.

Where to start: `plain.py` has BLEU and CIDEr as their papers write them, `rouge.py` has ROUGE-L. `ptb.py` is the
tokenizer, `meteor.py` is METEOR.

METEOR needs tables that are not part of this code; `meteor_data.py` says where they are read from. Without them METEOR
uses the remaining matchers and is named after them, e.g. METEOR[exact,stem].

References
[1] Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, arXiv 1504.00325, 2015.
"""

from dataclasses import dataclass

from . import bleu, cider, inputs, meteor, ngrams, ptb, rouge
from .inputs import InputError
from .meteor_data import load as load_meteor_tables

__all__ = ["METRICS", "VERSION", "InputError", "Scores", "printed_name", "score"]

VERSION = "1.0"
METRICS = ("BLEU", "METEOR", "ROUGE_L", "CIDEr")
TOKENIZERS = ("ptb", "none")
TABLES_HINT = "install pycocoevalcap (its files are read, no Java is needed) or set meteor_data or --meteor-data"


@dataclass(frozen=True)
class Scores:
    """The result of `score`.

    corpus: {name: float}, names Bleu_1..Bleu_4, METEOR, ROUGE_L, CIDEr; 0..1, CIDEr 0..10. per_video:
    {id: {name: float}}, ids as in the references. signature: how the scores were computed, in the manner of sacrebleu.
    notes: warnings for whoever reads the numbers.
    """

    corpus: dict
    per_video: dict
    signature: str
    notes: tuple = ()


def printed_name(name):
    """A score's name as papers write it: "BLEU-4" for "Bleu_4", which is pycocoevalcap's name."""
    return name.replace("Bleu_", "BLEU-").replace("ROUGE_L", "ROUGE-L")


def check_options(tokenizer, metrics):
    if tokenizer not in TOKENIZERS:
        raise InputError(f"tokenizer: is {tokenizer!r}, expected one of {', '.join(TOKENIZERS)}")
    if isinstance(metrics, str) or not metrics or not set(metrics) <= set(METRICS):
        raise InputError(f"metrics: is {metrics!r}, expected some of {', '.join(METRICS)}")


def tokenize(references, hypotheses, tokenizer):
    """Tokenised captions. To the PTB tokenizer, references and hypotheses are two files."""
    if tokenizer == "none":
        return references, hypotheses
    tokenized = iter(ptb.tokenize_captions([caption for group in references for caption in group]))
    return [[next(tokenized) for _ in group] for group in references], ptb.tokenize_captions(hypotheses)


def meteor_name(tables):
    """METEOR, or a name that lists the matchers if some are missing."""
    matchers = tables.matchers()
    return "METEOR" if len(matchers) == 4 else f"METEOR[{','.join(matchers)}]"


def check_tables(tables, strict):
    """Notes about missing tables. Raises InputError instead if `strict`."""
    missing = [name for name in ("synonym", "paraphrase") if name not in tables.matchers()]
    note = f"METEOR's tables ({', '.join(missing)}) were not found: {TABLES_HINT}"
    if missing and strict:
        raise InputError(note)
    return (note,) if missing else ()


def make_signature(references, num_videos, tokenizer, metrics, tables):
    """videos:670|refs:27-41|tok:ptb|meteor:1.5+syn+para|cider:d,n4,s6|v:1.0

    references: of the scored videos; num_videos: videos before a subset was taken.
    """
    scored = len(references)
    fewest, most = min(map(len, references)), max(map(len, references))
    parts = [f"videos:{scored}" if scored == num_videos else f"videos:{scored}/{num_videos}"]
    parts += [f"refs:{fewest}" if fewest == most else f"refs:{fewest}-{most}", f"tok:{tokenizer}"]
    if tables is not None:
        name = meteor_name(tables)
        parts.append("meteor:1.5+syn+para" if name == "METEOR" else f"meteor:1.5{name.removeprefix('METEOR')}")
    if "CIDEr" in metrics:
        parts.append("cider:d,n4,s6")
    return "|".join([*parts, f"v:{VERSION}"])


def score_ngrams(references, hypotheses, metrics):
    """{name: (corpus score, per-video scores)} of BLEU-1..4 and CIDEr, if they are in `metrics`.

    The n-gram counts are large. They are freed when this returns, before METEOR needs its memory.
    """
    if not {"BLEU", "CIDEr"} & set(metrics):
        return {}
    results, counts = {}, ngrams.count_ngrams(references, hypotheses)
    if "BLEU" in metrics:
        corpus, per_video = bleu.score(counts)
        results |= {f"Bleu_{n}": (corpus[n - 1], per_video[n - 1]) for n in range(1, ngrams.MAX_N + 1)}
    if "CIDEr" in metrics:
        results["CIDEr"] = cider.score(counts)
    return results


def score(
    references,
    hypotheses,
    tokenizer="ptb",
    meteor_data=None,
    strict=False,
    subset=False,
    metrics=METRICS,
    names=inputs.NAMES,
    progress=None,
):
    """Scores one caption per video against its references.

    references: {id: [str, ...]}; hypotheses: {id: str} or {id: [str]}. tokenizer: "ptb", or "none" for captions that
    are already tokenized and are split at spaces. meteor_data: folder of METEOR's tables. strict: missing tables raise
    an error. subset: videos without a hypothesis are left out instead of raising an error. metrics: which of METRICS
    to compute; METEOR's tables are only read for METEOR. names: what error messages call the two inputs. progress:
    called with a line of text before METEOR's tables are compiled.

    Returns Scores. Raises InputError, a ValueError, whose text names the input, the id and what was expected. The order
    of videos and of references does not matter, with two exceptions: ties between references in METEOR's counts, and
    abbreviations at the end of a caption, which the tokenizer reads together with the next caption (`ptb.py`).
    """
    check_options(tokenizer, metrics)
    ids, refs, hyps = inputs.pair_captions(references, hypotheses, subset, names)
    tables, notes = None, ()
    if "METEOR" in metrics:  # first, because compiling the paraphrases takes the most memory
        tables = load_meteor_tables(meteor_data, progress)
        notes = check_tables(tables, strict)
    refs, hyps = tokenize(refs, hyps, tokenizer)
    results = score_ngrams(refs, hyps, metrics)
    if tables is not None:
        results[meteor_name(tables)] = meteor.score(refs, hyps, tables)[:2]
    if "ROUGE_L" in metrics:
        results["ROUGE_L"] = rouge.score(refs, hyps)
    if "CIDEr" in metrics:
        results["CIDEr"] = results.pop("CIDEr")  # last, as papers print it
        if len(ids) == 1:
            notes += ("CIDEr is 0 for one video: its weights come from the scored set of videos",)
    if len(ids) < len(references):
        notes = (f"scored {len(ids)} of {len(references)} videos", *notes)
    rows = zip(*[per_video.tolist() for _, per_video in results.values()], strict=True)
    return Scores(
        corpus={name: float(corpus) for name, (corpus, _) in results.items()},
        per_video={key: dict(zip(results, row, strict=True)) for key, row in zip(ids, rows, strict=True)},
        signature=make_signature(refs, len(references), tokenizer, metrics, tables),
        notes=notes,
    )
