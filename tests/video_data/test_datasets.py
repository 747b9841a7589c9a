"""Datasets: real annotation files, and small generated ones in each layout.

References: the published sizes of both datasets [1, 2] for the real files in the folder QADAPTER_REAL; what was written
here for generated files.

[1] MSVD: 1,200 / 100 / 670 clips; 48,774 / 4,290 / 27,763 captions, of the tokenised source
[2] MSR-VTT: 6,513 / 497 / 2,990 clips of 20 captions
"""

import json
import os
import pickle
import random
import time
from pathlib import Path

import pytest

from common.errors import InputError
from video_data import annotations, datasets, shapes
from video_data.annotations import SPLITS

LISTS = [f"{split}_list.txt" for split in SPLITS]


def link_files(source: Path, folder: Path, *names: str) -> Path:
    for name in names:
        os.symlink(source / name, folder / name)
    return folder


def sizes(annotated: annotations.Annotations) -> dict[str, tuple[int, int]]:
    """Clips and captions of each split."""
    return {split: (len(ids), sum(len(annotated.captions.get(clip_id, [])) for clip_id in ids))
            for split, ids in annotated.splits.items()}  # fmt: skip


# ------------------------------------------------------------------------------------ the real files


@pytest.mark.parametrize("split_by", [LISTS, ["youtube_mapping.txt"], []], ids=["lists", "mapping", "order"])
@pytest.mark.parametrize("source, captions, skipped", [
    ("raw-captions.pkl", (48774, 4290, 27763), 0),
    # 12 captions more than in the tokenised source, 3 of them in scripts without a Latin letter
    ("AllVideoDescriptions.txt", (48778, 4291, 27767), 3),
])  # fmt: skip
def test_msvd_has_its_published_sizes(real, tmp_path, split_by, source, captions, skipped):
    annotated = annotations.read_msvd(link_files(real / "msvd", tmp_path, source, *split_by))
    assert sizes(annotated) == dict(zip(SPLITS, zip((1200, 100, 670), captions, strict=True), strict=True))
    assert annotated.skipped == skipped
    listed = {split: (real / f"msvd/{split}_list.txt").read_text().split() for split in SPLITS}
    assert annotated.splits == listed


def test_the_csv_of_msvd(real, tmp_path):
    """This copy has rows for validation and test clips only. One row is in another script."""
    folder = link_files(real / "msvd", tmp_path, "MSR_Video_Description_Corpus.csv", *LISTS)
    annotated = annotations.read_msvd(folder)
    assert sizes(annotated) == {"train": (1200, 0), "val": (100, 4291), "test": (670, 27767)} and annotated.skipped == 1
    text = annotations.read_msvd(link_files(real / "msvd", tmp_path, "AllVideoDescriptions.txt"))
    assert sum(len(group) == len(text.captions[clip_id]) for clip_id, group in annotated.captions.items()) == 770
    (folder / "test_list.txt").unlink()
    with pytest.raises(InputError, match="770 clips, so its split is not known"):
        (folder / "AllVideoDescriptions.txt").unlink()
        annotations.read_msvd(folder)


def test_the_three_sources_of_msvd_agree(real, tmp_path):
    """The first two words of the first caption; the tokenised source ends a caption at its first comma."""
    openings = []
    for name in ("raw-captions.pkl", "AllVideoDescriptions.txt", "MSR_Video_Description_Corpus.csv"):
        (tmp_path / name).mkdir()
        annotated = annotations.read_msvd(link_files(real / "msvd", tmp_path / name, name, *LISTS))
        captions = [annotated.captions[clip_id][0].lower() for clip_id in annotated.splits["val"]]
        openings.append([caption.strip(".").split(",")[0].split()[:2] for caption in captions])
    assert sum(a == b == c for a, b, c in zip(*openings, strict=True)) >= 95


