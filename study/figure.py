"""All ablations of the study in one figure, docs/ablations.svg: what each change costs or gains, from results/.

Each line of the figure is a row of a table. Its dot is the mean difference from the table's reference row, over the
seeds; its bar reaches one standard error to either side. What lies beyond the axis is an arrow at its end.
"""

import math
from html import escape

from study import tables

FIGURE = tables.ROOT / "docs/ablations.svg"
SCORE, TITLE = "motion", "Ablation: "
LEFT, RIGHT, LINE = 360, 680, 18  # pixels: where the axis begins and ends, the height of a row
LOWEST, HIGHEST = -30, 10  # points of the axis
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 {height}" font-family="Helvetica, Arial, sans-serif"
font-size="12" fill="#223">
<title>What each ablation changes</title>
<rect width="780" height="{height}" fill="#fff"/>
<text x="16" y="28">change of "motion right", points ± standard error</text>
"""


def x_of(points: float) -> float:
    """Where a difference stands on the axis, or the nearer end of that."""
    return LEFT + (RIGHT - LEFT) * (min(max(points, LOWEST), HIGHEST) - LOWEST) / (HIGHEST - LOWEST)


def draw_row(label: str, mean: float, error: float, y: int) -> list[str]:
    """A label, a dot with its bar or an arrow, and the difference in numbers; y: of the letters' feet, in pixels."""
    middle, x, is_out = y - 4, x_of(mean), not LOWEST <= mean <= HIGHEST
    mark = f"M{x - 4:.1f} {middle}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z"  # a dot
    if is_out:  # an arrow
        mark = f"M{x + 7} {middle - 4}l-7 4l7 4z" if mean < 0 else f"M{x - 7} {middle - 4}l7 4l-7 4z"
    bar = "" if is_out or math.isnan(error) else f"M{x_of(mean - error):.1f} {middle}H{x_of(mean + error):.1f}"
    return [f'<text x="{LEFT - 12}" y="{y}" text-anchor="end">{escape(label)}</text>',
            f'<path d="{mark}{bar}" fill="#1f6fb4" stroke="#1f6fb4"/>',
            f'<text x="{RIGHT + 12}" y="{y}">{tables.format_difference(mean, error)}</text>']


def draw_ablations() -> str:
    """The figure as SVG."""
    parts, y = [], 30
    for name, table in tables.CONTENT["tables"].items():
        if not table["title"].startswith(TITLE):
            continue
        rows = {row.label: tables.scores(row.best_runs, SCORE) for row in tables.read_rows(name) if row.best_runs}
        if (reference := rows.pop(table["reference"], None)) is None:
            continue
        y += LINE + 6
        title = escape(f"{table['title'].removeprefix(TITLE)}, instead of {table['reference']}")
        parts.append(f'<text x="16" y="{y}" font-weight="bold">{title}</text>')
        for label, values in rows.items():
            y += LINE
            parts += draw_row(label, *tables.compare(values, reference), y)
    ticks = range(LOWEST, HIGHEST + 1, 10)
    axis = [f'<path d="M{x_of(t):.0f} 36V{y + 6}" stroke="{"#888" if t == 0 else "#ddd"}"/>'
            f'<text x="{x_of(t):.0f}" y="28" text-anchor="middle">{t}</text>' for t in ticks]
    return HEAD.format(height=y + 16) + "\n".join([*axis, *parts, "</svg>\n"])
