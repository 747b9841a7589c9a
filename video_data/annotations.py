"""MSVD's and MSR-VTT's captions and splits, from the files that people have of them; and where a clip's video lies.

    MSVD      captions   AllVideoDescriptions.txt      ID CAPTION a line, comments begin with #
                         raw-captions.pkl              {ID: [[WORD, ...], ...]}
                         MSR Video Description Corpus  CSV: VideoID, Start, End, Language, Description, ...
              splits     train_list.txt, val_list.txt, test_list.txt, or youtube_mapping.txt (ID vidN a line)
    MSR-VTT   both       *.json with {videos: [{video_id, split}], sentences: [{video_id, caption}]}

The standard split of MSVD [1] takes the clips in the order of their numbers N: 1,200 to train, 100 to validate, 670 to
test. Those numbers follow the code points of the ids, so the order of all 1,970 is known without the mapping.

References
[1] S. Venugopalan et al., "Translating Videos to Natural Language", https://arxiv.org/abs/1412.4729, section 4.1
[2] MSR-VTT, J. Xu et al., CVPR 2016; 6,513, 497 and 2,990 clips by the field `split`
"""

import csv
import io
import pickle
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short

from weights import InputError, read_json
from weights import field as typed

VIDEO_ENDINGS = (".avi", ".mp4", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts")
SPLITS = ("train", "val", "test")
DEPTH = 3  # folders below the dataset's own that are looked through


@dataclass
class Annotations:
    """What the files say: ids a split, captions an id, as they stand; and what was left out of them."""

    splits: dict[str, list[str]]
    captions: dict[str, list[str]]
    files: list[Path]
    dirty: int = 0  # rows that hold no caption
    aliases: dict[str, str] = field(default_factory=dict)  # id -> another name that its video may have


def walk(root: Path) -> Iterator[Path]:
    """Files in the folder and below, nearest first, in the order of their names."""
    folders = [root]
    for _ in range(DEPTH + 1):
        below = []
        for folder in folders:
            inside = sorted(folder.iterdir())
            yield from (path for path in inside if path.is_file())
            below += [path for path in inside if path.is_dir() and not path.name.startswith(".")]
        folders = below


def named(files: Iterable[Path], *names: str) -> Path | None:
    """The first file with the first of these names that any has."""
    files = list(files)
    return next((path for name in names for path in files if path.name.lower() == name.lower()), None)


def text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"{error.object[error.start]:#04x} at {error.start}"
        raise InputError(f"{path}: expected UTF-8, found byte {byte}") from error


def lines(path: Path) -> list[str]:
    """Lines of a text file, without empty ones and comments."""
    return [line for line in text_of(path).split("\n") if line.strip() and not line.startswith("#")]


def said(captions: Iterable[tuple[str, str]]) -> tuple[dict[str, list[str]], int]:
    """(id, caption) pairs -> captions by id, and how many were none: without a letter from a to z."""
    found: dict[str, list[str]] = {}
    dirty = 0
    for key, caption in captions:
        mine = found.setdefault(key, [])
        if any("a" <= letter <= "z" for letter in caption.lower()):
            mine.append(" ".join(caption.split()))
        else:
            dirty += 1
    return found, dirty


# -------------------------------------------------------------------------------------------- MSVD


def descriptions(path: Path) -> Iterator[tuple[str, str]]:
    """AllVideoDescriptions.txt -> (id, caption)."""
    for line in lines(path):
        key, _, caption = line.strip().partition(" ")
        yield key, caption


class Plain(pickle._Unpickler):  # the one in C sets aside any amount of memory that a damaged file asks for
    """Reads what is made of Python's own containers, strings and numbers; nothing is called."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


def pickled(path: Path) -> Iterator[tuple[str, str]]:
    """raw-captions.pkl -> (id, caption)."""
    try:
        content = Plain(io.BytesIO(path.read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
            MemoryError, RecursionError, AssertionError, struct.error) as error:  # fmt: skip
        raise InputError(f"{path}: not a pickle of captions that can be trusted: {short(str(error))}") from error
    where = f"{path}: expected {{id: [[word, ...], ...]}}"
    if not isinstance(content, dict):
        raise InputError(f"{where}, found {type(content).__name__}")
    for key, group in content.items():
        if not isinstance(key, str) or not isinstance(group, list):
            raise InputError(f"{where}, found {short(key)}: {short(group)}")
        for words in group:
            words = [words] if isinstance(words, str) else words
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise InputError(f"{where}, found {short(words)} among those of {short(key)}")
            yield key, " ".join(words)


def corpus_csv(path: Path) -> Iterator[tuple[str, str]]:
    """The MSR Video Description Corpus -> (id, caption), English ones."""
    rows = csv.DictReader(io.StringIO(text_of(path), newline=""))
    names = "VideoID", "Start", "End", "Language", "Description"
    try:
        if missing := [name for name in names if name not in (rows.fieldnames or [])]:
            raise InputError(f"{path}: expected a column {missing[0]!r} in its first line")
        for row in rows:
            video, start, end, language, caption = (row[name] or "" for name in names)
            if language.strip() == "English":
                yield f"{video}_{start}_{end}", caption
    except csv.Error as error:
        raise InputError(f"{path}: line {rows.line_num}: not a CSV file: {error}") from error


def msvd(root: Path) -> Annotations:
    """Reads what there is of MSVD under `root`. Raises InputError where it has no captions, or no known split."""
    files = list(walk(root))
    readers = {"AllVideoDescriptions.txt": descriptions, "raw-captions.pkl": pickled,
               "MSR_Video_Description_Corpus.csv": corpus_csv, "MSR Video Description Corpus.csv": corpus_csv,
               "video_corpus.csv": corpus_csv}  # fmt: skip
    source = named(files, *readers)
    if source is None:
        raise InputError(f"{root}: expected one of {', '.join(readers)} in it")
    reader = next(reader for name, reader in readers.items() if name.lower() == source.name.lower())
    captions, dirty = said(reader(source))
    mapping = named(files, "youtube_mapping.txt")
    numbers = _numbers(mapping) if mapping else {}
    splits, used = _msvd_splits(root, files, mapping, numbers, captions)
    return Annotations(splits, captions, [source, *used], dirty, numbers)


def _numbers(path: Path) -> dict[str, str]:
    """youtube_mapping.txt -> {id: vidN}."""
    found = {}
    for line in lines(path):
        words = line.split()
        if len(words) != 2 or not re.fullmatch(r"vid[0-9]{1,9}", words[1]) or words[0] in found:
            raise InputError(f"{path}: expected 'ID vidN' in each line, each ID once, found {short(line)}")
        found[words[0]] = words[1]
    return found


def _msvd_splits(root: Path, files: list[Path], mapping: Path | None, numbers: dict[str, str],
                 captions: dict[str, list[str]]) -> tuple[dict[str, list[str]], list[Path]]:  # fmt: skip
    """-> ids a split, and the files that say so: lists, else the mapping's numbers, else the order of all ids."""
    lists = {split: named(files, f"{split}_list.txt") for split in SPLITS}
    if all(lists.values()):
        ids = {number: key for key, number in numbers.items()}
        listed = {split: [Path(line.strip()).stem for line in lines(path)] for split, path in lists.items()}
        return {split: [ids.get(name, name) for name in names] for split, names in listed.items()}, list(lists.values())
    order = sorted(numbers, key=lambda key: int(numbers[key][3:])) if numbers else sorted(captions)
    if len(order) != 1970:
        raise InputError(f"{mapping or root}: {len(order)} clips, so its split is not known: expected all 1970, or "
                         "train_list.txt, val_list.txt and test_list.txt")  # fmt: skip
    return {"train": order[:1200], "val": order[1200:1300], "test": order[1300:]}, [mapping] if mapping else []


# ----------------------------------------------------------------------------------------- MSR-VTT

MSRVTT_FILES = ("MSRVTT_data.json", "train_val_videodatainfo.json", "train_videodatainfo.json",
                "val_videodatainfo.json", "test_videodatainfo.json", "videodatainfo_2017.json")  # fmt: skip


def msrvtt(root: Path) -> Annotations:
    """Reads what there is of MSR-VTT under `root`: one file with all, or several. Raises InputError."""
    files = list(walk(root))
    found = [path for name in MSRVTT_FILES if (path := named(files, name))]
    if not found:
        raise InputError(f"{root}: expected one of {', '.join(MSRVTT_FILES)} in it")
    split_of: dict[str, str] = {}
    pairs: dict[tuple, tuple[str, str]] = {}  # the same sentence may stand in two files
    for path in found:
        content = read_json(path)
        for video in typed(content, "videos", list, path):
            key, split = (typed(_object(video, f"{path}: videos"), name, str, f"{path}: videos")
                          for name in ("video_id", "split"))  # fmt: skip
            split = {"validate": "val"}.get(split, split)
            if split not in SPLITS or split_of.setdefault(key, split) != split:
                raise InputError(f"{path}: split of {short(key)} is {short(split)}, expected train, validate or test, "
                                 "and the same everywhere")  # fmt: skip
        for i, row in enumerate(typed(content, "sentences", list, path)):
            key, caption = (typed(_object(row, f"{path}: sentences"), name, str, f"{path}: sentences")
                            for name in ("video_id", "caption"))  # fmt: skip
            number = f"{path} {i}" if row.get("sen_id") is None else str(row["sen_id"])
            pairs.setdefault((key, number, caption), (key, caption))
    captions, dirty = said(pairs.values())
    order = sorted(split_of, key=lambda key: (len(key), key))  # video9 before video10
    return Annotations({split: [key for key in order if split_of[key] == split] for split in SPLITS}, captions, found,
                       dirty)  # fmt: skip


def _object(value, where: str) -> dict:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected objects, found {short(value)}")
    return value


# ------------------------------------------------------------------------------------------ videos


def find_videos(root: Path, wanted: dict[str, str]) -> dict[str, Path]:
    """{id: another name of it, or ""} -> the files under `root` that are called so, by id.

    Raises InputError where two files are.
    """
    by_name: dict[str, list[Path]] = {}
    for path in walk(root):
        if path.suffix.lower() in VIDEO_ENDINGS:
            by_name.setdefault(path.stem, []).append(path)
    found = {}
    for key, other in wanted.items():
        paths = by_name.get(key, []) + by_name.get(other, [])
        if len({path.resolve() for path in paths}) > 1:  # links to one file are one
            raise InputError(f"{paths[0]}: and {paths[1]}: two videos of one clip, expected one")
        if paths:
            found[key] = paths[0]
    return found
