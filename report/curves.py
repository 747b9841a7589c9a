"""The curves of a run, drawn from its log.jsonl as plain SVG: loss, gates and validation scores."""

import math
from itertools import cycle
from pathlib import Path

from common.errors import reading
from common.files import read_json_lines

COLOURS = ("#1f6fb4", "#d1495b", "#2a9d5c", "#8a6d1f", "#6b4fa0", "#555")
RIGHT = "shapes right", "motion_one right", "motion_two right"  # scores on `shapes`
PANEL = """<figure><figcaption>{title}{labels}</figcaption>
<div style="--top: '{top:g}'; --steps: '{steps} steps'">
<svg viewBox="0 0 {steps} {top}" preserveAspectRatio="none">{curves}</svg></div></figure>"""  # page.css draws the axes


def draw_panel(title: str, unit: float, lines: dict[str, list[tuple[float, float]]], steps: int) -> str:
    """Lines {label: [(step, value), ...]} as an SVG with a title. The axes end at `steps` and at the first multiple of
    `unit` above all values. An SVG's y points down, so it is counted from the top."""
    top = unit * max(1, math.ceil(max(y for points in lines.values() for _, y in points) / unit))
    labels = curves = ""
    for (label, points), colour in zip(lines.items(), cycle(COLOURS)):
        labels += f' <b style="color: {colour}">{label}</b>'
        pixels = " ".join(f"{x},{top - y:.5g}" for x, y in points)
        curves += f'<polyline points="{pixels}" stroke="{colour}"/>'
    return PANEL.format(title=title, labels=labels, top=top, steps=steps, curves=curves)


def make_panels(rows: list[dict], first_block: int) -> list[tuple[str, float, dict]]:
    """Title, unit and lines of each panel: loss, mean gates and saturated shares of the adapted blocks, CIDEr, correct
    captions; what the rows of the log have of it. first_block: the number of the first adapted block."""
    train, val = ([row for row in rows if name in row] for name in ("loss", "val"))
    of_captions = [(row["step"], row["loss"]) for row in train if row["phase"] == "captions"]
    panels = [("training loss per token", 1, {"": of_captions})] if of_captions else []
    for title, name in ("mean gate after block", "gates"), ("saturated gates after block", "saturated"):
        panels.append((title, 1, {str(first_block + i): [(row["step"], row[name][i]) for row in train]
                                  for i in range(len(train[0].get(name, ())))}))
    for title, unit, names in ("validation", 50, ["CIDEr"]), ("validation, % right", 100, RIGHT):
        panels.append((title, unit, {name.removesuffix(" right"): [(row["step"], 100 * row["val"][name]) for row in val]
                                     for name in names if name in val[0]["val"]}))
    return [panel for panel in panels if panel[2]]


def draw_run(run_folder: Path, first_block: int) -> str:
    """The curves of a run for a page of any colour and width, an SVG each; nothing for a run that trained nothing, or
    that comes without its log, as demo/ does. Raises InputError for a damaged log."""
    path = run_folder / "log.jsonl"
    if not path.exists():
        return ""
    with reading(path):
        rows = read_json_lines(path)
        panels = make_panels(rows, first_block) if {"loss", "val"} <= set().union(*rows) else []
        return "\n".join(draw_panel(*panel, steps=rows[-1]["step"]) for panel in panels)
