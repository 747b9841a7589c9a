"""The page of a run in a browser. References: Chromium's DOM, styles and pixels; the data that the page was made of.

Skipped where no Chromium is installed.
"""

import html
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from report import page
from report.attention import AttentionMaps

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
MARKUP = "<img src=x onerror=\"document.body.className='hacked'\">.mp4"
ATTENTION = torch.rand(2, 1, 1, 3, 4, 6, generator=torch.Generator().manual_seed(8))  # (J, B, h, N, T, P)
PROBE = """
const result = [];
const shown = () => [...document.querySelectorAll("article .numbers")].map((x) => x.textContent.split("  \u00b7")[0]);
const buttons = [...document.querySelectorAll("article button")];
const set = (id, value, event) =>
  Object.assign(document.getElementById(id), {{ value }}).dispatchEvent(new Event(event));
try {{ {} }} catch (error) {{ result.push(String(error)); }}
document.title = JSON.stringify(result);
"""


@pytest.fixture
def browse(tmp_path):
    """A function that opens a page of four clips, the second with attention, runs a probe in it, and returns what it
    pushed to `result`."""
    (tmp_path / "config.json").write_text(json.dumps({"config": {"lr": 0.005}, "trained": 1, "total": 2}))
    entries, frames = [], torch.zeros(4, 3, 96, 96, dtype=torch.uint8)
    for name, caption, score in (("one", "a red ball", 2.0), ("two", "a blue ball", 0.5), (MARKUP, MARKUP, 1.0),
                                 ("four", "100% red", 3.0)):
        entry = page.page_entry(SimpleNamespace(adapter=None), {"video": name, "caption": caption}, frames, 0)
        entries.append(entry | {"references": [f"reference of {name}"], "scores": {"CIDEr": score}})
    entries[1] |= page.encode_attention(AttentionMaps(ATTENTION, torch.full((2, 1, 3), 0.25), (2, 3)), [0, 1, 2, 3])
    path = tmp_path / "page.html"
    page.write_page(path, tmp_path, "a title", entries, 4, {}, {"CIDEr": 1.5}, "signature")
    text = path.read_text()

    def run(probe: str) -> list:
        path.write_text(text.replace("</body>", f"<script>{PROBE.format(probe)}</script></body>"))
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                   f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{path}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120)
        return json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))

    return run


def test_clips_are_sorted_and_searched(browse):
    """Worst first to begin with; best first, the order of the dataset, a word of a caption, of a reference, none."""
    found = browse("""result.push(document.body.className + document.images.length, shown());
    set("order", "CIDEr|-1", "change"); result.push(shown());
    set("order", "|1", "change"); result.push(shown());
    set("search", " RED ", "input"); result.push(shown());
    set("search", "reference of two", "input"); result.push(shown(), document.getElementById("count").textContent);
    set("search", "zebra", "input"); result.push(shown());""")
    assert found == ["4",  # images; the markup in a name has made none, and has not run
                     ["two", MARKUP, "one", "four"], ["four", "one", MARKUP, "two"], ["one", "two", MARKUP, "four"],
                     ["one", "four"], ["two"], "1 of 4 clips", []]


def test_what_a_query_does_not_read_fades(browse):
    """Query 3 after block 5 by a click: white over what it does not read, by its own maximum; another click
    removes it."""
    title, size, alpha, *states = browse("""const canvas = document.querySelector("canvas");
    const pressed = () => buttons.findIndex((b) => b.getAttribute("aria-pressed") == "true");
    buttons[5].click();
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    result.push(buttons[5].title, [canvas.width, canvas.height], [...pixels].filter((_, i) => i % 4 == 3), pressed());
    buttons[1].click(); result.push(pressed());
    buttons[1].click(); result.push(pressed(), canvas.width);""")
    assert title == "query 3 after block 5, gate 0.25" and size == [12, 2] and states == [5, 1, -1, 0]
    read = ATTENTION[1, 0, 0, 2].reshape(4, 2, 3).numpy()  # (T, rows, columns)
    expected = 0.75 * 255 * (1 - read / read.max()).transpose(1, 0, 2).reshape(2, 12)
    assert np.abs(np.reshape(alpha, (2, 12)) - expected).max() <= 1.5
