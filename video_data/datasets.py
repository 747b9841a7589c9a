"""The datasets: their clips, the captions of each, the splits, and deviations from the standard.

    shapes    generated (`shapes.py`)
    msvd      1,970 clips from YouTube, about 41 captions each [1]
    msrvtt    10,000 clips, 20 captions each [2]
    folder    your own: captions.json in the folder of the videos, {split: {file: [caption, ...]}}

Captions stay as people wrote them, because metrics are computed on these. `batches.py` normalizes those for training.

References
[1] D. Chen, W. Dolan, "Collecting Highly Parallel Data for Paraphrase Evaluation", ACL 2011
[2] J. Xu et al., "MSR-VTT: A Large Video Description Dataset for Bridging Video and Language", CVPR 2016
"""

import hashlib
import os
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short

from common.errors import InputError
from common.files import field, read_json
from video_data import annotations, shapes
from video_data.annotations import SPLITS, Annotations
from video_data.layouts import LAYOUTS

READERS = {"msvd": annotations.read_msvd, "msrvtt": annotations.read_msrvtt}  # of annotation files
DATASETS = ("shapes", *READERS, "folder")
DEFAULT_SIZES = (9000, 200, 500)  # clips of each split of shapes
MAX_SIZE = 10**6  # of a split of shapes

# Clips and captions per split in published results.
STANDARD_SIZES = {
    "msvd": {"train": (1200, 48774), "val": (100, 4290), "test": (670, 27763)},
    "msrvtt": {"train": (6513, 130260), "val": (497, 9940), "test": (2990, 59800)},
}


@dataclass(frozen=True)
class Clip:
    """One video file and its captions."""

    id: str
    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class VideoDataset:
    """The splits that were read, and what was left out of them."""

    name: str
    splits: dict[str, list[Clip]]
    files: tuple[Path, ...]  # the source of captions and splits
    missing: dict[str, int]  # clips per split without a video or a caption
    skipped: int  # rows without a caption

    def counts(self) -> dict[str, int]:
        return {split: len(clips) for split, clips in self.splits.items()}

    def differences(self) -> list[str]:
        """Why scores are not comparable with published ones, one line each."""
        return [f"{split}: {line}" for split in self.splits for line in self._differences(split)]

    def _differences(self, split: str) -> list[str]:
        clips = self.splits[split]
        lines = [f"{self.missing[split]} clips are missing"] if self.missing[split] else []
        sizes = len(clips), sum(len(clip.captions) for clip in clips)
        for what, size, standard in zip(("clips", "captions"), sizes, self._standard_sizes(split), strict=True):
            if standard is not None and size != standard:
                lines.append(f"{size:,} {what}, {standard:,} are standard")
        return lines

    def _standard_sizes(self, split: str) -> tuple[int | None, int | None]:
        return STANDARD_SIZES.get(self.name, {}).get(split, (None, None))

    def signature(self, split: str) -> str:
        """The part of a score's signature that describes the data."""
        lines = self._differences(split)
        return f"data:{self.name} {split}" + (f" ({'; '.join(lines)})" if lines else "")

    def __str__(self) -> str:
        """A table of the splits beside the standard sizes."""
        files = ", ".join(path.name for path in self.files)
        header = "split", "clips", "standard", "captions", "standard", "per clip", "missing"
        rows = ["{:8}{:>8}{:>10}{:>10}{:>10}{:>12}{:>9}".format(*header)]
        for split, clips in self.splits.items():
            sizes = sorted(len(clip.captions) for clip in clips)
            standard = [f"{n:,}" if n is not None else "-" for n in self._standard_sizes(split)]
            per_clip = f"{sizes[0]}-{statistics.median_low(sizes)}-{sizes[-1]}"
            rows.append(f"{split:8}{len(clips):>8,}{standard[0]:>10}{sum(sizes):>10,}{standard[1]:>10}{per_clip:>12}"
                        f"{self.missing[split]:>9,}")  # fmt: skip
        rows += [f"{self.skipped:,} rows without a caption were skipped"] if self.skipped else []
        rows += [f"differs: {line}" for line in self.differences()]
        return "\n".join([f"{self.name} from {files} (captions per clip: minimum, median, maximum)", *rows])


def cache_folder(cache: str | Path | None, dataset: str, root: Path) -> Path:
    """The folder for a dataset's caches: .cache in its own folder, or one in `cache` that no other dataset shares."""
    if cache is None:
        return root / ".cache"  # hidden folders are not searched for videos
    return Path(cache) / f"{dataset}-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]}"


def has_word(caption: str) -> bool:
    return any(letter.isalnum() for letter in caption)


def read_captions_json(path: Path) -> Annotations:
    """{split: {file: [caption, ...]}}, files relative to the folder of captions.json."""
    content, captions, splits = read_json(path), {}, {}
    if unexpected := sorted(content.keys() - set(SPLITS)):
        raise InputError(f"{path}: {unexpected[0]!r} is no split, expected {', '.join(SPLITS)}")
    for split in SPLITS:
        clips = field(content, split, dict, path)
        splits[split] = list(clips)
        for name, group in clips.items():
            if not isinstance(group, list) or not group or not all(isinstance(c, str) and has_word(c) for c in group):
                raise InputError(f"{path}: {split}: {name!r}: expected a list of captions, each with a word in it")
            if name in captions:
                raise InputError(f"{path}: {name!r} occurs in two splits, expected one")
            captions[name] = group
    return Annotations(splits, captions, [path])


