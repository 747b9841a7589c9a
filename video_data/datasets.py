"""The datasets: which clips there are, what people said of each, which split it is in, and what is not as usual.

    shapes    made here (`shapes.py`)
    msvd      1,970 clips from YouTube, about 41 captions each [1]
    msrvtt    10,000 clips, 20 captions each [2]
    folder    anybody's own: captions.json in the folder of the videos, {split: {file: [caption, ...]}}

Captions are kept as people wrote them, for that is what the scores are computed on; `data.py` cleans those that are
learnt.

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

import published
import shapes
import sources
from sources import SPLITS, Annotations
from weights import InputError, field, read_json

DATASETS = ("shapes", "msvd", "msrvtt", "folder")

# Clips and captions of each split as published results have them.
STANDARD = {
    "msvd": {"train": (1200, 48774), "val": (100, 4290), "test": (670, 27763)},
    "msrvtt": {"train": (6513, 130260), "val": (497, 9940), "test": (2990, 59800)},
}


@dataclass(frozen=True)
class Clip:
    """One video file and what people said of it."""

    id: str
    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """A dataset as it was found."""

    name: str
    splits: dict[str, list[Clip]]
    files: tuple[Path, ...]  # that the captions and splits are from
    missing: dict[str, int]  # clips a split without a video or a caption
    dirty: int  # rows without a caption

    def counts(self) -> dict[str, int]:
        return {split: len(clips) for split, clips in self.splits.items()}

    def differences(self) -> list[str]:
        """What keeps scores from being compared with published ones, a line each."""
        found = []
        for split, clips in self.splits.items():
            if self.missing[split]:
                found.append(f"{split}: {self.missing[split]} clips are missing")
            sizes = len(clips), sum(len(clip.captions) for clip in clips)
            for what, size, usual in zip(("clips", "captions"), sizes, self._standard(split), strict=True):
                if usual is not None and size != usual:
                    found.append(f"{split}: {size:,} {what}, {usual:,} are standard")
        return found

    def _standard(self, split: str) -> tuple[int | None, int | None]:
        return STANDARD.get(self.name, {}).get(split, (None, None))

    def label(self, split: str) -> str:
        """What a score's signature says of the data."""
        mine = [line.partition(": ")[2] for line in self.differences() if line.startswith(f"{split}:")]
        return f"data:{self.name} {split}" + (f" ({'; '.join(mine)})" if mine else "")

    def __str__(self) -> str:
        """A table of what was found, beside the standard where there is one."""
        files = ", ".join(path.name for path in self.files)
        rows = [f"{'split':8}{'clips':>8}{'standard':>10}{'captions':>10}{'standard':>10}{'a clip':>12}{'missing':>9}"]
        for split, clips in self.splits.items():
            each = sorted(len(clip.captions) for clip in clips)
            usual = [f"{n:,}" if n is not None else "-" for n in self._standard(split)]
            spread = f"{each[0]}-{statistics.median_low(each)}-{each[-1]}"
            rows.append(f"{split:8}{len(clips):>8,}{usual[0]:>10}{sum(each):>10,}{usual[1]:>10}{spread:>12}"
                        f"{self.missing[split]:>9,}")  # fmt: skip
        rows += [f"{self.dirty:,} rows without a caption were left out"] if self.dirty else []
        rows += [f"differs: {line}" for line in self.differences()]
        return "\n".join([f"{self.name} from {files} (captions a clip: fewest, median, most)", *rows])


def read(dataset: str, root: Path, sizes: Sequence[int] = (6000, 200, 500), allow_missing: bool = False,
         wanted: Sequence[str] = SPLITS) -> Corpus:  # fmt: skip
    """The `wanted` splits of a dataset under `root`; `shapes` is made there, `sizes` clips a split, if not there yet.

    Raises InputError where captions or splits cannot be read or contradict each other, or a clip has no video or
    no caption, which `allow_missing` leaves out instead.
    """
    if dataset not in DATASETS:
        raise InputError(f"dataset {dataset!r}: expected one of {', '.join(DATASETS)}")
    if len(sizes) != 3 or not all(type(n) is int and n > 0 for n in sizes):
        raise InputError(f"clips: {list(sizes)}, expected three whole numbers above 0")
    if dataset == "shapes":
        shapes.make(root, dict(zip(SPLITS, sizes, strict=True)))
    if not root.is_dir() or not any(root.iterdir()):
        print(published.HELP[dataset], file=sys.stderr)
        what = "nothing in it" if root.is_dir() else "none"
        raise InputError(f"{root}: expected the folder of {dataset}, found {what}")
    if dataset in ("shapes", "folder"):
        known = captions_json(root / "captions.json")
        paths = {key: path for key in known.captions if (path := root / key).is_file()}
    else:
        known = {"msvd": sources.msvd, "msrvtt": sources.msrvtt}[dataset](root)
        asked = {key: known.aliases.get(key, "") for split in wanted for key in known.splits.get(split, [])}
        paths = sources.find_videos(root, asked)
    check_splits(known, root)
    return corpus(dataset, root, known, paths, allow_missing, wanted)


