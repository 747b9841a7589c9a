"""The parts of an SVG drawing that the figures share, without a plotting package."""

from collections.abc import Iterable

COLOURS = ("#1f6fb4", "#d1495b", "#2a9d5c", "#8a6d1f", "#6b4fa0", "#555")


def text(x: float, y: float, words: str, style: str = "") -> str:
    """Words of ours: they are not escaped. x, y: pixels from the top left corner."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{words}</text>'


def line(points: Iterable[tuple[float, float]], colour: str, style: str = "") -> str:
    """A line through points (x, y), in pixels from the top left corner."""
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.8" {style}/>'


def document(width: int, height: int, parts: Iterable[str], background: str = "#fff") -> str:
    """The parts on a page. Titles have the colour `currentColor`: black, or what a page around the drawing says."""
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="11" fill="#555" '
            'font-family="Helvetica, Arial, sans-serif">')  # fmt: skip
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="{background}"/>', *parts, "</svg>\n"])