def check_splits(annotated: Annotations, root: Path) -> None:
    """Raises InputError if a clip occurs twice in the splits."""
    counts = Counter(clip_id for ids in annotated.splits.values() for clip_id in ids)
    if duplicates := [clip_id for clip_id, count in counts.items() if count > 1]:
        files = ", ".join(str(path.relative_to(root)) for path in annotated.files)
        raise InputError(f"{files} in {root}: {len(duplicates)} clips occur twice in the splits, "
                         f"such as {duplicates[0]!r}")  # fmt: skip


def check_complete(annotated: Annotations, paths: dict[str, Path], splits: Sequence[str], root: Path) -> None:
    """Raises InputError if a clip has no caption or no video."""
    ids = [clip_id for split in splits for clip_id in annotated.splits.get(split, [])]
    for what, available in (("caption", annotated.captions), ("video", paths)):
        if missing := [clip_id for clip_id in ids if not available.get(clip_id)]:
            hint = "--allow-missing leaves them out"
            if len(missing) == len(ids) and available:
                hint = f"other clips have one, such as {next(iter(available))}"
            raise InputError(f"{root}: {len(missing)} of {len(ids)} clips have no {what}: {', '.join(missing[:5])}"
                             f"{', ...' if len(missing) > 5 else ''}; {hint}")  # fmt: skip


def build_dataset(name: str, root: Path, annotated: Annotations, paths: dict[str, Path],
                  splits: Sequence[str]) -> VideoDataset:  # fmt: skip
    """Combines ids, captions and videos. Clips without a caption or a video are left out and counted.

    Raises InputError for an empty split, a caption with a lone surrogate, and a video file of two clips.
    """
    clips, missing = {}, {}
    for split in splits:
        ids = annotated.splits.get(split, [])
        clips[split] = [Clip(clip_id, paths[clip_id], tuple(annotated.captions[clip_id])) for clip_id in ids
                        if annotated.captions.get(clip_id) and clip_id in paths]  # fmt: skip
        missing[split] = len(ids) - len(clips[split])
        if not clips[split]:
            raise InputError(f"{root}: split {split!r} is empty: none of its {len(ids)} clips is present")
    every_clip = [clip for group in clips.values() for clip in group]
    for clip in every_clip:
        if any("\ud800" <= letter <= "\udfff" for caption in clip.captions for letter in caption):
            raise InputError(f"{root}: a caption of {clip.id!r} contains a lone surrogate, expected Unicode text")
    counts = Counter(clip.path.resolve() for clip in every_clip)
    if duplicates := [path for path, count in counts.items() if count > 1]:
        raise InputError(f"{duplicates[0]}: is the video of {counts[duplicates[0]]} clips, expected one")
    return VideoDataset(name, clips, tuple(annotated.files), missing, annotated.skipped)


def check_sizes(sizes: Sequence[int], where: str) -> None:
    """Raises an InputError that starts with `where` unless `shapes` can be made with these sizes of its splits."""
    is_list = isinstance(sizes, Sequence) and len(sizes) == 3
    if not is_list or not all(type(n) is int and 0 < n <= MAX_SIZE for n in sizes):
        raise InputError(f"{where}: {short(sizes)}, expected three whole numbers from 1 to {MAX_SIZE}")


def read_dataset(name: str, root: Path, sizes: Sequence[int] = DEFAULT_SIZES, allow_missing: bool = False,
                 splits: Sequence[str] = SPLITS, workers: int = 0, seed: int = 0) -> VideoDataset:  # fmt: skip
    """The given splits of a dataset in the folder `root`. `shapes` is generated there first, `sizes` clips per split of
    a `seed`, by `workers` processes; 0: one per core.

    Raises InputError if captions or splits cannot be read or contradict each other, or if a clip has no video or no
    caption. With `allow_missing`, such clips are left out instead.
    """
    if name not in DATASETS:
        raise InputError(f"dataset {name!r}: expected one of {', '.join(DATASETS)}")
    sizes = sizes or DEFAULT_SIZES
    check_sizes(sizes, "shapes_sizes")
    if name == "shapes":
        shapes.make_dataset(root, dict(zip(SPLITS, sizes, strict=True)), seed, workers=workers)
    if not root.is_dir() or not any(root.iterdir()):
        print(LAYOUTS[name], file=sys.stderr)
        found = "an empty one" if root.is_dir() else "none"
        raise InputError(f"{root}: expected the folder of {name}, found {found}")
    if name in ("shapes", "folder"):
        annotated = read_captions_json(root / "captions.json")
        paths = {clip_id: path for clip_id in annotated.captions if (path := root / clip_id).is_file()}
    else:
        annotated = READERS[name](root)
        aliases = {clip_id: annotated.aliases.get(clip_id, "") for split in splits
                   for clip_id in annotated.splits.get(split, [])}  # fmt: skip
        paths = annotations.find_clip_files(root, aliases)
    check_splits(annotated, root)
    if not allow_missing:
        check_complete(annotated, paths, splits, root)
    return build_dataset(name, root, annotated, paths, splits)


def load(name: str, root: Path, sizes: Sequence[int] = DEFAULT_SIZES) -> dict[str, list[Clip]]:
    """{split: clips} of a dataset, see `read_dataset`."""
    return read_dataset(name, root, sizes).splits
