"""The benchmarks' own code: unequal outputs are refused, memory is measured, and the picture shows a mistake."""

import mmap
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import __main__ as command
from bench import models, picture, scorers, video
from bench.measure import measure
from common.errors import InputError
from video_data import shapes
from video_data.datasets import Clip


def test_unknown_names_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "decode", "nothing"])
    with pytest.raises(InputError, match="--only: invalid choice: 'nothing'"):
        command.main()


def test_memory_and_cpu_time_of_a_function_are_measured():

    def fill() -> int:
        with mmap.mmap(-1, 64 << 20) as pages:  # fresh ones: malloc may have kept as much
            return sum(pages.write(bytes(1 << 20)) for _ in range(64))

    result, figures = measure(fill)
    assert result == 64 << 20 and 60 < figures["MB"] < 100 and 0 <= figures["CPU s"] < 10


def test_unequal_outputs_are_refused():
    x = torch.tensor([1.0, 10.0])
    models.assert_close("logits", x + 5e-5, x, 1e-5)
    with pytest.raises(AssertionError, match="logits: differs by 0.01"):
        models.assert_close("logits", torch.tensor([1.1, 10.0]), x, 1e-5)
    scorers.assert_scores_equal({"CIDEr": [1.0, 2.0]}, {"CIDEr": [1.0, 2.0 + 1e-12]})
    with pytest.raises(AssertionError, match="CIDEr differs"):
        scorers.assert_scores_equal({"CIDEr": [1.0, 2.0]}, {"CIDEr": [1.0, 2.1]})


@pytest.mark.parametrize("dtype, beams, is_refused", [("fp32", 5, True), ("bf16", 1, True), ("bf16", 5, False)])
def test_unequal_texts_are_refused_except_of_beams_in_bf16(dtype, beams, is_refused, monkeypatch):
    ours = SimpleNamespace(config=SimpleNamespace(eos_id=2))
    theirs = SimpleNamespace(generate=lambda **options: torch.tensor([[5, 6, 2, 2], [5, 6, 7, 8]]))
    monkeypatch.setattr(models, "generate", lambda *args, **options: [[5, 6], [5, 6, 7, 9]])
    if is_refused:
        with pytest.raises(AssertionError, match="only 1 of 2 texts are equal"):
            models.generation_row(theirs, ours, dtype, 2, beams, 1)
    else:
        assert models.generation_row(theirs, ours, dtype, 2, beams, 1)["equal"] == "1 of 2"


def test_unequal_pixels_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "00000.mp4"
    shapes.write_clip(path, np.full((16, 64, 64, 3), 200, np.uint8))
    assert video.compare_clip(path, 1)["frames/s"] > 0
    monkeypatch.setattr(video, "read_with_pyav", lambda path, indices: np.zeros((16, 3, 224, 224), np.uint8))
    with pytest.raises(AssertionError, match="00000.mp4: the pixels differ"):
        video.compare_clip(path, 1)


CLIPS = [Clip("a", "", ("a red ring spins",)), Clip("b", "", ("a red ring spins and a blue cross rises",)),
         Clip("c", "", ("the pink cross sinks",)), Clip("d", "", ("a red ring grows and a blue cross blinks",)),
         Clip("e", "", ("a white square grows",))]  # fmt: skip


@pytest.mark.parametrize("wrong, expected", [("", "acbd"), ("a", "acbd"), ("e", "acbe"), ("de", "acbd")])
def test_picture_shows_a_wrong_caption_if_there_is_one(wrong, expected):
    captions = {clip.id: "a red circle" if clip.id in wrong else clip.captions[0] for clip in CLIPS}
    assert "".join(clip.id for clip in picture.select_clips(CLIPS, captions)) == expected
