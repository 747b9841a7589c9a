"""What a run will take, and the cached inputs of a run. References: the batches and cache files of real runs, and the
captioner on the cached frames. The plan's memory is in tests/reference/test_08_memory.py."""

import re
import shutil
from dataclasses import replace

import pytest
import torch

from common.config import Config, parse_args
from common.errors import InputError
from model import MAX_CAPTION_TOKENS, MLLM, Captioner
from tests.models.test_mllm_checkpoints import make_folder
from tests.reference.test_08_memory import make_captioner
from tests.tiny import Letters, prompt_of_letters
from training import plan
from training.inputs import cached_inputs, plan_caches
from video_data import shapes
from video_data.batches import epoch_batches
from video_data.datasets import VideoDataset, read_dataset

CPU = torch.device("cpu")


@pytest.mark.parametrize("clips, batch_size, epochs", [(12, 4, 3), (13, 4, 3), (5, 5, 1), (7, 2, 10)])
def test_steps_are_those_of_the_batches(clips, batch_size, epochs):
    """Reference: epoch_batches itself. Each clip has 2 captions, of which a step shows 3."""
    config = Config(batch_size=batch_size, captions_per_clip=3, epochs=(2, epochs, 1))
    batches, steps = list(epoch_batches(clips, batch_size, epochs + 3, seed=0)), plan.count_steps(config, clips)
    passes = 3 * sum(map(len, batches)) / (2 * clips) * epochs / (epochs + 3)
    expected = f"epochs: 2 of words, {epochs} of captions, 1 of CIDEr; {passes:.2f} "
    assert steps == len(batches)
    assert f"{steps} steps of {batch_size} clips; {expected}" in plan.format_steps(config, steps, 2 * clips)
    assert plan.count_steps(replace(config, method="none"), clips) == 0
    with pytest.raises(InputError, match="--batch-size"):
        plan.count_steps(replace(config, epochs=(2, 1)), batch_size - 1)


# ------------------------------------------------------------------------------- cached inputs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> VideoDataset:
    shapes.make_dataset(root := tmp_path_factory.mktemp("inputs"), (3, 2, 1))
    return read_dataset("shapes", root)


@pytest.mark.parametrize("cache_features", [False, True])
def test_caches_are_those_of_the_plan_and_hold_block_outputs(cache_features, dataset, backbones, tmp_path, capsys):
    """All sizes are said in one line before the first clip is decoded; with everything there nothing is said. Features
    are the captioner's block outputs, at most one rounding to bf16 apart."""
    data = shutil.copytree(dataset.splits["train"][0].path.parents[1], tmp_path / "shapes")  # with a cache of its own
    config = Config(data=data, frames=4, queries=4, rank=4, last_blocks=0, precision="fp32", batch_size=2,
                    cache_features=cache_features)
    captioner = make_captioner(backbones, config)
    capsys.readouterr()
    caches = cached_inputs(config, dataset, captioner, {})
    planned, said = plan_caches(config, dataset, captioner, {}), capsys.readouterr().out
    sizes = {kind: sum(len(cache) * cache.clip_bytes for cache in group.values()) for kind, group in planned.items()}
    texts = [f"{kind} {plan.format_bytes(size)}" for kind, size in sizes.items() if size]
    assert said.startswith(f"cache: {', '.join(texts)}, go into {tmp_path / 'shapes/.cache'}\n")
    stored = sum(path.stat().st_size for path in (tmp_path / "shapes/.cache").rglob("*") if path.is_file())
    assert stored == sum(sizes.values()) and (sizes["features"] > 0) == cache_features
    assert [len(caches[split][0]) for split in ("train", "val", "test")] == [config.stored_frames, 4, 4]
    cached_inputs(config, dataset, captioner, {})
    assert capsys.readouterr().out == ""
    if cache_features:
        frames = cached_inputs(replace(config, cache_features=False), dataset, captioner, {})
        expected = captioner.block_outputs(torch.tensor(frames["val"][1])[None])[0]
        found = torch.tensor(caches["val"][1]).view(torch.bfloat16)
        torch.testing.assert_close(found, expected.bfloat16(), rtol=2**-7, atol=1e-3)
        config = replace(config, cache_features=False, method="none")
        assert "train" not in cached_inputs(config, dataset, captioner, {})


# ------------------------------------------------------------------------- the models of the presets


@pytest.mark.parametrize("dataset_name, device, name, gflop, features", [
    # Of a frame: 24 P D^2 + 4 P^2 D per block of P tokens, 2 P 3 p^2 D for the patches; the last three blocks' outputs.
    ("msvd", CPU, "smolvlm2-256m", 213.8, 3 * 1024 * 768 * 2),
    ("msrvtt", torch.device("cuda"), "internvl3.5-1b", 723.6, 3 * 1025 * 1024 * 2)])
def test_the_default_models_fit_at_their_presets(tmp_path, dataset, dataset_name, device, name, gflop, features):
    """FLOP and features by hand; 16 GB of memory, or 24 GB of a GPU, with the longest captions."""
    make_folder(tmp_path, name)
    config = parse_args(["--dataset", dataset_name, "--data", str(tmp_path)])
    mllm = MLLM.from_config(tmp_path).to(torch.bfloat16)
    mllm.prompt = prompt_of_letters
    with torch.device("meta"):
        captioner = Captioner(mllm, Letters(), config)
    lines = plan.format_plan(config, dataset, captioner, device, MAX_CAPTION_TOKENS + 1).splitlines()
    per_clip = plan.format_bytes(config.frames * features)
    pflop = 3 * config.frames * gflop / 1e6
    found = re.fullmatch(r"ViT: ([\d,]+) GFLOP per frame, (\S+) PFLOP per epoch, or once with --cache-features, which "
                         rf"stores {per_clip} per clip", lines[0])
    assert float(found[1]) == pytest.approx(gflop, abs=1) and float(found[2]) == pytest.approx(pflop, rel=0.01)
    assert float(re.search(r"([\d.]+) GB", lines[-1])[1]) < (16 if device == CPU else 24)
    assert "without its gradients" in plan.format_vit(replace(config, write_back=True), captioner, 3)
