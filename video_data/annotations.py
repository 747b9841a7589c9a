"""Captions and splits of MSVD and MSR-VTT from the files in circulation, and the video file of each clip.

    MSVD      captions   AllVideoDescriptions.txt      lines "ID CAPTION", comments begin with #
                         raw-captions.pkl              {ID: [[WORD, ...], ...]}
                         MSR Video Description Corpus  CSV: VideoID, Start, End, Language, Description, ...
              splits     train_list.txt, val_list.txt, test_list.txt, or youtube_mapping.txt (lines "ID vidN")
    MSR-VTT   both       *.json with {videos: [{video_id, split}], sentences: [{video_id, caption}]}

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
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short

from common.errors import InputError
from common.files import field as json_field
from common.files import read_json

VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts")
SPLITS = ("train", "val", "test")
MAX_DEPTH = 3  # levels of subfolders that are searched


@dataclass(frozen=True)
class Annotations:
    """Ids per split and captions per id, unchanged from the files."""

    splits: dict[str, list[str]]
    captions: dict[str, list[str]]
    files: list[Path]
    skipped: int = 0  # rows without a caption
    aliases: dict[str, str] = field(default_factory=dict)  # id -> another name that its video file may have


def iter_files(root: Path) -> Iterator[Path]:
    """Files in the folder and its subfolders, nearest first, sorted by name. Hidden subfolders are skipped."""
    folders = [root]
    for _ in range(MAX_DEPTH + 1):
        subfolders = []
        for folder in folders:
            paths = sorted(folder.iterdir())
            yield from (path for path in paths if path.is_file())
            subfolders += [path for path in paths if path.is_dir() and not path.name.startswith(".")]
        folders = subfolders


def find_file(files: Iterable[Path], *names: str) -> Path | None:
    """The first file that has the first name; if there is none, the second name, and so on. Case is ignored."""
    files = list(files)
    return next((path for name in names for path in files if path.name.lower() == name.lower()), None)


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"{error.object[error.start]:#04x} at {error.start}"
        raise InputError(f"{path}: expected UTF-8, found byte {byte}") from error


def read_lines(path: Path) -> list[str]:
    """Lines of a text file without empty lines and comments."""
    return [line for line in read_text(path).split("\n") if line.strip() and not line.startswith("#")]


def group_captions(pairs: Iterable[tuple[str, str]]) -> tuple[dict[str, list[str]], int]:
    """(id, caption) pairs -> captions by id, and the number of skipped ones, which have no letter from a to z."""
    captions: dict[str, list[str]] = {}
    skipped = 0
    for clip_id, caption in pairs:
        group = captions.setdefault(clip_id, [])
        if any("a" <= letter <= "z" for letter in caption.lower()):
            group.append(" ".join(caption.split()))
        else:
            skipped += 1
    return captions, skipped


# -------------------------------------------------------------------------------------------- MSVD


def read_descriptions(path: Path) -> Iterator[tuple[str, str]]:
    """AllVideoDescriptions.txt -> (id, caption)."""
    for line in read_lines(path):
        clip_id, _, caption = line.strip().partition(" ")
        yield clip_id, caption


class SafeUnpickler(pickle._Unpickler):  # the one in C allocates as much memory as a damaged file asks for
    """Reads Python's own containers, strings and numbers. Calls nothing."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


def read_pickle(path: Path) -> Iterator[tuple[str, str]]:
    """raw-captions.pkl -> (id, caption)."""
    try:
        content = SafeUnpickler(io.BytesIO(path.read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
            MemoryError, RecursionError, AssertionError, struct.error) as error:  # fmt: skip
        raise InputError(f"{path}: not a pickle of captions that can be trusted: {short(str(error))}") from error
    expected = f"{path}: expected {{id: [[word, ...], ...]}}"
    if not isinstance(content, dict):
        raise InputError(f"{expected}, found {type(content).__name__}")
    for clip_id, captions in content.items():
        if not isinstance(clip_id, str) or not isinstance(captions, list):
            raise InputError(f"{expected}, found {short(clip_id)}: {short(captions)}")
        for words in captions:
            words = [words] if isinstance(words, str) else words
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise InputError(f"{expected}, found {short(words)} in the captions of {short(clip_id)}")
            yield clip_id, " ".join(words)


def read_corpus_csv(path: Path) -> Iterator[tuple[str, str]]:
    """The MSR Video Description Corpus -> (id, caption), English captions only."""
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""))
    columns = "VideoID", "Start", "End", "Language", "Description"
    try:
        if missing := [name for name in columns if name not in (rows.fieldnames or [])]:
            raise InputError(f"{path}: expected a column {missing[0]!r} in its first line")
        for row in rows:
            video, start, end, language, caption = (row[name] or "" for name in columns)
            if language.strip() == "English":
                yield f"{video}_{start}_{end}", caption
    except csv.Error as error:
        raise InputError(f"{path}: line {rows.line_num}: not a CSV file: {error}") from error


