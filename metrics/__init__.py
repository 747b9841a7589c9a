"""Caption metrics equal to pycocoevalcap's, without Java: BLEU-1..4, ROUGE-L, CIDEr."""

from dataclasses import dataclass

from . import bleu, cider, ngrams, ptb, rouge

METRICS = ("BLEU", "ROUGE_L", "CIDEr")


@dataclass(frozen=True)
class Scores:
    """corpus {name: float}, per_video {id: {name: float}}, signature str."""

    corpus: dict
    per_video: dict
    signature: str


def score(references, hypotheses, tokenizer="ptb", metrics=METRICS):
    """Scores {id: caption} or {id: [caption]} against {id: [caption, ...]}."""
    ids = list(references)
    refs = [list(references[i]) for i in ids]
    hyps = [hypotheses[i] if isinstance(hypotheses[i], str) else hypotheses[i][0] for i in ids]
    if tokenizer == "ptb":
        refs, hyps = [ptb.captions(r) for r in refs], ptb.captions(hyps)
    columns, corpus = {}, {}
    counts = ngrams.count(refs, hyps)
    if "BLEU" in metrics:
        total, rows = bleu.score(counts)
        for n in range(4):
            corpus[f"Bleu_{n + 1}"], columns[f"Bleu_{n + 1}"] = float(total[n]), rows[n]
    if "ROUGE_L" in metrics:
        corpus["ROUGE_L"], columns["ROUGE_L"] = rouge.score(refs, hyps)
    if "CIDEr" in metrics:
        corpus["CIDEr"], columns["CIDEr"] = cider.score(counts)
    per_video = {
        i: {name: float(values[n]) for name, values in columns.items()} for n, i in enumerate(ids)
    }
    return Scores(corpus, per_video, f"videos:{len(ids)}|tok:{tokenizer}")
