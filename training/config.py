"""The flags of `train.py`, and those of a run that is resumed."""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch

from common import cli
from common.errors import InputError
from common.files import bounded, field, read_json
from models.mllm_prompts import INSTRUCTION
from training.devices import DTYPES
from training.presets import PRESETS
from video_data.datasets import DATASETS
from video_data.shapes import DEFAULT_SIZES

METHODS = ("qadapter", "none", "linear", "lora", "lora-lm", "adapter", "prompt", "full")
VISUAL = ("queries", "frames", "both")
TINY = "backbones/tiny-vit", "backbones/tiny-lm"
CLIP = "openai/clip-vit-base-patch16"
TINYLLAMA, LLAMA_160M = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "JackFram/llama-160m"
ALLOWED_WITH_RESUME = {"resume", "device", "data", "epochs"}
NOT_STORED = {"resume", "plan", "speed"}  # of a run's flags in its config.json
MAX_FRAMES, MAX_SIDE, MAX_EPOCHS = 4096, 4096, 10**5
CANDIDATE_FRAMES = 16  # unless --frames is large
PRESET = "unset: the dataset's preset"
DEFAULTS_IN_OLDER_RUNS = {  # flags that older runs lack, and the value they had in effect
    "image_size": None, "allow_missing": False, "compile": False, "precision": "fp32", "save_every": 200,
    "lr_scaling": "none", "gate_lr": 1.0, "passes": None, "micro_batch_size": None, "beams": 1,
    "raw_channels": True, "mllm": None, "visual": "queries", "grid": 0,
    "instruction": INSTRUCTION, "gate_bias": 0.0, "time_embed": "ramp", "per_frame": False, "no_changes": True,
    "token_dropout": 0.0,
}  # fmt: skip


def default_models(dataset: str, device: torch.device) -> tuple[str, str]:
    """The ViT and the language model where no flag names them."""
    return TINY if dataset == "shapes" else (CLIP, LLAMA_160M if device.type == "cpu" else TINYLLAMA)


def fill_models(args: argparse.Namespace, device: torch.device) -> None:
    """Gives --vit and --lm their defaults where neither they nor --mllm are given."""
    if args.mllm is None:
        default_vit, default_lm = default_models(args.dataset, device)
        args.vit = default_vit if args.vit is None else args.vit
        args.lm = default_lm if args.lm is None else args.lm


def check_models(args: argparse.Namespace) -> None:
    """Raises InputError where flags of an MLLM are given with those of a ViT and a language model, or the reverse."""
    if args.mllm == "":
        raise InputError("--mllm: expected a folder or a hub id, found nothing")
    if any("\ud800" <= letter <= "\udfff" for letter in args.instruction):
        raise InputError("--instruction: contains a lone surrogate, expected Unicode text")
    for name in ("vit", "lm", "image_size"):
        if args.mllm is not None and getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')}: was given with --mllm, expected only one of them")
    if args.mllm is None and args.visual != "queries":
        raise InputError("--visual: expected --mllm too: only its language model can read frames")
    if args.method != "qadapter" and (args.visual != "queries" or args.write_back):
        raise InputError(f"--visual and --write-back: expected --method qadapter, found {args.method}")
    if args.mllm is None and args.instruction != INSTRUCTION:
        raise InputError("--instruction: expected --mllm too: the prompt of a ViT and a language model is fixed")
    if args.grid and args.method == "qadapter" and args.visual == "queries":
        raise InputError("--grid: expected --visual frames or both: the queries have no grid")
    if args.visual == "frames" and not args.write_back:
        raise InputError("--visual frames: expected --write-back too: else nothing reads the queries")


