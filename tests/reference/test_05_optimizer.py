"""Learning rates that are scaled with 1 / fan_in. Reference: the rule of training/optimizer.py."""

import math

import pytest
import torch
from torch import nn

from common.config import Config
from qadapter import QAdapter
from training.optimizer import learning_rate, lr_scale, make_optimizer, set_learning_rate


@pytest.mark.parametrize("width", [128, 384, 1152])
def test_which_tensors_are_scaled(width):
    """Matrices whose fan_in is the width D: by 128 / D. Gates read 2D, and have a tenth of the rate, also their biases.
    From rank r, and vectors: not at all."""
    trained = {f"adapter.{name}": p for name, p in QAdapter(width, 3, Config(last_blocks=1)).named_parameters()}
    trained["lm.blocks.0.gate.weight"] = nn.Parameter(torch.ones(4, 4))  # of a gated MLP, trained with --method full
    scales = {name: lr_scale(name, parameter) for name, parameter in trained.items()}
    expected = {f"adapter.blocks.0.{name}.weight": 128 / width for name in ("q", "kv", "kv_change")}
    expected |= {"adapter.blocks.0.gate.weight": 0.1 * 64 / width, "adapter.blocks.0.gate.bias": 0.1}
    assert scales == pytest.approx(dict.fromkeys(scales, 1.0) | expected)
    assert {"adapter.queries", "adapter.time_embed", "adapter.blocks.0.o.weight"} <= scales.keys()


def test_the_first_step_moves_an_output_alike_at_every_width():
    """AdamW's first step is lr x (the sign of the gradient + weight_decay x the weight), here 50 x 0.01: for inputs of
    size 1 the output of a layer moves by lr x 128 x 1.5, whatever the width."""
    for width in (128, 384, 1152):
        layer, x = nn.Linear(width, 1, bias=False), torch.ones(1, width)
        nn.init.constant_(layer.weight, 0.01)
        optimizer = make_optimizer(dict(layer.named_parameters()), weight_decay=50.0)
        set_learning_rate(optimizer, 0.01)
        (before := layer(x)).sum().backward()
        optimizer.step()
        assert (before - layer(x)).item() == pytest.approx(1.92, rel=1e-4)


def test_the_schedule():
    """Of 1,000 steps: 50 upward, the peak until half of all, then half a cosine to almost zero."""
    rates = [learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[:50] == pytest.approx([2 * (i + 1) / 50 for i in range(50)]) and rates[49:501] == [2.0] * 452
    assert rates[500:] == pytest.approx([1 + math.cos(math.pi * i / 500) for i in range(500)])
