"""`python -m report.curves RUN --save FILE.svg`: loss, gates and validation scores of a run, drawn from its log.jsonl.

The panels share the horizontal axis, steps. The picture is plain SVG without a plotting package.
"""

import math
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from common import cli
from common.errors import InputError
from common.files import replace_atomically
from common.run_log import check_output, read_log
from report.svg import COLOURS, document, line, text

WIDTH, HEIGHT, LEFT, TOP, GAP = 250, 170, 52, 48, 62  # pixels: a panel, and the margins around it


@dataclass(frozen=True)
class Panel:
    """Lines {label: [(step, value), ...]} on an axis from 0 to `top`."""

    title: str
    top: float
    lines: dict[str, list[tuple[int, float]]]


def make_panels(rows: list[dict], path: Path, first_block: int = 1) -> list[Panel]:
    """Loss, mean gates and saturated shares of each adapted block, CIDEr, correct captions; what the log has of it.

    first_block: the number of the first adapted block.
    """
    train = [row for row in rows if "loss" in row]
    val = [(row["step"], row["val"]) for row in rows if "val" in row]
    if not train or not val:
        raise InputError(f"{path}: expected rows of training and of validation")
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


def draw_panel(panel: Panel, left: float, top: float, steps: int) -> str:
    """One panel, whose axes begin at this left edge and end `steps` to the right; its upper edge is at `top`."""
    bottom = top + HEIGHT
    parts = [text(left, top - 26, panel.title, 'font-size="13" fill="currentColor"')]
    for i in range(5):
        y = bottom - HEIGHT * i / 4
        parts += [f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="currentColor" stroke-opacity="0.15"/>',
                  text(left - 6, y + 4, f"{panel.top * i / 4:.3g}", 'text-anchor="end"')]  # fmt: skip
    parts += [text(left, bottom + 16, "0"), text(left + WIDTH, bottom + 16, f"{steps} steps", 'text-anchor="end"')]
    x_label = left
    for colour, (label, points) in zip(cycle(COLOURS), panel.lines.items(), strict=False):
        pixels = [(left + WIDTH * step / steps, bottom - HEIGHT * min(1, y / panel.top)) for step, y in points]
        parts += [line(pixels, colour),
                  text(x_label, top - 9, label, f'font-weight="bold" fill="{colour}"')]  # fmt: skip
        x_label += 8 * len(label) + 12
    return "\n".join(parts)


def draw(panels: list[Panel], steps: int, background: str = "#fff") -> str:
    """All panels, three in a row, as one SVG."""
    columns = min(3, len(panels))
    width, height = LEFT + columns * (WIDTH + GAP), math.ceil(len(panels) / columns) * (HEIGHT + TOP + 34)
    parts = []
    for i, panel in enumerate(panels):
        row, column = divmod(i, columns)
        parts.append(draw_panel(panel, LEFT + column * (WIDTH + GAP), TOP + row * (HEIGHT + TOP + 34), steps))
    return document(width, height, parts, background)


def last_step(panels: list[Panel]) -> int:
    """Where the axes end."""
    return panels[0].lines[""][-1][0]


def curves_of(run: Path, first_block: int) -> str:
    """The curves of a run for a page of any colour and width, an SVG each; nothing for a run that trained nothing."""
    path = run / "log.jsonl"
    rows = [row for _, row in read_log(path)]
    if not (any("loss" in row for row in rows) and any("val" in row for row in rows)):
        return ""
    panels = make_panels(rows, path, first_block)
    return "\n".join(draw([panel], last_step(panels), "none") for panel in panels)


def main() -> None:
    parser = cli.Parser("Draws loss, gates and validation scores of a run.")
    parser.add_argument("run", type=cli.path, metavar="RUN", help="a folder that train.py made")
    parser.add_argument("--save", type=cli.path, required=True, metavar="FILE", help="the SVG to write")
    args = parser.parse_args()
    check_output("--save", args.save, args.run)
    path = args.run / "log.jsonl"
    panels = make_panels([row for _, row in read_log(path)], path)
    with replace_atomically(args.save) as file:
        file.write(draw(panels, last_step(panels)).encode())


if __name__ == "__main__":
    cli.run(main)