def test_msrvtt_has_its_published_sizes(real):
    annotated = annotations.read_msrvtt(real / "msrvtt")
    assert sizes(annotated) == {"train": (0, 0), "val": (497, 9940), "test": (2990, 59800)} and annotated.skipped == 0
    assert annotated.splits["val"][0] == "video6513" and annotated.splits["test"][-1] == "video9999"


def test_real_clips_are_found_by_id_and_by_number(real, tmp_path):
    clip = next((real / "msvd/YouTubeClips").iterdir())
    mapping = annotations.read_mapping(real / "msvd/youtube_mapping.txt")
    for name in (clip.name, f"{mapping[clip.stem]}.avi"):
        (tmp_path / name).mkdir()
        os.symlink(clip, tmp_path / name / name)
        assert annotations.find_clip_files(tmp_path / name, mapping) == {clip.stem: tmp_path / name / name}


# -------------------------------------------------------------------------------- generated files


def make_msvd(folder: Path, clips: int = 6) -> list[str]:
    """A folder in MSVD's layout with empty video files: half for train, the rest alternates between val and test."""
    ids = [f"-{i:02d}_a_1_{i + 2}" for i in range(clips)]
    (folder / "YouTubeClips").mkdir(parents=True)
    for clip_id in ids:
        (folder / "YouTubeClips" / f"{clip_id}.avi").touch()
    rows = [f"{clip_id} {text}" for clip_id in ids for text in ("A man runs.", "Someone, he says, runs!")]
    (folder / "AllVideoDescriptions.txt").write_text("# a comment\n\n" + "\n".join(rows) + "\n")
    split_ids = ids[: clips // 2], ids[clips // 2 :: 2], ids[clips // 2 + 1 :: 2]
    for name, group in zip(LISTS, split_ids, strict=True):
        (folder / name).write_text("".join(f"{clip_id}\n" for clip_id in group))
    return ids


def make_msrvtt(folder: Path) -> dict:
    """A folder in MSR-VTT's two-file layout with empty video files. Returns the content of both files in one."""
    splits = ["train"] * 3 + ["validate"] * 2 + ["test"] * 2
    videos = [{"video_id": f"video{i + 8}", "split": split, "id": i} for i, split in enumerate(splits)]
    sentences = [{"video_id": v["video_id"], "sen_id": 2 * i + j, "caption": f"a {j} b"}
                 for i, v in enumerate(videos) for j in (0, 1)]  # fmt: skip
    for name, group in (("train_val", videos[:5]), ("test", videos[5:])):
        ids = {video["video_id"] for video in group}
        content = {"info": {}, "videos": group, "sentences": [row for row in sentences if row["video_id"] in ids]}
        folder.mkdir(exist_ok=True)
        (folder / f"{name}_videodatainfo.json").write_text(json.dumps(content))
        subfolder = folder / ("TestVideo" if name == "test" else "TrainValVideo")
        subfolder.mkdir()
        for clip_id in ids:
            (subfolder / f"{clip_id}.mp4").touch()
    return {"videos": videos, "sentences": sentences}


def make_folder(folder: Path, content: dict | None = None) -> None:
    train = {"a.mp4": ["x y"], "b/c.mov": ["y", "z"]}
    content = content or {"train": train, "val": {"d.mp4": ["x"]}, "test": {"e": ["x"]}}
    for clips in content.values():
        for name in clips:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    (folder / "captions.json").write_text(json.dumps(content))


def test_the_layout_of_msvd(tmp_path):
    ids = make_msvd(tmp_path)
    found = datasets.read_dataset("msvd", tmp_path)
    assert found.counts() == {"train": 3, "val": 2, "test": 1}
    clip = found.splits["train"][0]
    path = tmp_path / f"YouTubeClips/{ids[0]}.avi"
    assert clip == datasets.Clip(ids[0], path, ("A man runs.", "Someone, he says, runs!"))
    assert "test: 1 clips, 670 are standard" in found.differences()
    assert found.signature("val") == "data:msvd val (2 clips, 100 are standard; 4 captions, 4,290 are standard)"
    table = str(found)
    for words in ("AllVideoDescriptions.txt, train_list.txt", "1,200", "48,774", "2-2-2", "differs: val: 2 clips"):
        assert words in table, words
    assert datasets.load("msvd", tmp_path) == found.splits


def test_the_mapping_gives_order_and_file_names(tmp_path):
    """1,970 clips numbered in reverse order of their ids, a video named by number, no lists."""
    ids = [f"v_{i}_{i + 1}" for i in range(1970)]
    lines = [f"{clip_id} vid{1970 - i}" for i, clip_id in enumerate(ids)]
    (tmp_path / "youtube_mapping.txt").write_text("\n".join(lines))
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps({clip_id: [["a", "man"], ["b"]] for clip_id in ids}))
    annotated = annotations.read_msvd(tmp_path)
    assert annotated.splits == {"train": ids[::-1][:1200], "val": ids[::-1][1200:1300], "test": ids[::-1][1300:]}
    assert annotated.captions[ids[0]] == ["a man", "b"]
    (tmp_path / "vid1970.mp4").touch()
    assert annotations.find_clip_files(tmp_path, annotated.aliases) == {ids[0]: tmp_path / "vid1970.mp4"}
    (tmp_path / "youtube_mapping.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(InputError, match=r"youtube_mapping\.txt: 1969 clips"):
        annotations.read_msvd(tmp_path)


def test_rows_of_the_csv(tmp_path):
    """Quoted line breaks and commas belong to the caption. Other languages, empty and short rows are skipped."""
    (tmp_path / "MSR_Video_Description_Corpus.csv").write_text(
        "\ufeffVideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description\n"
        'x,1,2,7,clean,3,English,"A man,\na plan."\nx,1,2,7,clean,3,German,Ein Mann.\nx,1,2,7,clean,3,English,\n'
        "x,1,2,7,clean,3,English\ny,3,4,7,clean,3,English,?!\ny,3,4,7,clean,3,English,Été\n", encoding="utf-8",
    )  # fmt: skip
    for split, clip_id in zip(SPLITS, ("x_1_2", "y_3_4", "z_5_6"), strict=True):
        (tmp_path / f"{split}_list.txt").write_text(f"{clip_id}.avi\n")
    annotated = annotations.read_msvd(tmp_path)
    assert annotated.captions == {"x_1_2": ["A man, a plan."], "y_3_4": ["Été"]} and annotated.skipped == 3
    assert annotated.splits == {"train": ["x_1_2"], "val": ["y_3_4"], "test": ["z_5_6"]}


def test_the_layouts_of_msrvtt(tmp_path):
    """Two files, or one; a sentence in both counts once. video9 comes before video10."""
    content = make_msrvtt(tmp_path)
    found = datasets.read_dataset("msrvtt", tmp_path)
    assert found.counts() == {"train": 3, "val": 2, "test": 2}
    assert [clip.id for clip in found.splits["train"]] == ["video8", "video9", "video10"]
    assert found.splits["test"][0].path == tmp_path / "TestVideo/video13.mp4"
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps(content))
    assert datasets.read_dataset("msrvtt", tmp_path).splits == found.splits
    content["sentences"] = [row | {"sen_id": None} for row in content["sentences"]]
    for name in ("train_val", "test"):
        (tmp_path / f"{name}_videodatainfo.json").unlink()
    for sentences in (content["sentences"], [row | {"sen_id": 7} for row in content["sentences"]]):
        (tmp_path / "MSRVTT_data.json").write_text(json.dumps(content | {"sentences": sentences}))
        assert datasets.read_dataset("msrvtt", tmp_path).splits == found.splits


