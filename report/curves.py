"""The curves of a run, drawn from its log.jsonl: loss, gates and validation scores, as plain SVG."""

import math
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from common.run_log import read_log
from report.svg import COLOURS, document, line, text

WIDTH, HEIGHT, LEFT, TOP, GAP = 250, 170, 52, 48, 62  # pixels: a panel, and the margins around it


@dataclass(frozen=True)
class Panel:
    """Lines {label: [(step, value), ...]} on an axis from 0 to `top`."""

    title: str
    top: float
    lines: dict[str, list[tuple[int, float]]]


def make_panels(rows: list[dict], first_block: int) -> list[Panel]:
    """Loss, mean gates and saturated shares of each adapted block, CIDEr, correct captions; what the log has of it.

    first_block: the number of the first adapted block.
    """
    train = [row for row in rows if "loss" in row]
    val = [(row["step"], row["val"]) for row in rows if "val" in row]
    top = max(1, math.ceil(max(row["loss"] for row in train)))
    panels = [Panel("training loss", top, {"": [(row["step"], row["loss"]) for row in train]})]
    for title, name in ("mean gate of each adapted block", "gates"), ("saturated share of its gates", "saturated"):
        lines = {f"{first_block + i}": [(row["step"], row[name][i]) for row in train if i < len(row.get(name, []))]
                 for i in range(len(train[0].get(name, [])))}  # fmt: skip
        panels += [Panel(title, 1, lines)] if lines else []
    cider = [(step, 100 * scores["CIDEr"]) for step, scores in val]
    panels.append(Panel("validation CIDEr", max(50, 50 * math.ceil(max(y for _, y in cider) / 50)), {"": cider}))
    names = [name for name in ("shapes right", "motion_one right", "motion_two right") if name in val[-1][1]]
    lines = {name.removesuffix(" right"): [(step, 100 * scores[name]) for step, scores in val if name in scores]
             for name in names}  # fmt: skip
    return panels + ([Panel("correct validation captions, %", 100, lines)] if lines else [])


def draw_panel(panel: Panel, steps: int) -> str:
    """One panel as SVG; its horizontal axis ends at `steps`."""
    bottom = TOP + HEIGHT
    parts = [text(LEFT, TOP - 26, panel.title, 'font-size="13" fill="currentColor"')]
    for i in range(5):
        y = bottom - HEIGHT * i / 4
        parts += [f'<path d="M{LEFT} {y:.1f}h{WIDTH}" stroke="currentColor" stroke-opacity="0.15"/>',
                  text(LEFT - 6, y + 4, f"{panel.top * i / 4:.3g}", 'text-anchor="end"')]  # fmt: skip
    parts += [text(LEFT, bottom + 16, "0"), text(LEFT + WIDTH, bottom + 16, f"{steps} steps", 'text-anchor="end"')]
    x_label = LEFT
    for colour, (label, points) in zip(cycle(COLOURS), panel.lines.items(), strict=False):
        pixels = [(LEFT + WIDTH * step / steps, bottom - HEIGHT * min(1, y / panel.top)) for step, y in points]
        parts += [line(pixels, colour),
                  text(x_label, TOP - 9, label, f'font-weight="bold" fill="{colour}"')]  # fmt: skip
        x_label += 8 * len(label) + 12
    return document(LEFT + WIDTH + GAP, TOP + HEIGHT + 34, parts, "none")


def curves_of(run: Path, first_block: int) -> str:
    """The curves of a run for a page of any colour and width, an SVG each; nothing for a run that trained nothing or
    has no log. Raises InputError for a damaged log."""
    path = run / "log.jsonl"
    rows = [row for _, row in read_log(path)] if path.exists() else []
    if not (any("loss" in row for row in rows) and any("val" in row for row in rows)):
        return ""
    panels = make_panels(rows, first_block)
    steps = panels[0].lines[""][-1][0]
    return "\n".join(draw_panel(panel, steps) for panel in panels)
