"""The comparison of widths: repeated channels, the training at each rate, its figures and its drawing."""

import json
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from bench import widths
from tests.scripts import ROOT, assert_one_line_error, read_log, run_forked
from training.optimizer import make_optimizer, set_learning_rate

DRAWING = ROOT / "docs/lr-widths.svg"


def test_layer_norm_of_repeated_channels():
    """Reference: LayerNorm's equation without repetition, in float64, seed 0, tolerance 1e-12."""
    features = 3 * torch.randn(2, 4, 3, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    mean, variance = features.mean(-1, keepdim=True), features.var(-1, correction=0, keepdim=True)
    expected = (features - mean) / (variance + 1e-5).sqrt()  # (B, T, L, P, D)
    repeated = widths.repeat_channels(features, 6)
    assert repeated.shape == (2, 4, 3, 5, 96)
    for chunk in F.layer_norm(repeated, [96]).split(16, dim=-1):
        torch.testing.assert_close(chunk, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scaling, factor", [("fan-in", 1), ("none", 3)])
def test_a_step_on_repeated_channels(scaling, factor):
    """With scaling a step moves a layer's output by as much as without repetition; without, R = 3 times as much.

    Reference: the step of the layer of D = 128, seed 0. Tolerance 1e-4 of the largest move: Adam's epsilon.
    """
    torch.manual_seed(0)
    x, target, moves = torch.randn(64, 128), torch.randn(64, 8), []
    weight = torch.randn(8, 128) / 128**0.5
    for repeats in (1, 3):
        layer, inputs = nn.Linear(128 * repeats, 8, bias=False), x.repeat(1, repeats)
        layer.weight.data = weight.repeat(1, repeats) / repeats  # the same outputs
        optimizer = make_optimizer(dict(layer.named_parameters()), scaling, weight_decay=0.0, gate_lr=1.0)
        set_learning_rate(optimizer, 1e-3)
        before = layer(inputs)
        (before - target).square().mean().backward()
        optimizer.step()
        moves.append((layer(inputs) - before).detach())
    torch.testing.assert_close(moves[1], factor * moves[0], rtol=0, atol=1e-4 * moves[1].abs().max().item())


def test_the_command_trains_as_the_training_script_does(tmp_path, monkeypatch):
    """Reference: the mean loss of the same three steps of train.py with the same seed and no token dropout; 5 digits of
    it are kept.

    A repeated ViT has other initial weights, hence another loss.
    """
    for name, value in {"LRS": {"fan-in": [1e-3, 2e-3]}, "REPEATS": (1, 3), "SEEDS": {"fan-in": (0,)}}.items():
        monkeypatch.setattr(widths, name, value)
    done = run_forked(widths, "--clips", 8, "--batch-size", 8, "--steps", 3, "--precision", "fp32",
                      "--data", tmp_path / "data", "--save", tmp_path / "widths.svg")  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, three = json.loads((tmp_path / "widths.json").read_text())["curves"]
    done = run_forked(train, "--dataset", "shapes", "--data", tmp_path / "data", "--shapes-sizes", 8, 1, 1, "--seed", 0,
                      "--cache-features", "--frames", 8, "--captions-per-clip", 1, "--batch-size", 8, "--epochs", 3,
                      "--lr", 2e-3, "--log-every", 1, "--precision", "fp32",
                      "--token-dropout", 0, "--out", tmp_path / "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [row["loss"] for row in read_log(tmp_path / "run") if "loss" in row]
    assert len(losses) == 3 and one["loss"]["0.002"] == pytest.approx(sum(losses) / 3, abs=6e-6)
    assert (one["width"], three["width"]) == (128, 384) and three["loss"] != one["loss"]
    tags = [element.tag.rpartition("}")[2] for element in ElementTree.parse(tmp_path / "widths.svg").iter()]
    assert tags.count("polyline") == tags.count("circle") == 2
    done = run_forked(widths, "--clips", 9, "--batch-size", 9, "--data", tmp_path / "data", "--save",
                      tmp_path / "no.svg")  # fmt: skip
    assert_one_line_error(done, "--clips 9", "only 8 training clips")


def test_more_clips_a_step_than_clips_are_refused(tmp_path):
    done = run_forked(widths, "--clips", 8, "--batch-size", 9, "--save", tmp_path / "widths.svg")
    assert_one_line_error(done, "--batch-size 9", "at most 8")


def test_documented_figures():
    """With scaling the best rates of all widths and seeds are within a factor of 2; without, they fall with the width.

    No best rate is its curve's lowest or highest. Reference: the losses in docs/lr-widths.json, of which
    docs/lr-widths.svg is the drawing.
    """
    results = json.loads(DRAWING.with_suffix(".json").read_text())
    best = {"fan-in": {}, "none": {}}
    for curve in results["curves"]:
        losses = {float(lr): loss for lr, loss in curve["loss"].items()}
        best_lr = min(losses, key=losses.__getitem__)
        assert min(losses) < best_lr < max(losses), curve
        best[curve["scaling"]][curve["width"], curve["seed"]] = best_lr
    assert max(best["fan-in"].values()) <= 2 * min(best["fan-in"].values())
    unscaled = [best["none"][width, 0] for width in (128, 384, 768)]
    assert unscaled == sorted(unscaled, reverse=True) and unscaled[0] >= 2 * unscaled[-1]
    assert DRAWING.read_text() == widths.draw(results)