def test_the_layout_of_a_folder(tmp_path):
    make_folder(tmp_path)
    found = datasets.read_dataset("folder", tmp_path)
    assert [clip.path for clip in found.splits["train"]] == [tmp_path / "a.mp4", tmp_path / "b/c.mov"]
    assert found.differences() == [] and found.signature("test") == "data:folder test"
    assert "differs: " not in str(found)
    content = (tmp_path / "captions.json").read_bytes()
    (tmp_path / "captions.json").write_bytes(b"\xef\xbb\xbf" + content)  # a byte-order mark, as Windows editors write
    assert datasets.read_dataset("folder", tmp_path).splits == found.splits


def test_shapes_is_made_by_as_many_workers_as_given(tmp_path, monkeypatch):
    """0 is one per core. The captions do not depend on the number; for frames see test_shapes."""
    counts, contents, worker_pool = [], set(), shapes.worker_pool
    monkeypatch.setattr(shapes, "worker_pool", lambda count: counts.append(count) or worker_pool(count))
    for workers in (1, 3, 0):
        datasets.read_dataset("shapes", tmp_path / str(workers), (3, 1, 1), workers=workers)
        contents.add((tmp_path / str(workers) / "captions.json").read_bytes())
    assert counts == [1, 3, os.cpu_count()] and len(contents) == 1


