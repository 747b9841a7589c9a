"""docs/study-TABLE.svg: the scores of a table's rows, a small dot for each seed and a large one for the mean."""

import statistics

from report.svg import COLOURS, document, text

PANELS = {"CIDEr": None, "shapes": 100, "motion": 100}  # the right end of each axis; None: as needed
WIDTH, LABELS, LEFT, GAP, TOP, STEP = 210, 230, 12, 36, 44, 24  # pixels: a panel, the rows' names, margins, a row


def draw_panel(name: str, values: list[list[float]], left: float) -> list[str]:
    """One score: an axis from 0, and the dots of each row."""
    top = PANELS[name] or 100 * max(1, -(-max(map(max, values)) // 100))
    bottom = TOP + STEP * len(values)
    parts = [text(left, TOP - 22, name, 'font-size="13" fill="currentColor"')]
    for i in range(5):
        x = left + WIDTH * i / 4
        parts += [f'<path d="M{x:.1f} {TOP - 8}V{bottom}" stroke="#ddd"/>',
                  text(x, bottom + 14, f"{top * i / 4:g}", 'text-anchor="middle"')]  # fmt: skip
    for i, row in enumerate(values):
        y, mean = TOP + STEP * (i + 0.5), statistics.mean(row)
        parts += [f'<circle cx="{left + WIDTH * value / top:.1f}" cy="{y:.1f}" r="3" fill="{COLOURS[0]}" '
                  'fill-opacity="0.35"/>' for value in row]  # fmt: skip
        parts += [f'<circle cx="{left + WIDTH * mean / top:.1f}" cy="{y:.1f}" r="4.5" fill="{COLOURS[0]}"/>',
                  text(left + WIDTH + 4, y + 4, f"{mean:.1f}", 'font-size="10"')]  # fmt: skip
    return parts


def draw(rows: dict[str, dict[str, list[float]]]) -> str:
    """{row: {score: a value for each seed}} -> SVG."""
    parts = [text(LEFT, TOP + STEP * (i + 0.5) + 4, row.replace("`", ""), 'fill="currentColor"')
             for i, row in enumerate(rows)]  # fmt: skip
    for i, name in enumerate(PANELS):
        parts += draw_panel(name, [scores[name] for scores in rows.values()], LEFT + LABELS + i * (WIDTH + GAP))
    return document(LEFT + LABELS + len(PANELS) * (WIDTH + GAP), TOP + STEP * len(rows) + 24, parts)
