"""Datasets as people have them: real annotation files, and small made ones in each layout.

References: the published sizes of both datasets [1, 2] on the real files in the folder that QADAPTER_REAL names; what
was written here on made ones.

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

import corpora
import sources
from weights import InputError

SPLITS = ("train", "val", "test")
LISTS = [f"{split}_list.txt" for split in SPLITS]


def linked(real: Path, folder: Path, *names: str) -> Path:
    for name in names:
        os.symlink(real / name, folder / name)
    return folder


def sizes(known: sources.Annotations) -> dict[str, tuple[int, int]]:
    return {s: (len(ids), sum(len(known.captions.get(key, [])) for key in ids)) for s, ids in known.splits.items()}


# ------------------------------------------------------------------------------------ the real files


@pytest.mark.parametrize("split_by", [LISTS, ["youtube_mapping.txt"], []], ids=["lists", "mapping", "order"])
@pytest.mark.parametrize("source, captions, dirty", [
    ("raw-captions.pkl", (48774, 4290, 27763), 0),
    # It also has 12 captions that the tokenised source dropped, 3 of them in scripts without a Latin letter.
    ("AllVideoDescriptions.txt", (48778, 4291, 27767), 3),
])  # fmt: skip
def test_msvd_has_its_published_sizes(real, tmp_path, split_by, source, captions, dirty):
    known = sources.msvd(linked(real / "msvd", tmp_path, source, *split_by))
    assert sizes(known) == dict(zip(SPLITS, zip((1200, 100, 670), captions, strict=True), strict=True))
    assert known.dirty == dirty
    listed = {split: (real / f"msvd/{split}_list.txt").read_text().split() for split in SPLITS}
    assert known.splits == listed


def test_msvd_s_csv_has_the_clips_that_it_has(real, tmp_path):
    """Only validation and test clips have rows in this copy; one row is in another script."""
    folder = linked(real / "msvd", tmp_path, "MSR_Video_Description_Corpus.csv", *LISTS)
    known = sources.msvd(folder)
    assert sizes(known) == {"train": (1200, 0), "val": (100, 4291), "test": (670, 27767)} and known.dirty == 1
    text = sources.msvd(linked(real / "msvd", tmp_path, "AllVideoDescriptions.txt"))
    same = [key for key in known.captions if len(known.captions[key]) == len(text.captions[key])]
    assert len(same) == 770
    (folder / "test_list.txt").unlink()
    with pytest.raises(InputError, match="770 clips, so its split is not known"):
        (folder / "AllVideoDescriptions.txt").unlink()
        sources.msvd(folder)


def test_msvd_s_three_sources_say_the_same(real, tmp_path):
    """Letters of the first words of the first caption, for the tokenised source ends a caption at its first comma."""
    found = []
    for name in ("raw-captions.pkl", "AllVideoDescriptions.txt", "MSR_Video_Description_Corpus.csv"):
        (tmp_path / name).mkdir()
        known = sources.msvd(linked(real / "msvd", tmp_path / name, name, *LISTS))
        firsts = [known.captions[key][0].lower().strip(".").split(",")[0] for key in known.splits["val"]]
        found.append([first.split()[:2] for first in firsts])
    assert sum(a == b == c for a, b, c in zip(*found, strict=True)) >= 95


def test_msrvtt_has_its_published_sizes(real):
    known = sources.msrvtt(real / "msrvtt")
    assert sizes(known) == {"train": (0, 0), "val": (497, 9940), "test": (2990, 59800)} and known.dirty == 0
    assert known.splits["val"][0] == "video6513" and known.splits["test"][-1] == "video9999"


def test_real_clips_are_found_by_either_name(real, tmp_path):
    clip = next((real / "msvd/YouTubeClips").iterdir())
    mapping = sources._numbers(real / "msvd/youtube_mapping.txt")
    for name in (clip.name, f"{mapping[clip.stem]}.avi"):
        (tmp_path / name).mkdir()
        os.symlink(clip, tmp_path / name / name)
        assert sources.find_videos(tmp_path / name, mapping) == {clip.stem: tmp_path / name / name}


# ---------------------------------------------------------------------------------------- made ones


def msvd(folder: Path, clips: int = 6) -> list[str]:
    """A folder in MSVD's layout, its videos empty files: half to train, the rest for val and test in turn."""
    ids = [f"-{i:02d}_a_1_{i + 2}" for i in range(clips)]
    (folder / "YouTubeClips").mkdir(parents=True)
    for key in ids:
        (folder / "YouTubeClips" / f"{key}.avi").touch()
    rows = [f"{key} {text}" for key in ids for text in ("A man runs.", "Someone, he says, runs!")]
    (folder / "AllVideoDescriptions.txt").write_text("# a comment\n\n" + "\n".join(rows) + "\n")
    for split, mine in zip(SPLITS, (ids[: clips // 2], ids[clips // 2 :: 2], ids[clips // 2 + 1 :: 2]), strict=True):
        (folder / f"{split}_list.txt").write_text("".join(f"{key}\n" for key in mine))
    return ids


def msrvtt(folder: Path) -> dict:
    """A folder in MSR-VTT's two-file layout, its videos empty files."""
    splits = ["train"] * 3 + ["validate"] * 2 + ["test"] * 2
    videos = [{"video_id": f"video{i + 8}", "split": split, "id": i} for i, split in enumerate(splits)]
    sentences = [{"video_id": v["video_id"], "sen_id": 2 * i + j, "caption": f"a {j} b"}
                 for i, v in enumerate(videos) for j in (0, 1)]  # fmt: skip
    for name, mine in (("train_val", videos[:5]), ("test", videos[5:])):
        ids = {video["video_id"] for video in mine}
        content = {"info": {}, "videos": mine, "sentences": [row for row in sentences if row["video_id"] in ids]}
        folder.mkdir(exist_ok=True)
        (folder / f"{name}_videodatainfo.json").write_text(json.dumps(content))
        place = folder / ("TestVideo" if name == "test" else "TrainValVideo")
        place.mkdir()
        for key in ids:
            (place / f"{key}.mp4").touch()
    return {"videos": videos, "sentences": sentences}


def own(folder: Path, content: dict | None = None) -> None:
    train = {"a.mp4": ["x y"], "b/c.mov": ["y", "z"]}
    content = content or {"train": train, "val": {"d.mp4": ["x"]}, "test": {"e": ["x"]}}
    for clips in content.values():
        for name in clips:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    (folder / "captions.json").write_text(json.dumps(content))


def test_msvd_in_its_layout(tmp_path):
    ids = msvd(tmp_path)
    found = corpora.read("msvd", tmp_path)
    assert found.counts() == {"train": 3, "val": 2, "test": 1}
    clip = found.splits["train"][0]
    path = tmp_path / f"YouTubeClips/{ids[0]}.avi"
    assert clip == corpora.Clip(ids[0], path, ("A man runs.", "Someone, he says, runs!"))
    assert "test: 1 clips, 670 are standard" in found.differences()
    assert found.label("val") == "data:msvd val (2 clips, 100 are standard; 4 captions, 4,290 are standard)"
    shown = str(found)
    for words in ("AllVideoDescriptions.txt, train_list.txt", "1,200", "48,774", "2-2-2", "differs: val: 2 clips"):
        assert words in shown, words
    assert corpora.load("msvd", tmp_path) == found.splits


def test_the_mapping_s_numbers_and_names(tmp_path):
    """1,970 clips whose numbers run against their names' order, videos named by number; no lists."""
    ids = [f"v_{i}_{i + 1}" for i in range(1970)]
    lines = [f"{key} vid{1970 - i}" for i, key in enumerate(ids)]
    (tmp_path / "youtube_mapping.txt").write_text("\n".join(lines))
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps({key: [["a", "man"], ["b"]] for key in ids}))
    known = sources.msvd(tmp_path)
    assert known.splits == {"train": ids[::-1][:1200], "val": ids[::-1][1200:1300], "test": ids[::-1][1300:]}
    assert known.captions[ids[0]] == ["a man", "b"]
    (tmp_path / "vid1970.mp4").touch()
    assert sources.find_videos(tmp_path, known.aliases) == {ids[0]: tmp_path / "vid1970.mp4"}
    (tmp_path / "youtube_mapping.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(InputError, match=r"youtube_mapping\.txt: 1969 clips"):
        sources.msvd(tmp_path)


def test_the_csv_s_rows(tmp_path):
    """Quoted line breaks and commas are of the caption; other languages, empty and short rows are not."""
    (tmp_path / "MSR_Video_Description_Corpus.csv").write_text(
        "\ufeffVideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description\n"
        'x,1,2,7,clean,3,English,"A man,\na plan."\nx,1,2,7,clean,3,German,Ein Mann.\nx,1,2,7,clean,3,English,\n'
        "x,1,2,7,clean,3,English\ny,3,4,7,clean,3,English,?!\ny,3,4,7,clean,3,English,Été\n", encoding="utf-8",
    )  # fmt: skip
    for split, key in zip(SPLITS, ("x_1_2", "y_3_4", "z_5_6"), strict=True):
        (tmp_path / f"{split}_list.txt").write_text(f"{key}.avi\n")
    known = sources.msvd(tmp_path)
    assert known.captions == {"x_1_2": ["A man, a plan."], "y_3_4": ["Été"]} and known.dirty == 3
    assert known.splits == {"train": ["x_1_2"], "val": ["y_3_4"], "test": ["z_5_6"]}


def test_msrvtt_in_its_layouts(tmp_path):
    """Two files, or all in one; a sentence in both counts once. Numbers are ordered as numbers."""
    content = msrvtt(tmp_path)
    found = corpora.read("msrvtt", tmp_path)
    assert found.counts() == {"train": 3, "val": 2, "test": 2}
    assert [clip.id for clip in found.splits["train"]] == ["video8", "video9", "video10"]
    assert found.splits["test"][0].path == tmp_path / "TestVideo/video13.mp4"
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps(content))
    assert corpora.read("msrvtt", tmp_path).splits == found.splits
    content["sentences"] = [row | {"sen_id": None} for row in content["sentences"]]
    for name in ("train_val", "test"):
        (tmp_path / f"{name}_videodatainfo.json").unlink()
    for sentences in (content["sentences"], [row | {"sen_id": 7} for row in content["sentences"]]):
        (tmp_path / "MSRVTT_data.json").write_text(json.dumps(content | {"sentences": sentences}))
        assert corpora.read("msrvtt", tmp_path).splits == found.splits


def test_one_s_own_folder(tmp_path):
    own(tmp_path)
    found = corpora.read("folder", tmp_path)
    assert [clip.path for clip in found.splits["train"]] == [tmp_path / "a.mp4", tmp_path / "b/c.mov"]
    assert found.differences() == [] and found.label("test") == "data:folder test" and "standard: " not in str(found)


@pytest.mark.parametrize("sizes", [["x", 1, 1], [1, 1], [1, 1, 0], [1, 1, True]])
def test_sizes_that_are_none_are_refused_before_anything_is_made(tmp_path, sizes):
    """As a run's config.json may have them that was changed by hand."""
    with pytest.raises(InputError, match="clips: .* expected three whole numbers"):
        corpora.read("shapes", tmp_path / "shapes", sizes)
    assert not list(tmp_path.iterdir())


def test_two_datasets_keep_their_frames_apart(tmp_path):
    asked = ("msvd", "a"), ("msvd", "b"), ("folder", "a")
    places = [corpora.kept_in(tmp_path, name, Path(root)) for name, root in asked]
    assert len({*places}) == 3 and {place.parent for place in places} == {tmp_path}
    assert corpora.kept_in(None, "msvd", Path("a")) == Path("a")


def test_only_what_is_wanted_need_be_there(tmp_path):
    msvd(tmp_path)
    for path in (tmp_path / "YouTubeClips").iterdir():
        if path.stem not in (tmp_path / "val_list.txt").read_text():
            path.unlink()
    assert corpora.read("msvd", tmp_path, wanted=["val"]).counts() == {"val": 2}
    with pytest.raises(InputError, match="4 of 6 clips have no video"):
        corpora.read("msvd", tmp_path)


def test_missing_videos_and_captions_are_counted_and_five_named(tmp_path):
    ids = msvd(tmp_path, 20)
    for key in ids[1:8]:
        (tmp_path / "YouTubeClips" / f"{key}.avi").unlink()
    with pytest.raises(InputError, match="7 of 20 clips have no video: .*, \\.\\.\\.; --allow-missing") as error:
        corpora.read("msvd", tmp_path)
    assert [key for key in ids if key in str(error.value)] == ids[1:6]
    found = corpora.read("msvd", tmp_path, allow_missing=True)
    assert found.counts() == {"train": 3, "val": 5, "test": 5} and found.missing == {"train": 7, "val": 0, "test": 0}
    assert "train: 7 clips are missing" in found.differences() and "7 clips are missing" in found.label("train")
    with open(tmp_path / "test_list.txt", "a") as file:
        file.write("nobody_1_2\n")
    with pytest.raises(InputError, match="1 of 21 clips have no caption: nobody_1_2; --allow"):
        corpora.read("msvd", tmp_path)


def twice(tmp_path):
    """A clip in two splits."""
    ids = msvd(tmp_path)
    with open(tmp_path / "test_list.txt", "a") as file:
        file.write(f"{ids[0]}\n")
    return "msvd", "1 clips stand twice in the splits", ids[0]


def two_videos(tmp_path):
    ids = msvd(tmp_path)
    (tmp_path / f"{ids[2]}.mp4").touch()
    return "msvd", "two videos of one clip", f"{ids[2]}.mp4", f"{ids[2]}.avi"


def one_video(tmp_path):
    """One file under two names."""
    own(tmp_path)
    (tmp_path / "d.mp4").unlink()
    os.symlink(tmp_path / "a.mp4", tmp_path / "d.mp4")
    return "folder", "a.mp4: is the video of 2 clips"


def two_minds(tmp_path):
    content = msrvtt(tmp_path)
    content["videos"][0]["split"] = "test"
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps(content))
    return "msrvtt", "video8", "the same everywhere"


def no_captions(tmp_path):
    (tmp_path / "something").touch()
    return "msvd", "expected one of AllVideoDescriptions.txt, raw-captions.pkl"


def no_json(tmp_path):
    (tmp_path / "something").touch()
    return "msrvtt", "expected one of MSRVTT_data.json"


def empty_caption(tmp_path):
    own(tmp_path, {"train": {"a.mp4": ["x"]}, "val": {"b.mp4": [" "]}, "test": {"c.mp4": ["x"]}})
    return "folder", "captions.json: val: 'b.mp4': expected a list of captions"


def half_a_character(tmp_path):
    own(tmp_path, {"train": {"a.mp4": ["a \ud800 man"]}, "val": {"b.mp4": ["x"]}, "test": {"c.mp4": ["x"]}})
    return "folder", "'a.mp4'", "half a character"


def signs(tmp_path):
    own(tmp_path, {"train": {"a.mp4": ["x"]}, "val": {"b.mp4": ["x"]}, "test": {"c.mp4": ["?!"]}})
    return "folder", "captions.json: test: 'c.mp4': expected a list of captions, each with a word in it"


def others(tmp_path):
    msvd(tmp_path)
    (tmp_path / "AllVideoDescriptions.txt").write_text("someone_1_2 A man.\n")
    return "msvd", "6 of 6 clips have no caption", "there are of others, such as someone_1_2"


def no_split(tmp_path):
    own(tmp_path, {split: {f"{split}.mp4": ["x"]} for split in (*SPLITS, "dev")})
    return "folder", "captions.json: 'dev' is no split, expected train, val, test"


def no_val(tmp_path):
    own(tmp_path, {"train": {"a.mp4": ["x"]}, "val": {}, "test": {"c.mp4": ["x"]}})
    return "folder", "split 'val' is empty"


@pytest.mark.parametrize("make", [
    twice, two_videos, one_video, two_minds, no_captions, no_json, empty_caption, no_val, signs, half_a_character,
    others, no_split,
])  # fmt: skip
def test_what_contradicts_itself_is_one_line(tmp_path, make):
    name, *words = make(tmp_path)
    with pytest.raises(InputError) as error:
        corpora.read(name, tmp_path)
    assert all(word in str(error.value) for word in [str(tmp_path), *words]), error.value
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["msvd", "msrvtt", "folder"])
def test_a_missing_folder_is_answered_with_what_belongs_in_it(tmp_path, capsys, name):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="expected the folder of"):
            corpora.read(name, folder)
        told = capsys.readouterr().err
        assert "--data" in told and len(told.splitlines()) >= 6 and max(map(len, told.splitlines())) <= 120


