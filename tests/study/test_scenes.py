"""The harder clips beside the scenes that their seeds draw. 12 clips of seed 0."""

from pathlib import Path

import numpy as np

from common.files import read_json
from study.scenes import KINDS, MOVING_STEPS, draw_distracted, draw_sparse
from video_data import read_frames, shapes


def test_distractors_are_grey_and_not_named(tmp_path):
    """The mean colour of the pixels of the middle frame that a distractor covers alone, if there are 20, is GREY to 20:
    colours vary by 12, and the codec blurs edges. Captions claim what the other shapes do, and nothing else."""
    distractors = 0
    shapes.make_dataset(tmp_path, (12, 1, 1), 0, KINDS["distractors"])
    for name, captions in read_json(tmp_path / "captions.json")["train"].items():
        frames = read_frames(tmp_path / name, shapes.FRAMES, shapes.SIDE).permute(0, 2, 3, 1).numpy()  # (F, S, S, 3)
        _, masks, scene, others, _ = draw_distracted(tmp_path / name, 0)
        for mask in masks[: len(others), shapes.FRAMES // 2] > 0.99:
            if mask.sum() >= 20:
                np.testing.assert_allclose(frames[shapes.FRAMES // 2][mask].mean(0), shapes.GREY, rtol=0, atol=20)
                distractors += 1
        expected = sorted((f"{shape.colour} {shape.kind}", shape.motion) for shape in scene)
        assert all(shapes.parse_claims(caption) == expected for caption in captions)
    assert distractors > 12


def test_sparse_clips_rest_outside_a_moment():
    """12 clips, seed 0. Noise alone changes pixels while the shapes rest; each step of the moment changes them by 3%
    more than any other step does. Captions claim what the shapes do."""
    for index in range(12):
        frames, scene, start, captions = draw_sparse(Path(f"train/{index:05d}.mp4"), 0)
        steps = np.abs(np.diff(frames.astype(np.float32), axis=0)).mean((1, 2, 3))  # (F - 1,)
        moment = (np.arange(len(steps)) - start) // MOVING_STEPS == 0
        if any(shape.motion != "still" for shape in scene):
            assert steps[moment].min() > 1.03 * steps[~moment].max()
        claims = sorted((f"{shape.colour} {shape.kind}", shape.motion) for shape in scene)
        assert all(shapes.parse_claims(caption) == claims for caption in captions)
