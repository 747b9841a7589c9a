"""The page of a run and the picture of a clip: what stands in them is what the model did.

References: the equations at the top of qadapter.py, one head at a time; the captioner called by hand; the standard
library's JSON, base64 and HTML parser; torchvision's decoders; XML.
"""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.io import ImageReadMode, decode_image

import evaluate
from common.config import Config
from common.errors import printable
from model import Captioner, CausalLM, Pair, ViT, load_tokenizer
from qadapter import HEADS, naive_gated_cross_attention
from report import curves, page, show
from report.attention import AttentionMaps, record_attention
from tests.scripts import ROOT, read_log, run_forked, succeed
from video_data.video import read_frames

TINY_VIT, TINY_LM = ROOT / "backbones/tiny-vit", ROOT / "backbones/tiny-lm"
MARKUP = "</script><img src=x onerror=alert(1)>\u2028 & \"quoted\" \udcff"
NO_ADAPTER = SimpleNamespace(adapter=None)


def make(**fields) -> Captioner:
    """An untrained captioner, seed 0."""
    torch.manual_seed(0)
    pair = Pair(ViT.from_pretrained(TINY_VIT), CausalLM.from_pretrained(TINY_LM))
    return Captioner(pair, load_tokenizer(TINY_LM), Config(queries=5, rank=8, frames=3, **fields))


