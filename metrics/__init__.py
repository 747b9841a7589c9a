"""Caption metrics, equal to the figures of pycocoevalcap 1.2, in Python and numpy, without Java.

    import metrics
    scores = metrics.score({"v1": ["a man runs", "a man is running"]}, {"v1": "a man runs"})
    scores.corpus["CIDEr"], scores.per_video["v1"]["Bleu_4"], scores.signature

BLEU-1..4, METEOR 1.5, ROUGE-L and CIDEr (which is CIDEr-D), after the Penn Treebank tokenizer. The
folder stands alone and can be copied. `python -m metrics` scores files.

METEOR needs tables that are not part of this code; `meteor_data.py` says where they are read from.
Without them METEOR is computed from what is left and is named after it, e.g. METEOR[exact,stem].

References
[1] Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, arXiv 1504.00325,
    2015.
"""

from dataclasses import dataclass

from . import bleu, cider, inputs, meteor, ngrams, ptb, rouge
from .inputs import InputError
from .meteor_data import load as load_meteor

__all__ = ["METRICS", "VERSION", "InputError", "Scores", "score"]

VERSION = "1.0"
METRICS = ("BLEU", "METEOR", "ROUGE_L", "CIDEr")
TOKENIZERS = ("ptb", "none")
GET_TABLES = (
    "install pycocoevalcap for them (they are read from its files, Java is not needed), or give"
    " their folder as meteor_data, --meteor-data or METEOR_DATA"
)


@dataclass(frozen=True)
class Scores:
    """What `score` returns.

    corpus: {name: float}, names Bleu_1..Bleu_4, METEOR, ROUGE_L, CIDEr, unscaled (CIDEr reaches
    10). per_video: {id: {name: float}}, ids as in the references. signature: how it was
    computed, as sacrebleu has it. notes: sentences that a reader of the numbers should see.
    """

    corpus: dict
    per_video: dict
    signature: str
    notes: tuple = ()


def tokenize(references, hypotheses, tokenizer):
    """Tokenised captions; references and hypotheses are two files to the tokenizer."""
    if tokenizer == "none":
        return references, hypotheses
    flat = iter(ptb.captions([caption for group in references for caption in group]))
    return [[next(flat) for _ in group] for group in references], ptb.captions(hypotheses)


def meteor_name(tables):
    """METEOR, or a name that says which modules were left."""
    modules = tables.modules()
    return "METEOR" if len(modules) == 4 else f"METEOR[{','.join(modules)}]"


def check_tables(tables, strict):
    """Notes on missing tables; an InputError instead if `strict`."""
    missing = [name for name in ("synonym", "paraphrase") if name not in tables.modules()]
    if not missing:
        return ()
    also = ", function words" if tables.words is None else ""
    note = f"METEOR's tables ({', '.join(missing)}{also}) were not found: {GET_TABLES}"
    if strict:
        raise InputError(note)
    return (note,)


def signature(videos, of, references, tokenizer, metrics, tables):
    """videos:670|refs:27-41|tok:ptb|meteor:1.5+syn+para|cider:d,n4,s6|v:1.0"""
    counts = sorted(map(len, references))
    spread = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]}-{counts[-1]}"
    parts = [f"videos:{videos}" if videos == of else f"videos:{videos}/{of}"]
    parts += [f"refs:{spread}", f"tok:{tokenizer}"]
    if tables is not None:
        name = meteor_name(tables)
        parts.append("meteor:1.5+syn+para" if name == "METEOR" else f"meteor:1.5{name[6:]}")
    if "CIDEr" in metrics:
        parts.append("cider:d,n4,s6")
    return "|".join([*parts, f"v:{VERSION}"])


def score_ngrams(references, hypotheses, metrics, names):
    """{name: (corpus score, per-video scores)} of BLEU-1..4 and CIDEr, as far as they are asked for.

    The counts are large, so they end here, before METEOR takes its memory.
    """
    if not {"BLEU", "CIDEr"} & set(metrics):
        return {}
    columns, counts = {}, ngrams.count(references, hypotheses)
    if "BLEU" in metrics:
        total, rows = bleu.score(counts)
        columns |= {f"Bleu_{n + 1}": (total[n], rows[n]) for n in range(ngrams.ORDERS)}
    if "CIDEr" in metrics:
        if not counts.length[: counts.references].any():
            raise InputError(f"{names[0]}: every reference is empty, expected a word for CIDEr")
        columns["CIDEr"] = cider.score(counts)
    return columns


def check_options(tokenizer, metrics):
    if tokenizer not in TOKENIZERS:
        raise InputError(f"tokenizer: is {tokenizer!r}, expected one of {', '.join(TOKENIZERS)}")
    unknown = set(metrics) - set(METRICS)
    if unknown or not metrics or isinstance(metrics, str):
        raise InputError(f"metrics: is {metrics!r}, expected some of {', '.join(METRICS)}")


def score(
    references,
    hypotheses,
    tokenizer="ptb",
    meteor_data=None,
    strict=False,
    subset=False,
    metrics=METRICS,
    names=inputs.NAMES,
    tell=None,
):
    """Scores one caption a video against its references.

    references: {id: [str, ...]}; hypotheses: {id: str} or {id: [str]}. tokenizer: "ptb", or "none"
    for captions that are tokenised already and are split at spaces. meteor_data: folder of METEOR's
    tables. strict: missing tables are an error. subset: videos without a hypothesis are left out
    instead of being an error. metrics: which of METRICS to compute; without METEOR none of its
    tables is touched. names: what error messages call the two inputs. tell: called as
    tell(text, done, total) while METEOR works, and as tell(text) before its tables are compiled.

    Returns Scores. Raises InputError, a ValueError, whose text names the input, the id and what
    was expected. Order of videos and of references does not matter, but for ties between
    references in METEOR's counts and for abbreviations at the end of a caption, which the
    tokenizer reads together with the next caption (`ptb.py`).
    """
    check_options(tokenizer, metrics)
    ids, refs, hyps = inputs.pair(references, hypotheses, subset, names)
    tables, notes = None, ()
    if "METEOR" in metrics:  # first, as compiling its paraphrases takes most memory
        tables = load_meteor(meteor_data, tell)
        notes = check_tables(tables, strict)
    refs, hyps = tokenize(refs, hyps, tokenizer)
    columns = score_ngrams(refs, hyps, metrics, names)
    last = columns.pop("CIDEr", None)
    if tables is not None:
        columns[meteor_name(tables)] = meteor.score(refs, hyps, tables, tell)[:2]
    if "ROUGE_L" in metrics:
        columns["ROUGE_L"] = rouge.score(refs, hyps)
    if last is not None:
        columns["CIDEr"] = last
        if len(ids) == 1:
            notes += ("CIDEr is 0 for one video: its weights come from the set of videos scored",)
    if len(ids) < len(references):
        notes = (f"scored {len(ids)} of {len(references)} videos", *notes)
    rows = zip(*[values.tolist() for _, values in columns.values()], strict=True)
    per_video = [dict(zip(columns, row, strict=True)) for row in rows]
    return Scores(
        corpus={name: float(total) for name, (total, _) in columns.items()},
        per_video=dict(zip(ids, per_video, strict=True)),
        signature=signature(len(ids), len(references), refs, tokenizer, metrics, tables),
        notes=notes,
    )
