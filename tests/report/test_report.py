"""The page of a run and the picture of a clip: what stands in them is what the model did.

References: the captioner and `QAdapter.attention` called by hand; the standard library's JSON, base64 and HTML parser;
torchvision's decoders.
"""

import base64
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.io import ImageReadMode, decode_image

import evaluate
from common.cli import printable
from report import build, page, show, strips
from report.inside import Inside, look_inside
from tests.scripts import assert_one_line_error, run_forked
from tests.tiny import CONFIGS, clips, make

MARKUP = "</script><img src=x onerror=alert(1)>\u2028 & \"quoted\""


class Page(HTMLParser):
    """The text of each element that matters, and every tag with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.data, self.texts, self.open = [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self.open and self.open[-1] == ("script", {"type": "application/json", "id": "data"}):
            self.data += data
        self.texts.append(data)


def decode(uri: str) -> torch.Tensor:
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return decode_image(torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.uint8), ImageReadMode.RGB)


# ------------------------------------------------------------------------------- what is inside


@pytest.mark.parametrize("name", ["no write-back", "write-back"])
def test_the_attention_and_gates_are_those_of_the_adapter(name):
    """Model seed 0, frames seed 1, exactly: the mean over the heads, clip by clip; each query's sums to 1."""
    captioner, frames = make(name), clips(2, 4, 1)
    found = look_inside(captioner, frames)
    with torch.no_grad(), captioner.adapter.looking_inside():
        captioner.encode(frames)
    attention = captioner.adapter.attention(4)  # (L, B, h, N, T, P)
    for b in range(2):
        assert np.array_equal(found.attention[b], attention[:, b].mean(1).numpy())
        assert np.array_equal(found.gates[b], captioner.adapter.gates[:, b].numpy())
    assert found.attention.shape == (2, 3, 5, 4, 5) and found.patches().shape == (2, 3, 5, 4, 2, 2)
    assert np.array_equal(found.patches().reshape(2, 3, 5, 4, 4), found.attention[..., 1:])  # after a class token
    if not captioner.adapter.blocks[0].self_attention:
        np.testing.assert_allclose(found.attention.sum((-2, -1)), 1, atol=1e-6)


def test_other_methods_have_nothing_inside():
    for name, config in CONFIGS.items():
        assert (look_inside(make(name), clips(1, 4, 2)) is None) == (config.method != "qadapter")


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("gate", ["channel", "patch"])
def test_other_gates_are_means_over_channels_or_not_shown(gate, frames, monkeypatch):
    """Model seed 3, frames seed 4: gates of channels (B, N, D) become a number a query; those of tokens are of none,
    also where there are as many tokens as queries, 5."""
    monkeypatch.setitem(CONFIGS, "other gate", replace(CONFIGS["no write-back"], gate=gate))
    captioner = make("other gate", 3)
    found = look_inside(captioner, clips(2, frames, 4))
    if gate == "channel":
        assert np.allclose(found.gates, captioner.adapter.gates.mean(-1).transpose(0, 1), atol=1e-6)
    else:
        assert found.gates is None


# -------------------------------------------------------------------------------------- the page


def test_a_strip_holds_the_frames_side_by_side():
    """Small frames stay as they are; large ones are resized to 96 pixels. JPEG, within 12 of 255 on smooth frames."""
    ramp = torch.linspace(0, 255, 64).expand(3, 64, 64)
    small = torch.stack([ramp, 255 - ramp]).to(torch.uint8)  # (2, 3, 64, 64)
    found = decode(strips.jpeg_uri(strips.film_strip(small)))
    assert found.shape == (3, 64, 128)
    assert (found.float() - torch.cat(list(small.float()), dim=2)).abs().max() < 12
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    found = decode(strips.jpeg_uri(strips.film_strip(large)))
    assert found.shape == (3, 96, 192) and abs(found[0, 50, 48].item() - ramp[0, 0, 32].item()) < 12


