"""The datasets: which clips there are, what people said of each, and which split it is in."""

from dataclasses import dataclass
from pathlib import Path

import shapes
from weights import InputError, field, read_json


@dataclass(frozen=True)
class Clip:
    """One video file and what people said of it."""

    id: str
    path: Path
    captions: tuple[str, ...]


SPLITS = ("train", "val", "test")


def load(dataset: str, root: Path, sizes: tuple[int, int, int] = (6000, 200, 500)) -> dict[str, list[Clip]]:
    """{split: clips} of a dataset; `shapes` is made under `root`, `sizes` clips a split, if not there yet."""
    if dataset != "shapes":
        raise InputError(f"dataset {dataset!r}: expected shapes")
    shapes.make(root, dict(zip(SPLITS, sizes, strict=True)))
    path = root / "captions.json"
    splits = read_json(path)
    found = {}
    for split in SPLITS:
        clips = field(splits, split, dict, path)
        if not clips:
            raise InputError(f"{path}: split {split!r} is empty, expected {{file: [caption, ...]}}")
        found[split] = [Clip(name, root / name, tuple(captions)) for name, captions in clips.items()]
    ids = [clip.id for clips in found.values() for clip in clips]
    if len(set(ids)) < len(ids):
        raise InputError(f"{path}: a clip stands in two splits, for one {max(ids, key=ids.count)!r}")
    return found