# -------------------------------------------------------------------------------------------- damage


def test_a_pickle_that_calls_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/pwned",)

    msvd(tmp_path)
    (tmp_path / "AllVideoDescriptions.txt").unlink()
    for content in (Evil(), {"a": [Evil()]}, {"a": [["x", 3]]}, {"a": "x"}, [1], {3: [["x"]]}):
        (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(InputError, match=r"raw-captions\.pkl: ") as error:
            sources.msvd(tmp_path)
        assert str(error.value).isprintable()
    assert not (tmp_path / "pwned").exists()


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Cut, flipped, overwritten, or with a part of it twice."""
    kind, at = draw.randrange(4), draw.randrange(len(content))
    if kind == 0:
        return content[:at]
    if kind == 1:
        flipped = bytearray(content)
        for _ in range(draw.choice([1, 10, 200])):
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return content[:at] + draw.randbytes(draw.choice([1, 50])) + content[at + 50 :]
    return content[:at] + content[max(0, at - 300) :]


def some_of(content: dict) -> dict:
    keys = {video["video_id"] for video in content["videos"][:20]}
    rows = [row for row in content["sentences"] if row["video_id"] in keys]
    return content | {"videos": content["videos"][:20], "sentences": rows}


def test_damaged_sources_are_read_or_named(real, tmp_path):
    """200 variants, seeds 0 to 199, of the beginnings of the five real files; each is done within 5 seconds."""
    first = (real / "msvd/train_list.txt").read_text().split()[:20]
    words = pickle.loads((real / "msvd/raw-captions.pkl").read_bytes())
    content = some_of(json.loads((real / "msrvtt/val_videodatainfo.json").read_text()))
    wholes = {
        "AllVideoDescriptions.txt": (real / "msvd/AllVideoDescriptions.txt").read_bytes()[:40_000],
        "raw-captions.pkl": pickle.dumps({key: words[key] for key in first}, 2),
        "MSR_Video_Description_Corpus.csv": (real / "msvd/MSR_Video_Description_Corpus.csv").read_bytes()[:40_000],
        "youtube_mapping.txt": (real / "msvd/youtube_mapping.txt").read_bytes(),
        "val_videodatainfo.json": json.dumps(content).encode(),
    }
    said = {"read": 0, "named": 0}
    for seed in range(200):
        draw, folder = random.Random(seed), tmp_path / str(seed)
        folder.mkdir()
        name = list(wholes)[seed % len(wholes)]
        (folder / name).write_bytes(damaged(wholes[name], draw))
        if name == "youtube_mapping.txt":
            (folder / "AllVideoDescriptions.txt").write_bytes(wholes["AllVideoDescriptions.txt"])
        elif not name.endswith(".json"):
            linked(real / "msvd", folder, *LISTS)
        begun = time.monotonic()
        try:
            known = (sources.msrvtt if name == "val_videodatainfo.json" else sources.msvd)(folder)
        except InputError as error:
            assert str(error).startswith(str(folder)) and str(error).isprintable(), (seed, error)
            said["named"] += 1
        else:
            assert all(isinstance(text, str) for group in known.captions.values() for text in group), seed
            said["read"] += 1
        assert time.monotonic() - begun < 5, seed
    assert min(said.values()) > 40, said