def test_the_strip_of_many_frames_is_a_part_of_them():
    """1,000 frames, each of one grey: 64 of them from the first to the last, since a JPEG is at most 65,500 wide."""
    frames = (torch.arange(1000) // 4).to(torch.uint8)[:, None, None, None].expand(1000, 3, 64, 64)
    strip = strips.film_strip(frames)
    assert strip.shape == (3, 64, 64 * 64) and (strip[0, 0, 0], strip[0, 0, -1]) == (0, 249)
    assert decode(strips.jpeg_uri(strip)).shape == strip.shape
    attention = np.zeros((1, 1, 1, 1000, 4), dtype=np.float32)
    attention[..., 0] = np.arange(1000) / 999
    data = page.clip_data(page.ClipRow("a", "", len(frames), "b", inside=Inside(attention, None)))
    assert data["frames"] == 64 and data["shape"] == [1, 1, 64, 2]
    levels = np.frombuffer(base64.b64decode(data["attention"]), np.uint8).reshape(64, 4)[:, 0]
    assert np.abs(levels - strip[0, 0, ::64].double().numpy() * 255 / 249.75).max() <= 1.5  # each frame has its own


def test_attention_is_a_byte_a_patch_by_each_querys_own_maximum():
    attention = np.random.default_rng(5).random((2, 3, 4, 2, 2))
    levels = np.frombuffer(base64.b64decode(page.encode_attention(attention)), np.uint8).reshape(attention.shape)
    expected = 255 * attention / attention.max((2, 3, 4), keepdims=True)
    assert np.abs(levels - expected).max() <= 0.5 and (levels.max((2, 3, 4)) == 255).all()


def test_foreign_text_is_only_text():
    """Captions, references, ids, flags and titles with markup: no new tag, no way out of the JSON, the same words."""
    strip = build.make_strip(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    clip = page.clip_data(page.ClipRow(MARKUP, strip, 2, MARKUP, [MARKUP], {"CIDEr": 0.5}))
    plain = page.clip_data(page.ClipRow("a", strip, 2, "b", ["c"], {"CIDEr": 0.5}))
    found = Page(page.format_page(MARKUP, {MARKUP: MARKUP}, [clip], 4, {MARKUP: 0.1}, MARKUP))
    expected = Page(page.format_page("a", {"b": "c"}, [plain], 4, {"d": 0.1}, "e"))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in expected.tags]
    assert found.tags == expected.tags
    stored = json.loads(found.data)["clips"][0]
    assert (stored["id"], stored["caption"], stored["references"]) == (MARKUP, MARKUP, [MARKUP])
    assert found.texts.count(MARKUP) == 6  # twice the title, a setting's name and value, a score's name, the signature


def test_the_page_needs_no_network():
    """No address, no script or style of another file; the page's own rule forbids them too."""
    text = page.format_page("a", {}, [], 1, {})
    policy = next(attributes["content"] for tag, attributes in Page(text).tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; img-src data:")
    assert "http://" not in text and "https://" not in text and "src=" not in text.partition("<body>")[2]


def test_a_name_that_is_no_unicode_is_escaped(tmp_path):
    page.write_page(tmp_path / "p.html", page.format_page("run\udcff", {"out": "run\udcff"}, [], 1, {}))
    assert (tmp_path / "p.html").read_text(encoding="utf-8").count("run\\udcff") == 3


def test_settings_are_those_that_are_set(tmp_path):
    """0 is a value: --last-blocks 0 means all blocks."""
    flags = {"seed": 0, "last_blocks": 0, "gate_bias": 0.0, "mllm": None, "compile": False, "cache_features": True}
    (tmp_path / "config.json").write_text(json.dumps({"flags": flags, "trained": 1234}))
    assert build.settings_of(tmp_path) == {"trained": "1,234", "seed": 0, "last_blocks": 0, "gate_bias": 0.0,
                                           "cache_features": True}  # fmt: skip


def test_numbers_of_parameters_that_were_changed_by_hand_are_shown_as_they_are(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"trained": 1234, "total": [3], "flags": {}}))
    assert build.settings_of(tmp_path) == {"trained": "1,234", "total": [3]}


def test_the_attention_of_large_models_is_shown_for_fewer_clips():
    """3 blocks, 5 queries, 4 frames of 5 tokens: 300 bytes a clip."""
    captioner = make("no write-back")
    assert build.max_inside(captioner, 4) == 50 and build.max_inside(make("linear"), 4) == 0
    assert build.max_inside(captioner, 4 * 1000) == build.MAX_INSIDE_BYTES // 300_000


