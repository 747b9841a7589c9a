"""What a run will take, before it starts: steps, passes over the captions, disk space, memory.

Shapes: L tokens of a caption with its EOS.
"""

from dataclasses import dataclass

import torch

from common.config import Config
from common.errors import InputError
from common.files import format_bytes
from training.inputs import plan_caches
from training.memory import step_memory
from video_data.datasets import VideoDataset

DAY = 24 * 3600  # seconds
CAPTION_TOKENS = 15  # of a usual English caption with its EOS


@dataclass(frozen=True)
class Schedule:
    """The steps of a run, and its passes over the training captions."""

    steps: int
    passes: float


def make_schedule(config: Config, clips: int, captions: int) -> Schedule:
    """The schedule of a run on so many training clips with so many captions. An epoch drops its incomplete batch.

    Raises InputError if the clips do not fill a batch.
    """
    if config.method == "none":
        return Schedule(0, 0.0)
    if clips < config.batch_size:
        raise InputError(f"--batch-size {config.batch_size}: the dataset has only {clips} training clips")
    steps = config.epochs * (clips // config.batch_size)
    return Schedule(steps, steps * config.batch_size * config.captions_per_clip / captions)


def format_schedule(schedule: Schedule, config: Config) -> str:
    """The line that a run prints, and a warning for less than one pass over the training captions."""
    if not schedule.steps:
        return "training: nothing, --method none"
    line = (f"training: {schedule.steps:,} steps of {config.batch_size} clips, {config.epochs} epochs, "
            f"{schedule.passes:.2f} passes over the captions ({config.captions_per_clip} per clip and epoch)")
    if schedule.passes < 1:
        line += "\nwarning: that is less than one pass over the training captions; --epochs makes the run longer"
    return line


def format_plan(config: Config, dataset: VideoDataset, captioner, device: torch.device, max_caption_tokens: int,
                processes: int = 1) -> str:
    """Caches and memory of a run as aligned lines, of a Captioner on the meta device and of one of so many processes.

    max_caption_tokens: the longest L that training allows, whose memory is given too.
    """
    caches = {f"{split} {what}": len(cache) * cache.clip_bytes
              for what, group in plan_caches(config, dataset, captioner, {}).items() for split, cache in group.items()}
    memory = step_memory(captioner, config, device, CAPTION_TOKENS, processes)
    longest = step_memory(captioner, config, device, max_caption_tokens, processes)
    tables = {
        "caches on the disk": caches | {"sum": sum(caches.values())},
        f"memory of a step on {device.type}, per process, at its largest moment": {
            "frozen weights": memory.frozen, "trained weights, gradients, moments": memory.trained,
            "batches of features" if config.cache_features else "batches of frames": memory.inputs,
            "activations": memory.activations, "fragmentation": memory.fragmentation,
            f"sum, with {CAPTION_TOKENS} tokens per caption": memory.peak,
            f"sum, with {max_caption_tokens} tokens, the longest": longest.peak,
        },
    }
    lines = []
    for title, rows in tables.items():
        lines += [f"{title}:", *(f"  {name:40}{format_bytes(size):>10}" for name, size in rows.items() if size)]
    return "\n".join(lines)
