"""The page of a split and that of a user's videos: one self-contained HTML file with settings, curves, scores, and the
clips with what the model saw.

The page needs no network and no framework. Captions, references and names of files are foreign text: in the markup they
are escaped, and the script makes nothing but text of them. It is to stay below 15 MB, so of many clips some are left
out, and of these some are without attention, which takes a byte per patch, block and query, and a third more as text.

Shapes: T frames, S side in pixels, P tokens of the ViT per frame, J adapted blocks, N queries.
"""

import base64
import html
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from string import Template

import torch

from common.files import read_json, replace_atomically
from metrics import printed_name
from report.attention import AttentionMaps, record_attention
from report.curves import draw_run
from report.show import film_strip, shown_frames

MAX_CLIPS, MAX_WITH_ATTENTION, MAX_BYTES = 500, 50, 10_000_000  # on a page; of pictures and attention, as text

# ------------------------------------------------------------------------------------- of one clip


def fits_another(entries: Collection[dict]) -> bool:
    """Whether a page of these clips takes another one."""
    size = sum(len(entry["strip"]) + len(entry.get("attention", "")) for entry in entries)
    return len(entries) < MAX_CLIPS and size < MAX_BYTES


def encode_attention(maps: AttentionMaps, shown: list[int]) -> dict:
    """The attention to the frames `shown` as base64 of a byte per patch, its shape (J, N, shown, rows, columns), and
    the gates. 255 is the most that a query reads in any frame."""
    patches = maps.patches()  # (J, N, T, rows, columns)
    levels = (255 * patches / patches.amax((-3, -2, -1), keepdim=True).clamp(min=1e-12)).round().byte()[:, :, shown]
    return {"attention": base64.b64encode(levels.numpy()).decode(), "shape": list(levels.shape),
            "gates": maps.gates[:, 0].double().round(decimals=3).tolist()}


def page_entry(captioner, row: dict, frames: torch.Tensor, count: int) -> dict:
    """What the page's script needs of a video {"video", "caption"}, or a window {"start", "end"} of one, and its frames
    uint8 (T, 3, S, S), on a page with `count` others."""
    shown = shown_frames(len(frames))
    window = f", {row['start']:.2f} to {row['end']:.2f} s" if "start" in row else ""
    entry = {"id": row["video"] + window, "strip": film_strip(frames), "caption": row["caption"], "references": [],
             "aspect": len(shown) * frames.shape[-1] / frames.shape[-2], "scores": {}}
    if captioner.adapter is not None and count < MAX_WITH_ATTENTION:
        entry |= encode_attention(record_attention(captioner, frames[None]), shown)
    return entry


# --------------------------------------------------------------------------------------- the page


def read_settings(run_folder: Path) -> dict[str, object]:
    """What a page says of a run: its numbers of parameters, and the flags that are set; 0 is a value."""
    content = read_json(run_folder / "config.json")
    flags = {name: value for name, value in content["config"].items() if value is not None and value is not False}
    return {name: content.get(name) for name in ("trained", "total")} | flags


def format_rows(rows: dict[str, object]) -> str:
    """A table of two columns."""
    cells = (f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
    return f"<table>{''.join(cells)}</table>"


def write_page(path: Path, run_folder: Path, title: str, entries: list[dict], first_block: int, settings: dict,
               scores: dict[str, float], signature: str = "", curves: str = "") -> None:
    """Writes a page about a run. entries: see `page_entry`; first_block: number of the first adapted block; settings:
    rows to add to those of the run; curves: SVGs, or nothing."""
    data = {"clips": entries, "sortable": list(entries[0]["scores"]) if entries else [], "first": first_block}
    template, css, script = (Path(__file__).with_suffix(kind).read_text("utf-8") for kind in (".html", ".css", ".js"))
    page = Template(template).substitute(
        title=html.escape(f"{run_folder.resolve().name}: {title}"), css=css, script=script, curves=curves,
        settings=format_rows(read_settings(run_folder) | settings), signature=html.escape(signature),
        scores=format_rows({printed_name(name): f"{100 * value:.1f}" for name, value in scores.items()}),
        data=json.dumps(data).replace("<", "\\u003c"))
    with replace_atomically(path) as file:
        file.write(page.encode(errors="backslashreplace"))  # names of files need not be UTF-8


def order_clips(scores: Sequence[float]) -> list[int]:
    """Indices of clips in the order in which a page takes them: the worst, the first, the second worst, the second."""
    worst_first = sorted(range(len(scores)), key=scores.__getitem__)
    return list(dict.fromkeys(i for pair in zip(worst_first, range(len(scores)), strict=True) for i in pair))


def report_split(path: Path, run_folder: Path, captioner, dataset, split: str, cache: Sequence, result) -> None:
    """Writes the page of a split: its worst clips and some of the others.

    cache: frames uint8 (T, 3, S, S) of each clip; result: an `evaluate.SplitResult`.
    """
    clips, entries = dataset.splits[split], {}
    for i in order_clips([result.clip_scores[clip.id]["CIDEr"] for clip in clips]):
        if not fits_another(entries.values()):
            break
        name, scores = clips[i].id, result.clip_scores[clips[i].id]
        shown = {metric: scores[metric] for metric in sorted(scores) if metric.startswith(("CIDEr", "METEOR"))}
        row = {"video": name, "caption": result.captions[name]}
        entry = page_entry(captioner, row, torch.tensor(cache[i]), len(entries))
        entries[i] = entry | {"references": list(clips[i].captions), "scores": shown}
    first_block, title = captioner.first_block + 1, f"{len(entries)} of {len(clips)} {split} clips of {dataset.name}"
    write_page(path, run_folder, title, [entries[i] for i in sorted(entries)], first_block, {}, result.scores,
               result.signature, draw_run(run_folder, first_block))


def report_videos(path: Path, run_folder: Path, captioner, entries: list[dict], rows: list[dict]) -> None:
    """Writes the page of a user's videos, see `page_entry`; rows: all captions and errors so far."""
    failed = [row["video"] for row in rows if "error" in row]
    title = f"{len(entries)} of {len(rows) - len(failed)} captions"
    settings = {"not captioned": ", ".join(failed)} if failed else {}
    write_page(path, run_folder, title, entries, captioner.first_block + 1, settings, {})
