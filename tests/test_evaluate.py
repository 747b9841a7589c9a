"""Evaluation as a user runs it: a split of a run's dataset, and the user's own videos.

References: `Captioner.caption` called with the same options; that evaluation gives the captions and scores of training
is in test_train.py.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import evaluate
from common.errors import printable
from common.files import write_json
from evaluate import load_run
from models.generation import generate
from models.mllm import MLLM
from models.tokenizer import load_tokenizer
from tests.scripts import ENVIRONMENT, ROOT, assert_error, refuse, run_forked, succeed
from training import devices
from video_data.video import read_frames
from video_data.windows import iter_windows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def videos(finished_run, flags) -> list[Path]:
    return sorted((Path(flags[-1]) / "test").glob("*.mp4"))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_frames_and_beams_reach_the_captioner(finished_run, videos, tmp_path):
    """Captions of the test split with other frames and beams are those of `Captioner.caption`, and not the run's."""
    captioner, words = load_run(finished_run, CPU)[0], ["--beams", 3, "--frames", 5, "--save", tmp_path / "p.json"]
    succeed(evaluate, finished_run, *words, "--report", tmp_path / "p.html", "--device", "cpu")
    frames = torch.stack([read_frames(video, 5, captioner.vit.preprocessing) for video in videos])
    found = json.loads((tmp_path / "p.json").read_text())
    assert list(found.values()) == captioner.caption(frames, beams=3) and list(found)[1] == "test/00001.mp4"
    assert found != json.loads((finished_run / "test.json").read_text())["captions"]
    page = (tmp_path / "p.html").read_text()
    assert all(json.dumps(caption)[1:-1] in page for caption in found.values())


def test_another_dataset_is_scored(finished_run, videos, tmp_path):
    """Two of the run's test clips, as clips of one's own of which there is no other split."""
    (data := tmp_path / "data").mkdir()
    for video in videos[:2]:
        (data / video.name).symlink_to(video)
    write_json(data / "captions.json", {"test": {video.name: ["a red cat is rising"] for video in videos[:2]}})
    words = ["--dataset", "folder", "--data", data, "--device", "cpu"]
    output = succeed(evaluate, finished_run, *words, "--save", tmp_path / "found.json")
    assert "data:folder test (not the data of the run, 2 clips with SHA-256" in output
    expected = json.loads((finished_run / "test.json").read_text())["captions"]
    assert list(json.loads((tmp_path / "found.json").read_text()).values()) == list(expected.values())[:2]
    refuse(evaluate, [finished_run, *words, "--split", "val"], f"{data}: expected clips of the split val")


def test_without_a_run_an_mllm_captions_as_it_is(videos, tmp_path):
    """Reference: generation after the model's own prompt, 8 frames, 5 beams. Without both flags a run is expected."""
    folder, words = ROOT / "backbones/tiny-mllm", ["--device", "cpu", "--video", videos[0]]
    succeed(evaluate, "--mllm", folder, *words, "--save", tmp_path / "c.jsonl")
    dtype, tokenizer = torch.bfloat16 if devices.has_bf16(CPU) else torch.float32, load_tokenizer(folder)
    mllm = MLLM.from_pretrained(folder, dtype)
    pixels = mllm.vit.normalize(read_frames(videos[0], 8, mllm.vit.preprocessing)).to(mllm.vit.position.dtype)
    tokens = mllm.frame_tokens(mllm.vit.run_blocks(pixels), 0)  # (T, P', C)
    texts = [torch.tensor(ids, dtype=torch.long) for ids in mllm.prompt(tokenizer, 8)]
    ids = generate(mllm.lm, mllm.merge(texts, list(tokens[:, None])), beams=5, max_new_tokens=30)
    assert read_rows(tmp_path / "c.jsonl") == [{"video": str(videos[0]), "caption": tokenizer.decode(ids)[0]}]
    refuse(evaluate, words, "RUN: expected first")
    refuse(evaluate, ["--mllm", folder, *words, "--report", tmp_path / "p.html"], "--report: expected a RUN")


def test_videos_good_and_bad(finished_run, videos, tmp_path):
    """Four files, two of them bad: two captions, two errors, exit code 2."""
    captioner = load_run(finished_run, CPU)[0]
    (folder := tmp_path / "videos").mkdir()
    for name, content in (("0.mp4", videos[0].read_bytes()), ("1bad.mp4", b""), ("2.mp4", videos[2].read_bytes()),
                          ("4bad.mp4", b"not a video"), ("notes.txt", b"text")):
        (folder / name).write_bytes(content)
    done = run_forked(evaluate, finished_run, "--video", folder, "--save", tmp_path / "c.jsonl")
    assert_error(done, "2 of 4 videos")
    rows = {Path(row["video"]).name: row for row in read_rows(tmp_path / "c.jsonl")}
    assert list(rows) == ["0.mp4", "1bad.mp4", "2.mp4", "4bad.mp4"]
    frames = torch.stack([read_frames(videos[i], 8, captioner.vit.preprocessing) for i in (0, 2)])
    captions = dict(zip(("0.mp4", "2.mp4"), captioner.caption(frames), strict=True))
    assert {name: row["caption"] for name, row in rows.items() if "error" not in row} == captions
    assert done.stdout.splitlines() == [printable(f"{folder}/{name}: {text}") for name, text in captions.items()]
    assert "1bad.mp4" in done.stderr and "4bad.mp4" in done.stderr


