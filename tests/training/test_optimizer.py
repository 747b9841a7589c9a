"""Learning rates that are scaled with 1 / fan_in. References: the rule of the docstring, and torch's own AdamW."""

import pytest
import torch
from torch import nn

from qadapter import QAdapter
from training.optimizer import lr_scale, make_optimizer, set_learning_rate
from training.run import load_state


@pytest.mark.parametrize("width", [128, 384, 1152])
def test_which_tensors_are_scaled(width):
    """Matrices whose fan_in is the width D, or 2D: by 128 / fan_in. From rank r, and vectors: not at all."""
    adapter = QAdapter(width, 3, last_blocks=1)
    scales = {name: lr_scale(name, parameter) for name, parameter in adapter.named_parameters()}
    expected = {"blocks.0.q.weight": 128 / width, "blocks.0.kv.weight": 128 / width,
                "blocks.0.kv_change.weight": 128 / width, "blocks.0.gate.weight": 64 / width}
    assert scales == dict.fromkeys(scales, 1.0) | expected
    assert {"queries", "time_embed", "blocks.0.o.weight", "blocks.0.gate.bias", "norm.weight"} <= scales.keys()


def test_the_first_step_moves_an_output_alike_at_every_width():
    """Adam's first step is lr x the sign of the gradient: from zero weights and inputs of size 1 the output of a layer
    moves by lr x 128, whatever the width; without scaling, by lr x width."""
    for scaling, moves in (("fan-in", [1.28, 1.28, 1.28]), ("none", [1.28, 3.84, 11.52])):
        found = []
        for width in (128, 384, 1152):
            layer, x = nn.Linear(width, 1, bias=False), torch.ones(1, width)
            nn.init.zeros_(layer.weight)
            optimizer = make_optimizer(dict(layer.named_parameters()), scaling, weight_decay=0.0, gate_lr=1.0)
            set_learning_rate(optimizer, 0.01)
            layer(x).sum().backward()
            optimizer.step()
            found.append(-layer(x).item())
        assert found == pytest.approx(moves, rel=1e-4)


def test_gates_have_a_rate_of_their_own():
    """A factor of 0.1 on the weights and biases of gates, and of nothing else, with scaling and without."""
    trained = {f"adapter.{name}": p for name, p in QAdapter(384, 3, last_blocks=2).named_parameters()}
    trained["lm.blocks.0.gate.weight"] = nn.Parameter(torch.ones(4, 4))  # of a gated MLP, trained with --method full
    for scaling in ("fan-in", "none"):
        slow, usual = (make_optimizer(trained, scaling, 0.0, gate_lr).param_groups for gate_lr in (0.1, 1.0))
        ratios = {name: a["lr_scale"] / b["lr_scale"] for name, a, b in zip(trained, slow, usual, strict=True)}
        gates = [f"adapter.blocks.{i}.gate.{kind}" for i in (0, 1) for kind in ("weight", "bias")]
        assert ratios == pytest.approx(dict.fromkeys(trained, 1.0) | dict.fromkeys(gates, 0.1))


def test_without_scaling_it_is_adamw():
    """Three steps, seed 0, equal bit for bit."""
    layers, weights = [nn.Linear(300, 4), nn.Linear(300, 4)], []
    layers[1].load_state_dict(layers[0].state_dict())
    ours = make_optimizer(dict(layers[0].named_parameters()), "none", 0.1, 1.0)
    theirs = torch.optim.AdamW(layers[1].parameters(), 0.01, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    for layer, optimizer in zip(layers, (ours, theirs), strict=True):
        torch.manual_seed(0)
        for _ in range(3):
            set_learning_rate(ours, 0.01)
            optimizer.zero_grad()
            layer(torch.randn(5, 300)).square().sum().backward()
            optimizer.step()
        weights.append(layer.weight)
    assert weights[0].equal(weights[1])


def test_the_state_of_version_0_2_is_restored(tmp_path):
    """There the optimizer had one group, of the same tensors in the same order: the moments are equal bit for bit."""
    layer = nn.Linear(300, 4)
    old = torch.optim.AdamW(layer.parameters(), 0.01, fused=True)
    layer(torch.ones(1, 300)).sum().backward()
    old.step()
    torch.save({"optimizer": old.state_dict(), "step": 7, "best": 0.5}, tmp_path / "state.pt")
    new = make_optimizer(dict(layer.named_parameters()), "fan-in", 0.0, 1.0)
    assert load_state(tmp_path / "state.pt", new, torch.device("cpu")) == (7, 0.5)
    for parameter in layer.parameters():
        assert all(new.state[parameter][name].equal(old.state[parameter][name]) for name in ("exp_avg", "exp_avg_sq"))