def add_data_flags(group) -> None:
    group.add_argument("--dataset", choices=DATASETS, default="shapes", help="what to train on")
    group.add_argument("--data", type=cli.folder, help="the dataset's folder; unset: data/DATASET")
    group.add_argument("--allow-missing", action="store_true", help="leave out clips without a video or a caption")
    group.add_argument("--shapes-sizes", type=cli.at_least(1, 10**6), nargs=3, default=list(DEFAULT_SIZES),
                       metavar=("TRAIN", "VAL", "TEST"), help="clips of each split of shapes")  # fmt: skip
    group.add_argument("--cache-features", action="store_true",
                       help="run the frozen ViT once for each frame and store its outputs on the disk, in bf16")
    group.add_argument("--frames", type=cli.at_least(1, MAX_FRAMES), help=f"frames per clip; {PRESET}")
    group.add_argument("--candidate-frames", type=cli.at_least(1, MAX_FRAMES),
                       help="frames stored of a training clip, of which a step draws --frames; unset: "
                       f"{CANDIDATE_FRAMES} or twice --frames; with --cache-features --frames")  # fmt: skip
    group.add_argument("--captions-per-clip", type=cli.at_least(1, 1000), help=f"captions per clip in a step; {PRESET}")


def add_model_flags(group) -> None:
    group.add_argument("--vit", help="the ViT: a folder, a .pth file or a hub id; unset: the tiny one for shapes, else "
                       f"{CLIP}")  # fmt: skip
    group.add_argument("--lm", help="the language model: a folder or a hub id; unset: the tiny one for shapes, else "
                       f"{TINYLLAMA} with a GPU, {LLAMA_160M} without")  # fmt: skip
    group.add_argument("--mllm", help="a multimodal language model, in place of --vit and --lm: a folder or a hub id")
    group.add_argument("--image-size", type=cli.at_least(1, MAX_SIDE),
                       help="side of the ViT's input in pixels; unset: the ViT's own")  # fmt: skip
    group.add_argument("--method", choices=METHODS, default="qadapter", help="what is trained")
    group.add_argument("--write-back", action="store_true", help="patches read the queries too")
    group.add_argument("--visual", choices=VISUAL, default="queries",
                       help="what an MLLM's language model reads: the queries, its own tokens of each frame, both")
    group.add_argument("--grid", type=cli.at_least(0, 256), default=0, metavar="G",
                       help="average what is read of a frame to G x G tokens; 0: an MLLM's as they are, of a ViT its "
                       "pooled feature")  # fmt: skip
    group.add_argument("--instruction", default=INSTRUCTION, help="to an MLLM")
    group.add_argument("--queries", type=cli.at_least(1, 4096), default=16,
                       help="query tokens of the Q-Adapter; prompts of a block")  # fmt: skip
    group.add_argument("--rank", type=cli.at_least(1, 8192), default=32,
                       help="of the Q-Adapter's projections, of LoRA, of adapters")  # fmt: skip
    group.add_argument("--heads", type=cli.at_least(1, 1024), default=4, help="attention heads of the Q-Adapter")
    group.add_argument("--last-blocks", type=cli.at_least(0), default=3, help="adapt only the last so many; 0: all")
    group.add_argument("--gate", choices=["normed", "sigmoid", "channel", "patch", "none"], default="normed",
                       help="the gating layer: a number a query of normalized or plain inputs, a number a channel of "
                       "a query, a number a token of the ViT")  # fmt: skip
    group.add_argument("--gate-bias", type=cli.number(float, -20, 20), default=0.0, help="the gates' logit at the start")
    group.add_argument("--time-embed", choices=["ramp", "random", "none"], default="ramp",
                       help="the frame vectors of the Q-Adapter at the start; none: without them")  # fmt: skip
    group.add_argument("--per-frame", action="store_true", help="each query attends to one frame only")
    group.add_argument("--no-changes", action="store_true",
                       help="the Q-Adapter reads each token of the ViT alone; unset: and its change since the frame "
                       "before")  # fmt: skip
    group.add_argument("--token-dropout", type=cli.number(float, 0, 0.9), metavar="P",
                       help=f"in training hide this share of the ViT's tokens from the Q-Adapter; {PRESET}")
    group.add_argument("--raw-channels", action="store_true",
                       help="the Q-Adapter reads LN(Z) as it is; unset: each channel standardized")  # fmt: skip
    group.add_argument("--query-self-attention", action="store_true", help="queries attend to each other too")


