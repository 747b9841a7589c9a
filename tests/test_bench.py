"""The benchmarks' own code: what is measured, the captions that are scored, and the scripts beside them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from bench import loading, peft_captioner, picture, scorers, shapes_ceiling, timing, training_step
from bench.__main__ import format_table
from bench.processes import ROOT, measure_process, median_figures
from video_data import shapes
from video_data.batches import IGNORE_INDEX
from video_data.datasets import Clip


def test_measured_scorers_start_without_torch_and_metrics():
    code = "import sys; from bench import scorers; print({'torch', 'metrics', 'pycocoevalcap'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


def test_measure_process_returns_result_and_figures():
    folder = ROOT / "backbones/tiny-lm"
    total, figures = measure_process(loading.sum_weights, folder)
    _, baseline = measure_process(loading.sum_weights, "nothing")
    assert total == pytest.approx(loading.sum_weights(folder))
    assert baseline["MB"] + 2 < figures["MB"] < 2000
    assert 0 < figures["CPU s"] < 100 and figures["wall s"] > 0 and figures["child MB"] == 0


def test_failing_process_is_reported(tmp_path):
    with pytest.raises(SystemExit, match="(?s)score_ours.*FileNotFoundError.*missing.json"):
        measure_process(scorers.score_ours, tmp_path / "missing.json")


def test_figures_are_medians_and_ratios_are_of_each_turn():
    assert median_figures([{"MB": 1.0}, {"MB": 9.0}, {"MB": 2.0}]) == {"MB": 2.0, "runs": 3}
    row = timing.summarize_ratios([1.0, 2.0, 4.0], [3.0, 2.0, 8.0])
    assert row == {"wall s": 2.0, "theirs, wall s": 3.0, "ratio": 2.0, "min ratio": 1.0, "max ratio": 3.0}
    calls = []
    timing.compare_in_turns("", lambda: calls.append("ours"), lambda: calls.append("theirs"), 2)
    assert calls == ["theirs", "ours"] * 3
    table = format_table([{"what": "a", "s": 1.0}, {"what": "b", "n": 2}])
    assert table.splitlines()[2:] == ["| a | 1.00 |  |", "| b |  | 2 |"]


def test_captions_are_reproducible_and_varied():
    rng = np.random.default_rng(0)
    scenes = [shapes.draw_scene(rng) for _ in range(1000)]
    captions = scorers.make_captions(40, 6)
    assert captions == scorers.make_captions(40, 6)
    texts = [text for group in captions.values() for text in group]
    assert {len(group) for group in captions.values()} == {6}
    assert 0.02 < np.mean([not text[-1].isalpha() for text in texts]) < 0.2
    words = {word for text in texts for word in text.lower().split()}
    assert 50 < len(words - set(" ".join(shapes.describe(scene, rng) for scene in scenes).split())) < 200


def test_training_batch_has_captions_of_6_to_14_tokens_and_eos():
    frames, labels = peft_captioner.make_batch()
    assert frames.shape == (2, 8, 3, 224, 224) and labels.shape == (2, 4, 15)
    for row in labels.flatten(0, 1):
        length = int((row != IGNORE_INDEX).sum())
        assert 7 <= length <= 15 and row[length - 1] == 2 and (row[:length] != IGNORE_INDEX).all()


def test_operations_of_a_product_and_of_attention_are_counted():
    a = torch.randn(4, 5)
    assert training_step.count_operations(lambda: a @ a.T) == 2 * 4 * 5 * 4
    x = torch.randn(1, 2, 6, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert training_step.count_operations(lambda: attention(x, x, x)) == 2 * 2 * (2 * 6 * 8 * 6)


def test_shapes_ceiling_scores_every_wording(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    test = {str(i): shapes.reference_captions(shapes.draw_scene(rng), rng) for i in range(20)}
    (tmp_path / "captions.json").write_text(json.dumps({"test": test}))
    monkeypatch.setattr(sys, "argv", ["shapes_ceiling", str(tmp_path)])
    shapes_ceiling.main()
    scores = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(scores) == 18 and scores == sorted(scores, reverse=True) and scores[-1] > 100


CLIPS = [Clip("a", "", ("a red ring spins",)), Clip("b", "", ("a red ring spins and a blue cross rises",)),
         Clip("c", "", ("the pink cross sinks",)), Clip("d", "", ("a red ring grows and a blue cross blinks",)),
         Clip("e", "", ("a white square grows",))]  # fmt: skip


@pytest.mark.parametrize("wrong, expected", [("", "acbd"), ("a", "acbd"), ("e", "acbe"), ("de", "acbd")])
def test_picture_shows_a_wrong_caption_if_there_is_one(wrong, expected):
    captions = {clip.id: "a red circle" if clip.id in wrong else clip.captions[0] for clip in CLIPS}
    assert "".join(clip.id for clip in picture.select_clips(CLIPS, captions, 4)) == expected


def test_picture_has_the_frames_and_a_wrong_caption_in_red():
    frames = torch.full((2, 3, 64, 64), 200, dtype=torch.uint8)
    canvases = [Image.new("RGB", (800, 200), "white") for _ in range(2)]
    for canvas, caption in zip(canvases, (CLIPS[0].captions[0], "a red circle"), strict=True):
        picture.draw_clip(canvas, 10, frames, CLIPS[0], caption)
        pixels = np.asarray(canvas)
        assert (pixels[10:106, 16:112] == 200).all() and (pixels[10:106, 116:212] == 200).all()
        assert (pixels[10:106, 112:116] == 255).all() and (pixels[112:] < 255).any()
    reds = [(np.asarray(canvas).astype(int) @ [1, -1, 0] > 60).any() for canvas in canvases]
    assert reds == [False, True]