def test_half_of_the_shown_clips_are_the_worst():
    scores = [3, 1, 4, 1.5, 9, 2, 6, 5, 3.5, 8]
    assert build.select_clips(scores, 4) == [0, 1, 2, 3]  # 1 and 1.5, then the first two others
    assert build.select_clips(scores, 6) == [0, 1, 2, 3, 4, 5]
    assert build.select_clips(scores[::-1], 4) == [0, 1, 6, 8]
    assert build.select_clips(scores, 50) == list(range(10))


def test_a_page_of_large_frames_shows_fewer_clips():
    """600 clips of 12 frames of noise, 96 pixels, as large as JPEGs get: the strips fit; the worst are shown first."""
    noise = torch.randint(0, 256, (12, 3, 96, 96), generator=torch.Generator().manual_seed(6), dtype=torch.uint8)
    size = len(build.make_strip(noise))
    scores = list(np.random.default_rng(7).permutation(600))
    found = build.select_strips(scores, [noise.numpy()] * 600)
    assert build.MAX_STRIP_BYTES - 2 * size < len(found) * size <= build.MAX_STRIP_BYTES
    assert list(found) == build.select_clips(scores, len(found))
    strip = next(iter(found.values()))
    rows = [page.clip_data(page.ClipRow(f"clip {i}", found[i], 12, "word " * 10, ["word " * 10] * 20)) for i in found]
    attention = np.zeros((1, 1, 1, 1, build.MAX_INSIDE_BYTES), dtype=np.float32)
    rows[0]["attention"] = page.encode_attention(attention[..., None])
    assert len(page.format_page("a", {}, rows, 4, {})) < 15e6
    assert build.has_room([{"strip": strip}] * 10) and not build.has_room([{"strip": strip}] * 1000)
    small = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert list(build.select_strips(scores, [small.numpy()] * 600)) == build.select_clips(scores, 500)
    assert not build.has_room([{"strip": ""}] * 500)


