"""Datasets: real annotation files, and small generated ones in each layout.

References: the published sizes of both datasets [1, 2] for the real files in the folder QADAPTER_REAL; what was written
here for generated files.

[1] MSVD: 1,200 / 100 / 670 clips; 48,774 / 4,290 / 27,763 captions, of the tokenised source
[2] MSR-VTT: 6,513 / 497 / 2,990 clips of 20 captions
"""

import json
import os
import pickle
import shutil
import time
import zipfile
from pathlib import Path
from unicodedata import normalize

import pytest

from common.errors import InputError
from metrics.inputs import MAX_LETTERS
from tests.common.helpers import damaged, refused
from video_data import annotations, datasets
from video_data.annotations import SPLITS

LISTS = [f"{split}_list.txt" for split in SPLITS]


def sizes(annotated: annotations.Annotations) -> list[tuple[int, int]]:
    """Clips and captions of each split."""
    groups = [[annotated.captions.get(clip_id, []) for clip_id in annotated.splits[split]] for split in SPLITS]
    return [(len(group), sum(map(len, group))) for group in groups]


# ------------------------------------------------------------------------------------ the real files


PICKLED = "raw-captions.pkl", [(1200, 48774), (100, 4290), (670, 27763)]
# 12 captions more than in the tokenised source, 3 of them in scripts without a Latin letter
DESCRIBED = "AllVideoDescriptions.txt", [(1200, 48778), (100, 4291), (670, 27767)]
# This copy has rows for validation and test clips only. One row is in another script.
ROWS = "MSR_Video_Description_Corpus.csv", [(1200, 0), (100, 4291), (670, 27767)]


@pytest.mark.parametrize("source, expected, split_by", [
    (*PICKLED, LISTS), (*PICKLED, ["youtube_mapping.txt"]), (*PICKLED, []), (*DESCRIBED, []), (*ROWS, LISTS)])
def test_msvd_has_its_published_sizes(real, tmp_path, source, expected, split_by):
    for name in (source, *split_by):
        os.symlink(real / "msvd" / name, tmp_path / name)
    annotated = annotations.read_msvd(tmp_path)
    assert sizes(annotated) == expected
    listed = {split: (real / f"msvd/{split}_list.txt").read_text().split() for split in SPLITS}
    assert annotated.splits == listed


def test_msrvtt_has_its_published_sizes(real, tmp_path):
    """The two official files."""
    for name in ("train_val_annotation.zip", "test_videodatainfo.json.zip"):
        with zipfile.ZipFile(real / "msrvtt-half" / name) as file:
            file.extractall(tmp_path)
    annotated = annotations.read_msrvtt(tmp_path)
    assert sizes(annotated) == [(6513, 130260), (497, 9940), (2990, 59800)]
    assert [annotated.splits[split][0] for split in SPLITS] == ["video0", "video6513", "video7010"]


# -------------------------------------------------------------------------------- generated files


