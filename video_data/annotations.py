"""Captions, splits and video files of MSVD, MSR-VTT and your own clips.

The docstring of a reader says what belongs in the folder of its dataset; it is printed if the folder is empty.

The standard split of MSVD [1] takes the clips in the order of their numbers N: 1,200 for training, 100 for validation,
670 for testing. The numbers follow the code points of the ids, so the order of all 1,970 is known without the mapping.

References
[1] S. Venugopalan et al., "Translating Videos to Natural Language", https://arxiv.org/abs/1412.4729, section 4.1
[2] MSR-VTT, J. Xu et al., CVPR 2016; 6,513, 497 and 2,990 clips by the field `split`
"""

import csv
import io
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any
from unicodedata import normalize

from common.errors import InputError, reading
from common.files import field as json_field
from common.files import open_to_read, read_json

VIDEO_SUFFIXES = tuple(".avi .mp4 .mkv .mov .webm .m4v .mpg .mpeg .wmv .flv .ts".split())
SPLITS = ("train", "val", "test")
MAX_DEPTH = 3  # levels of subfolders that are searched

Pairs = Iterable[tuple[str, str]]  # (id, caption)


@dataclass(frozen=True)
class Clip:
    """One video file and its captions."""

    id: str
    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Annotations:
    """Ids per split, captions and video file per id, unchanged from the files."""

    splits: dict[str, list[str]]
    captions: dict[str, list[str]]
    videos: dict[str, Path]
    files: list[Path]  # the source of captions and splits


