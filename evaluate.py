"""Captions a split of a run's dataset and scores it, or captions your own videos.

    python evaluate.py RUN [--split {val,test}] [--save predictions.json]
    python evaluate.py RUN --video a.mp4 b.mp4 folder/

Letters: B clips, T frames, S side in pixels.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import cli
import data
import metrics
import shapes
from lm import CausalLM
from model import AdapterConfig, Captioner
from vit import ViT
from weights import InputError, field, read_json, read_metadata, replace_atomically, sha256_of

VIDEO_ENDINGS = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts"}


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one (cuda, then mps), else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error


def backbone_hashes(vit: str, lm: str) -> dict[str, str]:
    """sha256 of both backbones' weights, which a checkpoint names and cannot do without."""
    return {name: sha256_of(Path(folder) / "model.safetensors") for name, folder in (("vit", vit), ("lm", lm))}


def load_run(run: Path, which: str = "best") -> tuple[Captioner, dict]:
    """The captioner of a run's folder, from its config, its two backbones and `which`/adapter.safetensors."""
    if not (run / "config.json").is_file():
        raise InputError(f"{run}: expected a run's folder with config.json in it, as train.py makes it")
    config = read_json(run / "config.json")
    flags = field(config, "flags", dict, run / "config.json")
    path = run / which / "adapter.safetensors"
    metadata = read_metadata(path)
    for name, sha in backbone_hashes(flags["vit"], flags["lm"]).items():
        if metadata.get(name) != sha:
            raise InputError(f"{path}: was trained on another {name} than {flags[name]} (sha256 {sha[:12]}..., "
                             f"expected {str(metadata.get(name))[:12]}...)")  # fmt: skip
    captioner = Captioner(
        ViT.from_pretrained(flags["vit"]),
        CausalLM.from_pretrained(flags["lm"]),
        data.load_tokenizer(flags["lm"]),
        AdapterConfig(**field(config, "adapter", dict, run / "config.json")),
    )
    captioner.load(path)
    return captioner, config


def caption_frames(captioner: Captioner, batches: Iterator[torch.Tensor]) -> list[str]:
    """uint8 batches (B, T, 3, S, S) -> a caption for each clip."""
    device = next(captioner.parameters()).device
    return [caption for frames in batches for caption in captioner.caption(frames.to(device))]


def caption_split(captioner: Captioner, cache, batch: int = 64) -> list[str]:
    """Captions all clips of a frame cache (clips, T, 3, S, S), which holds segment centres."""
    starts = range(0, len(cache), batch)
    return caption_frames(captioner, (torch.from_numpy(np.array(cache[i : i + batch])) for i in starts))


def score_captions(dataset: str, references: dict[str, list[str]], captions: dict[str, str],
                   names=("BLEU", "ROUGE_L", "CIDEr")) -> tuple[dict[str, float], str]:  # fmt: skip
    """Scores by name, unscaled, `shapes` also by what its captions claim; and the metrics' signature."""
    result = metrics.score(references, captions, metrics=names)
    scores = dict(result.corpus)
    if dataset == "shapes":
        scores |= {f"{k} right": v for k, v in shapes.attributes(references, captions).items()}
    return scores, result.signature


def table(scores: dict[str, float]) -> str:
    """Scores x100, as papers print them; shares in %."""
    return "  ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())


def find_videos(names: list[str]) -> list[Path]:
    """Files as they are, folders as the videos in them by name."""
    found = []
    for path in map(Path, names):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in VIDEO_ENDINGS)
            if not inside:
                raise InputError(f"{path}: a folder without a video ({', '.join(sorted(VIDEO_ENDINGS))})")
            found += inside
        else:
            found.append(path)
    return found


def caption_videos(captioner: Captioner, paths: list[Path], frames: int) -> tuple[dict[str, str], int]:
    """Prints a caption or, on stderr, an error for each video; returns the captions and how many failed."""
    captions, failed = {}, 0
    for path in paths:
        try:
            pixels = data.read_frames(path, frames, captioner.vit.config.image_size)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        captions[str(path)] = caption_frames(captioner, iter([pixels[None]]))[0]
        print(f"{path}: {captions[str(path)]}", flush=True)
    return captions, failed


def main() -> int:
    parser = cli.Parser("Captions and scores a split of a run's dataset, or captions your own videos.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder that train.py made")
    what = parser.add_argument_group("what is captioned")
    what.add_argument("--split", choices=["val", "test"], default="test", help="which split of the run's dataset")
    what.add_argument("--video", nargs="+", metavar="FILE", help="your own videos, or folders of them, instead")
    what.add_argument("--frames", type=cli.at_least(1), help="frames a clip; unset: as in training")
    what.add_argument("--weights", choices=["best", "last"], default="best", help="which checkpoint of the run")
    out = parser.add_argument_group("output and machine")
    out.add_argument("--save", type=Path, metavar="FILE", help="writes {id: caption} as JSON")
    out.add_argument("--device", default="auto", help="cuda, mps, cpu; auto takes the first that is there")
    args = parser.parse_args()

    captioner, config = load_run(args.run, args.weights)
    captioner.to(pick_device(args.device))
    flags = config["flags"]
    frames = args.frames or flags["frames"]
    failed = 0
    if args.video:
        captions, failed = caption_videos(captioner, find_videos(args.video), frames)
    else:
        root = Path(flags["data"])
        clips = data.load(flags["dataset"], root, flags["clips"])[args.split]
        size = captioner.vit.config.image_size
        cache = data.cached_frames(clips, root / f"{args.split}-{frames}x{size}.frames", frames, size, 0)
        captions = dict(zip((c.id for c in clips), caption_split(captioner, cache), strict=True))
        references = {c.id: list(c.captions) for c in clips}
        scores, signature = score_captions(flags["dataset"], references, captions)
        print(f"{args.split}: {table(scores)}")
        print(signature)
    if args.save:
        with replace_atomically(args.save) as file:
            file.write((json.dumps(captions, indent=1, ensure_ascii=False) + "\n").encode())
    if failed and failed + len(captions) > 1:
        print(f"error: {failed} of {failed + len(captions)} videos could not be captioned", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    cli.run(main)