def make_msvd(folder: Path, clips: int = 6) -> list[str]:
    """A folder in MSVD's layout; each video file holds its name. Half are for train, the rest alternate."""
    ids = [f"-{i:02d}_a_1_{i + 2}" for i in range(clips)]
    (folder / "YouTubeClips").mkdir(parents=True)
    for clip_id in ids:
        (folder / "YouTubeClips" / f"{clip_id}.avi").write_text(clip_id)
    rows = [f"{clip_id} {text}" for clip_id in ids for text in ("A man runs.", "Someone, he says, runs!")]
    (folder / "AllVideoDescriptions.txt").write_text("# a comment\n\n" + "\n".join(rows) + "\n")
    split_ids = ids[: clips // 2], ids[clips // 2 :: 2], ids[clips // 2 + 1 :: 2]
    for name, group in zip(LISTS, split_ids, strict=True):
        (folder / name).write_text("".join(f"{clip_id}\n" for clip_id in group))
    return ids


def make_msrvtt(folder: Path) -> dict:
    """A folder in MSR-VTT's two-file layout; each video file holds its name. Returns both files' content."""
    splits = ["train"] * 3 + ["validate"] * 2 + ["test"] * 2
    videos = [{"video_id": f"video{i + 8}", "split": split, "id": i} for i, split in enumerate(splits)]
    sentences = [{"video_id": video["video_id"], "sen_id": 2 * i + j, "caption": f"a {j} b"}
                 for i, video in enumerate(videos) for j in (0, 1)]
    for name, group in (("train_val", videos[:5]), ("test", videos[5:])):
        ids = {video["video_id"] for video in group}
        content = {"info": {}, "videos": group, "sentences": [row for row in sentences if row["video_id"] in ids]}
        folder.mkdir(exist_ok=True)
        (folder / f"{name}_videodatainfo.json").write_text(json.dumps(content))
        subfolder = folder / ("TestVideo" if name == "test" else "TrainValVideo")
        subfolder.mkdir()
        for clip_id in ids:
            (subfolder / f"{clip_id}.mp4").write_text(clip_id)
    return {"videos": videos, "sentences": sentences}


def make_folder(folder: Path, content: dict | None = None) -> None:
    train = {"a.mp4": ["x y"], "b/c.mov": ["y", "z"]}
    content = content or {"train": train, "val": {"d.mp4": ["x"]}, "test": {"e": ["x"]}}
    for clips in content.values():
        for name in clips:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
    (folder / "captions.json").write_text(json.dumps(content))


def counts(found: datasets.VideoDataset) -> dict[str, int]:
    return {split: len(clips) for split, clips in found.splits.items()}


def test_the_layout_of_msvd(tmp_path):
    """Hidden folders, such as the cache, hold no videos: else a clip would have two."""
    ids = make_msvd(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / f".cache/{ids[0]}.avi").touch()
    found = datasets.read_dataset("msvd", tmp_path)
    assert counts(found) == {"train": 3, "val": 2, "test": 1}
    clip = found.splits["train"][0]
    path = tmp_path / f"YouTubeClips/{ids[0]}.avi"
    assert clip == datasets.Clip(ids[0], path, ("A man runs.", "Someone, he says, runs!"))
    assert "test: 1 clips, 670 are standard" in found.differences()
    assert found.signature("val") == "data:msvd val (2 clips, 100 are standard; 4 captions, 4,290 are standard)"
    table = str(found)
    for words in ("AllVideoDescriptions.txt, train_list.txt", "2-2", "differs: val: 2 clips, 100 are standard"):
        assert words in table, words
    assert datasets.load("msvd", tmp_path) == found.splits


def test_the_mapping_gives_order_and_file_names(tmp_path):
    """1,970 clips numbered in reverse order of their ids, a video named by number, no lists."""
    ids = [f"v_{i}_{i + 1}" for i in range(1970)]
    lines = [f"{clip_id} vid{1970 - i}" for i, clip_id in enumerate(ids)]
    (tmp_path / "youtube_mapping.txt").write_text("\n".join(lines))
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps({clip_id: [["a", "man"], ["b"]] for clip_id in ids}))
    (tmp_path / "vid1970.mp4").touch()
    annotated = annotations.read_msvd(tmp_path)
    assert annotated.splits == {"train": ids[::-1][:1200], "val": ids[::-1][1200:1300], "test": ids[::-1][1300:]}
    assert annotated.captions[ids[0]] == ["a man", "b"]
    assert annotated.videos == {ids[0]: tmp_path / "vid1970.mp4"}
    (tmp_path / "youtube_mapping.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(InputError, match=r"youtube_mapping\.txt: 1969 clips"):
        annotations.read_msvd(tmp_path)


def test_rows_of_the_csv(tmp_path):
    """Quoted line breaks and commas belong to the caption. Other languages, empty and short rows are skipped."""
    rows = [
        "\ufeffVideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description",
        'x,1,2,7,clean,3,English,"A man,\na plan."\nx,1,2,7,clean,3,German,Ein Mann.\nx,1,2,7,clean,3,English,',
        "x,1,2,7,clean,3,English\ny,3,4,7,clean,3,English,?!\ny,3,4,7,clean,3,English,Été\n",
    ]
    (tmp_path / "MSR_Video_Description_Corpus.csv").write_text("\n".join(rows), encoding="utf-8")
    for split, clip_id in zip(SPLITS, ("x_1_2", "y_3_4", "z_5_6"), strict=True):
        (tmp_path / f"{split}_list.txt").write_text(f"{clip_id}.avi\n")
    annotated = annotations.read_msvd(tmp_path)
    assert annotated.captions == {"x_1_2": ["A man, a plan."], "y_3_4": ["Été"]}
    assert annotated.splits == {"train": ["x_1_2"], "val": ["y_3_4"], "test": ["z_5_6"]}


def test_the_layouts_of_msrvtt(tmp_path):
    """Two files, or one; a sentence in both counts once. video9 comes before video10."""
    content = make_msrvtt(tmp_path)
    found = datasets.read_dataset("msrvtt", tmp_path)
    assert counts(found) == {"train": 3, "val": 2, "test": 2}
    assert [clip.id for clip in found.splits["train"]] == ["video8", "video9", "video10"]
    assert found.splits["test"][0].path == tmp_path / "TestVideo/video13.mp4"
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps(content))
    assert datasets.read_dataset("msrvtt", tmp_path).splits == found.splits
    for name in ("train_val", "test"):
        (tmp_path / f"{name}_videodatainfo.json").unlink()
    for sen_id in (None, 7):
        sentences = [row | {"sen_id": sen_id} for row in content["sentences"]]
        (tmp_path / "MSRVTT_data.json").write_text(json.dumps(content | {"sentences": sentences}))
        assert datasets.read_dataset("msrvtt", tmp_path).splits == found.splits


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_may_be_composed_in_the_file_and_decomposed_on_the_disk(tmp_path, form):
    """And the other way round: a Mac's disk has "é" as two characters."""
    disk, file = (normalize(f, "caf\u00e9_1_2") for f in (form, {"NFC": "NFD", "NFD": "NFC"}[form]))
    (tmp_path / f"{disk}.mp4").touch()
    assert annotations.find_videos([tmp_path / f"{disk}.mp4"], {file: file}) == {file: tmp_path / f"{disk}.mp4"}
    content = {"train": {f"{file}.mp4": ["x"]}, "val": {}, "test": {}}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    assert annotations.read_folder(tmp_path).videos == {f"{file}.mp4": tmp_path / f"{disk}.mp4"}


