"""Every option of a run, in one place: `Config`'s fields are the flags of `train.py`, the content of a run's
config.json, and what the model is built from. A new option is a field here and the line that uses it.

The defaults of a dataset override those of the fields:

| dataset | why |
|---|---|
| shapes | small models: large batches are cheap; the six captions of a clip say the same, so one of them is enough;
           weight decay and token dropout keep the adapter from memorizing the clips (docs/log.md) |
| msvd   | 41 captions per clip: five share one encoding of the clip; 8 frames, since clips last 10 seconds; 8 at once,
           since an MLLM's ViT has 1,024 patches per frame |
| msrvtt | 20 captions per clip, four of them share an encoding; 12 frames, since clips last 15 seconds and have cuts |
| folder | nothing is known: a clip may have one caption only, and a small dataset needs more epochs |

One learning rate serves every width (`training/optimizer.py`): 0.005 on `shapes`; 0.002 on real videos, where it was
the Q-Adapter's best of four with one pair of models (docs/real-video.md). Captions of real videos are searched with
five beams, as published results are; on `shapes` that lowers CIDEr.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from common import cli
from common.errors import InputError, reading
from common.files import field as json_field
from common.files import read_json

VERSION = "1.9.0"
METHODS = ("qadapter", "none", "linear", "lora", "lora-lm", "adapter", "st-adapter", "prompt", "full")
DEVICES = ("auto", "cuda", "mps", "cpu")
HEADS = 4  # of the attention in qadapter.py; the rank is a multiple of them
PRESETS = {
    "shapes": dict(captions_per_clip=1, batch_size=64, epochs=(8,), weight_decay=0.2, token_dropout=0.3, beams=1),
    "msvd": dict(captions_per_clip=5, batch_size=32, micro_batch_size=8, epochs=(49,), lr=0.002),
    "msrvtt": dict(frames=12, captions_per_clip=4, batch_size=64, micro_batch_size=8, epochs=(20,), lr=0.002),
    "folder": dict(captions_per_clip=1, batch_size=16, epochs=(20,), lr=0.002),
}
ALLOWED_WITH_RESUME = {"resume", "device", "data", "epochs"}
NOT_STORED = {"resume", "plan", "device", "out"}  # of a run's config.json
EXAMPLE = "python train.py --dataset shapes --cache-features        (docs/runs.md has more)"


def _flag(group: str, default: Any, words: str, **options) -> Any:
    """A field of Config, with its help and the options of argparse's add_argument."""
    return field(default=default, metadata={"group": group, "help": words, **options})


count = partial(cli.number, int)
daily, clips, adapting, prompting, training, saving = (partial(_flag, group) for group in (
    "every day", "what is read of a clip", "the adapter", "what the language model reads", "optimization",
    "validation and checkpoints"))