@pytest.mark.parametrize("sizes", [["x", 1, 1], [1, 1], [1, 1, 0], [1, 1, True]])
def test_invalid_sizes_are_an_error_before_anything_is_written(tmp_path, sizes):
    """A run's config.json may have been edited by hand."""
    with pytest.raises(InputError, match="shapes_sizes: .* expected three whole numbers"):
        datasets.read_dataset("shapes", tmp_path / "shapes", sizes)
    assert not list(tmp_path.iterdir())


def test_datasets_have_separate_cache_folders(tmp_path):
    named = ("msvd", "a"), ("msvd", "b"), ("folder", "a")
    folders = [datasets.cache_folder(tmp_path, name, Path(root)) for name, root in named]
    assert len({*folders}) == 3 and {folder.parent for folder in folders} == {tmp_path}
    assert datasets.cache_folder(None, "msvd", Path("a")) == Path("a/.cache")


def test_the_cache_folder_is_not_searched_for_videos(tmp_path):
    """A file that would otherwise be a second video of a clip."""
    ids, cache = make_msvd(tmp_path), datasets.cache_folder(None, "msvd", tmp_path)
    cache.mkdir()
    (cache / f"{ids[0]}.avi").touch()
    assert datasets.read_dataset("msvd", tmp_path).counts() == {"train": 3, "val": 2, "test": 1}


def test_only_the_requested_splits_need_videos(tmp_path):
    make_msvd(tmp_path)
    for path in (tmp_path / "YouTubeClips").iterdir():
        if path.stem not in (tmp_path / "val_list.txt").read_text():
            path.unlink()
    assert datasets.read_dataset("msvd", tmp_path, splits=["val"]).counts() == {"val": 2}
    with pytest.raises(InputError, match="4 of 6 clips have no video"):
        datasets.read_dataset("msvd", tmp_path)


def test_missing_videos_and_captions_are_counted_and_five_are_named(tmp_path):
    ids = make_msvd(tmp_path, 20)
    for clip_id in ids[1:8]:
        (tmp_path / "YouTubeClips" / f"{clip_id}.avi").unlink()
    with pytest.raises(InputError, match="7 of 20 clips have no video: .*, \\.\\.\\.; --allow-missing") as error:
        datasets.read_dataset("msvd", tmp_path)
    assert [clip_id for clip_id in ids if clip_id in str(error.value)] == ids[1:6]
    found = datasets.read_dataset("msvd", tmp_path, allow_missing=True)
    assert found.counts() == {"train": 3, "val": 5, "test": 5} and found.missing == {"train": 7, "val": 0, "test": 0}
    assert "train: 7 clips are missing" in found.differences() and "7 clips are missing" in found.signature("train")
    with open(tmp_path / "test_list.txt", "a") as file:
        file.write("nobody_1_2\n")
    with pytest.raises(InputError, match="1 of 21 clips have no caption: nobody_1_2; --allow"):
        datasets.read_dataset("msvd", tmp_path)


