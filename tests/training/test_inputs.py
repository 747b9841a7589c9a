"""The cached inputs of a run: the space that they need is told, and checked, before a clip is decoded.

Reference: sizes by hand. A ViT of width 16 reads 64 pixels in patches of 16: 17 tokens, 2 blocks.
"""

import shutil
from types import SimpleNamespace

import pytest
import torch

from common.errors import InputError
from model import AdapterConfig, Captioner
from models.lm import CausalLM
from models.tokenizer import load_tokenizer
from models.vit import ViT
from training.inputs import cached_inputs
from video_data import batches as cache
from video_data.batches import cache_folder
from video_data.datasets import read_dataset

CPU = torch.device("cpu")
CLIP_FRAME = 3 * 64 * 64  # bytes
FRAMES = 6 * 4 * CLIP_FRAME  # 3 + 2 + 1 clips of 4 frames
FEATURES = 5 * 4 * 2 * 17 * 16 * 2  # bytes of 3 + 2 clips


@pytest.fixture
def captioner(backbones) -> Captioner:
    vit, lm = ViT.from_pretrained(backbones / "vit"), CausalLM.from_pretrained(backbones / "lm")
    config = AdapterConfig(queries=4, rank=4, heads=2, last_blocks=0, frames=4)
    return Captioner(vit, lm, load_tokenizer(backbones / "lm"), config)


@pytest.fixture
def args(tmp_path) -> SimpleNamespace:
    return SimpleNamespace(dataset="shapes", data=tmp_path / "shapes", cache=None, cache_features=True, frames=4,
                           candidate_frames=4, batch_size=2, micro_batch_size=None, workers=1,
                           precision="fp32")  # fmt: skip


def test_all_sizes_are_told_before_the_first_clip_is_decoded(args, captioner, capsys):
    """Frames of three splits and features of two in one line; nothing is told when everything is there."""
    dataset = read_dataset("shapes", args.data, (3, 2, 1))
    capsys.readouterr()
    caches = cached_inputs(args, dataset, captioner, {}, CPU)
    root = cache_folder("shapes", args.data)
    assert FRAMES == 294_912 and FEATURES == 21_760
    assert capsys.readouterr().out.startswith(f"cache: frames 294.9 kB, features 21.8 kB, go into {root}\ncache: frames ")
    stored = {path: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    assert sum(size for path, size in stored.items() if "-features-" in str(path)) == FEATURES
    assert sum(stored.values()) == FRAMES + FEATURES
    assert [caches[split].dtype.__name__ for split in ("train", "val", "test")] == ["uint16", "uint16", "uint8"]
    cached_inputs(args, dataset, captioner, {}, CPU)
    assert capsys.readouterr().out == ""

    args.cache_features, args.candidate_frames = False, 16  # of which a step draws 4
    caches = cached_inputs(args, dataset, captioner, {}, CPU)
    assert [len(caches[split].shape) for split in caches] == [4] * 3 and caches["train"].shape[0] == 16
    assert capsys.readouterr().out.startswith(f"cache: frames 589.8 kB, go into {root}\ncache: frames ")


def test_features_of_more_frames_than_a_step_draws(args, captioner, capsys):
    """6 candidates of a training clip, of which a step draws 4. Reference: the captioner on the cached frames."""
    args.candidate_frames = 6
    dataset = read_dataset("shapes", args.data, (3, 2, 1))
    features = cached_inputs(args, dataset, captioner, {}, CPU)
    size = (3 * 6 + 2 * 4) * 2 * 17 * 16 * 2  # bytes of 3 and of 2 clips
    assert f"features {size / 1000:.1f} kB" in capsys.readouterr().out
    args.cache_features = False
    frames = cached_inputs(args, dataset, captioner, {}, CPU)
    for split, count in {"train": 6, "val": 4}.items():
        outputs = captioner.block_outputs(torch.tensor(frames[split][1])[None])[0]
        assert features[split].shape == outputs.shape == (count, 2, 17, 16)
        stored = torch.tensor(features[split][1]).view(torch.bfloat16)
        torch.testing.assert_close(stored, outputs, rtol=2**-7, atol=1e-3)  # a batch rounds otherwise


def test_a_disk_without_space_for_features_is_an_error_before_the_first_clip_is_decoded(args, captioner, monkeypatch):
    """One byte less than all frames and features need, then just as much."""
    dataset, usage, decoded = read_dataset("shapes", args.data, (3, 2, 1)), type(shutil.disk_usage(args.data)), []
    decode = cache._decode_clips
    monkeypatch.setattr(cache, "_decode_clips", lambda *a: decoded.append(a) or decode(*a))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, FRAMES + FEATURES - 1))
    with pytest.raises(InputError, match=r"\.cache, frames 294\.9 kB, features 21\.8 kB: needs 316\.7 kB"):
        cached_inputs(args, dataset, captioner, {}, CPU)
    assert not decoded
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, FRAMES + FEATURES))
    cached_inputs(args, dataset, captioner, {}, CPU)
    assert len(decoded) == 3
