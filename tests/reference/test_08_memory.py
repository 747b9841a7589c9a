"""The memory of a training step as `--plan` computes it on the meta device, against a real step on the CPU.

References: the tensors of that step, counted, within 1%; numbers by hand.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

import evaluate
from common.config import Config
from model import Captioner
from training import plan
from training.frozen_models import load_models

CPU, GPU = torch.device("cpu"), torch.device("cuda")
B, T, K, L = 4, 4, 3, 12
BASE = Config(batch_size=B, frames=T, captions_per_clip=K, queries=5, rank=8)
METHODS = {"no write-back": replace(BASE, last_blocks=1), "write-back": replace(BASE, last_blocks=0, write_back=True),
           **{method: replace(BASE, method=method) for method in ("linear", "lora", "lora-lm", "adapter", "st-adapter",
                                                                  "prompt", "full")}}
CASES = [(name, precision) for name in METHODS for precision in ("fp32", "bf16")
         if (name, precision) != ("full", "bf16")]


def make_captioner(backbones: Path, config: Config, precision: str = "fp32", meta: bool = False) -> Captioner:
    config = replace(config, precision=precision, plan=meta)
    return evaluate.make_captioner(config, {"vit": backbones / "vit", "lm": backbones / "lm"})


@pytest.mark.parametrize("name, precision", CASES)
def test_the_planned_peak_is_that_of_a_step(backbones, name, precision):
    config = METHODS[name]
    planned = make_captioner(backbones, config, precision, meta=True)
    found = plan.step_memory(planned, config, CPU, L)
    assert plan.format_vit(config, planned, 3).startswith("ViT: ")  # on single images again
    captioner = make_captioner(backbones, config, precision)
    size, trained = captioner.vit.config.image_size, captioner.trained().values()
    frames, labels = torch.randint(256, (B, T, 3, size, size), dtype=torch.uint8), torch.randint(3, 400, (B, K, L))
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    known = [frames, labels, *captioner.parameters(), *captioner.buffers(), *(p.grad for p in trained)]
    with plan.MemoryCounter(known) as counter:
        captioner(frames, labels).backward()
    assert found["activations"] == pytest.approx(counter.peak, rel=0.01)


def test_the_counter_counts_what_lives():
    """By hand: float32 tensors of 1000 numbers on the meta device; views are the memory of what they view."""
    x = torch.empty(1000, device="meta")
    with plan.MemoryCounter([x]) as counter:
        y = 2 * x
        view, excluded_view = y[10:], x.view(10, 100)
        assert counter.bytes == counter.peak == 4000
        z = (y + 1) + 1  # three at once
        assert (counter.bytes, counter.peak) == (8000, 12000)
        del y, view, z, excluded_view
        assert counter.bytes == 0
    assert _get_current_dispatch_mode() is None


def test_a_model_chooses_as_on_the_cpu():
    """A tensor on the meta device says that it is on the CPU."""
    x = torch.empty(3, device="meta")
    with plan.PretendDevice(is_cpu=True):
        assert x.device.type == "cpu"
    assert x.device.type == "meta"


def test_what_a_step_consists_of(backbones):
    """By hand, from the shapes: a ViT of width 16 on 17 tokens of 64 x 64 pixels, of whose 2 blocks one is adapted."""
    config = METHODS["no write-back"]
    captioner = make_captioner(backbones, config, "bf16", meta=True)

    def step(device=CPU, processes=1, **fields) -> dict[str, int]:
        return plan.step_memory(captioner, replace(config, **fields), device, L, processes)

    whole = step()
    frozen = [*captioner.vit.parameters(), *captioner.lm.parameters()]
    assert whole["frozen weights"] == 2 * sum(tensor.numel() for tensor in frozen)
    trained = sum(tensor.numel() for tensor in captioner.trained().values())
    assert whole["trained weights, gradients, moments"] == 16 * trained
    assert whole["batches"] == 3 * B * T * 3 * 64**2 and whole["fragmentation"] == round(0.15 * whole["activations"])
    assert step(cache_features=True)["batches"] == 3 * B * T * 17 * 16 * 2
    micro, gpu = step(micro_batch_size=1), step(GPU, micro_batch_size=1)
    assert micro["batches"] == whole["batches"] and micro["activations"] < 0.4 * whole["activations"]
    assert gpu["batches"] == T * 3 * 64**2 and gpu["fragmentation"] == 0
    assert step(processes=3) == step(batch_size=math.ceil(B / 3))


@pytest.mark.parametrize("image_size, vit_blocks", [(None, None), ((32,), 1)])
def test_models_without_weights_have_the_shapes_of_loaded_ones(backbones, image_size, vit_blocks):
    """References: both models as training loads them; tied heads are one tensor in both."""
    folders, shapes = {"vit": backbones / "vit", "lm": backbones / "lm"}, []
    for meta in (True, False):
        config = Config(precision="bf16", image_size=image_size, vit_blocks=vit_blocks, plan=meta)
        pair, _ = load_models(config, folders)
        shapes.append({name: (tensor.shape, tensor.dtype) for name, tensor in pair.named_parameters()})
        assert all(tensor.is_meta == meta for tensor in pair.parameters())
    assert shapes[0] == shapes[1]
