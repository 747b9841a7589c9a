"""The page of a split, and that of a user's videos: what `evaluate.py --report` and the end of training write.

Letters: T frames, S side in pixels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.files import field, read_json
from report.curves import curves_of
from report.inside import Inside, look_inside
from report.page import ClipRow, clip_data, format_page, write_page
from report.show import draw_clip, write_picture
from report.strips import film_strip, jpeg_uri

MAX_CLIPS, MAX_INSIDE = 500, 50  # on a page; of these with their attention
# A page is to stay below 15 MB. Attention takes a byte a patch, block and query, and a third more as text.
MAX_INSIDE_BYTES, MAX_STRIP_BYTES = 4_500_000, 8_000_000  # of all clips together
SHOWN_SCORES = ("CIDEr", "METEOR")  # of a clip; METEOR's name depends on its tables


def settings_of(run: Path) -> dict[str, object]:
    """What a page says of a run: its numbers of parameters, and the flags that are set."""
    path = run / "config.json"
    config = read_json(path)
    counts = {name: config[name] for name in ("trained", "total") if name in config}
    counts = {name: f"{count:,}" if type(count) is int else count for name, count in counts.items()}
    flags = field(config, "config", dict, path)
    return counts | {name: value for name, value in flags.items() if value is not None and value is not False}


def inside_of(captioner, frames: Tensor) -> Inside | None:
    """What the Q-Adapter did with one clip's frames (T, 3, S, S)."""
    return look_inside(captioner, frames[None].to(next(captioner.parameters()).device))


def max_inside(captioner, frames: int) -> int:
    """How many clips of T = `frames` frames are shown with their attention."""
    if captioner.adapter is None:
        return 0
    blocks, queries = len(captioner.adapter.blocks), len(captioner.adapter.queries)
    return min(MAX_INSIDE, MAX_INSIDE_BYTES // (blocks * queries * frames * len(captioner.vit.position)))


def select_clips(scores: Sequence[float], count: int) -> list[int]:
    """Indices of at most `count` clips, in order: half of them are the worst ones, then come the first of the rest."""
    worst = set(sorted(range(len(scores)), key=scores.__getitem__)[: count // 2])
    others = [i for i in range(len(scores)) if i not in worst][: count - len(worst)]
    return sorted([*worst, *others])


def select_strips(scores: Sequence[float], cache: Sequence[np.ndarray]) -> dict[int, str]:
    """{index: strip} of the clips to show, see `select_clips`: at most MAX_CLIPS, fewer where strips are large."""
    count = min(MAX_CLIPS, len(scores))
    strips = {i: make_strip(frames_of(cache, i)) for i in select_clips(scores, count)}
    while (size := sum(map(len, strips.values()))) > MAX_STRIP_BYTES and count > 1:
        count = min(count - 1, count * MAX_STRIP_BYTES // size)
        strips = {i: strips[i] for i in select_clips(scores, count)}
    return strips


def frames_of(cache: Sequence[np.ndarray], index: int) -> Tensor:
    """The frames (T, 3, S, S) of a clip, in memory of their own."""
    return torch.from_numpy(np.array(cache[index]))


def make_strip(frames: Tensor) -> str:
    """Frames uint8 (T, 3, S, S) -> the address of a picture of them."""
    return jpeg_uri(film_strip(frames))


def report_split(path: Path, run: Path, captioner, dataset, split: str, cache: Sequence[np.ndarray], result) -> None:
    """Writes the page of a split: its worst clips and some of the others, a part of them with their attention.

    cache: frames uint8 (T, 3, S, S) of each clip; result: an `evaluate.SplitResult`.
    """
    clips = dataset.splits[split]
    ciders = [result.clip_scores[clip.id]["CIDEr"] for clip in clips]
    strips = select_strips(ciders, cache)
    shown = list(strips)
    inside = {shown[i] for i in select_clips([ciders[i] for i in shown], max_inside(captioner, len(cache[0])))}
    rows = []
    for i, strip in strips.items():
        clip = clips[i]
        all_scores = result.clip_scores[clip.id]
        scores = {name: all_scores[name] for prefix in SHOWN_SCORES for name in all_scores if name.startswith(prefix)}
        found = inside_of(captioner, frames_of(cache, i)) if i in inside else None
        rows.append(clip_data(ClipRow(clip.id, strip, len(cache[i]), result.captions[clip.id], list(clip.captions),
                                      scores, found)))  # fmt: skip
    title = f"{run.resolve().name}: {len(shown)} of {len(clips)} {split} clips of {dataset.name}"
    page = format_page(title, settings_of(run), rows, captioner.first_block + 1, result.scores, result.signature,
                       curves_of(run, captioner.first_block + 1))  # fmt: skip
    write_page(path, page)


def fits_another(clips: Sequence[dict]) -> bool:
    """Whether a page of these videos takes another one."""
    return len(clips) < MAX_CLIPS and sum(len(clip["strip"]) for clip in clips) < MAX_STRIP_BYTES


def page_entry(captioner, row: dict, frames: Tensor, count: int) -> dict:
    """A user's video {"video", "caption"}, or a window of one, and its frames, as part of a page with `count`
    others."""
    name = f"{row['video']}, {row['start']:.2f} to {row['end']:.2f} s" if "start" in row else row["video"]
    inside = inside_of(captioner, frames) if count < max_inside(captioner, len(frames)) else None
    return clip_data(ClipRow(name, make_strip(frames), len(frames), row["caption"], inside=inside))


def show_video(path: Path, captioner, caption: str, frames: Tensor) -> None:
    """Writes one picture of a video's frames, what was read of them, and the caption."""
    write_picture(path, draw_clip(frames, caption, inside_of(captioner, frames), captioner.first_block + 1))


def report_videos(path: Path, run: Path, captioner, clips: list[dict], rows: list[dict]) -> None:
    """Writes the page of a user's videos, see `page_entry`; rows: all captions and errors so far."""
    failed = [row["video"] for row in rows if "error" in row]
    what = "windows of videos" if any("start" in row for row in rows) else "videos"
    title = f"{run.resolve().name}: {len(clips)} of {len(rows) - len(failed)} {what}"
    settings = settings_of(run) | ({"not captioned": ", ".join(failed)} if failed else {})
    write_page(path, format_page(title, settings, clips, captioner.first_block + 1, {}))