def test_clips_without_a_video_or_a_caption_are_an_error_or_left_out_and_counted(tmp_path):
    """Five are named. Only the requested splits need to be complete."""
    ids = make_msvd(tmp_path, 20)
    for clip_id in ids[1:8]:
        (tmp_path / "YouTubeClips" / f"{clip_id}.avi").unlink()
    add_line(tmp_path / "test_list.txt", "nobody_1_2")
    with refused(f"7 of 10 train clips have no video or no caption: {', '.join(ids[1:6])}, ...; --allow-missing"):
        datasets.read_dataset("msvd", tmp_path)
    found = datasets.read_dataset("msvd", tmp_path, allow_missing=True)
    assert counts(found) == {"train": 3, "val": 5, "test": 5}
    assert "train: 7 clips are missing" in found.differences() and "7 clips are missing" in found.signature("train")
    assert counts(datasets.read_dataset("msvd", tmp_path, splits=["val"])) == {"val": 5}
    for clip_id in ids[10::2]:
        (tmp_path / "YouTubeClips" / f"{clip_id}.avi").unlink()
    with refused("5 of 5 val clips have no video or no caption"):  # nothing would be left
        datasets.read_dataset("msvd", tmp_path, allow_missing=True)


def test_the_fingerprint_of_a_split_is_that_of_its_ids_captions_and_sizes(tmp_path):
    """The time of a file is not in it: a copy of the folder is the same dataset."""
    make_folder(tmp_path)
    before = datasets.read_dataset("folder", tmp_path).fingerprints()
    assert before["train"].startswith("2 clips ") and len(set(before.values())) == 3
    os.utime(tmp_path / "a.mp4", (0, 0))
    assert datasets.read_dataset("folder", tmp_path).fingerprints() == before
    train = {"a.mp4": ["x y"], "b/c.mov": ["z", "z"]}
    make_folder(tmp_path, {"train": train, "val": {"d.mp4": ["x"]}, "test": {"f": ["x"]}})
    (tmp_path / "d.mp4").write_text("longer")
    after = datasets.read_dataset("folder", tmp_path).fingerprints()
    assert all(after[split] != before[split] for split in SPLITS)


def test_a_video_in_two_splits_under_two_names_is_said(tmp_path):
    """b.mp4 is a copy of a.mp4. c.mp4 only has its size."""
    make_folder(tmp_path, {"train": {"a.mp4": ["x"]}, "val": {"b.mp4": ["x"]}, "test": {"c.mp4": ["x"]}})
    assert datasets.read_dataset("folder", tmp_path).differences() == []
    shutil.copy(tmp_path / "a.mp4", tmp_path / "b.mp4")
    found = datasets.read_dataset("folder", tmp_path, splits=["val", "test"])
    assert found.differences() == ["val: 1 of 1 videos are also in another split"]
    assert found.signature("val") == "data:folder val (1 of 1 videos are also in another split)"


def test_a_caption_that_the_scorers_refuse_is_found_before_training(tmp_path):
    """10,001 letters, of which 10,000 are their limit, and half of a surrogate pair."""
    assert datasets.MAX_LETTERS == MAX_LETTERS
    make_folder(tmp_path, {"train": {"a.mp4": ["x"]}, "val": {"b.mp4": ["x"]}, "test": {"c.mp4": ["x" * 10_000]}})
    datasets.read_dataset("folder", tmp_path)
    for caption in ("x" * 10_001, "x \ud800"):
        make_folder(tmp_path, {"train": {"a.mp4": ["x"]}, "val": {"b.mp4": ["x"]}, "test": {"c.mp4": ["y", caption]}})
        with refused(f"{tmp_path}: c.mp4: expected captions in Unicode, at most 10,000 characters"):
            datasets.read_dataset("folder", tmp_path)


