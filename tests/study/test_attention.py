"""Where the queries look. References: the renderer, pixels of the clips, numbers by hand, `report.attention`, loops."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import qadapter
from common.files import read_json, write_json
from common.preprocessing import Preprocessing
from evaluate import load_run
from report.attention import record_attention
from study import attention
from tests import tiny
from tests.scripts import refuse, succeed
from video_data import load, read_frames, shapes

DRAWN = [1, 3, 5, 7, 9, 11, 13, 15]  # the frames of a clip that are read, if it is 8 of 16


@pytest.mark.parametrize("size, edge", [(64, 0), (48, 8)])
def test_the_parts_of_patches_are_those_that_the_renderer_draws(size, edge, tmp_path):
    """Three test clips, seed 3, with one and with two shapes; the ViT sees all 64 pixels or the central 48. Reference:
    means of the renderer's masks over each of 4 x 4 patches, tolerance 1e-6. Of all frames that are drawn, those of the
    masks are the most similar to the frames that are read from the file."""
    shapes.make_dataset(tmp_path, (1, 1, 3), seed=3)
    vit = SimpleNamespace(preprocessing=Preprocessing(size, 64), config=SimpleNamespace(grid=4))
    counts = set()
    for number, clip in enumerate(load("shapes", tmp_path)["test"]):
        rng = np.random.default_rng([3, 2, number])
        scene = shapes.draw_scene(rng)
        frames, masks = shapes.render(scene, np.linspace(0, 1, 16), rng)
        counts.add(len(scene))
        parts, patch = attention.covered_parts(clip.path, clip.captions, 3, 8, vit), size // 4
        for shape, t, p in np.ndindex(2, 8, 16):
            row, column = edge + p // 4 * patch, edge + p % 4 * patch
            mask = masks[shape, DRAWN[t], row : row + patch, column : column + patch] if shape < len(scene) else 0
            assert abs(parts[shape, t, p] - np.mean(mask)) < 1e-6
        read = read_frames(clip.path, 8, 64).permute(0, 2, 3, 1).numpy().astype(float)
        assert abs(read[:, None] - frames[None]).mean((2, 3, 4)).argmin(1).tolist() == DRAWN
    assert counts == {1, 2}


@pytest.mark.parametrize("fields", [{}, {"gate": "none"}], ids=str)
def test_what_is_measured_of_each_block(fields):
    """A tiny random captioner, seed 0, 3 clips, random parts. References: of g A and Q `naive_gated_cross_attention`,
    clip by clip; of the rest loops over the weights of `record_attention`. Tolerance 1e-4."""
    captioner = tiny.randomized("no write-back", **fields).eval()
    frames, parts = tiny.clips(3, tiny.T, seed=1), torch.rand(3, 2, tiny.T, 16, generator=torch.manual_seed(2))
    tokens, on_shapes, by_gate, pure, read, query, gates = attention.measure(captioner, frames, parts)
    maps, adapter = record_attention(captioner, frames), captioner.adapter
    with torch.no_grad():
        outputs = captioner.block_outputs(frames)  # (B, T, J, P, D)
    for j, i in np.ndindex(tiny.DEPTH, 3):
        shares, larger, counts = [], [], []
        for n in range(tiny.N):
            weights = maps.weights[j, i, :, n].double().numpy()  # (h, T, P)
            counts += [np.exp(-sum(w * np.log(w) for w in head.flatten())) for head in weights]
            mean = weights.mean(0)[:, 1:]
            of_each = [(mean * part.numpy()).sum() / mean.sum() for part in parts[i]]
            shares.append(sum(of_each))
            larger.append(max(of_each))
        g = maps.gates[j, i].numpy()
        found = [tokens[j, i], on_shapes[j, i], by_gate[j, i], pure[j, i]]
        expected = [np.mean(counts), np.mean(shares), np.average(shares, weights=g), sum(larger) / sum(shares)]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert (gates[j, i].numpy() == g).all() and (fields.get("gate") != "none" or (g == 1).all())
    if not fields:
        for i in range(3):
            q = adapter.queries.detach()
            for j, block in enumerate(adapter.blocks):
                with torch.no_grad():
                    new = qadapter.naive_gated_cross_attention(block, q, outputs[i, :, j], adapter.time_embed)
                expected = [(new - q).square().mean(), q.square().mean()]
                np.testing.assert_allclose([read[j, i], query[j, i]], expected, rtol=1e-4)
                q = new


def test_a_run_is_measured_with_and_without_each_block(finished_run, flags, monkeypatch, tmp_path):
    """A run of twelve steps with other gates, seed 0, on its 6 test clips. References: captions of the same captioner
    whose W_o of a block is zero, or whose gates are a bias alone; means computed here, within half of a printed digit.
    """
    run, captioner = shutil.copytree(finished_run, tmp_path / "run"), load_run(finished_run, torch.device("cpu"))[0]
    adapter, generator = captioner.adapter, torch.manual_seed(0)
    for block in adapter.blocks:
        block.gate.weight.data.normal_(generator=generator)
        block.gate.bias.data.fill_(-3)
    captioner.save(run / "best/adapter.safetensors")
    monkeypatch.setattr(shapes, "attribute_accuracy", lambda references, captions: print(json.dumps(captions)) or
                        {"shapes": 0.25, "motion": 0.125})
    lines = succeed(attention, run).splitlines()
    found, rows = [json.loads(line) for line in lines if line.startswith("{")], [line.split() for line in lines[3::2]]
    clips = load("shapes", flags[-1])["test"]
    frames = torch.stack([read_frames(clip.path, 8, captioner.vit.preprocessing) for clip in clips])
    parts = torch.stack([attention.covered_parts(clip.path, clip.captions, 0, 8, captioner.vit) for clip in clips])
    two = torch.tensor([len(shapes.parse_claims(clip.captions[0])) == 2 for clip in clips])
    assert lines[0] == f"6 clips, {two.sum()} of two shapes" and 0 < two.sum() < 6
    assert [row[0] for row in rows] == ["even", "block", "block", "mean"] and len(rows) == len(found)
    tokens, on_shapes, by_gate, pure, read, query, gates = attention.measure(captioner, frames, parts)
    area, captions = parts.sum(1).mean().item(), [captioner.caption(frames)]
    assert [float(x) for x in rows[0][1:6]] == pytest.approx([0.25, 0.125, 136, area, area], rel=0.005)
    for j, block in enumerate(adapter.blocks):
        kept = block.o.weight.detach().clone()
        block.o.weight.data.zero_()
        captions.append(captioner.caption(frames))
        block.o.weight.data.copy_(kept)
        count = round(tokens[j].mean().item())
        top = np.mean([sorted(clip.sum(0).flatten().tolist())[-count:] for clip in parts])
        expected = [tokens[j].mean(), on_shapes[j].mean(), by_gate[j].mean(), by_gate[j].mean() / area, top,
                    pure[j, two].mean(), gates[j].mean(), gates[j].std(0, correction=0).mean(),
                    (read[j].mean() / query[j].mean()) ** 0.5]
        assert [float(x) for x in rows[j + 1][4:]] == pytest.approx([*map(float, expected)], rel=0.005)
    for block, values in zip(adapter.blocks, gates, strict=True):
        block.gate.weight.data.zero_()
        block.gate.bias.data.fill_(torch.logit(values.mean()))
    captions.append(captioner.caption(frames))
    assert [[*one.values()] for one in found] == captions
    assert all(one != captions[0] for one in captions[1:])


def test_what_cannot_be_measured_is_one_line(finished_run, tmp_path):
    refuse(attention, [finished_run, "--seed", 1], "test/00000.mp4: .* --seed 1")
    config = read_json(finished_run / "config.json")
    config["config"]["dataset"] = "folder"
    run = shutil.copytree(finished_run, tmp_path / "run")
    write_json(run / "config.json", config)
    refuse(attention, [run], "on --dataset shapes")