def test_a_long_video_is_captioned_piece_by_piece(finished_run, videos, tmp_path):
    """Windows of half a second: captions of the frames of `iter_windows`, as JSON, subtitles and a page."""
    captioner, words = load_run(finished_run, CPU)[0], [finished_run, "--video", videos[0], "--window", 0.5, "--save"]
    succeed(evaluate, *words, tmp_path / "c.jsonl", "--report", tmp_path / "r.html")
    expected = [{"video": str(videos[0]), "start": round(start, 3), "end": round(end, 3),
                 "caption": captioner.caption(frames[None])[0]}
                for start, end, frames, _ in iter_windows(videos[0], 0.5, 8, captioner.vit.preprocessing)]
    assert len(expected) > 1 and read_rows(tmp_path / "c.jsonl") == expected
    assert json.dumps(f"{videos[0]}, 0.50 to 1.00 s") in (tmp_path / "r.html").read_text()
    (tmp_path / "c.srt").write_text("old")
    succeed(evaluate, *words, tmp_path / "c.srt")
    cues = (tmp_path / "c.srt").read_text().split("\n\n")
    assert [cue.split("\n")[2] for cue in cues[:-1]] == [row["caption"] for row in expected]
    assert cues[1].startswith("2\n00:00:00,500 --> 00:00:01,000\n")


def test_captions_are_saved_as_they_come_and_shown_after_sigterm(finished_run, videos, tmp_path):
    """2,000 videos. After the fourth caption those before it are in the file, each a whole JSON object, whatever ends
    the program. SIGTERM, twice, as `timeout` and batch systems send it, leaves a page of what was captioned."""
    (tmp_path / "c.jsonl").write_text("old\n")
    command = [sys.executable, "-u", "evaluate.py", finished_run, "--video", *[videos[0]] * 2000,
               "--save", tmp_path / "c.jsonl", "--report", tmp_path / "r.html"]
    child = subprocess.Popen([*map(str, command)], cwd=ROOT, bufsize=0, env=os.environ | ENVIRONMENT,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    lines = [child.stdout.readline().decode() for _ in range(4)]
    rows = read_rows(tmp_path / "c.jsonl")
    assert len(rows) >= 3 and [printable(f"{row['video']}: {row['caption']}") + "\n" for row in rows[:3]] == lines[:3]
    child.terminate()
    time.sleep(0.01)
    child.terminate()
    rest, errors = child.communicate()
    assert (child.returncode, errors) == (130, b"stopped\n")
    shown = (tmp_path / "r.html").read_text().count('"strip": "')  # in the data, not in the script
    assert 0 <= 4 + rest.count(b"\n") - shown <= 1  # the signal may come after a caption was printed


@pytest.mark.parametrize("words, message", [
    ("--video VIDEO --split val", "--split, --dataset and --data: expected without"), ("--beams 1000", "1000"),
    ("--video VIDEO --window 2 --show x.png", "--show: expected without --window"), ("--window 1e-9", "--window"),
    ("--video VIDEO --save a.srt", "--save FILE.srt: expected --window"), ("--show x.png", "--show and --window: exp"),
    ("--video VIDEO VIDEO --window 2 --save a.srt", "a.srt: expected one video, found 2"), ("--mllm TMP", "--mllm"),
    ("--video VIDEO VIDEO --show a.png", "a.png: expected one video"), ("--vit TMP/gone", "gone: expected a folder"),
    ("--data TMP/typo", "typo: expected the folder"), ("--dataset folder", "--dataset: expected --data too"),
    ("--save TMP/a --report TMP/a", "--report .*/a: expected a file that is not read"),
    ("--save DATA/test/new.json", "new.json: expected a file that is not read"), ("--video TMP", "found none"),
    ("--video TMP/loop --save TMP/gone/p.json", "gone/p.json: expected a file"),
])
def test_what_does_not_fit_is_refused(words, message, finished_run, flags, videos, tmp_path):
    for name, value in (("VIDEO", videos[0]), ("DATA", flags[-1]), ("TMP", tmp_path)):
        words = words.replace(name, str(value))
    (tmp_path / "loop").symlink_to("loop")
    refuse(evaluate, [finished_run, *words.split()], message)


@pytest.mark.parametrize("flag", ["--save", "--report", "--show"])
def test_an_output_replaces_no_input(flag, finished_run, flags, backbones, videos, tmp_path):
    """Files of the run, of the frozen models and of the dataset, and the video, also under another name."""
    video = shutil.copy(videos[0], tmp_path / "video.mp4")
    (tmp_path / "link.mp4").symlink_to(video)
    os.link(video, tmp_path / "hard link.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")  # replacing or opening a device file would do harm
    reader = os.open(tmp_path / "pipe.mp4", os.O_RDWR)  # else a write would wait for one
    paths = [*(finished_run / name for name in ("config.json", "log.jsonl", "best/adapter.safetensors", "best")),
             backbones / "lm/model.safetensors", *(tmp_path / f"{name}.mp4" for name in ("link", "hard link", "pipe"))]
    words = [[finished_run, "--video", video, flag, path] for path in (video, *paths)]
    if flag != "--show":  # which reads no dataset
        words.append([finished_run, flag, Path(flags[-1]) / "captions.json"])
    for *others, path in words:
        before = path.read_bytes() if path.is_file() else None
        refuse(evaluate, [*others, path], f"{flag} {path}: ")
        assert before == (path.read_bytes() if path.is_file() else None)
    os.close(reader)
