"""What `train.py` can be told, and the flags of a run that goes on."""

import argparse
from pathlib import Path

import torch

import cli
import corpora
import devices
from weights import InputError, field, read_json

TINY = "backbones/tiny-vit", "backbones/tiny-lm"
CLIP = "openai/clip-vit-base-patch16"
TINYLLAMA, LLAMA_160M = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "JackFram/llama-160m"
NEWER = {  # flags that older runs do not have, and what they did
    "image_size": None, "allow_missing": None, "cache": None, "download": None, "compile": None, "precision": "fp32",
    "save_every": None,
}  # fmt: skip


def parse(argv: list[str] | None = None):
    parser = cli.Parser("Trains a captioner on a dataset.")
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=corpora.DATASETS, default="shapes", help="what to train on")
    group.add_argument("--data", type=Path, help="the dataset's folder; unset: data/DATASET")
    group.add_argument("--allow-missing", action="store_true", help="leave out clips without a video or a caption")
    group.add_argument("--download", action="store_true", help="first fetch what is published of msvd or msrvtt")
    group.add_argument("--cache", type=Path, help="where decoded frames are kept; unset: the dataset's folder")
    group.add_argument("--clips", type=cli.at_least(1), nargs=3, default=[6000, 200, 500],
                       metavar=("TRAIN", "VAL", "TEST"), help="clips that shapes is made of")  # fmt: skip
    group.add_argument("--cache-features", action="store_true",
                       help="run the frozen ViT once for each frame and keep what it makes of them on disk, in bf16")
    group.add_argument("--frames", type=cli.at_least(1, 4096), default=8, help="frames a clip")
    group.add_argument("--captions-per-clip", type=cli.at_least(1), default=1, help="captions a clip in a step")
    group = parser.add_argument_group("model")
    group.add_argument("--vit", help="the ViT: a folder, a .pth file or a hub id; unset: the tiny one for shapes, else "
                       f"{CLIP}")  # fmt: skip
    group.add_argument("--lm", help="the language model: a folder or a hub id; unset: the tiny one for shapes, else "
                       f"{TINYLLAMA} with a GPU, {LLAMA_160M} without")  # fmt: skip
    group.add_argument("--image-size", type=cli.at_least(1, 4096),
                       help="side of the ViT's input in pixels; unset: its own")  # fmt: skip
    group.add_argument("--method", choices=["qadapter", "linear", "lora", "full"], default="qadapter",
                       help="what is trained")  # fmt: skip
    group.add_argument("--reading", choices=["read", "write"], default="read", help="do patches read queries back?")
    group.add_argument("--queries", type=cli.at_least(1), default=16, help="query tokens, and so visual tokens")
    group.add_argument("--rank", type=cli.at_least(1), default=32, help="of the Q-Adapter's projections, of LoRA")
    group.add_argument("--heads", type=cli.at_least(1), default=8, help="attention heads of the Q-Adapter")
    group.add_argument("--last-blocks", type=cli.at_least(0), default=3, help="adapt only the last so many; 0: all")
    group.add_argument("--gate", choices=["sigmoid", "none"], default="sigmoid", help="the gating layer")
    group.add_argument("--talk", action="store_true", help="queries attend to each other too")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch-size", type=cli.at_least(1), default=64, help="clips a step, of all processes together")
    group.add_argument("--epochs", type=cli.at_least(1), default=16, help="passes over the training clips")
    group.add_argument("--lr", type=cli.number(0, above=True), default=5e-3, help="peak learning rate of AdamW")
    group.add_argument("--weight-decay", type=cli.number(0), default=0.01, help="of AdamW")
    group.add_argument("--warmup", type=cli.at_least(0), default=50, help="steps of linear warm-up")
    group.add_argument("--seed", type=cli.at_least(0), default=0, help="of weights, order, frames and captions")
    group = parser.add_argument_group("run and machine")
    group.add_argument("--out", type=Path, help="the run's folder; unset: runs/DATASET-METHOD")
    group.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run, with its own flags")
    group.add_argument("--eval-every", type=cli.at_least(1), default=4, help="epochs between validations")
    group.add_argument("--log-every", type=cli.at_least(1), default=20, help="steps between reports")
    group.add_argument("--save-every", type=cli.at_least(1), default=200, help="steps between checkpoints")
    group.add_argument("--workers", type=cli.at_least(0), default=0, help="processes that decode; 0: one a core")
    group.add_argument("--device", default="auto", help="cuda, mps, cpu; auto takes the first that is there")
    group.add_argument("--precision", choices=["auto", *devices.DTYPES], default="auto",
                       help="of the frozen weights; auto: bf16 where the device has instructions for it")  # fmt: skip
    group.add_argument("--compile", action="store_true", help="compile the blocks, which takes a minute or two")
    return parser.parse_args(argv)


def of_run(argv: list[str]) -> argparse.Namespace:
    """The flags of the run that `--resume` names. Beside it only where and on what may be given anew."""
    given = parse(argv)
    config = given.resume / "config.json"
    if not config.is_file():
        raise InputError(f"{given.resume}: expected a run to go on with, with config.json and last/state.pt in it")
    free = {"--resume", "--device", "--workers", "--data", "--cache"}
    if odd := [word for word in argv if word.startswith("--") and word.split("=")[0] not in free]:
        raise InputError(f"{odd[0]}: a run goes on with its own flags; beside --resume only {', '.join(sorted(free))}")
    words, flags = [], field(read_json(config), "flags", dict, config)
    for name in vars(given).keys() - {"resume", "out"}:
        if name not in flags and name not in NEWER:
            raise InputError(f"{config}: flags: expected a field {name!r}")
        value = flags.get(name, NEWER.get(name))
        if value is not None and value is not False:
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else map(str, value if isinstance(value, list) else [value])
    try:
        return parse([*words, *argv, "--out", str(given.resume)])
    except InputError as error:
        raise InputError(f"{config}: flags: {error}") from error


def backbones(dataset: str, device: torch.device) -> tuple[str, str]:
    """ViT and language model for a dataset, unless one says which."""
    return TINY if dataset == "shapes" else (CLIP, LLAMA_160M if device.type == "cpu" else TINYLLAMA)
