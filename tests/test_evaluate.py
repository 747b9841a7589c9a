"""Evaluation as a user runs it: a split of a run's dataset, and the user's own videos.

References: the scores and captions that training wrote; `Captioner.caption` called with the same options.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import train
from common.cli import printable
from common.errors import InputError
from tests.scripts import ENVIRONMENT, ROOT, assert_one_line_error, run_forked, run_python
from video_data.batches import cache_folder, cached_frames
from video_data.datasets import read_dataset


def test_the_scores_are_those_of_training(finished_run, tmp_path):
    done = run_forked(evaluate, finished_run, "--save", tmp_path / "p.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    test = json.loads((finished_run / "test.json").read_text())
    assert json.loads((tmp_path / "p.json").read_text()) == test["captions"]
    assert f"CIDEr {100 * test['scores']['CIDEr']:.1f}" in done.stdout and test["signature"] in done.stdout


def test_the_flags_of_generation_reach_the_decoder(finished_run, tmp_path):
    """A split's captions with each flag are those of `Captioner.caption`; some differ from the greedy ones."""
    captioner, flags = evaluate.load_run(finished_run)
    root = Path(flags["data"])
    clips = read_dataset("shapes", root, flags["shapes_sizes"], splits=["test"]).splits["test"]
    cache = cached_frames(clips, cache_folder("shapes", root), "test", 8, captioner.vit.preprocessing)
    frames = torch.from_numpy(np.stack([cache[i] for i in range(6)]))
    greedy, differs = captioner.caption(frames), set()
    for options in ({"beams": 3, "length_penalty": -2.0}, {"min_new_tokens": 7, "max_new_tokens": 9}):
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
        done = run_forked(evaluate, finished_run, "--save", tmp_path / "p.json", "--device", "cpu", *words)
        assert done.returncode == 0, done.stderr
        found = list(json.loads((tmp_path / "p.json").read_text()).values())
        assert found == captioner.caption(frames, **options)
        differs.add(found != greedy)
    assert True in differs


def test_videos_good_and_bad(finished_run, flags, tmp_path):
    """Ten files, two of them bad: eight captions, two errors, exit code 2."""
    clips = sorted((Path(flags[-1]) / "test").glob("*.mp4"))
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.mp4").write_bytes(clips[i % len(clips)].read_bytes())
    (folder / "3bad.mp4").write_bytes(b"")
    (folder / "5bad.mp4").write_bytes(b"not a video")
    done = run_forked(evaluate, finished_run, "--video", folder, "--save", tmp_path / "c.json")
    assert_one_line_error(done, "2 of 10 videos")
    assert len(done.stdout.splitlines()) == 8 and "3bad.mp4" in done.stderr and "5bad.mp4" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "c.json").read_text().splitlines()]
    assert [Path(row["video"]) for row in rows] == sorted(folder.iterdir())
    printed = [printable(f"{row['video']}: {row['caption']}") for row in rows if "caption" in row]
    assert printed == done.stdout.splitlines()
    assert [Path(row["video"]).name for row in rows if "error" in row] == ["3bad.mp4", "5bad.mp4"]
    names = f"{folder}/0.mp4\n\n{folder}/1.mp4\n"
    done = run_python("evaluate.py", finished_run, "--video", "-", "--frames", 3, input=names)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2


def test_captions_are_saved_as_they_come(finished_run, flags, tmp_path):
    """SIGKILL after the fourth caption is printed: those before it are in the file, each a whole JSON object."""
    video = next((Path(flags[-1]) / "test").glob("*.mp4"))
    (tmp_path / "c.jsonl").write_text("old\n")
    command = ["evaluate.py", finished_run, "--video", *[video] * 2000, "--save", tmp_path / "c.jsonl"]
    child = subprocess.Popen([sys.executable, "-u", *map(str, command)], cwd=ROOT, env=os.environ | ENVIRONMENT,
                             stdout=subprocess.PIPE)  # fmt: skip
    lines = [child.stdout.readline().decode() for _ in range(4)]
    child.kill()
    child.communicate()
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert len(rows) >= 3 and [printable(f"{row['video']}: {row['caption']}\n") for row in rows[:3]] == lines[:3]


