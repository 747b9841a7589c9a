"""One self-contained HTML page about a run: settings, curves, scores, and its clips with what the model saw.

The page needs no network and no framework. Captions, references and names of files are foreign text: in the markup they
are escaped, and the script makes nothing but text of them.

Letters: T frames, L adapted blocks, N queries.
"""

import base64
import html
import json
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

import numpy as np

from common.files import replace_atomically
from report.inside import Inside
from report.strips import shown_frames

HERE = Path(__file__).parent
CURVES = '<details open><summary>Training</summary><div class="curves">{}</div></details>'


@dataclass(frozen=True)
class ClipRow:
    """One clip of the page."""

    id: str
    strip: str  # the address of a picture of its T frames side by side
    frames: int  # T
    caption: str
    references: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)  # unscaled
    inside: Inside | None = None  # of this clip alone


def format_rows(rows: dict[str, object]) -> str:
    """A table of two columns."""
    cells = (f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
    return f"<table>{''.join(cells)}</table>"


def encode_attention(patches: np.ndarray) -> str:
    """Attention (L, N, T, side, side) -> base64 of a byte a patch of the frames that a strip shows; 255 is the most
    that the query reads in any frame."""
    largest = patches.max((-3, -2, -1), keepdims=True)
    levels = np.round(255 * patches / np.maximum(largest, 1e-12)).astype(np.uint8)
    levels = levels[:, :, shown_frames(patches.shape[2])]
    return base64.b64encode(levels.tobytes()).decode()


def clip_data(row: ClipRow) -> dict:
    """What the page's script needs of one clip."""
    scores = {name: round(value, 4) for name, value in row.scores.items()}
    count = len(shown_frames(row.frames))
    name = row.id.encode(errors="backslashreplace").decode()  # names of files need not be UTF-8
    data = {"id": name, "strip": row.strip, "frames": count,
            "caption": row.caption, "references": row.references, "scores": scores}  # fmt: skip
    if row.inside is not None:
        patches = row.inside.patches()[0]
        blocks, queries, _, side = patches.shape[:4]
        data |= {"attention": encode_attention(patches), "shape": [blocks, queries, count, side]}
        if row.inside.gates is not None:
            data["gates"] = np.round(row.inside.gates[0].astype(float), 3).tolist()
    return data


def read(name: str) -> str:
    """A part of the page that lies beside this file."""
    return (HERE / name).read_text(encoding="utf-8")


def format_page(title: str, settings: dict[str, object], clips: list[dict], first_block: int, scores: dict[str, float],
                signature: str = "", curves: str = "") -> str:  # fmt: skip
    """The page. clips: see `clip_data`; first_block: number of the first adapted block; curves: SVGs, or nothing."""
    data = {"clips": clips, "sortable": list(clips[0]["scores"]) if clips else [], "first": first_block}
    shown = format_rows({name: f"{100 * value:.1f}" for name, value in scores.items()})
    return Template(read("page.html")).substitute(
        title=html.escape(title),
        css=read("page.css"),
        scores=f'{shown}<p class="signature">{html.escape(signature)}</p>' if scores else "",
        settings=format_rows(settings),
        curves=CURVES.format(curves) if curves else "",
        data=json.dumps(data).replace("<", "\\u003c"),
        script=read("page.js"),
    )


def write_page(path: Path, page: str) -> None:
    """Writes the page as UTF-8. Raises InputError if the disk refuses."""
    with replace_atomically(path) as file:
        file.write(page.encode(errors="backslashreplace"))  # names of files need not be UTF-8
