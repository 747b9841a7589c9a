"""Does one --lr fit every width of the ViT? `python -m bench.widths` trains the Q-Adapter at several learning
rates, for several widths, with `--lr-scaling fan-in` and `none`, and draws the training loss at the end.

A wider ViT is imitated by repeating the channels of one ViT's outputs: h (D) becomes [h, ..., h] (R D). LayerNorm's
statistics do not change, so LN([h, ..., h]) = [LN(h), ..., LN(h)]. Every width gets the same information, and the same
batches. Only the adapter and the connector become wider. All R weights of a repeated channel get the same gradient,
hence the same step of Adam: a step moves LN(Z) W_k by R times as much, and with 1 / R of the rate by as much as before.

What this cannot show is that a wide ViT behaves so. Its channels are not repetitions, for which the rule is exact.

Letters: B clips, T frames, L adapted blocks, P tokens per frame, D width of the ViT, R repeats.
"""

import argparse
import math
import os
import platform
import re
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from common import cli
from common.errors import InputError
from common.files import replace_atomically, write_json
from model import MAX_CAPTION_TOKENS, AdapterConfig, Captioner
from models.lm import CausalLM
from models.tokenizer import load_tokenizer
from models.vit import ViT, ViTConfig
from report.svg import COLOURS, document, line, text
from train import MEASURED_CLIPS, learning_rate
from training.config import TINY
from training.devices import DTYPES, keep_freed_memory, select_precision
from training.frozen_models import backbone_hashes
from training.optimizer import make_optimizer, set_learning_rate
from video_data.annotations import Clip
from video_data.batches import (
    IGNORE_INDEX,
    ClipCache,
    TrainingExamples,
    cache_folder,
    cached_features,
    cached_frames,
    collate,
    epoch_batches,
    run_in_processes,
)
from video_data.datasets import read_dataset

VIT, LM = map(Path, TINY)
LRS = {  # without scaling the best rate falls with the width, so those curves begin lower
    "fan-in": [1.25e-3 * 2**i for i in range(5)],  # to 2e-2
    "none": [1.5625e-4 * 2**i for i in range(7)],  # to 1e-2
}
REPEATS, SEEDS = (1, 3, 6), {"fan-in": (0, 1), "none": (0,)}  # D = 128, 384, 768
WARMUP, WEIGHT_DECAY, GATE_LR = 50, 0.01, 0.1  # as train.py, but for the decay and the token dropout of shapes
AVERAGED_STEPS, BATCH_SEED = 30, 0
PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP, GAP = 360, 230, 62, 62, 60  # of the drawing, in pixels


@dataclass(frozen=True)
class TrainingSet:
    """Clips, their block outputs (T, L, P, D), and what a captioner for them is made of."""

    clips: list[Clip]
    features: ClipCache
    vit: ViTConfig
    precision: str


@dataclass(frozen=True)
class Curve:
    """A curve of loss against learning rate: one width, one scaling, one seed of the initial weights."""

    width: int
    repeats: int
    scaling: str
    seed: int


def repeat_channels(features: Tensor, repeats: int) -> Tensor:
    """(B, T, L, P, D) -> (B, T, L, P, R*D)."""
    return features.repeat(1, 1, 1, 1, repeats)


def make_training_set(data: Path, num_clips: int, precision: str) -> TrainingSet:
    """Reads or makes `shapes`, and the block outputs of its first training clips. Raises InputError."""
    name = "folder" if (data / "captions.json").exists() else "shapes"  # one made before may have more clips
    clips = read_dataset(name, data, (num_clips, 1, 1), splits=["train"]).splits["train"][:num_clips]
    if len(clips) < num_clips:
        raise InputError(f"--clips {num_clips}: {data} has only {len(clips)} training clips")
    dtype = DTYPES[precision]
    vit, lm, config = ViT.from_pretrained(VIT, dtype), CausalLM.from_pretrained(LM, dtype), AdapterConfig()
    captioner = Captioner(vit, lm, load_tokenizer(LM), config)
    frames = cached_frames(clips, cache_folder("shapes", data), "train", config.frames, vit.preprocessing)
    key = [backbone_hashes({"vit": VIT, "lm": LM}), precision, captioner.first_block]
    shape = captioner.block_outputs_shape(config.frames)
    features = cached_features(frames, key, shape, captioner.block_outputs, images_per_batch=32 * config.frames)
    return TrainingSet(clips, features, vit.config, precision)


