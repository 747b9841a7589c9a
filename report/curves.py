"""The curves of a run, drawn from its log.jsonl as plain SVG: loss, gates and validation scores.

Shapes: J adapted blocks.
"""

import math
from pathlib import Path

from common.errors import reading
from common.files import read_json_lines

COLOURS = ("#1f6fb4", "#d1495b", "#2a9d5c", "#8a6d1f", "#6b4fa0", "#555")
WIDTH, HEIGHT, LEFT, TOP, GAP = 250, 170, 52, 48, 62  # pixels: a panel, and the margins around it
RIGHT = {name: f"{name} right" for name in ("shapes", "motion_one", "motion_two")}  # scores on `shapes`
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" font-size="11" fill="#555"
font-family="Helvetica, Arial, sans-serif">
{}
</svg>"""


def text(x: float, y: float, words: str, style: str = "") -> str:
    """Words of ours: they are not escaped. x, y: pixels from the top left corner."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{words}</text>'


def draw_panel(title: str, unit: float, lines: dict[str, list[tuple[float, float]]], steps: int) -> str:
    """Lines {label: [(step, value), ...]} as an SVG. The axes end at `steps` and at the first multiple of `unit` above
    all values. The title has the colour of the page around it."""
    bottom, top = TOP + HEIGHT, unit * max(1, math.ceil(max(y for points in lines.values() for _, y in points) / unit))
    parts = [text(LEFT, TOP - 26, title, 'font-size="13" fill="currentColor"')]
    for i in range(5):
        y = bottom - HEIGHT * i / 4
        parts += [f'<path d="M{LEFT} {y:.1f}h{WIDTH}" stroke="currentColor" stroke-opacity="0.15"/>',
                  text(LEFT - 6, y + 4, f"{top * i / 4:.3g}", 'text-anchor="end"')]
    parts += [text(LEFT, bottom + 16, "0"), text(LEFT + WIDTH, bottom + 16, f"{steps} steps", 'text-anchor="end"')]
    for i, (label, points) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        pixels = " ".join(f"{LEFT + WIDTH * x / steps:.1f},{bottom - HEIGHT * y / top:.1f}" for x, y in points)
        parts += [f'<polyline points="{pixels}" fill="none" stroke="{colour}" stroke-width="1.8"/>',
                  text(LEFT + WIDTH * i / len(lines), TOP - 9, label, f'font-weight="bold" fill="{colour}"')]
    return SVG.format(LEFT + WIDTH + GAP, bottom + 34, "\n".join(parts))


def make_panels(rows: list[dict], first_block: int) -> list[tuple[str, float, dict]]:
    """Title, unit and lines of each panel: loss, mean gates and saturated shares of the L blocks, CIDEr, correct
    captions; what the rows of the log have of it. first_block: the number of the first adapted block."""
    train, val = ([row for row in rows if name in row] for name in ("loss", "val"))
    panels = [("training loss", 1, {"": [(row["step"], row["loss"]) for row in train]})]
    for title, name in ("mean gate of each adapted block", "gates"), ("saturated share of its gates", "saturated"):
        panels.append((title, 1, {str(first_block + i): [(row["step"], row[name][i]) for row in train]
                                  for i in range(len(train[0].get(name, ())))}))
    for title, unit, names in ("validation CIDEr", 50, {"": "CIDEr"}), ("correct validation captions, %", 100, RIGHT):
        panels.append((title, unit, {label: [(row["step"], 100 * row["val"][name]) for row in val]
                                     for label, name in names.items() if name in val[0]["val"]}))
    return [panel for panel in panels if panel[2]]


def draw_run(run_folder: Path, first_block: int) -> str:
    """The curves of a run for a page of any colour and width, an SVG each; nothing for a run that trained nothing.
    Raises InputError for a damaged log."""
    path = run_folder / "log.jsonl"
    with reading(path):
        rows = [row for _, row in read_json_lines(path)]
        panels = make_panels(rows, first_block) if {"loss", "val"} <= set().union(*rows) else []
        return "\n".join(draw_panel(*panel, steps=rows[-1]["step"]) for panel in panels)