def add_optimization_flags(group) -> None:
    group.add_argument("--batch-size", type=cli.at_least(1), help=f"clips per step, over all processes; {PRESET}")
    group.add_argument("--micro-batch-size", type=cli.at_least(1),
                       help="clips of a process in memory at once; gradients are summed; unset: its whole batch")
    group.add_argument("--passes", type=cli.number(float, 0, MAX_EPOCHS, above=True),
                       help=f"passes over the training captions; {PRESET}")  # fmt: skip
    group.add_argument("--epochs", type=cli.at_least(1, MAX_EPOCHS),
                       help="passes over the training clips, in place of --passes")  # fmt: skip
    group.add_argument("--lr", type=cli.number(float, 0, above=True), help=f"peak learning rate of AdamW; {PRESET}")
    group.add_argument("--lr-scaling", choices=["fan-in", "none"], default="fan-in",
                       help="scale the learning rate of a matrix with 1 / fan_in, so that one --lr fits every width")
    group.add_argument("--gate-lr", type=cli.number(float, 0), default=0.1,
                       help="a factor of the gates' learning rate: gates that learn fast close early")
    group.add_argument("--weight-decay", type=cli.number(float, 0), help=f"of AdamW; {PRESET}")
    group.add_argument("--warmup", type=cli.at_least(0), default=50, help="steps of linear warm-up")
    group.add_argument("--seed", type=cli.at_least(0), default=0, help="of weights, clip order, frames and captions")


def add_run_flags(group) -> None:
    group.add_argument("--out", type=cli.path, help="the folder of the run; unset: runs/DATASET-METHOD")
    group.add_argument("--resume", type=cli.path, metavar="RUN", help="continue this run with its own flags")
    group.add_argument("--eval-every", type=cli.at_least(1), default=4, help="epochs between validations")
    group.add_argument("--beams", type=cli.at_least(1), help=f"beams of the search on the test split; {PRESET}")
    group.add_argument("--log-every", type=cli.at_least(1), default=20, help="steps between log lines")
    group.add_argument("--save-every", type=cli.at_least(1), default=200, help="steps between checkpoints")
    group.add_argument("--device", default="auto", help="cuda, mps or cpu; auto: CUDA, else MPS, else CPU")
    group.add_argument("--precision", choices=["auto", *DTYPES], default="auto",
                       help="of the frozen weights; auto: bf16 where the device has instructions for it")  # fmt: skip
    group.add_argument("--compile", action="store_true", help="compile the blocks, which takes a minute or two")
    group.add_argument("--plan", action="store_true",
                       help="print steps, passes, caches and memory of the run, and train nothing")  # fmt: skip
    group.add_argument("--speed", type=cli.number(float, 1e-6), metavar="CLIPS/S", help="for the time in --plan")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser("Trains a captioner on a dataset.")
    add_data_flags(parser.add_argument_group("data"))
    add_model_flags(parser.add_argument_group("model"))
    add_optimization_flags(parser.add_argument_group("optimization"))
    add_run_flags(parser.add_argument_group("run and machine"))
    return parser


def default_candidate_frames(frames: int) -> int:
    """Frames stored of a training clip, of which each step draws `frames` others."""
    return max(CANDIDATE_FRAMES, 2 * frames)


def fill_from_preset(args: argparse.Namespace) -> None:
    """Gives the flags that are unset the values of the dataset's preset; --epochs stands in for --passes."""
    if args.epochs is not None and args.passes is not None:
        raise InputError("--passes: was given with --epochs, expected only one of them")
    for name, value in asdict(PRESETS[args.dataset]).items():
        if getattr(args, name) is None and not (name == "passes" and args.epochs is not None):
            setattr(args, name, value)
    if args.candidate_frames is None:  # with --cache-features, more would cost the ViT's time before they are used
        args.candidate_frames = args.frames if args.cache_features else default_candidate_frames(args.frames)
    if args.candidate_frames < args.frames:
        raise InputError(f"--candidate-frames {args.candidate_frames}: expected at least --frames {args.frames}")


def check_out(folder: Path, resume: bool) -> None:
    """Raises InputError where the folder is that of another run, holds other files, or cannot be written to."""
    if (folder / "config.json").exists() and not resume:
        raise InputError(f"{folder}: holds a run already; --resume {folder} continues it, --out names another folder")
    for path in sorted(folder.iterdir()) if folder.is_dir() and not resume else ():
        was_killed_early = path.name in ("lock", "last.new") or path.suffix == ".tmp" or (path / "sha256.json").exists()
        if not was_killed_early:  # else what is left of a run that has no config.json yet
            raise InputError(f"--out {folder}: holds {path.name}, expected a new or an empty folder")
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--out {folder}: cannot be written to")


