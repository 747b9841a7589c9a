"""Captions and scores a split of a dataset, or captions your own videos.

    python evaluate.py RUN [--split {val,test}] [--save predictions.json]
    python evaluate.py RUN --dataset folder --data DIR        another dataset than that of the training
    python evaluate.py RUN --video a.mp4 folder/ [--save captions.jsonl]
    python evaluate.py RUN --video film.mp4 --window 10 --save film.srt
    python evaluate.py --mllm HuggingFaceTB/SmolVLM2-256M-Video-Instruct --video a.mp4      the model as it is, no run

`--report page.html` makes a page of what was captioned, `--show picture.png` a picture of one video (`report/`).

Shapes: B clips, T frames, S side in pixels.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import metrics
from common import cli
from common.config import DEVICES, PRESETS, Config, read_config
from common.errors import InputError, printable, writing
from common.files import write_json
from model import Captioner, variant_of
from report.page import fits_another, page_entry, report_split, report_videos
from report.show import show_video
from training import devices
from training.distributed import ProcessGroup
from training.frozen_models import fingerprint_models, load_models, resolve_models
from training.inputs import cached_inputs
from training.run import check_models, data_differences
from video_data import shapes
from video_data.annotations import SPLITS, VIDEO_SUFFIXES
from video_data.batches import ClipCache, to_tensor
from video_data.datasets import VideoDataset, read_dataset
from video_data.video import read_clip
from video_data.windows import format_srt, iter_windows

BATCH_SIZE = 64  # clips of a split that are captioned at once
MODEL_FLAGS = "vit", "lm", "mllm"

# ---------------------------------------------------------------------------------- loading a run


def load_run(run: Path | None, device: torch.device, **models: str) -> tuple[Captioner, dict[str, Path]]:
    """The captioner of a run's folder, with its best weights, and the folders of its frozen models.

    models: where vit, lm or mllm are now, if they have moved. Without a run: the mllm as it is, untrained. Raises
    InputError where the folder is not a run, or a file in it or in a frozen model's folder is not the one of the
    training.
    """
    if run is None:
        config = Config(dataset="folder", method="none", **models)
        config = replace(config, precision=devices.select_precision(config, device))
    else:
        config = replace(read_config(run), **models)
    config.check()
    config, folders = resolve_models(config)
    if run is not None:
        check_models(run, fingerprint_models(folders))
    captioner = make_captioner(config, folders)
    if run is not None:
        captioner.load(run / "best/adapter.safetensors")
    return captioner.eval().to(device), folders


def make_captioner(config: Config, folders: dict[str, Path]) -> Captioner:
    """The untrained captioner of a config, for --plan on the meta device. Raises InputError."""
    backbone, tokenizer = load_models(config, folders)
    with backbone.vit.position.device:
        return variant_of(Captioner, config)(backbone, tokenizer, config)


def chosen_data(args: argparse.Namespace) -> dict:
    """What --dataset and --data replace in the Config of a run. Raises InputError."""
    if args.dataset and not args.data:
        raise InputError("--dataset: expected --data too, the folder of that dataset")
    return {name: value for name in ("dataset", "data") if (value := getattr(args, name))}


def read_run_dataset(run: Path, config: Config, splits: Sequence[str] = SPLITS) -> VideoDataset:
    """Some splits, or all, of the dataset in a Config, that of the run or another. What differs from the data of the
    run is in their notes. Raises InputError."""
    dataset = read_dataset(config.dataset, config.data, config.allow_missing, splits)
    for split, difference in data_differences(run, dataset).items():
        dataset.notes[split].append(difference)
    return dataset


# --------------------------------------------------------------------------- captions and scores


@dataclass(frozen=True)
class SplitResult:
    """Captions and scores of a split, by clip id; scores are unscaled."""

    captions: dict[str, str]
    scores: dict[str, float]
    signature: str
    clip_scores: dict[str, dict[str, float]]


def score_captions(dataset: VideoDataset, split: str, captions: dict[str, str], metric_names) -> SplitResult:
    """Scores the captions of a split; on `shapes` also the shares of captions that are right."""
    references = {clip.id: list(clip.captions) for clip in dataset.splits[split]}
    try:
        result = metrics.score(references, captions, metrics=metric_names)
    except metrics.InputError as error:  # metrics/ imports nothing of the project
        raise InputError(str(error)) from error
    scores = dict(result.corpus)
    if dataset.name == "shapes":
        scores |= {f"{k} right": v for k, v in shapes.attribute_accuracy(references, captions).items()}
    return SplitResult(captions, scores, f"{result.signature}|{dataset.signature(split)}", result.per_video)


def caption_and_score(captioner: Captioner, dataset: VideoDataset, split: str, cache: ClipCache,
                      batch_size: int, group: ProcessGroup, metric_names=metrics.METRICS,
                      beams: int = 1) -> SplitResult:
    """Captions a split, from a cache of frames (T, 3, S, S) or features, and scores it. Each process captions its
    share, and all together `batch_size` clips at once."""
    clips, training, captions = dataset.splits[split], captioner.training, []
    device, indices = next(captioner.parameters()).device, group.shard(range(len(clips)))
    stride, progress = max(1, batch_size // group.world_size), cli.Progress(len(indices))
    captioner.eval()
    for start in range(0, len(indices), stride):
        batch = indices[start : start + stride]
        frames = to_tensor(np.stack([cache[i] for i in batch]))  # (B, T, ...)
        times = torch.from_numpy(np.stack([cache.times[i] for i in batch])) if cache.times else None  # (B, T + 1)
        captions += captioner.caption(frames.to(device), beams, times=times)
        progress.report("captions", len(captions))
    captioner.train(training)
    captions = group.gather({clips[i].id: caption for i, caption in zip(indices, captions, strict=True)})
    return score_captions(dataset, split, {clip.id: captions[clip.id] for clip in clips}, metric_names)


def format_scores(scores: dict[str, float]) -> str:
    """Scores times 100, as papers print them; accuracies in %."""
    return "  ".join(f"{metrics.printed_name(name)} {100 * value:.1f}" for name, value in scores.items())


def evaluate_split(captioner: Captioner, dataset: VideoDataset, args: argparse.Namespace, config: Config) -> None:
    """Captions a split of a dataset, prints its scores, and writes --save and --report."""
    cache = cached_inputs(replace(config, cache_features=False), dataset, captioner, {})[args.split]  # read once
    batch_size = config.micro_batch_size or BATCH_SIZE
    result = caption_and_score(captioner, dataset, args.split, cache, batch_size, ProcessGroup(), beams=config.beams)
    print(f"{args.split}: {format_scores(result.scores)}\n{result.signature}")
    if args.save:
        write_json(args.save, result.captions)
    if args.report:
        report_split(args.report, args.run, captioner, dataset, args.split, cache, result)


# ------------------------------------------------------------------------------- your own videos


def expand_video_paths(names: list[str]) -> list[Path]:
    """Files as they are, folders as the videos in them by name. Raises InputError if there are none."""
    paths = []
    for path in map(Path, names):
        if path.is_dir():
            paths += sorted(p for p in path.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
        else:
            paths.append(path)
    if not paths or "" in names:  # which would be the working folder
        raise InputError(f"--video: expected videos, or folders with videos ({', '.join(VIDEO_SUFFIXES)}), found none")
    return paths


def caption_videos(captioner: Captioner, paths: list[Path], config: Config,
                   window: float | None = None) -> Iterator[tuple[dict, Tensor | None]]:
    """Prints a caption or, on stderr, an error for each video, or for each window of `window` seconds; yields it,
    {"video", "start", "end", "caption"} or {"video", "error"}, with the frames that the model saw (T, 3, S, S)."""
    device, preprocessing = next(captioner.parameters()).device, captioner.vit.preprocessing
    for path in paths:
        try:
            for start, end, pixels, times in (iter_windows(path, window, config.frames, preprocessing) if window else
                                              [(0, 0, *read_clip(path, config.frames, preprocessing))]):
                times = torch.tensor([times], dtype=torch.float64)
                caption = captioner.caption(pixels[None].to(device), config.beams, times=times)[0]
                span = {"start": round(start, 3), "end": round(end, 3)} if window else {}
                when = f" {start:.2f}-{end:.2f} s:" if window else ""
                print(printable(f"{path}:{when} {caption}"))
                yield {"video": str(path), **span, "caption": caption}, pixels
        except InputError as error:
            cli.print_error(f"error: {error}")
            yield {"video": str(path), "error": str(error)}, None


def write_row(path: Path, row: dict, number: int) -> None:
    """Writes a JSON object and a line break, or a subtitle into a file .srt, at once, so that it is there whatever ends
    the program later. Row number 1 replaces the file's old content."""
    text = json.dumps(row) + "\n"
    if path.suffix.lower() == ".srt":
        text = "" if "error" in row else format_srt(number, row["start"], row["end"], row["caption"])
    mode = "w" if number == 1 else "a"
    with writing(path), open(path, mode, encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def evaluate_videos(captioner: Captioner, paths: list[Path], args: argparse.Namespace, config: Config) -> int:
    """Captions the videos of --video. Returns the exit code, 2 if any could not be read."""
    rows, entries = [], []
    try:
        for row, pixels in caption_videos(captioner, paths, config, args.window):
            rows.append(row)
            if args.save:
                write_row(args.save, row, len(rows))
            if args.report and pixels is not None and fits_another(entries):
                entries.append(page_entry(captioner, row, pixels, len(entries)))
            if args.show and pixels is not None:
                show_video(args.show, captioner, row["caption"], pixels)
    finally:  # after Ctrl-C and SIGTERM, too
        if args.report and entries:
            report_videos(args.report, args.run, captioner, entries, rows)
    failed = sum("error" in row for row in rows)
    if failed and len(paths) > 1:
        cli.print_error(f"error: {failed} of {len(paths)} videos could not be captioned")
    return 2 if failed else 0


# ------------------------------------------------------------------------------- the command line


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser("Captions and scores a split of a run's dataset, or captions your own videos.",
                        "python evaluate.py RUN [--split test] [--video clip.mp4 ...]")
    parser.add_argument("run", type=cli.path, metavar="RUN", nargs="?",
                        help="a folder that train.py made; without it, --mllm captions each --video untrained")
    group = parser.add_argument_group("input")
    group.add_argument("--split", choices=["val", "test"], help="which split of the dataset (default: test)")
    group.add_argument("--dataset", choices=tuple(PRESETS), help="another dataset, of which --data is the folder")
    group.add_argument("--video", nargs="+", action="extend", metavar="FILE",
                       help="caption your own videos instead, or folders of them")
    group.add_argument("--window", type=cli.number(float, 0.1), metavar="SECONDS",
                       help="caption each --video piece by piece, with times; --save FILE.srt writes subtitles")
    group.add_argument("--frames", type=cli.number(int, 1, 4096), help="frames per clip (default: as in training)")
    group.add_argument("--beams", type=cli.number(int, 1, 1000),
                       help="beams of the search; 1 is greedy (default: as in training)")
    group = parser.add_argument_group("output")
    group.add_argument("--save", type=cli.path, metavar="FILE",
                       help="write {id: caption} as JSON; for --video one JSON object per line")
    group.add_argument("--report", type=cli.path, metavar="FILE.html",
                       help="write a page with frames, captions, scores and attention, for a browser")
    group.add_argument("--show", type=cli.path, metavar="FILE.png",
                       help="draw one --video: its frames, what the queries read of them, the caption")
    group = parser.add_argument_group("where things are now")
    group.add_argument("--data", type=cli.path, help="the dataset's folder (default: as in training)")
    for name in MODEL_FLAGS:
        group.add_argument(f"--{name}", type=cli.text,
                           help="where this frozen model of the run is; any other model is refused")
    group.add_argument("--device", default="auto", choices=DEVICES, help="auto: CUDA, else MPS, else CPU")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises InputError for flags that do not fit each other."""
    is_srt = args.save is not None and args.save.suffix.lower() == ".srt"
    for is_refused, message in (
        (not args.run and not (args.mllm and args.video), "RUN: expected first; without one, --mllm and --video"),
        (not args.run and args.report, "--report: expected a RUN, which the page describes"),
        (args.video and (args.split or args.dataset or args.data),
         "--split, --dataset and --data: expected without --video, it reads no dataset"),
        (not args.video and (args.show or args.window), "--show and --window: expected --video too"),
        (args.show and args.window, "--show: expected without --window; it draws a whole video"),
        (is_srt and not args.window, "--save FILE.srt: expected --window too; subtitles have times"),
    ):
        if is_refused:
            raise InputError(message)


def check_outputs(args: argparse.Namespace, inputs: Sequence[Path], videos: Sequence[Path]) -> None:
    """Raises InputError for an output that cannot be written, or would replace a file of the run or of `inputs`, files
    and folders that are read; and for several videos with an output for one."""
    of_run = ("best", "last", "val", "config.json", "log.jsonl", "test.json", "report.html", "lock") if args.run else ()
    # realpath: Path.resolve raises a RuntimeError for a link to itself
    taken = [Path(os.path.realpath(path)) for path in (*inputs, *videos, *(args.run / name for name in of_run))]
    for flag in ("save", "report", "show"):
        if not (path := getattr(args, flag, None)):
            continue
        target = Path(os.path.realpath(path))
        is_taken = any(target.is_relative_to(other) for other in taken)
        if target.exists():  # not a folder or a device, and not an input by another name
            is_taken |= not target.is_file() or any(map(target.samefile, filter(Path.exists, taken)))
        if is_taken or not os.access(target.parent, os.W_OK):
            raise InputError(f"--{flag} {path}: expected a file that is not read, in a folder that can be written to")
        taken.append(target)
        if len(videos) > 1 and (flag == "show" or path.suffix.lower() == ".srt"):
            raise InputError(f"--{flag} {path}: expected one video, found {len(videos)}")


def main() -> int:
    args = make_parser().parse_args()
    check_args(args)
    args.split = args.split or "test"
    videos = expand_video_paths(args.video) if args.video else []
    device = devices.select_device(args.device)
    devices.keep_freed_memory()
    models = {name: value for name in MODEL_FLAGS if (value := getattr(args, name))}
    captioner, folders = load_run(args.run, device, **models)
    given = {name: value for name in ("frames", "beams") if (value := getattr(args, name))}
    config = replace(captioner.config, **chosen_data(args), **given)
    check_outputs(args, list(folders.values()) + ([] if args.video else [config.data]), videos)
    captioner.check_length(config.frames, config.beams)
    if args.video:
        return evaluate_videos(captioner, videos, args, config)
    dataset = read_run_dataset(args.run, config, [args.split])
    print(dataset)
    evaluate_split(captioner, dataset, args, config)
    return 0


if __name__ == "__main__":
    cli.run(main)