@dataclass(frozen=True)
class Config:
    """The options of a run. A Path or a name of a model is as the user gave it until `train.py` resolves it."""

    dataset: str = daily("shapes", "what to train on", choices=tuple(PRESETS))
    data: Path | None = daily(None, "the dataset's folder (default: data/DATASET)", type=cli.path)
    mllm: str | None = daily(None, "adapt this multimodal language model: a folder or a hub id (default on msvd and "
                             "msrvtt: SmolVLM2 256M on a CPU, else InternVL3.5 1B)", type=cli.text)
    vit: str | None = daily(None, "or this ViT: a folder, a .pth file or a hub id", type=cli.text)
    lm: str | None = daily(None, "with this language model: a folder or a hub id", type=cli.text)
    method: str = daily("qadapter", "what is trained; docs/design.md describes each", choices=METHODS)
    epochs: tuple[int, ...] = daily((8,), "passes over the training clips: of captions; two or three numbers: of "
                                    "words, captions, CIDEr (docs/runs.md)", nargs="+", type=count(0, 10**5),
                                    metavar="N")
    batch_size: int = daily(16, "clips per step, over all processes", type=count(1))
    cache_features: bool = daily(False, "run the frozen ViT once per frame and store its outputs on the disk, in bf16")
    out: Path | None = daily(None, "the folder of the run (default: runs/DATASET-METHOD)", type=cli.path)
    resume: Path | None = daily(None, "continue this run with its own flags", type=cli.path, metavar="RUN")
    plan: bool = daily(False, "print steps, disk space and memory of the run, and train nothing")
    device: str = daily("auto", "auto: CUDA, else MPS, else CPU", choices=DEVICES)

    frames: int = clips(8, "frames per clip", type=count(1, 4096))
    captions_per_clip: int = clips(1, "captions per clip in a step", type=count(1, 1000))
    image_size: tuple[int, ...] | None = clips(None, "height of the model's input in pixels, and its width if that "
                                               "differs (default: its own)", type=count(1, 4096), nargs="+",
                                               metavar=("H", "W"))
    vit_blocks: int | None = clips(None, "use only the first so many blocks of the ViT", type=count(1, 10**4))
    allow_missing: bool = clips(False, "leave out clips without a video or a caption")

    queries: int = adapting(16, "query tokens of the Q-Adapter; prompts per block", type=count(1, 4096))
    rank: int = adapting(32, "rank of the Q-Adapter's projections, of LoRA, of adapters", type=count(1, 8192))
    last_blocks: int = adapting(3, "the Q-Adapter reads the last so many blocks of the ViT; 0: all",
                                type=count(0, 10**4))
    deep_rank: int = adapting(0, "rank of what visual tokens add to each block of the language model; 0: it reads them "
                              "at its input alone", type=count(0, 8192))
    gate: str = adapting("normed", "the gating layer: one number per query, or none", choices=("normed", "none"))
    write_back: bool = adapting(False, "the ViT's patches read the queries too")
    token_dropout: float = adapting(0.0, "hide this share of the ViT's tokens from the queries in training",
                                    type=cli.number(float, 0, 0.9), metavar="P")
    variant: str | None = adapting(None, "an experiment: a name in study/variants.py", type=cli.text, metavar="NAME")

    visual: str = prompting("queries", "of an MLLM: the queries, or its own tokens of each frame",
                            choices=("queries", "frames"))
    grid: int = prompting(0, "average what is read of a frame to G x G tokens; 0: an MLLM's own tokens, a ViT's pooled "
                          "feature", type=count(0, 256), metavar="G")

    lr: float = training(5e-3, "peak learning rate of AdamW", type=cli.number(float, 1e-12, 1e6))
    weight_decay: float = training(0.01, "weight decay of AdamW", type=cli.number(float, 0, 1e6))
    micro_batch_size: int | None = training(None, "clips that a process holds in memory at once (None: all of them); "
                                            "gradients are summed", type=count(1))
    compile: bool = training(False, "compile the language model's blocks: faster steps after two minutes; CPUs need a "
                             "C++ compiler")
    seed: int = training(0, "seed of weights, clip order, frames and captions", type=count(0, 10**9))
    precision: str = training("auto", "of the frozen weights; auto: bf16 where the device has instructions for it",
                              choices=("auto", "fp32", "bf16"))

    eval_every: int = saving(4, "epochs between validations", type=count(1))
    beams: int = saving(5, "beams of the search on the test split", type=count(1, 1000))

    @property
    def is_pair(self) -> bool:
        """Whether a ViT and a language model are joined, not an MLLM adapted: where a flag is about one of the two, and
        by default on shapes and folder."""
        has_flag = self.vit or self.lm or self.image_size or self.vit_blocks
        return self.mllm is None and bool(has_flag or self.dataset in ("shapes", "folder"))

    @property
    def reads_queries(self) -> bool:
        """Whether the language model reads the queries of the Q-Adapter; else it reads tokens of each frame."""
        return self.method == "qadapter" and self.visual == "queries"

    @property
    def can_cache_vit(self) -> bool:
        """Whether the outputs of the ViT's blocks are those of the frozen ViT, and can be stored."""
        return self.method in ("none", "linear", "lora-lm") or (self.method == "qadapter" and not self.write_back)

    @property
    def phase_epochs(self) -> tuple[int, ...]:
        """Epochs of words, of captions and of CIDEr; one number is of captions, two are of words and captions."""
        epochs = self.epochs if len(self.epochs) > 1 else (0, *self.epochs)
        return (*epochs, 0)[:3]

    @property
    def stored_frames(self) -> int:
        """Frames of a training clip that are stored; a step draws `frames` of them. More features would cost the ViT's
        time before they are used."""
        return self.frames if self.cache_features else 2 * self.frames

    def check(self) -> None:
        """Raises InputError for flags that do not fit each other."""
        is_qadapter, reads_frames = self.method == "qadapter", self.visual == "frames"
        for is_refused, message in (
            (self.mllm and (self.vit or self.lm or self.vit_blocks),
             "--vit, --lm and --vit-blocks: expected without --mllm, which has both models"),
            (self.image_size and len(self.image_size) > (2 if self.mllm else 1),
             "--image-size: expected one number, or with --mllm two: height and width"),
            (reads_frames and (self.is_pair or not (is_qadapter and self.write_back)),
             "--visual frames: expected --mllm, and --method qadapter with --write-back; else nothing reads queries"),
            (not is_qadapter and (self.write_back or self.gate == "none"
                                  or self.last_blocks not in (0, Config.last_blocks)),
             "--write-back, --gate and --last-blocks: expected --method qadapter"),
            (self.grid and self.reads_queries,
             "--grid: expected --visual frames or another method; queries have no grid"),
            (len(self.epochs) > 3 or not any(self.epochs), "--epochs: expected one to three numbers, not all 0"),
            (self.phase_epochs[0] and (self.method == "none" or (self.method == "lora-lm" and not self.is_pair)),
             "--epochs: expected none of words; nothing is trained before the language model"),
            (self.phase_epochs[2] and self.method == "none", "--epochs: expected none of CIDEr; nothing is trained"),
            (self.deep_rank and not (self.reads_queries or (self.is_pair and self.method != "none")),
             "--deep-rank: expected queries, or a ViT with a language model and a method that trains"),
            (is_qadapter and self.rank % HEADS, f"--rank: expected a multiple of {HEADS}"),
            (self.cache_features and (self.method == "none" or not self.can_cache_vit),
             "--cache-features: expected --method linear, lora-lm, or qadapter without --write-back"),
            (self.plan and self.method == "none", "--plan: expected a method that trains"),
            (self.precision == "bf16" and self.method == "full",
             "--precision bf16: is of frozen weights, --method full has none"),
        ):
            if is_refused:
                raise InputError(message)