def clip_in_two_splits(tmp_path):
    ids = make_msvd(tmp_path)
    with open(tmp_path / "test_list.txt", "a") as file:
        file.write(f"{ids[0]}\n")
    return "msvd", "1 clips occur twice in the splits", ids[0]


def two_videos_of_a_clip(tmp_path):
    ids = make_msvd(tmp_path)
    (tmp_path / f"{ids[2]}.mp4").touch()
    return "msvd", "two videos of one clip", f"{ids[2]}.mp4", f"{ids[2]}.avi"


def video_of_two_clips(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "d.mp4").unlink()
    os.symlink(tmp_path / "a.mp4", tmp_path / "d.mp4")
    return "folder", "a.mp4: is the video of 2 clips"


def contradicting_splits(tmp_path):
    content = make_msrvtt(tmp_path)
    content["videos"][0]["split"] = "test"
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps(content))
    return "msrvtt", "video8", "the same in all files"


def no_captions(tmp_path):
    (tmp_path / "something").touch()
    return "msvd", "expected one of AllVideoDescriptions.txt, raw-captions.pkl"


def no_json(tmp_path):
    (tmp_path / "something").touch()
    return "msrvtt", "expected one of MSRVTT_data.json"


def empty_caption(tmp_path):
    make_folder(tmp_path, {"train": {"a.mp4": ["x"]}, "val": {"b.mp4": [" "]}, "test": {"c.mp4": ["x"]}})
    return "folder", "captions.json: val: 'b.mp4': expected a list of captions"


def lone_surrogate(tmp_path):
    make_folder(tmp_path, {"train": {"a.mp4": ["a \ud800 man"]}, "val": {"b.mp4": ["x"]}, "test": {"c.mp4": ["x"]}})
    return "folder", "'a.mp4'", "a lone surrogate"


def caption_without_a_word(tmp_path):
    make_folder(tmp_path, {"train": {"a.mp4": ["x"]}, "val": {"b.mp4": ["x"]}, "test": {"c.mp4": ["?!"]}})
    return "folder", "captions.json: test: 'c.mp4': expected a list of captions, each with a word in it"


def captions_of_other_clips(tmp_path):
    make_msvd(tmp_path)
    (tmp_path / "AllVideoDescriptions.txt").write_text("someone_1_2 A man.\n")
    return "msvd", "6 of 6 clips have no caption", "other clips have one, such as someone_1_2"


def unknown_split(tmp_path):
    make_folder(tmp_path, {split: {f"{split}.mp4": ["x"]} for split in (*SPLITS, "dev")})
    return "folder", "captions.json: 'dev' is no split, expected train, val, test"


def empty_split(tmp_path):
    make_folder(tmp_path, {"train": {"a.mp4": ["x"]}, "val": {}, "test": {"c.mp4": ["x"]}})
    return "folder", "split 'val' is empty"


def clip_in_two_splits_of_a_folder(tmp_path):
    make_folder(tmp_path, {"train": {"a.mp4": ["x"]}, "val": {"a.mp4": ["x"]}, "test": {"c.mp4": ["x"]}})
    return "folder", "captions.json: 'a.mp4' occurs in two splits"


@pytest.mark.parametrize("make", [
    clip_in_two_splits, two_videos_of_a_clip, video_of_two_clips, contradicting_splits, no_captions, no_json,
    empty_caption, empty_split, caption_without_a_word, lone_surrogate, captions_of_other_clips, unknown_split,
    clip_in_two_splits_of_a_folder,
])  # fmt: skip
def test_inconsistent_data_is_a_one_line_error(tmp_path, make):
    name, *words = make(tmp_path)
    with pytest.raises(InputError) as error:
        datasets.read_dataset(name, tmp_path)
    assert all(word in str(error.value) for word in [str(tmp_path), *words]), error.value
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["msvd", "msrvtt", "folder"])
def test_a_missing_or_empty_folder_prints_its_layout(tmp_path, capsys, name):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="expected the folder of"):
            datasets.read_dataset(name, folder)
        layout = capsys.readouterr().err
        assert "--data" in layout and len(layout.splitlines()) >= 6 and max(map(len, layout.splitlines())) <= 120
        assert ("docs/datasets.md" in layout) == (name != "folder")