def read_msvd(root: Path) -> Annotations:
    """Annotations of MSVD in the folder `root`. Raises InputError without captions or without a known split."""
    files = list(iter_files(root))
    readers = {"AllVideoDescriptions.txt": read_descriptions, "raw-captions.pkl": read_pickle,
               "MSR_Video_Description_Corpus.csv": read_corpus_csv,
               "MSR Video Description Corpus.csv": read_corpus_csv, "video_corpus.csv": read_corpus_csv}  # fmt: skip
    source = find_file(files, *readers)
    if source is None:
        raise InputError(f"{root}: expected one of {', '.join(readers)} in it")
    reader = next(reader for name, reader in readers.items() if name.lower() == source.name.lower())
    captions, skipped = group_captions(reader(source))
    mapping = find_file(files, "youtube_mapping.txt")
    numbers = read_mapping(mapping) if mapping else {}
    splits, split_files = _split_msvd(root, files, mapping, numbers, captions)
    return Annotations(splits, captions, [source, *split_files], skipped, numbers)


def read_mapping(path: Path) -> dict[str, str]:
    """youtube_mapping.txt -> {id: vidN}."""
    numbers = {}
    for line in read_lines(path):
        words = line.split()
        if len(words) != 2 or not re.fullmatch(r"vid[0-9]{1,9}", words[1]) or words[0] in numbers:
            raise InputError(f"{path}: expected 'ID vidN' in each line, each ID once, found {short(line)}")
        numbers[words[0]] = words[1]
    return numbers


def _split_msvd(root: Path, files: list[Path], mapping: Path | None, numbers: dict[str, str],
                captions: dict[str, list[str]]) -> tuple[dict[str, list[str]], list[Path]]:  # fmt: skip
    """-> ids per split and the files that define it: the lists, else the mapping, else none (the order of all ids)."""
    lists = {split: find_file(files, f"{split}_list.txt") for split in SPLITS}
    if all(lists.values()):
        ids = {number: clip_id for clip_id, number in numbers.items()}
        stems = {split: [Path(line.strip()).stem for line in read_lines(path)] for split, path in lists.items()}
        return {split: [ids.get(stem, stem) for stem in stems[split]] for split in SPLITS}, list(lists.values())
    ordered = sorted(numbers, key=lambda clip_id: int(numbers[clip_id][3:])) if numbers else sorted(captions)
    if len(ordered) != 1970:
        raise InputError(f"{mapping or root}: {len(ordered)} clips, so its split is not known: expected all 1970, or "
                         "train_list.txt, val_list.txt and test_list.txt")  # fmt: skip
    return {"train": ordered[:1200], "val": ordered[1200:1300], "test": ordered[1300:]}, [mapping] if mapping else []


# ----------------------------------------------------------------------------------------- MSR-VTT

MSRVTT_FILES = ("MSRVTT_data.json", "train_val_videodatainfo.json", "train_videodatainfo.json",
                "val_videodatainfo.json", "test_videodatainfo.json", "videodatainfo_2017.json")  # fmt: skip


def read_msrvtt(root: Path) -> Annotations:
    """Annotations of MSR-VTT in the folder `root`, in one file or several. Raises InputError."""
    files = list(iter_files(root))
    sources = [path for name in MSRVTT_FILES if (path := find_file(files, name))]
    if not sources:
        raise InputError(f"{root}: expected one of {', '.join(MSRVTT_FILES)} in it")
    split_of: dict[str, str] = {}
    pairs: dict[tuple, tuple[str, str]] = {}  # two files may contain the same sentence
    for path in sources:
        content = read_json(path)
        for clip_id, split, _ in _read_objects(content, "videos", ("video_id", "split"), path):
            split = {"validate": "val"}.get(split, split)
            if split not in SPLITS or split_of.setdefault(clip_id, split) != split:
                raise InputError(f"{path}: split of {short(clip_id)} is {short(split)}, expected train, validate or "
                                 "test, and the same in all files")  # fmt: skip
        rows = _read_objects(content, "sentences", ("video_id", "caption"), path)
        for i, (clip_id, caption, row) in enumerate(rows):
            number = f"{path} {i}" if row.get("sen_id") is None else str(row["sen_id"])
            pairs.setdefault((clip_id, number, caption), (clip_id, caption))
    captions, skipped = group_captions(pairs.values())
    ordered = sorted(split_of, key=lambda clip_id: (len(clip_id), clip_id))  # video9 before video10
    splits = {split: [clip_id for clip_id in ordered if split_of[clip_id] == split] for split in SPLITS}
    return Annotations(splits, captions, sources, skipped)


def _read_objects(content: dict, name: str, fields: tuple[str, str], path: Path) -> Iterator[tuple[str, str, dict]]:
    """The two fields, strings, of each object in the list content[name], and the object."""
    where = f"{path}: {name}"
    for row in json_field(content, name, list, path):
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected objects, found {short(row)}")
        yield json_field(row, fields[0], str, where), json_field(row, fields[1], str, where), row


# ------------------------------------------------------------------------------------------ videos


def find_clip_files(root: Path, aliases: dict[str, str]) -> dict[str, Path]:
    """{id: another name of the clip, or ""} -> {id: the video file in `root` with one of the two names}.

    Clips without a file are left out. Raises InputError if a clip has two files.
    """
    by_name: dict[str, list[Path]] = {}
    for path in iter_files(root):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            by_name.setdefault(path.stem, []).append(path)
    files = {}
    for clip_id, alias in aliases.items():
        paths = by_name.get(clip_id, []) + by_name.get(alias, [])
        if len({path.resolve() for path in paths}) > 1:  # several links to one file are allowed
            raise InputError(f"{paths[0]}: and {paths[1]}: two videos of one clip, expected one")
        if paths:
            files[clip_id] = paths[0]
    return files
