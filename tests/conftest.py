"""Shared fixtures: the folder of real files that the variable QADAPTER_REAL names, two tiny backbones, a short run."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backbones import pretrain
from metrics import meteor_data
from models.safetensors import read_safetensors, write_safetensors
from tests.scripts import run_python

torch.set_num_threads(1)  # for models this small a second thread costs more than it gains

TWELVE_STEPS = ["--shapes-sizes", "12", "4", "6", "--batch-size", "4", "--epochs", "4", "--eval-every", "2",
                "--log-every", "1", "--workers", "1", "--device", "cpu", "--queries", "4", "--rank", "4",
                "--heads", "2", "--last-blocks", "0", "--captions-per-clip", "2", "--precision", "fp32",
                "--lr", "0.02"]  # fmt: skip


@pytest.fixture(scope="session")
def real() -> Path:
    if not os.environ.get("QADAPTER_REAL"):
        pytest.skip("QADAPTER_REAL is not set")
    return Path(os.environ["QADAPTER_REAL"]).resolve()


@pytest.fixture(scope="session")
def backbones(tmp_path_factory) -> Path:
    """Two tiny backbones, seed 0. The language model's weights are large: its text depends on all of its input."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        lm = replace(pretrain.LM, vocab=400, width=32, depth=2, heads=2, kv_heads=1, head_width=16, mlp_width=48)
        patch.setattr(pretrain, "VIT", replace(pretrain.VIT, width=16, depth=2, heads=2, mlp_width=32))
        patch.setattr(pretrain, "LM", lm)
        pretrain.pretrain_vit(folder / "vit", count=8, steps=1, batch_size=4, seed=0)
        pretrain.pretrain_lm(folder / "lm", count=300, steps=1, batch_size=2, seed=0)
    path = folder / "lm/model.safetensors"
    tensors = read_safetensors(path)
    random = {name: 0.3 * torch.randn(tensor.shape) for name, tensor in tensors.items() if "norm" not in name}
    write_safetensors(path, tensors | {name: tensor.half() for name, tensor in random.items()})
    meteor_data.load()  # once, for all processes that tests fork
    return folder


@pytest.fixture(scope="session")
def flags(backbones, tmp_path_factory) -> list:
    """The flags of a run of twelve steps on 12, 4 and 6 clips; the last one is the dataset's folder."""
    data = tmp_path_factory.mktemp("data") / "shapes"
    return [*TWELVE_STEPS, "--vit", backbones / "vit", "--lm", backbones / "lm", "--data", data]


@pytest.fixture(scope="session")
def finished_run(flags, tmp_path_factory) -> Path:
    """A run of twelve steps, and its output in stdout.txt."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    done = run_python("train.py", *flags, "--out", out)
    assert done.returncode == 0, done.stderr
    (out / "stdout.txt").write_text(done.stdout)
    return out
