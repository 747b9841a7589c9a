"""Learning rates that are scaled with 1 / fan_in. References: the rule of training/optimizer.py, torch's own AdamW."""

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
    """Adam's first step is lr x the sign of the gradient: from zero weights and inputs of size 1 the output of a layer
    moves by lr x 128, whatever the width."""
    for width in (128, 384, 1152):
        layer, x = nn.Linear(width, 1, bias=False), torch.ones(1, width)
        nn.init.zeros_(layer.weight)
        optimizer = make_optimizer(dict(layer.named_parameters()), weight_decay=0.0)
        set_learning_rate(optimizer, 0.01)
        layer(x).sum().backward()
        optimizer.step()
        assert -layer(x).item() == pytest.approx(1.28, rel=1e-4)


def test_otherwise_it_is_adamw():
    """Three steps of a layer that is not scaled, seed 0, equal bit for bit."""
    torch.manual_seed(0)
    layers, weights = [nn.Linear(100, 4), nn.Linear(100, 4)], []
    layers[1].load_state_dict(layers[0].state_dict())
    ours = make_optimizer(dict(layers[0].named_parameters()), 0.1)
    theirs = torch.optim.AdamW(layers[1].parameters(), 0.01, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    for layer, optimizer in zip(layers, (ours, theirs), strict=True):
        torch.manual_seed(0)
        for _ in range(3):
            set_learning_rate(ours, 0.01)
            optimizer.zero_grad()
            layer(torch.randn(5, 100)).square().sum().backward()
            optimizer.step()
        weights.append(layer.weight)
    assert weights[0].equal(weights[1])


def test_the_schedule():
    """Of 1,000 steps: 50 upward, the peak until half of all, then half a cosine to almost zero."""
    rates = [learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[:50] == pytest.approx([2 * (i + 1) / 50 for i in range(50)]) and rates[49:501] == [2.0] * 452
    assert rates[500:] == pytest.approx([1 + math.cos(math.pi * i / 500) for i in range(500)])
