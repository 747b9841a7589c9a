"""Captions of changed frames. References: the run's test captions, and `Captioner.caption` of frames changed here."""

import numpy as np
import pytest
import torch

from common.files import read_json
from evaluate import load_run
from study import controls
from tests.scripts import succeed
from video_data.video import read_frames


def test_the_frames_are_changed_as_each_control_says(finished_run, flags, tmp_path):
    """Standard error by hand: 1, 2 and 6 have a standard deviation of 2.646, over the root of 3 1.528."""
    output = succeed(controls, finished_run, "--save", tmp_path / "c.json", "--device", "cpu")
    found, test = read_json(tmp_path / "c.json"), read_json(finished_run / "test.json")
    expected, ciders = test["captions"], [100 * test["CIDEr"][clip] for clip in test["captions"]]
    assert found["the clip"]["CIDEr"] == pytest.approx(ciders, abs=0.06)
    assert found["the clip"]["captions"] == expected
    assert [line.split("  ")[0] for line in output.splitlines()][-5:] == [*found]
    captioner = load_run(finished_run, torch.device("cpu"))[0]
    clips = torch.stack([read_frames(f"{flags[-1]}/{name}", 8, captioner.vit.preprocessing) for name in expected])
    changed = {"frames reversed": clips.flip(1), "frames of another clip": clips.roll(-3, 0),
               "the middle frame alone": clips[:, 4:5].expand_as(clips)}
    for name, frames in changed.items():
        assert list(found[name]["captions"].values()) == captioner.caption(frames), name


def test_a_shuffle_changes_the_order_and_nothing_else():
    for frames in (np.arange(2), np.arange(8)):
        for clip in range(20):
            shuffled = controls.shuffle(frames, clip)
            assert not np.array_equal(shuffled, frames) and sorted(shuffled) == list(frames)
    assert controls.shuffle(np.arange(1), 0) == [0]