def add_line(path: Path, line: str) -> None:
    path.write_text(f"{path.read_text()}{line}\n")


def link_second_clip(root: Path) -> None:
    (root / "d.mp4").unlink()
    os.symlink(root / "a.mp4", root / "d.mp4")


def write(name: str, text: str):
    """A change: a file with this text."""
    return lambda root: (root / name).write_text(text)


SPLIT_TWICE = '{"videos": [{"video_id": "video8", "split": "test"}], "sentences": []}'
INCONSISTENT = [  # a layout, what is done to it, the error
    (make_msvd, lambda root: add_line(root / "test_list.txt", "-00_a_1_2"), "-00_a_1_2 occurs twice in the splits"),
    (make_msvd, lambda root: (root / "-02_a_1_4.mp4").touch(), "-02_a_1_4.avi: two videos of one clip"),
    (make_folder, link_second_clip, "a.mp4 is the video of two clips"),
    (make_msrvtt, write("MSRVTT_data.json", SPLIT_TWICE), "split of 'video8' is"),
    (make_msvd, lambda root: (root / "AllVideoDescriptions.txt").unlink(), "expected one of AllVideoDescriptions.txt"),
    (make_folder, write("captions.json", '{"train": {"a.mp4": "man"}}'), "'a.mp4': expected a list of captions"),
    (make_folder, write("captions.json", '{"train": {"a.mp4": ["a man", "?!"]}}'), "captions, each with a word in it"),
    (make_folder, write("captions.json", '{"dev": {"d.mp4": ["x"]}}'), "expected the splits train, val, test"),
    (make_folder, write("captions.json", "{}"), "expected clips of the split train, found"),
]


@pytest.mark.parametrize(("make", "change", "words"), INCONSISTENT)
def test_inconsistent_data_is_a_one_line_error(tmp_path, make, change, words):
    make(tmp_path)
    change(tmp_path)
    with refused(str(tmp_path), words):
        datasets.read_dataset(make.__name__.removeprefix("make_"), tmp_path)


@pytest.mark.parametrize("name", ["msvd", "msrvtt", "folder"])
def test_a_folder_that_is_missing_or_empty_or_a_file_prints_what_belongs_in_it(tmp_path, capsys, name):
    (tmp_path / "a").touch()
    (empty := tmp_path / "b").mkdir()
    for folder, found in ((tmp_path / "none", "none"), (empty, "an empty one"), (tmp_path / "a", "a file")):
        with refused(f"{folder}: expected the folder of the dataset (--data), found {found}"):
            datasets.read_dataset(name, folder)
        lines = capsys.readouterr().err.splitlines()
        assert str(folder) in lines[0] and len(lines) >= 6 and max(map(len, lines[1:])) <= 120


# ------------------------------------------------------------------------------------ damaged files


def test_a_pickle_that_calls_a_function_is_an_error(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/called",)

    for content in (Malicious(), {"a": [Malicious()]}, {"a": [["x", 3]]}, [1]):
        (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(content))
        with refused(f"{tmp_path}/raw-captions.pkl: "):
            annotations.read_msvd(tmp_path)
    assert not (tmp_path / "called").exists()


def test_damaged_sources_are_read_or_an_error(tmp_path):
    """60 variants of each kind of file, seeds 0 to 59, each within 5 seconds."""
    make_msrvtt(tmp_path)
    make_folder(tmp_path)
    kinds = {
        "a.txt": (annotations.parse_descriptions, b"v_1_2 Une fille \xc3\xa9crit.\n" * 9),
        "a.pkl": (annotations.parse_pickle, pickle.dumps({f"v{i}": [["a", "man"]] for i in range(50)}, 2)),
        "a.csv": (annotations.parse_csv, b"VideoID,Start,End,Language,Description\n" + b'x,1,2,English,"A"\n' * 9),
        "map.txt": (annotations.parse_mapping, b"".join(b"v%d vid%d\n" % (i, i) for i in range(9))),
        **{name: (read, (tmp_path / name).read_bytes()) for name, read in (
            ("test_videodatainfo.json", annotations.read_msrvtt), ("captions.json", annotations.read_folder))},
    }
    results = []
    for seed in range(60):
        for name, (read, content) in kinds.items():
            (path := tmp_path / name).write_bytes(damaged(content, seed))
            start_time = time.monotonic()
            try:
                read(tmp_path) if path.suffix == ".json" else annotations.parse_file(path, read)
                results.append("read")
            except InputError as error:
                assert str(path) in str(error) and str(error).isprintable(), (path, seed, error)
                results.append("error")
            assert time.monotonic() - start_time < 5, (path, seed)
    assert min(results.count("read"), results.count("error")) > 60
