"""What a run will take, before it starts: steps, passes over the captions, disk space, memory, time.

Letters: L tokens of a caption with its EOS.
"""

import argparse
import math
from dataclasses import dataclass

import torch

from common.cli import format_seconds
from common.errors import InputError
from common.files import format_bytes
from training.inputs import FEATURE_SPLITS
from training.memory import StepMemory, clip_bytes, step_memory
from training.presets import epochs_of_passes
from training.progress import format_speed
from video_data.annotations import SPLITS
from video_data.datasets import Clip, VideoDataset, read_dataset

DAY = 24 * 3600  # seconds
CAPTION_TOKENS = 15  # of a usual English caption with its EOS
CAPTIONS_OF_SHAPES = 6  # of a clip

# -------------------------------------------------------------------------------------- schedule


@dataclass(frozen=True)
class Schedule:
    steps: int
    clips_seen: int  # in the whole run, a clip counts once in each epoch
    passes: float  # over the training captions


def make_schedule(clips: int, captions: int, batch_size: int, captions_per_clip: int, epochs: int) -> Schedule:
    """The schedule of a run on `clips` clips with `captions` captions in all. An epoch drops its incomplete batch."""
    steps = epochs * (clips // batch_size)
    clips_seen = steps * batch_size
    return Schedule(steps, clips_seen, clips_seen * captions_per_clip / captions)


def schedule_run(args: argparse.Namespace, clips: list[Clip]) -> Schedule:
    """The schedule of the flags on these training clips. Stores the epochs that --passes makes in args.

    Raises InputError if the clips do not fill a batch.
    """
    if len(clips) < args.batch_size:
        raise InputError(f"--batch-size {args.batch_size}: the dataset has only {len(clips)} training clips")
    captions = sum(len(clip.captions) for clip in clips)
    args.epochs = args.epochs or epochs_of_passes(args.passes, captions, len(clips), args.captions_per_clip)
    args.passes = None  # what is stored of a run are its epochs
    return make_schedule(len(clips), captions, args.batch_size, args.captions_per_clip, args.epochs)


def format_schedule(schedule: Schedule, args: argparse.Namespace) -> str:
    """The line that a run prints; args: the flags batch_size, epochs and captions_per_clip."""
    steps, passes = f"{schedule.steps:,} steps of {args.batch_size} clips", f"{schedule.passes:.2f} passes"
    return (f"training: {steps}, {args.epochs} epochs, {passes} over the captions ({args.captions_per_clip} of a clip "
            "in an epoch)")  # fmt: skip


def schedule_warnings(passes: float, seconds: float | None) -> list[str]:
    """A line for a run of less than one pass over the training captions, and one for a run of more than a day.

    seconds: the time of all steps; None: unknown.
    """
    lines = []
    if passes < 1:
        lines.append(f"the run sees only {passes:.2f} of a pass over the training captions; "
                     "--passes or --epochs make it longer")  # fmt: skip
    if seconds is not None and seconds > DAY:
        lines.append(f"the run takes {seconds / DAY:.1f} days; fewer --passes or a smaller model make it "
                     "shorter")  # fmt: skip
    return lines


# ---------------------------------------------------------------------------------------- caches


def cache_bytes(args: argparse.Namespace, counts: dict[str, int], captioner) -> dict[str, int]:
    """{"train frames": bytes, ...} of the caches that `training.inputs.cached_inputs` makes; counts: clips per split.

    args: the flags frames, candidate_frames and cache_features.
    """
    sizes = {}
    for split, count in counts.items():
        frames = args.candidate_frames if split == "train" else args.frames
        sizes[f"{split} frames"] = count * clip_bytes(captioner, frames, features=False)
        if args.cache_features and split in FEATURE_SPLITS:
            sizes[f"{split} features"] = count * clip_bytes(captioner, frames, features=True)
    return sizes


# -------------------------------------------------------------------------------------- the plan


def planned_dataset(args: argparse.Namespace) -> VideoDataset:
    """The dataset of the flags; `shapes` that are not made yet are clips without files. Raises InputError."""
    if args.dataset != "shapes" or (args.data / "captions.json").exists():
        return read_dataset(args.dataset, args.data, args.shapes_sizes, args.allow_missing)
    splits = {split: [Clip(str(i), args.data, ("",) * CAPTIONS_OF_SHAPES) for i in range(size)]
              for split, size in zip(SPLITS, args.shapes_sizes, strict=True)}  # fmt: skip
    return VideoDataset("shapes", splits, (args.data / "captions.json",), dict.fromkeys(SPLITS, 0), 0)


def format_table(title: str, rows: list[tuple[str, ...]]) -> str:
    """A line of the title, then indented rows with aligned columns; the first column is text, the others numbers."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [f"  {row[0]:{widths[0]}}" + "".join(f"{cell:>{width + 2}}" for cell, width in zip(row[1:], widths[1:],
             strict=True)) for row in rows]  # fmt: skip
    return "\n".join([title, *lines])


def format_memory(memory: StepMemory, title: str, inputs: str) -> str:
    """The table of a step's memory: a column for its largest moment in the encoder, and one for that after it.

    inputs: "frames" or "features".
    """
    peaks = memory.encoder_peak, memory.lm_peak
    rows = [
        ("frozen ViT", memory.vit, memory.vit),
        *[("frozen projector", memory.projector, memory.projector)] * (memory.projector > 0),
        ("frozen language model", memory.lm, memory.lm),
        ("trained weights, gradients, moments", memory.trained, memory.trained),
        (f"batches of {inputs}", memory.inputs, memory.inputs),
        ("outputs of the ViT's blocks", memory.block_outputs, 0),
        ("kept by the encoder", 0, memory.encoder_kept),
        ("kept by the language model", 0, memory.lm_kept),
        ("other activations", peaks[0] - memory.block_outputs, peaks[1] - memory.encoder_kept - memory.lm_kept),
        ("fragmentation", *(round(memory.fragmentation * peak) for peak in peaks)),
        ("sum", *map(memory.total, peaks)),
    ]
    cells = [(name, *(format_bytes(count) if count else "-" for count in counts)) for name, *counts in rows]
    return format_table(title, [("", "encoder", "language model"), *cells])


def format_plan(args: argparse.Namespace, dataset: VideoDataset, schedule: Schedule, captioner, device: torch.device,
                max_caption_tokens: int, processes: int = 1, caption_tokens: int = CAPTION_TOKENS) -> str:  # fmt: skip
    """Time, caches and memory of a run as aligned lines.

    captioner: a Captioner on the meta device, of `load_meta_models`. args: the flags batch_size, micro_batch_size,
    captions_per_clip, frames, cache_features and speed (clips/s, None: unknown). caption_tokens: L, with EOS;
    max_caption_tokens: the longest L that training allows, whose memory is given too. processes: those of torchrun.
    """
    seconds = schedule.clips_seen / args.speed if args.speed else None
    time = "unknown without --speed" if seconds is None else f"{format_seconds(seconds)} at {format_speed(args.speed)}"
    caches = cache_bytes(args, dataset.counts(), captioner)
    caches |= {"sum": sum(caches.values())}
    memory = step_memory(captioner, args, device, caption_tokens, processes)
    clips = math.ceil(args.batch_size / processes)
    clips = min(clips, args.micro_batch_size or clips)
    place = f"{device.type}, {processes} processes, in each" if processes > 1 else f"{device.type},"
    tables = [
        f"time of the steps: {time}",
        *(f"warning: {line}" for line in schedule_warnings(schedule.passes, seconds)),
        format_table("caches on the disk:", [(name, format_bytes(size)) for name, size in caches.items()]),
        format_memory(memory, f"memory of a step on {place} {clips} clips at once, {caption_tokens} tokens a "
                              "caption, at its largest moments:", "features" if args.cache_features else "frames"),
    ]  # fmt: skip
    longest = step_memory(captioner, args, device, max_caption_tokens, processes)
    tables.append(f"  {format_bytes(longest.peak)} where a caption has {max_caption_tokens} tokens, the longest")
    return "\n".join(tables)