def test_the_page_of_a_run_is_about_its_test_split(finished_run, tmp_path):
    """The page that training wrote, and the same by `evaluate.py --report`, but for its name."""
    text = (finished_run / "report.html").read_text()
    data, test = json.loads(Page(text).data), json.loads((finished_run / "test.json").read_text())
    assert {clip["id"]: clip["caption"] for clip in data["clips"]} == test["captions"]
    captioner, flags = evaluate.load_run(finished_run)
    dataset = evaluate.read_dataset("shapes", Path(flags["data"]), flags["shapes_sizes"], splits=["test"])
    for clip, shown in zip(dataset.splits["test"], data["clips"], strict=True):
        frames = evaluate.read_frames(clip.path, flags["frames"], captioner.vit.preprocessing)
        assert shown["references"] == list(clip.captions) and list(shown["scores"])[0] == "CIDEr"
        strip = decode(shown["strip"]).float()
        assert strip.shape == (3, 64, 64 * len(frames)) and (strip - torch.cat(list(frames), 2)).abs().mean() < 12
        inside = look_inside(captioner, frames[None])
        levels = np.frombuffer(base64.b64decode(shown["attention"]), np.uint8).reshape(*shown["shape"], -1)
        patches = inside.patches()[0]
        assert np.abs(levels / 255 * patches.max((2, 3, 4), keepdims=True) - patches).max() < 0.003
        assert np.allclose(shown["gates"], inside.gates[0], atol=1e-3)
    mean = sum(clip["scores"]["CIDEr"] for clip in data["clips"]) / len(data["clips"])
    assert mean == pytest.approx(test["scores"]["CIDEr"], abs=1e-3)
    assert "training loss" in text and "validation CIDEr" in text and f"{100 * test['scores']['CIDEr']:.1f}" in text
    done = run_forked(evaluate, finished_run, "--report", tmp_path / "r.html", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.html").read_text() == text


def test_the_page_of_videos(finished_run, flags, tmp_path):
    videos = sorted((Path(flags[-1]) / "test").glob("*.mp4"))[:2]
    (tmp_path / "bad.mp4").write_bytes(b"bad")
    done = run_forked(evaluate, finished_run, "--video", *videos, tmp_path / "bad.mp4", "--report", tmp_path / "r.html")
    assert done.returncode == 2
    data = json.loads(Page((tmp_path / "r.html").read_text()).data)
    assert [printable(f"{clip['id']}: {clip['caption']}") for clip in data["clips"]] == done.stdout.splitlines()
    assert all(clip["scores"] == {} and "attention" in clip for clip in data["clips"])
    text = (tmp_path / "r.html").read_text()
    assert "2 of 2 videos</title>" in text and f"<th>not captioned</th><td>{tmp_path / 'bad.mp4'}</td>" in text


# ----------------------------------------------------------------------------------- the picture


def test_what_is_read_is_bright():
    """Attention by hand: a query with gate 1 reads one patch, one with gate 0 another, which stays dark."""
    attention = np.zeros((1, 1, 2, 3, 5), dtype=np.float32)  # a class token and 2 x 2 patches
    attention[0, 0, 0, 1, 2] = attention[0, 0, 1, 2, 4] = 1
    inside = Inside(attention, np.array([[[1.0, 0.0]]], dtype=np.float32))
    bright = show.light(inside)
    assert bright.shape == (1, 3, 2, 2) and bright[0, 1, 0, 1] == 1
    assert torch.isclose(bright, torch.tensor(show.DARK)).sum() == 11
    frames = torch.full((3, 3, 8, 8), 200, dtype=torch.uint8)
    picture = show.draw_clip(frames, "a caption", inside, 4)
    side, top = show.HEIGHT, show.MARGIN + show.HEIGHT + show.LINE
    assert picture.shape == (3, 2 * show.MARGIN + 2 * (side + show.LINE), 2 * show.MARGIN + 3 * side)
    row = picture[0, top : top + side, show.MARGIN : -show.MARGIN]
    assert row[side // 4, side + 3 * side // 4] == 200 and row[side // 4, side // 4] == 30
    assert (picture[:, show.MARGIN : show.MARGIN + side, show.MARGIN : -show.MARGIN] == 200).all()


def test_the_picture_of_many_frames_shows_a_part_of_them():
    """100 frames of one grey each: the 64 of a strip, from the first to the last, and their attention."""
    frames = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    attention = np.zeros((1, 1, 1, 100, 5), dtype=np.float32)
    attention[:, :, :, -1] = 1
    picture = show.draw_clip(frames, "a caption", Inside(attention, None), 1)
    assert picture.shape[2] == 64 * show.HEIGHT + 2 * show.MARGIN
    shown, bright = (picture[0, show.MARGIN + top, show.MARGIN + show.HEIGHT // 2 : -show.MARGIN : show.HEIGHT].tolist()
                     for top in (0, show.HEIGHT + show.LINE))  # fmt: skip
    assert shown == strips.shown_frames(100) and bright[-1] == 99
    assert bright[:-1] == [round(show.DARK * grey) for grey in shown[:-1]]


def test_closed_gates_are_dark():
    attention = np.full((1, 1, 2, 1, 4), 0.25, dtype=np.float32)
    assert (show.light(Inside(attention, np.zeros((1, 1, 2), dtype=np.float32))) == show.DARK).all()


def test_a_long_caption_has_several_lines():
    assert show.draw_text("word " * 40, 480).shape == (3, 5 * show.LINE, 480)
    assert show.draw_text("word", 480).min() < 100 and show.draw_text("", 480).min() == 255


def test_the_picture_of_a_video(finished_run, flags, tmp_path):
    video = sorted((Path(flags[-1]) / "test").glob("*.mp4"))[0]
    done = run_forked(evaluate, finished_run, "--video", video, "--show", tmp_path / "c.png")
    assert done.returncode == 0, done.stderr
    captioner, flags = evaluate.load_run(finished_run)
    frames = evaluate.read_frames(video, flags["frames"], captioner.vit.preprocessing)
    expected = show.draw_clip(frames, captioner.caption(frames[None])[0], look_inside(captioner, frames[None]), 1)
    assert torch.equal(decode_image(str(tmp_path / "c.png")), expected)
    for words, text in ((["--show", "x.png"], "--show"), (["--video", video, video, "--show", "x.png"], "one video"),
                        (["--report", finished_run / "log.jsonl"], "a file of the run"),
                        (["--video", video, "--report", video], "one of the videos")):  # fmt: skip
        assert_one_line_error(run_forked(evaluate, finished_run, *words), text)
    assert not Path("x.png").exists()