# ------------------------------------------------------------------------------------ damaged files


def test_a_pickle_that_calls_a_function_is_an_error(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/called",)

    make_msvd(tmp_path)
    (tmp_path / "AllVideoDescriptions.txt").unlink()
    for content in (Malicious(), {"a": [Malicious()]}, {"a": [["x", 3]]}, {"a": "x"}, [1], {3: [["x"]]}):
        (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(InputError, match=r"raw-captions\.pkl: ") as error:
            annotations.read_msvd(tmp_path)
        assert str(error.value).isprintable()
    assert not (tmp_path / "called").exists()


def damage(content: bytes, rng: random.Random) -> bytes:
    """Truncated, with bits flipped, with bytes overwritten, or with a part repeated."""
    kind, offset = rng.randrange(4), rng.randrange(len(content))
    if kind == 0:
        return content[:offset]
    if kind == 1:
        data = bytearray(content)
        for _ in range(rng.choice([1, 10, 200])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if kind == 2:
        return content[:offset] + rng.randbytes(rng.choice([1, 50])) + content[offset + 50 :]
    return content[:offset] + content[max(0, offset - 300) :]


def read_samples(real: Path) -> dict[str, bytes]:
    """The first part of each of five real files."""
    train_ids = (real / "msvd/train_list.txt").read_text().split()[:20]
    captions = pickle.loads((real / "msvd/raw-captions.pkl").read_bytes())
    content = json.loads((real / "msrvtt/val_videodatainfo.json").read_text())
    ids = {video["video_id"] for video in content["videos"][:20]}
    sentences = [row for row in content["sentences"] if row["video_id"] in ids]
    content |= {"videos": content["videos"][:20], "sentences": sentences}
    return {
        "AllVideoDescriptions.txt": (real / "msvd/AllVideoDescriptions.txt").read_bytes()[:40_000],
        "raw-captions.pkl": pickle.dumps({clip_id: captions[clip_id] for clip_id in train_ids}, 2),
        "MSR_Video_Description_Corpus.csv": (real / "msvd/MSR_Video_Description_Corpus.csv").read_bytes()[:40_000],
        "youtube_mapping.txt": (real / "msvd/youtube_mapping.txt").read_bytes(),
        "val_videodatainfo.json": json.dumps(content).encode(),
    }


def test_damaged_sources_are_read_or_an_error(real, tmp_path):
    """200 variants of five real files, seeds 0 to 199, each within 5 seconds."""
    samples, results = read_samples(real), {"read": 0, "error": 0}
    for seed in range(200):
        rng, folder = random.Random(seed), tmp_path / str(seed)
        folder.mkdir()
        name = list(samples)[seed % len(samples)]
        (folder / name).write_bytes(damage(samples[name], rng))
        if name == "youtube_mapping.txt":
            (folder / "AllVideoDescriptions.txt").write_bytes(samples["AllVideoDescriptions.txt"])
        elif not name.endswith(".json"):
            link_files(real / "msvd", folder, *LISTS)
        reader = annotations.read_msrvtt if name == "val_videodatainfo.json" else annotations.read_msvd
        start_time = time.monotonic()
        try:
            annotated = reader(folder)
        except InputError as error:
            assert str(error).startswith(str(folder)) and str(error).isprintable(), (seed, error)
            results["error"] += 1
        else:
            assert all(isinstance(text, str) for group in annotated.captions.values() for text in group), seed
            results["read"] += 1
        assert time.monotonic() - start_time < 5, seed
    assert min(results.values()) > 40, results
