"""Captions and scores a split of a run's dataset, or captions your own videos.

    python evaluate.py RUN [--split {val,test}] [--save predictions.json]
    python evaluate.py RUN --video a.mp4 folder/ [--save captions.jsonl]
    ls clips/*.mov | python evaluate.py RUN --video -
    python evaluate.py RUN --video film.mp4 --window 10 --save film.srt

`--report page.html` makes a page of what was captioned, `--show picture.png` a picture of one video (`report/`).

Letters: B clips, T frames, S side in pixels.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

import metrics
from common import cli
from common.errors import InputError, error_prefix, explain_out_of_memory
from common.files import field, write_json
from common.preprocessing import Preprocessing
from common.run_log import check_output
from model import AdapterConfig, Captioner
from models import hub
from models.generation import make_generation_config
from report.build import has_room, report_split, report_videos, show_video, video_data_of
from report.curves import curves_of
from training import devices
from training.config import read_run_config
from training.distributed import ProcessGroup
from training.frozen_models import backbone_hashes, load_models
from training.run import check_checkpoint, check_sums, checkpoint_path
from video_data import shapes
from video_data.annotations import VIDEO_SUFFIXES
from video_data.batches import cache_folder, cached_frames, to_tensor
from video_data.datasets import VideoDataset, read_dataset
from video_data.video import read_frames
from video_data.windows import format_srt, iter_windows

# ---------------------------------------------------------------------------------- loading a run


def frozen_folders(flags: dict, path: Path) -> dict[str, Path]:
    """{part: folder} of a run's frozen models, "mllm", or "vit" and "lm"; path: its config.json, for errors."""
    folders = {}
    for part in ["mllm"] if field(flags, "mllm", str, path, None) else ["vit", "lm"]:
        name = field(flags, part, str, path)
        with error_prefix(f"{path}: {part}"):
            folders[part] = hub.resolve(name)
    return folders


def load_run(run: Path, which: str = "best") -> tuple[Captioner, dict]:
    """The captioner of a run's folder and its flags: config.json, the frozen models and `which`/adapter.safetensors.

    Raises InputError where the folder is no run or a file in it does not fit the others.
    """
    path = run / "config.json"
    config, flags = read_run_config(run)
    folders = frozen_folders(flags, path)
    precision = field(flags, "precision", str, path)
    if precision not in devices.DTYPES:
        raise InputError(f"{path}: flags: precision is {precision!r}, expected one of {', '.join(devices.DTYPES)}")
    adapter = AdapterConfig.from_dict(field(config, "adapter", dict, path), f"{path}: adapter")
    if adapter.method == "full" and precision != "fp32":
        raise InputError(f"{path}: flags: precision is {precision!r}, expected 'fp32' with method full")
    checkpoint = checkpoint_path(run, which)
    if which == "best" and not checkpoint.parent.is_dir() and (run / "last").is_dir():
        raise InputError(f"{checkpoint.parent}: expected a checkpoint, found none; --weights last takes the last one")
    check_sums(checkpoint.parent)
    check_checkpoint(checkpoint, backbone_hashes(folders), asdict(adapter))
    models = load_models(folders, devices.DTYPES[precision], field(flags, "image_size", int, path, None))
    with error_prefix(f"{path}: adapter"):
        captioner = Captioner(models.vit, models.lm, models.tokenizer, adapter, models.mllm)
    captioner.load(checkpoint)
    return captioner.eval(), flags


# --------------------------------------------------------------------------- captions and scores


def caption_split(captioner: Captioner, cache: Sequence[np.ndarray], indices: Sequence[int], batch_size: int,
                  **generation) -> list[str]:  # fmt: skip
    """Captions clips of a cache of frames (T, 3, S, S) or features, with options of `Captioner.caption`."""
    device, captions = next(captioner.parameters()).device, []
    time_left = cli.TimeLeft("captions", len(indices))
    for start in range(0, len(indices), batch_size):
        frames = to_tensor(np.stack([cache[i] for i in indices[start : start + batch_size]]))  # (B, T, ...)
        with explain_out_of_memory(f"captions of {len(frames)} clips at once, the batch may be smaller"):
            captions += captioner.caption(frames.to(device), **generation)
        time_left.update(len(captions))
    return captions


@dataclass(frozen=True)
class SplitResult:
    """Captions and scores of a split, by clip id; scores are unscaled."""

    captions: dict[str, str]
    scores: dict[str, float]
    signature: str
    clip_scores: dict[str, dict[str, float]]


