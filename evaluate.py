"""Captions a split of a run's dataset and scores it, or captions your own videos.

    python evaluate.py RUN [--split {val,test}] [--save predictions.json]
    python evaluate.py RUN --video a.mp4 folder/ [--save captions.jsonl]
    ls clips/*.mov | python evaluate.py RUN --video -

Letters: B clips, T frames, S side in pixels.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import cli
import corpora
import data
import devices
import metrics
import runs
import shapes
from cache import cached_frames
from decode import rules_for
from model import Captioner
from sources import VIDEO_ENDINGS
from weights import InputError, field, replace_atomically


def caption_frames(captioner: Captioner, batches: Iterator[torch.Tensor], **decoding) -> list[str]:
    """uint8 batches (B, T, 3, S, S) -> a caption for each clip, decoded as `Captioner.caption` is told."""
    device = next(captioner.parameters()).device
    return [caption for frames in batches for caption in captioner.caption(frames.to(device), **decoding)]


def caption_split(captioner: Captioner, cache, batch: int, **decoding) -> list[str]:
    """Captions all clips of a frame cache (clips, T, 3, S, S), which holds segment centres, `batch` clips at a time."""
    starts = range(0, len(cache), batch)
    return caption_frames(captioner, (torch.from_numpy(np.array(cache[i : i + batch])) for i in starts), **decoding)


def score_captions(dataset: str, references: dict[str, list[str]], captions: dict[str, str],
                   names=metrics.METRICS) -> tuple[dict[str, float], str]:  # fmt: skip
    """Scores by name, unscaled, `shapes` also by what its captions claim; and the metrics' signature."""
    try:
        result = metrics.score(references, captions, metrics=names)
    except metrics.InputError as error:
        raise InputError(str(error)) from error
    scores = dict(result.corpus)
    if dataset == "shapes":
        scores |= {f"{k} right": v for k, v in shapes.attributes(references, captions).items()}
    return scores, result.signature


def table(scores: dict[str, float]) -> str:
    """Scores x100, as papers print them; shares in %."""
    return "  ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())


def find_videos(names: list[str]) -> list[Path]:
    """Files as they are, folders as the videos in them by name; `-` stands for the lines of the standard input."""
    found = []
    for name in names:
        path = Path(name)
        if name == "-":
            found += [Path(line) for line in sys.stdin.read().splitlines() if line.strip()]
        elif path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in VIDEO_ENDINGS and p.is_file())
            if not inside:
                raise InputError(f"{path}: a folder without a video ({', '.join(VIDEO_ENDINGS)})")
            found += inside
        else:
            found.append(path)
    if not found:
        raise InputError("--video -: expected names of videos on the standard input, a line each, found none")
    return found


def caption_videos(captioner: Captioner, paths: list[Path], frames: int, **decoding) -> Iterator[dict[str, str]]:
    """Prints a caption or, on stderr, an error for each video, and yields it: {"video", "caption" or "error"}."""
    for path in paths:
        try:
            pixels = data.read_frames(path, frames, captioner.vit.pixels)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            yield {"video": str(path), "error": str(error)}
            continue
        caption = caption_frames(captioner, iter([pixels[None]]), **decoding)[0]
        print(f"{path}: {caption}", flush=True)
        yield {"video": str(path), "caption": caption}


def save_text(path: Path, text: str) -> None:
    with replace_atomically(path) as file:
        file.write(text.encode())


def main() -> int:
    parser = cli.Parser("Captions and scores a split of a run's dataset, or captions your own videos.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder that train.py made")
    what = parser.add_argument_group("what is captioned")
    what.add_argument("--split", choices=["val", "test"], default="test", help="which split of the run's dataset")
    what.add_argument("--data", help="the dataset's folder; unset: as in training")
    what.add_argument("--cache", type=Path, help="where decoded frames are kept; unset: as in training")
    what.add_argument("--video", nargs="+", metavar="FILE",
                      help="your own videos instead, or folders of them; - reads their names, a line each")  # fmt: skip
    what.add_argument("--frames", type=cli.at_least(1, 4096), help="frames a clip; unset: as in training")
    what.add_argument("--weights", choices=["best", "last"], default="best", help="which checkpoint of the run")
    how = parser.add_argument_group("decoding")
    how.add_argument("--beams", type=cli.at_least(1), default=1, help="beams of the search; 1 is greedy")
    how.add_argument("--length-penalty", type=cli.number(-10), default=1.0,
                     help="beams' scores are divided by length to this power: the larger, the longer")  # fmt: skip
    how.add_argument("--min-new-tokens", type=cli.at_least(0), default=0, help="tokens of a caption, at least")
    how.add_argument("--max-new-tokens", type=cli.at_least(1), default=30, help="tokens of a caption, at most")
    out = parser.add_argument_group("output and machine")
    out.add_argument("--save", type=Path, metavar="FILE",
                     help="writes {id: caption} as JSON; of --video a JSON object a line")  # fmt: skip
    out.add_argument("--batch-size", type=cli.at_least(1), default=64, help="clips of a split captioned at a time")
    out.add_argument("--device", default="auto", help="cuda, mps, cpu; auto takes the first that is there")
    args = parser.parse_args()

    device, _ = devices.pick_device(args.device)
    devices.keep_freed_memory()
    captioner, config = runs.load_run(args.run, args.weights)
    captioner.to(device)
    flags = config["flags"]
    frames = args.frames or field(flags, "frames", int, args.run / "config.json")
    decoding = {name: getattr(args, name) for name in ("beams", "length_penalty", "min_new_tokens", "max_new_tokens")}
    rules_for(captioner.lm.config, captioner.prefix_length(frames), **decoding)  # an error, if any, before the work
    to = args.save
    if to and not (to.parent.is_dir() and os.access(to.parent, os.W_OK) and (to.is_file() or not to.exists())):
        raise InputError(f"--save {to}: expected the name of a file in a folder that can be written to")
    rows: list[dict[str, str]] = []
    if args.video:
        try:
            for row in caption_videos(captioner, find_videos(args.video), frames, **decoding):
                rows.append(row)
        finally:  # Ctrl-C among them: what has been said is kept
            if args.save:
                save_text(args.save, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        where = args.run / "config.json"
        root = Path(args.data or field(flags, "data", str, where))
        name = field(flags, "dataset", str, where)
        corpus = corpora.read(name, root, field(flags, "clips", list, where),
                              field(flags, "allow_missing", bool, where, False), [args.split])  # fmt: skip
        print(corpus)
        cache = args.cache or field(flags, "cache", str, where, None)
        clips, kept = corpus.splits[args.split], corpora.kept_in(cache, name, root)
        view = captioner.vit.pixels
        cache = cached_frames(clips, kept / f"{args.split}-{frames}x{view.size}.frames", frames, view, 0)
        said = caption_split(captioner, cache, args.batch_size, **decoding)
        captions = dict(zip((c.id for c in clips), said, strict=True))
        references = {c.id: list(c.captions) for c in clips}
        scores, signature = score_captions(flags["dataset"], references, captions)
        print(f"{args.split}: {table(scores)}")
        print(f"{signature}|{corpus.label(args.split)}")
        if args.save:
            save_text(args.save, json.dumps(captions, indent=1) + "\n")
    failed = sum("error" in row for row in rows)
    if failed and len(rows) > 1:
        print(f"error: {failed} of {len(rows)} videos could not be captioned", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    cli.run(main)