# ------------------------------------------------------------------------------- the command line


def make_parser() -> argparse.ArgumentParser:
    """A parser whose result has only the flags that are given."""
    parser = cli.Parser("Trains a captioner on a dataset.", EXAMPLE)
    groups: dict[str, Any] = {}
    for option in fields(Config):
        options = dict(option.metadata)
        name, words = options.pop("group"), options.pop("help")
        if option.default not in (None, False, 0) or any(option.name in preset for preset in PRESETS.values()):
            values = {"": option.default} | {
                f" on {dataset}": preset[option.name] for dataset, preset in PRESETS.items()
                if preset.get(option.name, option.default) != option.default}
            defaults = (f"{x[0] if isinstance(x, tuple) else x}{where}" for where, x in values.items())
            words += f" (default: {', '.join(defaults)})"
        if option.type is bool:
            options["action"] = "store_true"
        group = groups[name] = groups.get(name) or parser.add_argument_group(name)
        flag = f"--{option.name.replace('_', '-')}"
        group.add_argument(flag, help=words.replace("%", "%%"), default=argparse.SUPPRESS, **options)
    return parser


def parse_words(words: Sequence[str]) -> tuple[Config, set[str]]:
    """The words of a command line -> the Config, and the names of the flags that are given. Raises InputError."""
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(make_parser().parse_args(words)).items()}
    config = Config(**(PRESETS[given.get("dataset", "shapes")] | given))
    config.check()
    return config, set(given)


def to_words(values: dict[str, Any]) -> list[str]:
    """Stored values -> the words of a command line."""
    words = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None and value is not False:
            words.append(flag if value is True else f"{flag}={value}")  # with "=", a value may begin with a dash
    return words


def to_json(config: Config) -> dict[str, Any]:
    """What a run stores of its Config."""
    return {name: value for name, value in asdict(config).items() if name not in NOT_STORED}


def read_config(run: Path) -> Config:
    """The Config of a run's folder. Each value is checked as if it were given as a flag. Raises InputError."""
    path = run / "config.json"
    content = read_json(path)
    if content.get("version") != VERSION:
        raise InputError(f"{path}: made by version {content.get('version')!r:.20}, this is version {VERSION}")
    values = json_field(content, "config", dict, path)
    with reading(f"{path}: config"):
        if different := values.keys() ^ to_json(Config()).keys():  # a default would be another run
            raise InputError(f"expected just the fields of a run, differs in {min(different)!r:.40}")
        config, _ = parse_words(to_words(values))
        found = json.loads(json.dumps(to_json(config), default=str))  # null, for one, would become a default
        is_open = {"data": config.data is None, "lm": not (config.mllm or config.vit and config.lm),
                   "precision": config.precision == "auto"}
        if different := [name for name in values if found[name] != values[name] or is_open.get(name)]:
            raise InputError(f"{different[0]} is {values[different[0]]!r:.40}, expected what train.py stores")
    return replace(config, out=run)


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """The Config of the command line. With --resume, that of the run, and what may be given beside it."""
    config, given = parse_words(sys.argv[1:] if argv is None else argv)
    if config.resume is None:
        out = config.out or Path(f"runs/{config.dataset}-{config.method}")
        return replace(config, data=config.data or Path("data") / config.dataset, out=out)
    if refused := sorted(given - ALLOWED_WITH_RESUME):
        raise InputError(f"--{refused[0].replace('_', '-')}: a run keeps its own flags; --resume takes only --device, "
                         "--data and --epochs")
    stored = read_config(config.resume)
    config = replace(stored, **{name: getattr(config, name) for name in given})
    config.check()
    words, captions, _ = stored.phase_epochs
    if config.phase_epochs[0] != words:  # else steps that are done would be of another phase
        raise InputError(f"--epochs: expected {words} of words, as many as the run has")
    if config.phase_epochs[2] and config.phase_epochs[1] < captions:
        raise InputError(f"--epochs: expected {captions} of captions or more before those of CIDEr")
    return config
