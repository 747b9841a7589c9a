"""Benchmark of the scorers beside pycocoevalcap, Java included, each in its own process.

Captions are those of MSVD's and MSR-VTT's test splits where the environment variable QADAPTER_REAL names a folder that
has them, else captions of random `shapes` scenes in the same numbers.
"""

import os
import random
import tempfile
from pathlib import Path

import numpy as np

from bench.measure import measure, new_process
from video_data import shapes
from video_data.annotations import read_msrvtt, read_msvd

TOLERANCE = 1e-9

Captions = dict[str, list[str]]  # by video
Scores = dict[str, list[float]]  # metric -> [corpus score, score of each video, ...]


def make_captions(videos: int, count: int) -> Captions:
    """`count` captions of each of `videos` random scenes."""
    rng = np.random.default_rng(videos)
    scenes = {f"video{i}": shapes.draw_scene(rng) for i in range(videos)}
    return {video: [shapes.describe(scene, rng) for _ in range(count)] for video, scene in scenes.items()}


def load_captions() -> dict[str, tuple[Captions, Captions]]:
    """By dataset. The hypothesis of a video is one of its captions, removed at random."""
    if real := os.environ.get("QADAPTER_REAL"):
        published = {"MSVD test": read_msvd(Path(real, "msvd")), "MSR-VTT test": read_msrvtt(Path(real, "msrvtt"))}
        datasets = {name: {video: annotations.captions[video] for video in annotations.splits["test"]}
                    for name, annotations in published.items()}  # fmt: skip
    else:
        datasets = {"MSVD size": make_captions(670, 42), "MSR-VTT size": make_captions(2990, 21)}
    rng = random.Random(0)
    return {name: (references, {video: [group.pop(rng.randrange(len(group)))] for video, group in references.items()})
            for name, references in datasets.items()}  # fmt: skip


# The imports are inside the two functions because they count as part of the work.


def score_ours(references: Captions, hypotheses: Captions, cache: str) -> Scores:
    """`cache` is the folder of METEOR's compiled tables."""
    import metrics

    os.environ["XDG_CACHE_HOME"] = cache
    scores = metrics.score(references, hypotheses, strict=True)
    return {name: [total, *(row[name] for row in scores.per_video.values())] for name, total in scores.corpus.items()}


def score_pycocoevalcap(references: Captions, hypotheses: Captions) -> Scores:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    refs, hyps = (
        PTBTokenizer().tokenize({key: [{"caption": text} for text in group] for key, group in captions.items()})
        for captions in (references, hypotheses)
    )
    totals, rows = Bleu(4).compute_score(refs, hyps, verbose=0)
    scores = {f"Bleu_{n}": [totals[n - 1], *rows[n - 1]] for n in range(1, 5)}
    for name, kind in ("METEOR", Meteor), ("ROUGE_L", Rouge), ("CIDEr", Cider):
        scorer = kind()
        total, row = scorer.compute_score(refs, hyps)
        scores[name] = [total, *row]
        del scorer  # ends METEOR's Java process; only then is its CPU time counted
    return {name: [float(value) for value in values] for name, values in scores.items()}


def assert_scores_equal(ours: Scores, theirs: Scores) -> None:
    assert ours.keys() == theirs.keys()
    for metric, values in theirs.items():
        error = max(abs(a - b) for a, b in zip(values, ours[metric], strict=True))
        assert error <= TOLERANCE, f"{metric} differs by {error}"


def compare_metrics(repeats: int) -> list[dict]:
    """Our first run compiles METEOR's paraphrases; the `repeats` later ones read them."""
    rows = []
    for name, captions in load_captions().items():
        with new_process() as pool:
            expected, theirs = pool.submit(measure, score_pycocoevalcap, *captions).result()
        rows.append({"what": f"{name}, pycocoevalcap"} | theirs)
        with tempfile.TemporaryDirectory() as cache:
            for run in range(1, repeats + 2):
                with new_process() as pool:
                    scores, figures = pool.submit(measure, score_ours, *captions, cache).result()
                assert_scores_equal(scores, expected)
                ratio = {"ratio": theirs["CPU s"] / figures["CPU s"]}
                rows.append({"what": f"{name}, ours, run {run}"} | figures | ratio)
    return rows
