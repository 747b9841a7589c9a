"""The page of a run in a browser. References: Chromium's DOM, styles and pixels; the data that the page was made of.

Skipped where no Chromium is installed.
"""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from report import build, page
from report.inside import Inside

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
MARKUP = "<img src=x onerror=\"document.body.className='hacked'\">.mp4"
PROBE = """
const result = [];
const names = () => [...document.querySelectorAll("article .numbers")].map((node) => node.textContent);
const shown = () => names().map((name) => name.split("  \u00b7")[0]);
const set = (id, value, event) => {{
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event(event));
}};
try {{ {} }} catch (error) {{ result.push(String(error)); }}
const output = Object.assign(document.createElement("pre"), {{ id: "result", textContent: JSON.stringify(result) }});
document.body.append(output);
"""


@pytest.fixture(scope="module")
def attention() -> np.ndarray:
    """(B, L, N, T, P) = (1, 2, 3, 4, 4), seed 8."""
    return np.random.default_rng(8).random((1, 2, 3, 4, 4), dtype=np.float32)


@pytest.fixture(scope="module")
def text(attention) -> str:
    """A page of four clips; the second has attention."""
    strip = build.make_strip(torch.zeros(4, 3, 96, 96, dtype=torch.uint8))
    inside = Inside(attention, np.full((1, 2, 3), 0.25, dtype=np.float32))
    clips = [
        page.clip_data(page.ClipRow(name, strip, 4, caption, [f"reference of {name}"], {"CIDEr": score}, found))
        for name, caption, score, found in (("one", "a red ball", 2.0, None), ("two", "a blue ball", 0.5, inside),
                                            (MARKUP, MARKUP, 1.0, None), ("four", "100% red", 3.0, None))
    ]  # fmt: skip
    curves = "<svg viewBox='0 0 364 252'></svg>" * 4
    return page.format_page("a run", {"lr": 0.005}, clips, 4, {"CIDEr": 1.5}, "signature", curves)


def browse(tmp_path, text: str, probe: str, link: str = "", *options: str) -> list:
    """Opens the page and runs a probe in it; -> what it pushed to `result`."""
    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", f"<script>{PROBE.format(probe)}</script></body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               *options, "--dump-dom", f"file://{path}{link}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search('<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(html.unescape(found[1]))


def test_clips_are_sorted_and_searched(tmp_path, text):
    """Worst first to begin with; best first, the order of the dataset, a word of a caption, of a reference, none."""
    probe = """result.push(document.body.className + document.images.length, shown());
    set("order", "CIDEr|-1", "change"); result.push(shown());
    set("order", "|1", "change"); result.push(shown());
    set("search", " RED ", "input"); result.push(shown());
    set("search", "reference of two", "input"); result.push(shown(), document.getElementById("count").textContent);
    set("search", "zebra", "input"); result.push(shown());"""
    name, *found = browse(tmp_path, text, probe)
    assert name == "4"  # images; the markup in a name has made none, and has not run
    assert found == [["two", MARKUP, "one", "four"], ["four", "one", MARKUP, "two"], ["one", "two", MARKUP, "four"],
                     ["one", "four"], ["two"], "1 of 4 clips", []]  # fmt: skip


def test_a_query_is_drawn_as_dark_as_it_does_not_read(tmp_path, text, attention):
    """Query 3 after block 5 by a click: opaque where it reads nothing, by its own maximum; another click removes it;
    of two queries only one is pressed."""
    probe = """const buttons = [...document.querySelectorAll("article button")];
    const pressed = () => buttons.map((b) => b.getAttribute("aria-pressed")).join();
    const canvas = document.querySelector("canvas");
    buttons[5].click();
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    result.push(buttons[5].title, [canvas.width, canvas.height], [...pixels].filter((_, i) => i % 4 == 3), pressed());
    buttons[1].click(); result.push(pressed());
    buttons[1].click(); result.push(pressed(), canvas.width);"""
    title, size, alpha, *states = browse(tmp_path, text, probe)
    assert title == "query 3 after block 5, gate 0.25" and size == [8, 2]
    read = attention[0, 1, 2].reshape(4, 2, 2)  # (T, side, side)
    expected = 0.85 * 255 * (1 - read / read.max()).transpose(1, 0, 2).reshape(2, 8)
    assert np.abs(np.reshape(alpha, (2, 8)) - expected).max() <= 1.5
    off = ["false"] * 6
    on = [",".join([*off[:i], "true", *off[i + 1 :]]) for i in (5, 1)]
    assert states == [*on, ",".join(off), 0]


@pytest.mark.parametrize(
    ("link", "clips", "query"),
    [("#two@2", ["two"], "query 2 after block 5, gate 0.25"), ("#100%25", ["four"], None), ("#100%", ["four"], None),
     ("#a@b@2", [], None)],
)  # fmt: skip
def test_a_link_searches_and_chooses_a_query(tmp_path, text, link, clips, query):
    probe = "result.push(shown(), document.querySelector('[aria-pressed=true]')?.title ?? null);"
    assert browse(tmp_path, text, probe, link) == [clips, query]


def test_nothing_is_wider_than_a_phone_and_buttons_can_be_hit(tmp_path, text):
    """At 360 pixels no right edge is beyond 360; buttons have the 24 pixels of WCAG 2.2, 2.5.8."""
    probe = """document.documentElement.style.width = "360px";
    const boxes = [...document.querySelectorAll("body *")].map((node) => node.getBoundingClientRect());
    result.push(Math.max(...boxes.map((box) => box.right)));
    const buttons = [...document.querySelectorAll("article button")].map((node) => node.getBoundingClientRect());
    result.push(Math.min(...buttons.map((box) => Math.min(box.width, box.height))));"""
    right, least = browse(tmp_path, text, probe)
    assert right <= 360 and least >= 24


def test_the_focus_is_not_behind_the_form(tmp_path, text):
    """Each button of a low page, focused from the last to the first, is below the form that stays at the top (WCAG
    2.2, 2.4.11)."""
    probe = """document.body.style.paddingBottom = "3000px";
    window.scrollTo(0, 3000);
    const form = document.getElementById("tools");
    for (const button of [...document.querySelectorAll("article button")].reverse()) {
      button.focus();
      result.push(button.getBoundingClientRect().top - form.getBoundingClientRect().bottom);
    }"""
    assert min(browse(tmp_path, text, probe, "", "--window-size=600,400")) >= 0


def test_a_dark_page_has_light_letters(tmp_path, text):
    """The brightness of page and letters, from 0 to 255 a channel, in both schemes."""
    probe = """const style = getComputedStyle(document.body);
    for (const colour of [style.backgroundColor, style.color])
      result.push(colour.match(/\\d+/g).slice(0, 3).reduce((sum, x) => sum + Number(x), 0) / 3);"""
    light_page, light_ink = browse(tmp_path, text, probe, "", "--blink-settings=preferredColorScheme=1")
    dark_page, dark_ink = browse(tmp_path, text, probe, "", "--blink-settings=preferredColorScheme=0")
    assert light_page > 200 > 100 > light_ink and dark_page < 50 < 200 < dark_ink