def iter_files(root: Path) -> Iterator[Path]:
    """Files in the folder and its subfolders, nearest first, sorted by name. Hidden files and folders are skipped."""
    folders = [root]
    for _ in range(MAX_DEPTH + 1):
        paths = [path for folder in folders for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
        yield from (path for path in paths if path.is_file())
        folders = [path for path in paths if path.is_dir()]


def find_files(files: list[Path], *names: str) -> list[Path]:
    """The first file of each name that is there. Case is ignored."""
    first = {path.name.lower(): path for path in reversed(files)}
    return [first[name.lower()] for name in names if name.lower() in first]


def spellings(*names: str) -> list[str]:
    """Names with "é" as two characters, as on a Mac's disk, as one, and as it is written."""
    return [form for name in names for form in (normalize("NFD", name), normalize("NFC", name), name)]


def find_videos(files: list[Path], names: dict[str, str]) -> dict[str, Path]:
    """{id: another name of the clip or the id again} -> {id: the video file with one of the two names}.

    Clips without a file are left out. Raises InputError if a clip has two files.
    """
    by_name: dict[str, list[Path]] = {}
    for path in files:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            by_name.setdefault(path.stem, []).append(path)
    found = {clip_id: [path for key in spellings(clip_id, name) for path in by_name.get(key, [])]
             for clip_id, name in names.items()}
    for paths in found.values():
        if len({path.resolve() for path in paths}) > 1:  # several links to one file are allowed
            raise InputError(f"{paths[0]}: and {paths[1]}: two videos of one clip, expected one")
    return {clip_id: paths[0] for clip_id, paths in found.items() if paths}


def parse_file(path: Path, parse: Callable[[bytes], Any]) -> Any:
    with open_to_read(path) as file:
        return parse(file.read())


def split_lines(content: bytes) -> list[str]:
    """Lines of a text without empty lines and comments."""
    lines = content.decode("utf-8-sig").split("\n")
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def group_captions(pairs: Pairs) -> dict[str, list[str]]:
    """Captions by id, without those that have no letter from a to z."""
    captions: dict[str, list[str]] = {}
    for clip_id, caption in pairs:
        if re.search("[a-z]", caption.lower()):
            captions.setdefault(clip_id, []).append(" ".join(caption.split()))
    return captions


# -------------------------------------------------------------------------------------------- MSVD


def parse_descriptions(content: bytes) -> Pairs:
    """AllVideoDescriptions.txt."""
    parts = [line.partition(" ") for line in split_lines(content)]
    return [(clip_id, caption) for clip_id, _, caption in parts]


class SafeUnpickler(pickle._Unpickler):  # the one in C allocates as much memory as a damaged file asks for
    """Reads Python's own containers, strings and numbers. Calls nothing."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


def parse_pickle(content: bytes) -> Pairs:
    """raw-captions.pkl."""
    captions = SafeUnpickler(io.BytesIO(content)).load()
    pairs = [(clip_id, words) for clip_id, group in captions.items() for words in group]
    return [(clip_id, words if isinstance(words, str) else " ".join(words)) for clip_id, words in pairs]


def parse_csv(content: bytes) -> Pairs:
    """The MSR Video Description Corpus, English captions only."""
    rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    english = [row for row in rows if (row["Language"] or "").strip() == "English"]
    return [(f"{row['VideoID']}_{row['Start']}_{row['End']}", row["Description"] or "") for row in english]


MSVD_PARSERS = {"AllVideoDescriptions.txt": parse_descriptions, "raw-captions.pkl": parse_pickle,
                "MSR_Video_Description_Corpus.csv": parse_csv, "MSR Video Description Corpus.csv": parse_csv,
                "video_corpus.csv": parse_csv}


def read_msvd(root: Path) -> Annotations:
    """MSVD (Microsoft Research Video Description Corpus): 1,970 short clips. In the folder or in its subfolders:

    YouTubeClips/               the clips, ID.avi (or .mp4; vidN.avi with youtube_mapping.txt), 1.7 GB
    AllVideoDescriptions.txt    the captions, lines "ID CAPTION"; or raw-captions.pkl, {ID: [[WORD, ...], ...]},
                                or MSR_Video_Description_Corpus.csv
    youtube_mapping.txt         lines "ID vidN"; or train_list.txt, val_list.txt, test_list.txt, the ids of each split;
                                not needed with captions of all clips

    docs/datasets.md lists where each file is published.
    """
    files = list(iter_files(root))
    sources = [(path, parse) for name, parse in MSVD_PARSERS.items() for path in find_files(files, name)]
    if not sources:
        raise InputError(f"{root}: expected one of {', '.join(MSVD_PARSERS)} in it")
    captions = group_captions(parse_file(*sources[0]))
    mapping = find_files(files, "youtube_mapping.txt")
    aliases = parse_file(mapping[0], parse_mapping) if mapping else {}
    lists = find_files(files, *(f"{split}_list.txt" for split in SPLITS))
    if len(lists) == len(SPLITS):
        ids = {name: clip_id for clip_id, name in aliases.items()}
        stems = [[Path(line).stem for line in parse_file(path, split_lines)] for path in lists]
        splits = [[ids.get(stem, stem) for stem in group] for group in stems]
    else:
        lists, ordered = mapping, list(aliases) or sorted(captions)
        if len(ordered) != 1970:
            expected = "expected all 1970, or train_list.txt, val_list.txt and test_list.txt"
            raise InputError(f"{[*mapping, root][0]}: {len(ordered)} clips, so its split is not known: {expected}")
        splits = [ordered[:1200], ordered[1200:1300], ordered[1300:]]
    videos = find_videos(files, {clip_id: aliases.get(clip_id, clip_id) for group in splits for clip_id in group})
    return Annotations(dict(zip(SPLITS, splits, strict=True)), captions, videos, [sources[0][0], *lists])


def parse_mapping(content: bytes) -> dict[str, str]:
    """youtube_mapping.txt -> {id: vidN}, by N."""
    pairs = [line.split() for line in split_lines(content)]
    return dict(sorted(pairs, key=lambda pair: int(pair[1].removeprefix("vid"))))


# ----------------------------------------------------------------------------------------- MSR-VTT

MSRVTT_FILES = ("MSRVTT_data.json", "train_val_videodatainfo.json", "train_videodatainfo.json",
                "val_videodatainfo.json", "test_videodatainfo.json", "videodatainfo_2017.json")


def read_msrvtt(root: Path) -> Annotations:
    """MSR-VTT: 10,000 clips with 20 captions each [2]. In the folder or in its subfolders:

    TrainValVideo/, TestVideo/    the clips, videoN.mp4, in these folders or in one, 6 GB
    MSRVTT_data.json              {videos: [{video_id, split}], sentences: [{video_id, caption}]}; or
                                  train_val_videodatainfo.json and test_videodatainfo.json

    docs/datasets.md lists where each file is published.
    """
    files = list(iter_files(root))
    sources = find_files(files, *MSRVTT_FILES)
    if not sources:
        raise InputError(f"{root}: expected one of {', '.join(MSRVTT_FILES)} in it")
    split_of: dict[str, str] = {}
    pairs: dict[tuple, tuple[str, str]] = {}  # by sentence: two files may contain the same
    for path in sources:
        content = read_json(path)
        with reading(path):
            for row in json_field(content, "videos", list, path):
                clip_id, split = json_field(row, "video_id", str, "videos"), json_field(row, "split", str, "videos")
                split = {"validate": "val"}.get(split, split)
                if split not in SPLITS or split_of.setdefault(clip_id, split) != split:
                    expected = "expected train, validate or test, and the same in all files"
                    raise InputError(f"split of {short(clip_id)} is {short(split)}, {expected}")
            for i, row in enumerate(json_field(content, "sentences", list, path)):
                clip_id, caption = (json_field(row, name, str, "sentences") for name in ("video_id", "caption"))
                pairs[clip_id, row.get("sen_id", i), caption] = clip_id, caption
    ordered = sorted(split_of, key=lambda clip_id: (len(clip_id), clip_id))  # video9 before video10
    splits = {split: [clip_id for clip_id in ordered if split_of[clip_id] == split] for split in SPLITS}
    videos = find_videos(files, dict(zip(ordered, ordered, strict=True)))
    return Annotations(splits, group_captions(pairs.values()), videos, sources)


# ---------------------------------------------------------------------------------- your own clips


def read_folder(root: Path) -> Annotations:
    """Your own clips: videos, and a file captions.json with paths relative to the folder:

    {"train": {"a.mp4": ["a man opens a door", "someone comes in"], "more/b.mov": ["a dog barks"]},
     "val": {"c.mp4": ["a cat sleeps"]},
     "test": {"d.mp4": ["a child paints"]}}

    val chooses the best weights. test is scored once, at the end. To score a finished run, one split is enough.
    """
    source = root / "captions.json"
    content = read_json(source)
    if content.keys() - set(SPLITS):
        raise InputError(f"{source}: expected the splits {', '.join(SPLITS)}, found {short(list(content))}")
    groups = {split: json_field(content, split, dict, source) for split in SPLITS if split in content}
    captions = {name: group for clips in groups.values() for name, group in clips.items()}
    for name, group in captions.items():
        is_list = isinstance(group, list) and group
        if not is_list or not all(isinstance(caption, str) and re.search(r"[^\W_]", caption) for caption in group):
            raise InputError(f"{source}: {name!r}: expected a list of captions, each with a word in it")
    videos = {name: root / form for name in captions for form in spellings(name) if (root / form).is_file()}
    return Annotations({split: list(groups.get(split, ())) for split in SPLITS}, captions, videos, [source])
