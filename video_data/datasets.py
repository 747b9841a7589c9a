"""The datasets: their clips, the captions of each, the splits, and deviations from the standard.

    shapes    generated (`shapes.py`)
    msvd      1,970 clips from YouTube, about 41 captions each [1]
    msrvtt    10,000 clips, 20 captions each [2]
    folder    your own: captions.json in the folder of the videos

Captions stay as people wrote them, because metrics are computed on these. `batches.py` normalizes those for training.

References
[1] D. Chen, W. Dolan, "Collecting Highly Parallel Data for Paraphrase Evaluation", ACL 2011
[2] J. Xu et al., "MSR-VTT: A Large Video Description Dataset for Bridging Video and Language", CVPR 2016
"""

import filecmp
import hashlib
import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import InputError
from video_data.annotations import SPLITS, Annotations, Clip, read_folder, read_msrvtt, read_msvd

READERS = {"shapes": read_folder, "msvd": read_msvd, "msrvtt": read_msrvtt, "folder": read_folder}

# Captions: the scorers take no more letters, and half of a surrogate pair, which JSON can write, is not text.
MAX_LETTERS, SURROGATE = 10_000, re.compile("[\ud800-\udfff]")
# Clips and captions of each split in published results.
STANDARD_SIZES = {
    "msvd": {"train": (1200, 48774), "val": (100, 4290), "test": (670, 27763)},
    "msrvtt": {"train": (6513, 130260), "val": (497, 9940), "test": (2990, 59800)},
}


@dataclass(frozen=True)
class VideoDataset:
    """The splits that were read, and what was left out of them."""

    name: str
    splits: dict[str, list[Clip]]
    files: tuple[Path, ...]  # the source of captions and splits
    notes: dict[str, list[str]]  # per split, why its scores are not comparable with others, one line each

    def fingerprints(self) -> dict[str, str]:
        """What a run depends on, per split: how many clips, and a hash of their ids, captions and sizes in bytes."""
        result = {}
        for split, clips in self.splits.items():
            text = json.dumps([[clip.id, clip.captions, clip.path.stat().st_size] for clip in clips])
            result[split] = f"{len(clips)} clips with SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return result

    def differences(self) -> list[str]:
        return [f"{split}: {line}" for split, lines in self.notes.items() for line in lines]

    def signature(self, split: str) -> str:
        """The part of a score's signature that describes the data."""
        lines = self.notes[split]
        return f"data:{self.name} {split}" + (f" ({'; '.join(lines)})" if lines else "")

    def __str__(self) -> str:
        """A table of the splits, and what differs from the standard ones."""
        files = ", ".join(path.name for path in self.files)
        lines = [f"{self.name} from {files}", f"{'split':8}{'clips':>8}{'captions':>10}{'per clip':>10}"]
        for split, clips in self.splits.items():
            counts = [len(clip.captions) for clip in clips]
            lines.append(f"{split:8}{len(clips):8,}{sum(counts):10,}{f'{min(counts)}-{max(counts)}':>10}")
        return "\n".join([*lines, *(f"differs: {line}" for line in self.differences())])


def refuse_duplicates(items: Iterable, where: Path, what: str) -> None:
    """Raises InputError if an item occurs twice."""
    if duplicates := [item for item, count in Counter(items).items() if count > 1]:
        raise InputError(f"{where}: {duplicates[0]} {what}, expected once")


def select_clips(root: Path, annotated: Annotations, split: str, allow_missing: bool) -> list[Clip]:
    """The clips of a split. Clips without a caption or a video are an InputError, or with `allow_missing` left out."""
    ids, captions, videos = annotated.splits[split], annotated.captions, annotated.videos
    if not ids:
        raise InputError(f"{root}: expected clips of the split {split}, found none")
    clips = [Clip(i, videos[i], tuple(captions[i])) for i in ids if i in videos and captions.get(i)]
    missing = [i for i in ids if i not in videos or not captions.get(i)]
    for clip in clips:
        if any(len(caption) > MAX_LETTERS or SURROGATE.search(caption) for caption in clip.captions):
            raise InputError(f"{root}: {clip.id}: expected captions in Unicode, at most {MAX_LETTERS:,} characters")
    if not clips or missing and not allow_missing:
        names = ", ".join(missing[:5] + ["..."] * (len(missing) > 5))
        counts = f"{len(missing)} of {len(ids)} {split} clips have no video or no caption"
        raise InputError(f"{root}: {counts}: {names}; --allow-missing leaves them out if any remain")
    return clips


def count_shared(annotated: Annotations, split: str) -> int:
    """How many videos of a split are also, byte for byte and under another name, in another split."""
    paths = {name: [annotated.videos[i] for i in ids if i in annotated.videos]
             for name, ids in annotated.splits.items()}
    by_size: dict[int, list[Path]] = {}
    for path in (path for name, group in paths.items() if name != split for path in group):
        by_size.setdefault(path.stat().st_size, []).append(path)
    return sum(any(filecmp.cmp(path, other, shallow=False) for other in by_size.get(path.stat().st_size, ()))
               for path in paths[split])


def list_differences(name: str, annotated: Annotations, split: str, clips: list[Clip]) -> list[str]:
    """Why scores of these clips are not comparable with published ones, one line each."""
    found = len(clips), sum(len(clip.captions) for clip in clips)
    standard = STANDARD_SIZES.get(name, {}).get(split, found)
    missing = len(annotated.splits[split]) - len(clips)
    shared = count_shared(annotated, split) if split != "train" else 0
    return [line for is_different, line in (
        (missing, f"{missing} clips are missing"),
        (shared, f"{shared} of {len(clips)} videos are also in another split"),
        (found[0] != standard[0], f"{found[0]:,} clips, {standard[0]:,} are standard"),
        (found[1] != standard[1], f"{found[1]:,} captions, {standard[1]:,} are standard"),
    ) if is_different]


def read_dataset(name: str, root: Path, allow_missing: bool = False,
                 splits: Sequence[str] = SPLITS) -> VideoDataset:
    """The given splits of a dataset in the folder `root`. Raises InputError if captions or splits cannot be read or
    contradict each other, if a clip or video occurs twice, and if a clip has no video or no caption, unless
    `allow_missing`."""
    if not root.is_dir() or not any(root.iterdir()):
        if name != "shapes":  # whose folder `train.py` makes
            print(f"Put into {root}:\n{inspect.getdoc(READERS[name])}", file=sys.stderr)
        found = "an empty one" if root.is_dir() else "a file" if root.exists() else "none"
        raise InputError(f"{root}: expected the folder of the dataset (--data), found {found}")
    annotated = READERS[name](root)
    refuse_duplicates([i for ids in annotated.splits.values() for i in ids], root, "occurs twice in the splits")
    clips = {split: select_clips(root, annotated, split, allow_missing) for split in splits}
    refuse_duplicates((c.path.resolve() for group in clips.values() for c in group), root, "is the video of two clips")
    notes = {split: list_differences(name, annotated, split, clips[split]) for split in splits}
    return VideoDataset(name, clips, tuple(annotated.files), notes)


def load(dataset: str, root: str | Path) -> dict[str, list[Clip]]:
    """{split: clips} of a dataset, see `read_dataset`."""
    return read_dataset(dataset, Path(root)).splits
