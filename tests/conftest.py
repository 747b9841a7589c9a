"""Shared fixtures: the folder of real files that the variable QADAPTER_REAL names, two tiny backbones, a short run."""

import os
from pathlib import Path

import pytest
import torch

import train
from metrics import meteor_data
from tests.scripts import TWELVE_STEPS, make_backbones, succeed
from video_data import shapes

torch.set_num_threads(1)  # for models this small a second thread costs more than it gains


@pytest.fixture(scope="session")
def real() -> Path:
    if not os.environ.get("QADAPTER_REAL"):
        pytest.skip("QADAPTER_REAL is not set")
    return Path(os.environ["QADAPTER_REAL"]).resolve()


@pytest.fixture(scope="session")
def backbones(tmp_path_factory) -> Path:
    """Two tiny backbones, as `make_backbones` writes them."""
    folder = make_backbones(tmp_path_factory.mktemp("backbones"))
    meteor_data.load()  # once, for all processes that tests fork
    return folder


@pytest.fixture(scope="session")
def flags(backbones, tmp_path_factory) -> list:
    """The flags of a run of twelve steps on 12, 4 and 6 clips, without token dropout; the last one is the dataset's
    folder."""
    shapes.make_dataset(data := tmp_path_factory.mktemp("data"), (12, 4, 6))
    return [*TWELVE_STEPS, "--vit", backbones / "vit", "--lm", backbones / "lm", "--token-dropout", 0, "--data", data]


@pytest.fixture(scope="session")
def finished_run(flags, tmp_path_factory) -> Path:
    """A run of twelve steps, and its output in stdout.txt."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    (out / "stdout.txt").write_text(succeed(train, *flags, "--out", out))
    return out