def test_sigterm_leaves_the_page_of_what_was_captioned(finished_run, flags, tmp_path):
    """SIGTERM after the second of 2,000 captions, as `timeout` and batch systems send it."""
    video = next((Path(flags[-1]) / "test").glob("*.mp4"))
    command = ["evaluate.py", finished_run, "--video", *[video] * 2000, "--report", tmp_path / "r.html"]
    child = subprocess.Popen([sys.executable, "-u", *map(str, command)], cwd=ROOT, env=os.environ | ENVIRONMENT,
                             bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    first = [child.stdout.readline() for _ in range(2)]  # without a buffer, of which `communicate` would know nothing
    child.terminate()
    time.sleep(0.01)
    child.terminate()  # as an impatient user, or `timeout`, which signals the process and then its group
    rest, errors = child.communicate()
    assert (child.returncode, errors) == (130, b"stopped\n") and b"" not in first
    shown = (tmp_path / "r.html").read_text().count('"strip": "')  # in the data, not in the script
    assert 0 <= 2 + rest.count(b"\n") - shown <= 1  # the signal may come after a caption was printed


def test_a_long_video_is_captioned_piece_by_piece(finished_run, flags, tmp_path):
    """Windows of half a second of a clip of shapes: captions of the frames of `iter_windows`, as JSON and subtitles."""
    video = next((Path(flags[-1]) / "test").glob("*.mp4"))
    words = [finished_run, "--video", video, "--window", 0.5, "--save"]
    done = run_forked(evaluate, *words, tmp_path / "c.jsonl", "--report", tmp_path / "r.html")
    assert done.returncode == 0, done.stderr
    captioner, run_flags = evaluate.load_run(finished_run)
    expected = [
        {"video": str(video), "start": round(start, 3), "end": round(end, 3),
         "caption": captioner.caption(frames[None])[0]}
        for start, end, frames in evaluate.iter_windows(video, 0.5, run_flags["frames"],
                                                        captioner.vit.preprocessing)
    ]  # fmt: skip
    assert len(expected) > 2
    assert [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()] == expected
    assert json.dumps(f"{video}, 0.50 to 1.00 s") in (tmp_path / "r.html").read_text()
    assert run_forked(evaluate, *words, tmp_path / "c.srt").returncode == 0
    cues = (tmp_path / "c.srt").read_text().split("\n\n")
    assert [cue.split("\n")[2] for cue in cues[:-1]] == [row["caption"] for row in expected]
    assert cues[1].startswith("2\n00:00:00,500 --> 00:00:01,000\n")


def test_a_saved_file_stays_where_nothing_is_captioned(finished_run, tmp_path, monkeypatch):
    """An empty folder, and an empty list of paths: an error, and the captions of an earlier call are still there."""
    (tmp_path / "c.json").write_text("old")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    for videos in (tmp_path / "empty", "-"):
        words = map(str, ["evaluate.py", finished_run, "--video", videos, "--save", tmp_path / "c.json"])
        monkeypatch.setattr(sys, "argv", list(words))
        with pytest.raises(InputError, match="found none"):
            evaluate.main()
        assert (tmp_path / "c.json").read_text() == "old"


def test_paths_on_the_standard_input_may_have_any_name(tmp_path, monkeypatch):
    """A line each: names that are no UTF-8, that contain other line breaks of Unicode, and a folder. NUL is no path."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.mp4").touch()
    names = [b"\xff.mp4", "a\u2028b.mp4".encode(), b"-", bytes(tmp_path / "folder")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join([*names, b""]))))
    found = evaluate.expand_video_paths(["-"])
    assert [os.fsencode(path) for path in found] == [*names[:2], bytes(tmp_path / "folder/a.mp4")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\0b")))
    with pytest.raises(InputError, match="is no path"):
        evaluate.expand_video_paths(["-"])
    with pytest.raises(InputError, match="--video '': is no path"):  # Path("") would be the current folder
        evaluate.expand_video_paths([""])
    assert evaluate.make_parser().parse_args(["r", "--video", "a", "b", "--video", "c"]).video == ["a", "b", "c"]


def test_a_run_whose_language_model_reads_patches(flags, tmp_path):
    """4 tokens a frame in place of one; evaluate.py captions the test split as train.py did."""
    run = tmp_path / "run"
    done = run_forked(train, *flags, "--method", "linear", "--cache-features", "--grid", 2, "--out", run)
    assert done.returncode == 0, done.stderr
    captioner, values = evaluate.load_run(run)
    assert captioner.num_visual_tokens(values["frames"]) == 4 * values["frames"]
    done = run_forked(evaluate, run, "--save", tmp_path / "p.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "p.json").read_text()) == json.loads((run / "test.json").read_text())["captions"]


def test_a_page_of_a_damaged_log_fails_before_the_work(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "r")
    (tmp_path / "r/log.jsonl").write_text("3\n" + (tmp_path / "r/log.jsonl").read_text())
    done = run_forked(evaluate, tmp_path / "r", "--report", tmp_path / "p.html", "--device", "cpu")
    assert_one_line_error(done, "log.jsonl: line 1")
    assert "CIDEr" not in done.stdout and not (tmp_path / "p.html").exists()


def test_a_run_without_a_best_checkpoint_names_the_last(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "r")
    shutil.rmtree(tmp_path / "r/best")
    with pytest.raises(InputError, match="r/best: expected a checkpoint, found none; --weights last takes the last"):
        evaluate.load_run(tmp_path / "r")
    evaluate.load_run(tmp_path / "r", "last")


def test_a_full_disk_leaves_whole_rows(tmp_path, monkeypatch):
    """Reference: a file that takes 10 more bytes."""

    def write_part(self, text):
        real_write(self, text[:10])
        raise OSError(28, "No space left on device")

    path = tmp_path / "c.jsonl"
    evaluate.write_row(path, {"video": "a"}, 1)

    class Full(io.TextIOWrapper):
        write = write_part

    real_write = io.TextIOWrapper.write
    monkeypatch.setattr(evaluate, "open", lambda name, mode, **kw: Full(io.FileIO(name, mode), **kw), raising=False)
    with pytest.raises(InputError, match="c.jsonl: No space"):
        evaluate.write_row(path, {"video": "b"}, 2)
    assert path.read_text() == '{"video": "a"}\n'


def test_real_videos_are_captioned_or_named(finished_run, real):
    """Every file of clips/ and of MSVD: 16 are captioned; the empty one, the text and the sound are named."""
    done = run_forked(evaluate, finished_run, "--video", real / "clips", real / "msvd/YouTubeClips")
    assert_one_line_error(done, "3 of 19 videos")
    assert len(done.stdout.splitlines()) == 16
    assert all(name in done.stderr for name in ("WrongFile.mp4", "audio_only.mp4", "empty.mp4"))


def test_a_run_of_an_older_version_is_read(flags, tmp_path):
    """Its queries did not read changes, and it lacks the flags that are newer; the captions stay the same."""
    run = tmp_path / "run"
    done = run_forked(train, *flags, "--no-changes", "--out", run)
    assert done.returncode == 0, done.stderr
    config = json.loads((run / "config.json").read_text())
    for fields in (config["flags"], config["adapter"]):
        for name in ("no_changes", "gate_bias", "time_embed", "per_frame", "visual", "grid", "instruction"):
            del fields[name]
    (run / "config.json").write_text(json.dumps(config))
    done = run_forked(evaluate, run, "--save", tmp_path / "p.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    test = json.loads((run / "test.json").read_text())
    assert json.loads((tmp_path / "p.json").read_text()) == test["captions"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("frames", 0, "at least 1"), ("frames", 10**30, "at most 4096"), ("frames", "8", "whole"), ("beams", -1, "least"),
     ("vit", "gone", "vit: gone: expected a folder"), ("dataset", "x", "dataset")],
)
def test_a_flag_changed_by_hand_is_named_with_its_file(finished_run, tmp_path, name, value, words):
    shutil.copytree(finished_run, tmp_path / "r")
    config = json.loads((tmp_path / "r/config.json").read_text())
    config["flags"][name] = value
    (tmp_path / "r/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"r/config.json: .*{words}"):
        evaluate.load_run(tmp_path / "r")


def test_each_user_error_is_one_line(finished_run, backbones, flags, tmp_path, monkeypatch):
    """In this process, where `cli.run` would turn the InputError into exit code 2; two of them as a user sees them."""

    def refused(words, *expected: str) -> None:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        with pytest.raises(InputError) as error:
            evaluate.main()
        assert str(error.value).isprintable() and all(word in str(error.value) for word in expected), error.value

    assert_one_line_error(run_python("evaluate.py", tmp_path / "gone"), "gone", "config.json")
    assert_one_line_error(run_forked(evaluate, finished_run, "--video", tmp_path / "gone.mp4"), "gone.mp4")
    refused([finished_run, "--device", "abacus"], "abacus")
    refused([finished_run, "--save", tmp_path / "gone/p.json"], "gone/p.json")
    refused([finished_run, "--save", tmp_path], str(tmp_path), "name of a file")
    refused([finished_run, "--save", finished_run / "config.json"], "config.json", "a file of the run")
    refused([finished_run, "--save", finished_run / "report.html"], "report.html", "a file of the run")
    video = tmp_path / "v.mp4"
    video.write_bytes(b"video")
    refused([finished_run, "--video", video, "--save", video], "v.mp4", "one of the videos")
    assert video.read_bytes() == b"video"
    os.link(video, tmp_path / "link.jsonl")
    refused([finished_run, "--video", video, "--save", tmp_path / "link.jsonl"], "link.jsonl", "one of the videos")
    (tmp_path / "list.txt").write_text(f"{video}\n")
    with open(tmp_path / "list.txt") as file:
        done = run_python("evaluate.py", finished_run, "--video", "-", "--save", tmp_path / "list.txt", stdin=file)
    assert_one_line_error(done, "list.txt", "is the standard input")
    assert (tmp_path / "list.txt").read_text() == f"{video}\n"
    refused([finished_run, "--video", video, "--split", "val"], "--video", "--split")
    refused([finished_run, "--data", tmp_path / "typo"], "--data", "typo")
    refused([finished_run, "--save", backbones / "lm/model.safetensors"], "model.safetensors", "frozen lm")
    refused([finished_run, "--video", video, "--data", flags[-1]], "--data", "without --video")
    refused([finished_run, "--video", video, "--show", tmp_path / "x.srt"], "--show", "x.srt", ".png")
    refused([finished_run, "--window", 2], "--window", "--video")
    refused([finished_run, "--video", video, "--window", 2, "--show", "x.png"], "--show", "without --window")
    refused([finished_run, "--video", video, "--window", 1e-9], "--window", "0.1")
    refused([finished_run, "--save", finished_run / "best/adapter.safetensors"], "a file of the run")
    refused([finished_run, "--save", tmp_path / "x", "--report", tmp_path / "x"], "different files")
    refused([finished_run, "--save", Path(flags[-1]) / "captions.json"], "captions.json", "a file of the dataset")
    refused([finished_run, "--video", video, "--save", tmp_path / "a.srt"], ".srt", "--window")
    refused([finished_run, "--video", video, video, "--window", 2, "--save", tmp_path / "a.srt"], ".srt", "one video")
    refused([finished_run, "--beams", 0], "--beams", "at least 1")
    refused([finished_run, "--length-penalty", "nan"], "--length-penalty", "nan")
    refused([finished_run, "--length-penalty", 11], "length_penalty", "11")
    refused([finished_run, "--beams", 400], "beams: 400", "399")
    refused([finished_run, "--min-new-tokens", 31], "min_new_tokens: 31", "30")
    refused([finished_run, "--max-new-tokens", 2000], "2000 tokens", "256")
