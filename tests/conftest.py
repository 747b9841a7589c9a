"""What the tests share: where real videos, captions and models are, the folder that the environment variable
QADAPTER_REAL names; two tiny backbones, and the flags of a run of twelve steps with them.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pretrain
from metrics import meteor_data
from weights import read_safetensors, write_safetensors

torch.set_num_threads(1)  # for models this small a second thread costs more than it gives

QUICK = ["--clips", "12", "4", "6", "--batch-size", "4", "--epochs", "4", "--eval-every", "2", "--log-every", "1",
         "--workers", "1", "--device", "cpu", "--queries", "4", "--rank", "4", "--heads", "2", "--last-blocks", "0",
         "--captions-per-clip", "2", "--precision", "fp32"]  # fmt: skip


@pytest.fixture(scope="session")
def real() -> Path:
    if not os.environ.get("QADAPTER_REAL"):
        pytest.skip("QADAPTER_REAL is not set")
    return Path(os.environ["QADAPTER_REAL"]).resolve()


@pytest.fixture(scope="session")
def backbones(tmp_path_factory) -> Path:
    """Two tiny backbones, seed 0. The language model's weights are large: what it says depends on all that it reads."""
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
    drawn = {name: 0.3 * torch.randn(tensor.shape) for name, tensor in tensors.items() if "norm" not in name}
    write_safetensors(path, tensors | {name: tensor.half() for name, tensor in drawn.items()})
    meteor_data.load()  # for the processes that tests split off from this one
    return folder


@pytest.fixture(scope="session")
def flags(backbones, tmp_path_factory) -> list:
    data = tmp_path_factory.mktemp("data") / "shapes"
    return [*QUICK, "--vit", backbones / "vit", "--lm", backbones / "lm", "--data", data]