def score_captions(dataset: VideoDataset, split: str, captions: dict[str, str], names=metrics.METRICS) -> SplitResult:
    """The scores of a split; for `shapes` also the accuracy of what the captions claim."""
    references = {clip.id: list(clip.captions) for clip in dataset.splits[split]}
    try:
        result = metrics.score(references, captions, metrics=names)
    except metrics.InputError as error:
        raise InputError(str(error)) from error
    scores = dict(result.corpus)
    if dataset.name == "shapes":
        scores |= {f"{k} right": v for k, v in shapes.attribute_accuracy(references, captions).items()}
    return SplitResult(captions, scores, f"{result.signature}|{dataset.signature(split)}", result.per_video)


def format_scores(scores: dict[str, float]) -> str:
    """Scores times 100, as papers print them; accuracies in %."""
    return "  ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())


def caption_and_score(captioner: Captioner, dataset: VideoDataset, split: str, cache: Sequence[np.ndarray],
                      batch_size: int, group: ProcessGroup, metric_names=metrics.METRICS,
                      **generation) -> SplitResult:  # fmt: skip
    """Captions a split and scores it. Each process captions its share."""
    clips, training = dataset.splits[split], captioner.training
    captioner.eval()
    shard = group.shard(range(len(clips)))
    local = caption_split(captioner, cache, shard, max(1, batch_size // group.world_size), **generation)
    captioner.train(training)
    captions = dict(zip((clip.id for clip in clips), group.gather_shards(local), strict=True))
    return score_captions(dataset, split, captions, metric_names)


def evaluate_split(captioner: Captioner, flags: dict, args: argparse.Namespace, frames: int,
                   generation: dict) -> None:  # fmt: skip
    """Captions a split of the run's dataset, prints its scores, and writes --save and --report."""
    path = args.run / "config.json"
    name, root = field(flags, "dataset", str, path), args.data or Path(field(flags, "data", str, path))
    if args.data and not args.data.exists():
        raise InputError(f"--data {args.data}: expected the folder of the dataset, found none")
    sizes, allow_missing = field(flags, "shapes_sizes", list, path), field(flags, "allow_missing", bool, path)
    dataset = read_dataset(name, root, sizes, allow_missing, [args.split])
    print(dataset)
    if args.report:
        curves_of(args.run, captioner.first_block + 1)  # a damaged log fails before the work
    check_outputs_outside(args, root, "dataset")
    cache_root = cache_folder(name, root)
    cache = cached_frames(dataset.splits[args.split], cache_root, args.split, frames, captioner.vit.preprocessing)
    result = caption_and_score(captioner, dataset, args.split, cache, args.batch_size, ProcessGroup(), **generation)
    print(f"{args.split}: {format_scores(result.scores)}")
    print(result.signature)
    if args.save:
        write_json(args.save, result.captions)
    if args.report:
        report_split(args.report, args.run, captioner, dataset, args.split, cache, result)


# ------------------------------------------------------------------------------- your own videos


def expand_video_paths(names: Iterable[str]) -> list[Path]:
    """Files as they are, folders as the videos in them by name; `-` stands for paths on the standard input, a line
    each."""
    paths = []
    for name in names:
        path = Path(name)
        if not name or "\0" in name:
            raise InputError(f"--video {name!r}: is no path")
        if name == "-":
            lines = os.fsdecode(sys.stdin.buffer.read()).split("\n")
            paths += expand_video_paths(line for line in lines if line.strip() not in ("", "-"))
        elif path.is_dir():
            videos = sorted(p for p in path.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
            if not videos:
                raise InputError(f"{path}: expected videos in the folder ({', '.join(VIDEO_SUFFIXES)}), found none")
            paths += videos
        else:
            paths.append(path)
    return paths


def read_pieces(
    path: Path, frames: int, preprocessing: Preprocessing, window: float | None
) -> Iterator[tuple[dict[str, float], Tensor]]:
    """A video as a whole, or window after window: ({} or {"start", "end"} in seconds, frames (T, 3, S, S))."""
    if window is None:
        yield {}, read_frames(path, frames, preprocessing)
        return
    for start, end, pixels in iter_windows(path, window, frames, preprocessing):
        yield {"start": round(start, 3), "end": round(end, 3)}, pixels


def caption_videos(captioner: Captioner, paths: list[Path], frames: int, window: float | None = None,
                   **generation) -> Iterator[tuple[dict, Tensor | None]]:  # fmt: skip
    """Prints a caption or, on stderr, an error for each video, or for each window of `window` seconds;
    yields it, {"video", "start", "end", "caption"} or {"video", "error"}, with the frames that the
    model saw (T, 3, S, S)."""
    device = next(captioner.parameters()).device
    for path in paths:
        name = str(path).replace("\n", "\\n")
        try:
            for times, pixels in read_pieces(path, frames, captioner.vit.preprocessing, window):
                caption = captioner.caption(pixels[None].to(device), **generation)[0]
                when = f" {times['start']:.2f}-{times['end']:.2f} s:" if times else ""
                print(cli.printable(f"{name}:{when} {caption}"))
                yield {"video": str(path), **times, "caption": caption}, pixels
        except InputError as error:
            cli.print_error(f"error: {error}")
            yield {"video": str(path), "error": str(error)}, None


def write_row(path: Path, row: dict, number: int) -> None:
    """Writes a JSON object and a line break, or a subtitle into a file .srt, at once, so that it is there whatever ends
    the program later. Row number 1 replaces the file's old content. Raises InputError if the disk refuses."""
    is_subtitle = path.suffix.lower() == ".srt"
    if is_subtitle and "error" in row:
        return
    text = format_srt(number, row["start"], row["end"], row["caption"]) if is_subtitle else json.dumps(row) + "\n"
    size = 0 if number == 1 or not path.exists() else path.stat().st_size
    try:
        with open(path, "w" if number == 1 else "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        if path.is_file() and path.stat().st_size > size:
            os.truncate(path, size)  # the disk is full: no half of a row stays
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def check_videos(paths: list[Path], args: argparse.Namespace) -> None:
    """Raises InputError for no videos, for several with an output for one, and for outputs that are one of them."""
    if not paths:
        raise InputError("--video -: expected paths of videos on the standard input, one per line, found none")
    for flag, given in (("--show", args.show), ("--save FILE.srt", args.save and args.save.suffix.lower() == ".srt")):
        if given and len(paths) > 1:
            raise InputError(f"{flag}: expected one video, found {len(paths)}")
    for flag, output in outputs(args).items():
        if not output.exists():
            continue
        if any(path.exists() and output.samefile(path) for path in paths):
            raise InputError(f"{flag} {output}: is one of the videos, expected another file")
        if "-" in args.video and os.path.samestat(os.fstat(0), output.stat()):
            raise InputError(f"{flag} {output}: is the standard input, expected another file")


def evaluate_videos(captioner: Captioner, args: argparse.Namespace, frames: int, generation: dict) -> int:
    """Captions the videos of --video; -> the exit code, 2 if any could not be read."""
    paths, rows, shown = expand_video_paths(args.video), [], []
    check_videos(paths, args)
    with cli.protect_cleanup():
        try:
            for row, pixels in caption_videos(captioner, paths, frames, args.window, **generation):
                rows.append(row)
                if args.save:
                    write_row(args.save, row, len(rows))
                if args.report and pixels is not None and has_room(shown):
                    shown.append(video_data_of(captioner, row, pixels, len(shown)))
                if args.show and pixels is not None:
                    show_video(args.show, captioner, row["caption"], pixels)
        finally:  # after Ctrl-C and SIGTERM, too
            if args.report and shown:
                report_videos(args.report, args.run, captioner, shown, rows)
    failed = sum("error" in row for row in rows)
    if failed and len(paths) > 1:
        cli.print_error(f"error: {failed} of {len(paths)} videos could not be captioned")
    return 2 if failed else 0


# ------------------------------------------------------------------------------- the command line


def outputs(args: argparse.Namespace) -> dict[str, Path]:
    """The files to write, by their flags."""
    named = {"--save": args.save, "--report": args.report, "--show": args.show}
    return {flag: path for flag, path in named.items() if path}


def check_outputs_outside(args: argparse.Namespace, folder: Path, name: str) -> None:
    """Raises InputError if a file to write is one of the folder that the run reads: its dataset or a frozen model."""
    for flag, output in outputs(args).items():
        if output.exists() and folder.resolve() in (output.resolve(), *output.resolve().parents):
            raise InputError(f"{flag} {output}: is a file of the {name}, expected another one")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser("Captions and scores a split of a run's dataset, or captions your own videos.")
    parser.add_argument("run", type=cli.path, metavar="RUN", help="a folder that train.py made")
    group = parser.add_argument_group("input")
    group.add_argument("--split", choices=["val", "test"], help="which split of the run's dataset; unset: test")
    group.add_argument("--data", type=cli.folder, help="the dataset's folder; unset: as in training")
    group.add_argument("--video", nargs="+", action="extend", metavar="FILE",
                       help="your own videos instead, or folders of them; - reads paths, one per line")  # fmt: skip
    group.add_argument("--window", type=cli.number(float, 0.1), metavar="SECONDS",
                       help="caption each --video piece by piece, with times; --save FILE.srt writes subtitles")
    group.add_argument("--frames", type=cli.at_least(1, 4096), help="frames a clip; unset: as in training")
    group.add_argument("--weights", choices=["best", "last"], default="best", help="which checkpoint of the run")
    group = parser.add_argument_group("generation")
    group.add_argument("--beams", type=cli.at_least(1), help="beams of the search; 1 is greedy; unset: as in training")
    group.add_argument("--length-penalty", type=cli.number(float, -10), default=1.0,
                       help="scores of beams are divided by length to this power; larger values favour long captions")
    group.add_argument("--min-new-tokens", type=cli.at_least(0), default=0, help="least tokens of a caption")
    group.add_argument("--max-new-tokens", type=cli.at_least(1), default=30, help="most tokens of a caption")
    group = parser.add_argument_group("output and machine")
    group.add_argument("--save", type=cli.path, metavar="FILE",
                       help="writes {id: caption} as JSON; for --video one JSON object per line")  # fmt: skip
    group.add_argument("--report", type=cli.path, metavar="FILE",
                       help="writes a page with frames, captions, scores and attention, for a browser")  # fmt: skip
    group.add_argument("--show", type=cli.path, metavar="FILE.png",
                       help="draws one --video: its frames, what the queries read of them, the caption")  # fmt: skip
    group.add_argument("--batch-size", type=cli.at_least(1), default=64, help="clips of a split captioned at a time")
    group.add_argument("--device", default="auto", help="cuda, mps or cpu; auto: CUDA, else MPS, else CPU")
    return parser


def parse_args() -> argparse.Namespace:
    """All flags. Raises InputError for those that do not fit each other."""
    args = make_parser().parse_args()
    if args.video and args.split:
        raise InputError("--video: was given with --split, expected only one of them")
    if args.video and args.data:
        raise InputError("--data: expected without --video: it reads no dataset")
    if not args.video and (args.show or args.window):
        raise InputError("--show and --window: expected --video too")
    if args.show and args.show.suffix.lower() != ".png":
        raise InputError(f"--show {args.show}: expected a name that ends in .png")
    if args.show and args.window:
        raise InputError("--show: expected without --window: it draws a whole video")
    if args.save and args.save.suffix.lower() == ".srt" and not args.window:
        raise InputError("--save FILE.srt: expected --window too: subtitles have times")
    written = outputs(args)
    if len({path.resolve() for path in written.values()}) < len(written):
        raise InputError(f"{', '.join(written)}: expected different files")
    args.split = args.split or "test"
    return args


def main() -> int:
    args = parse_args()
    for flag, path in outputs(args).items():
        check_output(flag, path, args.run)
    device, _ = devices.select_device(args.device)
    devices.keep_freed_memory()
    captioner, flags = load_run(args.run, args.weights)
    for part, folder in frozen_folders(flags, args.run / "config.json").items():
        check_outputs_outside(args, folder, f"run's frozen {part}")
    captioner.to(device)
    frames = args.frames or flags["frames"]
    if args.beams is None:
        args.beams = flags["beams"]
        with error_prefix(args.run / "config.json"):
            make_generation_config(captioner.lm.config, 0, max_new_tokens=1, beams=args.beams)
    names = "beams", "length_penalty", "min_new_tokens", "max_new_tokens"
    generation = {name: getattr(args, name) for name in names}
    make_generation_config(captioner.lm.config, captioner.prefix_length(frames), **generation)  # fail before the work
    if args.video:
        return evaluate_videos(captioner, args, frames, generation)
    evaluate_split(captioner, flags, args, frames, generation)
    return 0


if __name__ == "__main__":
    cli.run(main)