def make_captioner(training_set: TrainingSet, curve: Curve) -> Captioner:
    """The captioner of a width. Its ViT has no weights: it reads block outputs."""
    dtype = DTYPES[training_set.precision]
    with torch.device("meta"):
        vit = ViT(replace(training_set.vit, width=curve.width)).to(dtype)
    lm = CausalLM.from_pretrained(LM, dtype)
    torch.manual_seed(curve.seed)
    return Captioner(vit, lm, load_tokenizer(LM), AdapterConfig())


def train(curve_and_lr: tuple[Curve, float], training_set: TrainingSet, steps: int, batch_size: int) -> float:
    """Trains as train.py does. -> the mean loss of the last AVERAGED_STEPS steps; infinity if it is not finite."""
    curve, lr = curve_and_lr
    captioner = make_captioner(training_set, curve)
    trained, losses = captioner.trained(), []
    optimizer = make_optimizer(trained, curve.scaling, WEIGHT_DECAY, GATE_LR)
    examples = TrainingExamples(training_set.clips, training_set.features, captioner.tokenizer, captioner.config.frames,
                                1, BATCH_SEED, captioner.lm.config.eos_id, MAX_CAPTION_TOKENS)  # fmt: skip
    epochs = math.ceil(steps / (len(examples.captions) // batch_size))
    first_batch = next(epoch_batches(len(examples.captions), batch_size, 1, BATCH_SEED))
    features, _ = collate([examples[key] for key in first_batch[:MEASURED_CLIPS]])
    captioner.measure_channels(repeat_channels(features, curve.repeats))
    for step, batch in enumerate(islice(epoch_batches(len(examples.captions), batch_size, epochs, BATCH_SEED), steps)):
        set_learning_rate(optimizer, learning_rate(step, steps, WARMUP, lr))
        features, labels = collate([examples[key] for key in batch])  # (B, T, L, P, D), (B, 1, tokens)
        loss = captioner(repeat_channels(features, curve.repeats), labels) / (labels != IGNORE_INDEX).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return math.inf
    return sum(losses[-AVERAGED_STEPS:]) / len(losses[-AVERAGED_STEPS:])


def machine() -> dict[str, str | int | None]:
    """The processor and the versions that figures depend on."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(),
            "python": platform.python_version(), "torch": version("torch")}  # fmt: skip


def draw_panel(left: int, title: str, curves: list[dict], bounds: tuple[float, float]) -> str:
    """One scaling: loss against the logarithm of the learning rate. Dots: best rates. Dashed: another seed."""
    low, high = bounds
    first, last = (math.log2(pick(lr for rates in LRS.values() for lr in rates)) for pick in (min, max))

    def place(lr: float, loss: float) -> tuple[float, float]:
        x = left + PANEL_WIDTH * (math.log2(lr) - first) / (last - first)
        return x, TOP + PANEL_HEIGHT * (1 - (min(loss, high) - low) / (high - low))

    parts = [text(left, TOP - 28, title, 'font-size="13" fill="currentColor"')]
    for i in range(5):
        loss = low + (high - low) * i / 4
        _, y = place(2**first, loss)
        parts += [f'<path d="M{left} {y:.1f}h{PANEL_WIDTH}" stroke="#ddd"/>',
                  text(left - 6, y + 4, f"{loss:.2f}", 'text-anchor="end"')]  # fmt: skip
    for lr in sorted({lr for rates in LRS.values() for lr in rates}):
        x, _ = place(lr, low)
        parts.append(text(x, TOP + PANEL_HEIGHT + 16, f"{lr:.1e}".replace("e-0", "e-"), 'text-anchor="middle"'))
    widths = sorted({curve["width"] for curve in curves})
    for curve in curves:
        colour, losses = COLOURS[widths.index(curve["width"])], {float(lr): x for lr, x in curve["loss"].items()}
        best = min(losses, key=losses.__getitem__)
        x, y = place(best, losses[best])
        parts += [line((place(*point) for point in losses.items()), colour, 'stroke-dasharray="5 4"' * curve["seed"]),
                  f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>']  # fmt: skip
    parts += [text(left + 70 * i, TOP - 9, f"D = {width}", f'font-weight="bold" fill="{COLOURS[i]}"')
              for i, width in enumerate(widths)]  # fmt: skip
    return "\n".join(parts)


def draw(results: dict) -> str:
    """The SVG: a panel for each scaling, a curve for each width."""
    losses = [loss for curve in results["curves"] for loss in curve["loss"].values()]
    low = math.floor(10 * min(losses)) / 10
    bounds = (low, low + 0.4)  # higher losses are drawn at the upper edge
    parts = [draw_panel(LEFT + i * (PANEL_WIDTH + GAP), f"--lr-scaling {scaling}",
                        [curve for curve in results["curves"] if curve["scaling"] == scaling], bounds)
             for i, scaling in enumerate(LRS)]  # fmt: skip
    return document(LEFT + 2 * (PANEL_WIDTH + GAP), TOP + PANEL_HEIGHT + 34, parts)


def parse_args() -> argparse.Namespace:
    parser = cli.Parser("Trains at several learning rates for several widths of the ViT, with and without scaling.")
    parser.add_argument("--steps", type=cli.at_least(1), default=300, help="training steps")
    parser.add_argument("--clips", type=cli.at_least(1), default=1500, help="training clips")
    parser.add_argument("--batch-size", type=cli.at_least(1), default=32, help="clips per step")
    parser.add_argument("--precision", choices=["auto", *DTYPES], default="auto", help="of the frozen weights")
    parser.add_argument("--data", type=cli.path, default=Path("data/widths-shapes"),
                        help="the folder of shapes; made if it is empty")  # fmt: skip
    parser.add_argument("--save", type=cli.path, required=True, metavar="FILE",
                        help="the SVG to write; the figures go beside it, as .json")  # fmt: skip
    args = parser.parse_args()
    if args.batch_size > args.clips:
        raise InputError(f"--batch-size {args.batch_size}: expected at most {args.clips}, the number of --clips")
    return args


def main() -> None:
    args, start_time = parse_args(), time.monotonic()
    torch.set_num_threads(1)  # the trainings are the parallel part
    keep_freed_memory()
    precision, _ = select_precision(args.precision, torch.device("cpu"), frozen=True)
    training_set = make_training_set(args.data, args.clips, precision)
    curves = [Curve(repeats * training_set.vit.width, repeats, scaling, seed)
              for scaling in LRS for seed in SEEDS[scaling] for repeats in REPEATS]  # fmt: skip
    jobs = [(curve, lr) for curve in curves for lr in LRS[curve.scaling]]
    train_one = partial(train, training_set=training_set, steps=args.steps, batch_size=args.batch_size)
    losses = {curve: {} for curve in curves}
    for (curve, lr), loss in zip(jobs, run_in_processes("widths", train_one, [(job,) for job in jobs]), strict=True):
        print(f"D {curve.width}  scaling {curve.scaling}  seed {curve.seed}  lr {lr:.2e}  loss {loss:.4f}")
        losses[curve][f"{lr:.4g}"] = round(loss, 5)
    settings = {"steps": args.steps, "averaged steps": AVERAGED_STEPS, "warmup": WARMUP, "gate lr": GATE_LR,
                "clips": args.clips, "batch size": args.batch_size, "captions per clip": 1,
                "seed of the batches": BATCH_SEED, "precision": precision,
                "minutes": round((time.monotonic() - start_time) / 60, 1)}  # fmt: skip
    rows = [{"width": curve.width, "scaling": curve.scaling, "seed": curve.seed, "loss": losses[curve]}
            for curve in curves]  # fmt: skip
    results = {"machine": machine(), "settings": settings, "curves": rows}
    write_json(args.save.with_suffix(".json"), results)
    with replace_atomically(args.save) as file:
        file.write(draw(results).encode())


if __name__ == "__main__":
    cli.run(main)