def to_words(name: str, value: Any) -> list[str]:
    """A flag's name and value -> the words of the command line."""
    if value is None or value is False:
        return []
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag] if value is True else [f"{flag}={value}"]  # with "=", a value may begin with a dash


def read_run_config(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """-> config.json of a run, and its flags with those that older runs lack. Raises InputError."""
    path = run / "config.json"
    if not path.is_file():
        raise InputError(f"{run}: expected the folder of a run, with config.json in it")
    config = read_json(path)
    flags = DEFAULTS_IN_OLDER_RUNS | field(config, "flags", dict, path)
    # evaluate.py takes these from here, without a parser of its own.
    frames = bounded(flags, "frames", int, path, 1, MAX_FRAMES)
    bounded(flags, "beams", int, path, 1, 2**31)
    if flags["image_size"] is not None:
        bounded(flags, "image_size", int, path, 1, MAX_SIDE)
    if flags.get("dataset", "shapes") not in DATASETS:
        raise InputError(f"{path}: dataset is {short(flags['dataset'])}, expected one of {', '.join(DATASETS)}")
    return config, {"candidate_frames": default_candidate_frames(frames)} | flags


def resume_args(args: argparse.Namespace, argv: list[str]) -> argparse.Namespace:
    """The flags of the run that --resume names, with those of ALLOWED_WITH_RESUME replaced that are given beside it."""
    given = {word.split("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--")}
    if refused := sorted(given - ALLOWED_WITH_RESUME):
        allowed = ", ".join(f"--{name}" for name in sorted(ALLOWED_WITH_RESUME))
        raise InputError(f"--{refused[0].replace('_', '-')}: a run keeps its own flags; --resume takes only {allowed}")
    path = args.resume / "config.json"
    _, flags = read_run_config(args.resume)
    if "epochs" in given and flags.get("method") == "none":
        raise InputError(f"--epochs: {args.resume} is of --method none, which trains nothing")
    words = []  # parsed again, so that a flag that was changed by hand is checked like any other
    for name in sorted(vars(args).keys() - NOT_STORED - {"out"}):
        if name not in flags:
            raise InputError(f"{path}: flags: expected a field {name!r}")
        words += to_words(name, flags[name])
    try:
        return make_parser().parse_args([*words, *argv, "--out", str(args.resume)])
    except InputError as error:
        raise InputError(f"{path}: flags: {error}") from error


def check_together(args: argparse.Namespace) -> None:
    """Raises InputError for flags that do not fit each other."""
    check_models(args)
    if args.method == "qadapter" and args.rank % args.heads:
        raise InputError(f"--rank {args.rank}: expected a multiple of --heads {args.heads}")
    if args.per_frame and args.queries < args.frames:
        raise InputError(f"--per-frame: --queries {args.queries} cannot see all of --frames {args.frames}")
    if args.cache_features and (args.method not in ("qadapter", "linear", "lora-lm") or args.write_back):
        raise InputError("--cache-features: expected a method that trains and does not change the ViT: linear, "
                         "lora-lm, or qadapter without --write-back")  # fmt: skip
    if args.plan and args.method == "none":
        raise InputError("--plan: expected a method that trains, --method none has no steps")
    if args.speed and not args.plan:
        raise InputError("--speed: is for the time in --plan")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All flags, with --data and --out filled in. Raises InputError."""
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    if args.resume:
        args = resume_args(args, argv)
    fill_from_preset(args)
    if args.resume and not args.data.exists() and any(word.startswith("--data") for word in argv):
        raise InputError(f"--data {args.data}: expected the folder of the run's dataset, found none")
    args.data = args.data or Path("data") / args.dataset
    args.out = args.out or Path(f"runs/{args.dataset}-{args.method}")
    try:
        check_together(args)
    except InputError as error:
        raise InputError(f"{args.resume}/config.json: flags: {error}" if args.resume else str(error)) from error
    if not args.plan:
        check_out(args.out, bool(args.resume))
    return args