class Page(HTMLParser):
    """Every tag with its attributes, all texts, and the clips in the JSON."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts = [], []
        self.handle_starttag, self.handle_data = lambda *tag: self.tags.append(tag), self.texts.append
        self.feed(text)
        self.clips = json.loads(next(text for text in self.texts if text.startswith('{"clips"')))["clips"]


def decode_strip(uri: str) -> torch.Tensor:
    data = torch.frombuffer(bytearray(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))), dtype=torch.uint8)
    return decode_image(data, ImageReadMode.RGB).float()


# --------------------------------------------------------------------------------- what is recorded


@torch.no_grad()
@pytest.mark.parametrize("dropout", [0, 0.5])  # no token is hidden while nothing is trained
def test_the_attention_is_that_of_the_equations(dropout):
    """Frames of seed 1, to 1e-5; each query's weights sum to 1, with write-back too."""
    captioner = make(token_dropout=dropout)
    frames = torch.randint(256, (2, 3, 3, 64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    captioner.measure_channels(frames)
    maps, adapter = record_attention(captioner, frames), captioner.adapter
    for b, outputs in enumerate(captioner.block_outputs(frames)):  # (T, L, P, D)
        queries = adapter.queries
        for i, (block, z) in enumerate(zip(adapter.blocks, outputs.unbind(1), strict=True)):
            y = (F.layer_norm(z, z.shape[-1:]) - block.mean) / block.std  # (T, P, D)
            x = torch.cat([y + adapter.time_embed[:, None], y - torch.cat([y[:1], y[:-1]])], -1).flatten(0, 1)
            wk = torch.cat([block.kv.weight, block.kv_change.weight], -1).chunk(2)[0]  # (r, 2D)
            for h, (hq, hk) in enumerate(zip(block.q.weight.chunk(HEADS), wk.chunk(HEADS), strict=True)):
                weights = ((block.norm(queries) @ hq.T) @ (x @ hk.T).T / len(hq) ** 0.5).softmax(-1)  # (N, T*P)
                torch.testing.assert_close(maps.weights[i, b, h].flatten(1), weights, rtol=0, atol=1e-5)
            queries = naive_gated_cross_attention(block, queries, z, adapter.time_embed)
    assert torch.equal(maps.gates, adapter.last_gates) and maps.patches().shape == (3, 5, 3, 4, 4)
    written = record_attention(make(write_back=True), frames).weights.sum((-2, -1))
    torch.testing.assert_close(written, torch.ones(3, 2, HEADS, 5), rtol=0, atol=1e-5)
    assert not any(block._forward_hooks for block in adapter.blocks)


def test_a_mask_hides_tokens():
    """A variant whose queries see the first frame only; another method."""
    captioner, frames = make(), torch.zeros(1, 3, 3, 64, 64).byte()
    for block in captioner.adapter.blocks:
        block.mask = lambda z: torch.arange(3 * 17)[None] < 17  # (1, T*P)
    maps = record_attention(captioner, frames)
    assert not maps.weights[..., 1:, :].any() and (maps.weights[..., 0, :] > 0).all()
    assert record_attention(make(method="linear"), frames) is None


# -------------------------------------------------------------------------------------- the page


def test_a_strip_shows_64_of_many_frames():
    """1,000 frames of one grey each, from the first to the last; 96 pixels a side at most."""
    frames = (torch.arange(1000) // 4).to(torch.uint8)[:, None, None, None].expand(1000, 3, 128, 128)
    entry = page.page_entry(NO_ADAPTER, {"video": "a", "caption": "b"}, frames, 0)
    strip = decode_strip(entry["strip"])
    assert strip.shape == (3, 96, 64 * 96) and (strip[0, 50, 48], strip[0, 50, -48], entry["aspect"]) == (0, 249, 64)


def test_foreign_text_is_only_text_and_needs_no_network(tmp_path):
    """Captions, references, ids, flags and titles with markup: no new tag, no way out of the JSON, the same words."""
    pages = []
    for text in ("plain", MARKUP):
        (tmp_path / "config.json").write_text(json.dumps({"config": {text: text}, "trained": 1, "total": 2}))
        entry = page.page_entry(NO_ADAPTER, {"video": text, "caption": text}, torch.zeros(2, 3, 8, 8).byte(), 0)
        entry |= {"references": [text], "scores": {"CIDEr": 0.5}}
        page.write_page(tmp_path / "p.html", tmp_path, text, [entry], 4, {text: text}, {text: 0.1}, text)
        pages.append(Page((tmp_path / "p.html").read_text(encoding="utf-8")))
    assert pages[0].tags == pages[1].tags and "default-src 'none'; img-src data:" in str(pages[1].tags)
    stored = pages[1].clips[0]
    assert (stored["id"], stored["caption"], stored["references"]) == (MARKUP, MARKUP, [MARKUP])
    shown = [text for text in pages[1].texts if MARKUP.replace("\udcff", "\\udcff") in text]
    assert len(shown) == 6  # twice the title, a setting's name and value, a score's name, the signature


def test_a_page_of_many_large_frames_stays_small():
    """Frames of noise, as large as JPEGs get, and a full share of attention; the worst clip comes first."""
    noise = torch.randint(0, 256, (12, 3, 96, 96), generator=torch.Generator().manual_seed(6), dtype=torch.uint8)
    entries = []
    while page.fits_another(entries):
        entries.append(page.page_entry(NO_ADAPTER, {"video": "a", "caption": "word " * 250}, noise, 0))
    assert len(json.dumps(entries)) < 15e6
    assert len(entries) < 500 and not page.fits_another([{"strip": ""}] * 500)
    assert page.order_clips([3, 1, 4, 0, 2]) == [3, 0, 1, 4, 2]


def test_the_page_of_a_run_is_about_its_test_split(finished_run, flags):
    text = (finished_run / "report.html").read_text()
    clips, test = Page(text).clips, json.loads((finished_run / "test.json").read_text())
    assert {clip["id"]: clip["caption"] for clip in clips} == test["captions"]
    captioner, _ = evaluate.load_run(finished_run, torch.device("cpu"))
    for clip in clips:
        frames = read_frames(Path(flags[-1]) / clip["id"], 8, captioner.vit.preprocessing)
        assert len(clip["references"]) == 6 and list(clip["scores"])[0] == "CIDEr"
        assert (decode_strip(clip["strip"]) - torch.cat(list(frames), 2)).abs().mean() < 12
        maps = record_attention(captioner, frames[None])
        patches = maps.patches().flatten(3).numpy()  # (L, N, T, side * side)
        levels = np.frombuffer(base64.b64decode(clip["attention"]), np.uint8).reshape(patches.shape) / 255
        assert np.abs(levels * patches.max((2, 3), keepdims=True) - patches).max() < 0.003
        assert np.allclose(clip["gates"], maps.gates[:, 0], atol=1e-3)
    assert np.mean([clip["scores"]["CIDEr"] for clip in clips]) == pytest.approx(test["scores"]["CIDEr"], abs=1e-3)
    assert f"<td>{100 * test['scores']['CIDEr']:.1f}</td>" in text and "<th>last_blocks</th><td>0</td>" in text


def test_the_curves_are_those_of_the_log(finished_run):
    """A point for each row; losses at their heights, to 1e-4; demo/ has no log."""
    svg = ElementTree.fromstring(f"<a>{curves.draw_run(finished_run, 5)}</a>")
    lines = [element.get("points").split() for element in svg.iter() if "polyline" in element.tag]
    losses = np.array([row["loss"] for row in read_log(finished_run) if "loss" in row])
    assert [len(points) for points in lines] == [len(losses)] * 5 + [3] * 4  # five of two blocks, three validations
    heights = [np.ceil(losses.max()) - float(point.split(",")[1]) for point in lines[0]]
    np.testing.assert_allclose(heights, losses, atol=1e-4)
    assert curves.draw_run(ROOT / "demo", 4) == ""


def test_videos_get_a_page_and_a_picture(finished_run, flags, tmp_path):
    videos = sorted((Path(flags[-1]) / "test").glob("*.mp4"))[:2]
    (tmp_path / "bad.mp4").write_bytes(b"bad")
    done = run_forked(evaluate, finished_run, "--video", *videos, tmp_path / "bad.mp4", "--report", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert [printable(f"{clip['id']}: {clip['caption']}") for clip in Page(text).clips] == done.stdout.splitlines()
    assert "2 of 2 captions</title>" in text and f"captioned</th><td>{tmp_path}/bad.mp4</td>" in text
    succeed(evaluate, finished_run, "--video", videos[0], "--show", tmp_path / "c.png")
    captioner, _ = evaluate.load_run(finished_run, torch.device("cpu"))
    frames = read_frames(videos[0], 8, captioner.vit.preprocessing)
    expected = show.draw_clip(frames, captioner.caption(frames[None])[0], record_attention(captioner, frames[None]), 1)
    assert torch.equal(decode_image(str(tmp_path / "c.png")), expected)


# ----------------------------------------------------------------------------------- the picture


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_what_is_not_read_fades(gate):
    """Attention by hand: a query reads one patch, by its gate; one with gate 0 another, fades to white by three
    quarters. The long caption has two lines."""
    weights = torch.zeros(1, 1, 4, 2, 3, 5)  # a class token and 2 x 2 patches
    weights[:, :, :, 0, 1, 2] = weights[:, :, :, 1, 2, 4] = 1
    maps, frames = AttentionMaps(weights, torch.tensor([[[gate, 0.0]]]), (2, 2)), torch.full((3, 3, 8, 8), 200).byte()
    picture = show.draw_clip(frames, "ten words " * 5, maps, 4)
    side, top = show.HEIGHT, show.MARGIN + show.HEIGHT + 2 * show.LINE
    row = picture[0, top : top + side, show.MARGIN : -show.MARGIN]
    assert picture.shape == (3, 2 * show.MARGIN + 2 * side + 3 * show.LINE, 2 * show.MARGIN + 3 * side)
    assert row[side // 4, side + 3 * side // 4] == (200 if gate else 241) and row[side // 4, side // 4] == 241