def kept_in(cache: str | Path | None, dataset: str, root: Path) -> Path:
    """The folder for what is kept of a dataset: its own, or one in `cache` that no other dataset shares."""
    if cache is None:
        return root
    return Path(cache) / f"{dataset}-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]}"


def load(dataset: str, root: Path, sizes: Sequence[int] = (6000, 200, 500)) -> dict[str, list[Clip]]:
    """{split: clips} of a dataset, see `read`."""
    return read(dataset, root, sizes).splits


def has_word(caption: str) -> bool:
    return any(letter.isalnum() for letter in caption)


def captions_json(path: Path) -> Annotations:
    """{split: {file: [caption, ...]}}, files as they are called from the folder of captions.json."""
    content, captions, splits = read_json(path), {}, {}
    if odd := sorted(content.keys() - set(SPLITS)):
        raise InputError(f"{path}: {odd[0]!r} is no split, expected {', '.join(SPLITS)}")
    for split in SPLITS:
        clips = field(content, split, dict, path)
        splits[split] = list(clips)
        for name, said in clips.items():
            if not isinstance(said, list) or not said or not all(isinstance(c, str) and has_word(c) for c in said):
                raise InputError(f"{path}: {split}: {name!r}: expected a list of captions, each with a word in it")
            if name in captions:
                raise InputError(f"{path}: a clip stands in two splits, for one {name!r}")
            captions[name] = said
    return Annotations(splits, captions, [path])


def check_splits(known: Annotations, root: Path) -> None:
    """Raises InputError where a clip stands twice in the splits."""
    where = f"{', '.join(str(path.relative_to(root)) for path in known.files)} in {root}"
    times = Counter(key for ids in known.splits.values() for key in ids)
    if twice := [key for key, n in times.items() if n > 1]:
        raise InputError(f"{where}: {len(twice)} clips stand twice in the splits, for one {twice[0]!r}")


def corpus(dataset: str, root: Path, known: Annotations, paths: dict[str, Path], allow_missing: bool,
           wanted: Sequence[str]) -> Corpus:  # fmt: skip
    """Puts ids, captions and videos together."""
    asked = [key for split in wanted for key in known.splits.get(split, [])]
    for what, there in (("caption", known.captions), ("video", paths)):
        gone = [key for key in asked if not there.get(key)]
        if gone and not allow_missing:
            hint = "--allow-missing goes on without them"
            if len(gone) == len(asked) and there:
                hint = f"there are of others, such as {next(iter(there))}"
            raise InputError(f"{root}: {len(gone)} of {len(asked)} clips have no {what}: {', '.join(gone[:5])}"
                             f"{', ...' if len(gone) > 5 else ''}; {hint}")  # fmt: skip
    splits, missing = {}, {}
    for split in wanted:
        ids = known.splits.get(split, [])
        there = [key for key in ids if known.captions.get(key) and key in paths]
        splits[split] = [Clip(key, paths[key], tuple(known.captions[key])) for key in there]
        missing[split] = len(ids) - len(there)
        if not there:
            raise InputError(f"{root}: split {split!r} is empty: of its {len(ids)} clips none is here")
    for clip in (clip for clips in splits.values() for clip in clips):
        if any("\ud800" <= letter <= "\udfff" for caption in clip.captions for letter in caption):
            raise InputError(f"{root}: a caption of {clip.id!r} holds half a character, expected Unicode text")
    one_file = Counter(clip.path.resolve() for clips in splits.values() for clip in clips)
    if twice := [path for path, n in one_file.items() if n > 1]:
        raise InputError(f"{twice[0]}: is the video of {one_file[twice[0]]} clips, expected one")
    return Corpus(dataset, splits, tuple(known.files), missing, known.dirty)
