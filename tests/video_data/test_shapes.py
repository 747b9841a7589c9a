"""The embedded dataset against geometry, its own grammar, and its own files.

References: areas of the shapes by elementary geometry; time reversal (a clip to the left played
backwards is a clip to the right); what `describe` was given, as the truth for `claims`.
"""

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cli
import data
import shapes
from weights import InputError

U = np.linspace(0, 1, shapes.FRAMES)


def scene(seed: int) -> tuple[shapes.Shape, ...]:
    return shapes.draw_scene(np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("kind", "area"),  # at radius 1
    [
        ("circle", math.pi * 0.9**2),
        ("square", 1.6**2),
        ("triangle", 3 * math.sqrt(3) / 4),
        ("cross", 4 / 3 + 4 / 3 - 4 / 9),
        ("ring", math.pi * (0.95**2 - 0.55**2)),
    ],
)
def test_coverage_has_the_area_and_the_centre_of_the_shape(kind, area):
    """Within 2 % at radius 20 pixels, for any turn; the centre of mass within 0.1 pixel."""
    y, x = np.mgrid[0:64, 0:64] + 0.5 - 31.3
    for angle in (0.0, 0.4, 1.9):
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        cover = shapes.coverage(kind, u, v, np.full((1, 1), 20.0))
        assert cover.sum() == pytest.approx(area * 400, rel=0.02)
        assert abs((cover * x).sum() / cover.sum()) < 0.1 and abs((cover * y).sum() / cover.sum()) < 0.1


def test_symmetry_is_the_smallest_turn_that_shows_nothing():
    """A turn by 360/n degrees leaves each pixel's cover within 1e-6; half of that turn does not."""
    y, x = np.mgrid[0:64, 0:64] + 0.5 - 32
    for kind, n in shapes.SYMMETRY.items():
        covers = []
        for angle in (0, 2 * math.pi / n, math.pi / n):
            u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
            covers.append(shapes.coverage(kind, u, v, np.full((1, 1), 15.0)))
        assert abs(covers[0] - covers[1]).max() < 1e-6 < 0.5 < abs(covers[0] - covers[2]).max(), kind


@pytest.mark.parametrize(("one", "other"), [("left", "right"), ("up", "down"), ("grow", "shrink")])
def test_backwards_a_motion_is_its_opposite_so_no_still_tells_them_apart(one, other):
    """20 shapes, seeds 0..19: the same stills, bit for bit, in the opposite order."""
    for seed in range(20):
        shape = replace(scene(seed)[0], motion=one, speed=1.0 if one == "grow" else 20.0)
        there, _ = shapes.render((shape,), U, np.random.default_rng(seed))
        back, _ = shapes.render((replace(shape, motion=other),), 1 - U, np.random.default_rng(seed))
        assert np.array_equal(there, back)
        assert not np.array_equal(there[0], there[-1])


def test_place_size_and_angle_at_mid_clip_do_not_depend_on_the_motion():
    """20,000 shapes, seed 1: each motion's mean place and size within 4 standard errors of all shapes'."""
    rng = np.random.default_rng(1)
    drawn = [shapes.draw_shape(rng) for _ in range(20000)]
    for name in ("x", "y", "radius", "angle"):
        values = np.array([getattr(s, name) for s in drawn])
        for motion in shapes.MOTIONS:
            mine = values[[s.motion == motion for s in drawn]]
            assert abs(mine.mean() - values.mean()) < 4 * values.std() / len(mine) ** 0.5, (name, motion)


def test_still_means_still_and_every_other_motion_changes_the_frames():
    for seed in range(60):
        for shape in scene(seed):
            _, covers = shapes.render((shape,), U, np.random.default_rng(seed))
            change = abs(covers[0] - covers[0][:1]).max()
            assert (change == 0) == (shape.motion == "still"), shape


def test_claims_reads_back_what_describe_was_told():
    """2,000 scenes, seeds 0..1999, six references each; every motion, colour, kind and wording occurs."""
    words = set()
    for seed in range(2000):
        told = scene(seed)
        truth = sorted((f"{s.colour} {s.kind}", s.motion) for s in told)
        lines = shapes.references(told, np.random.default_rng(seed))
        assert len(set(lines)) == 6
        for line in lines:
            assert shapes.claims(line) == truth, line
            words.update(line.split())
    every = {w for pairs in shapes.MOTIONS.values() for pair in pairs for p in pair for w in p.split()}
    assert words >= every | set(shapes.COLOURS) | set(shapes.KINDS)


def test_attributes_counts_bound_motions():
    """By hand: shapes swapped in order are right, motions swapped between two shapes are wrong."""
    references = {str(i): ["a red circle moves left and a blue square spins"] for i in range(4)}
    references["4"] = ["a red circle moves left"]
    captions = {
        "0": "the blue square rotates and the red circle slides to the left",  # all right
        "1": "a red circle spins and a blue square moves left",  # motions of the wrong shapes
        "2": "a red circle moves left and a green square spins",  # wrong colour
        "3": "a red circle moves left",  # one shape missing
        "4": "a red circle moves left moves right",  # two motions are none
    }
    assert shapes.attributes(references, captions) == {
        "shapes": 3 / 5, "motion": 1 / 5, "motion_one": 0.0, "motion_two": 1 / 4,
    }  # fmt: skip


def frame_hashes(folder, split):
    frames = [data.read_frames(p, shapes.FRAMES, shapes.SIDE).numpy() for p in sorted((folder / split).glob("*.mp4"))]
    return [hashlib.sha256(f.tobytes()).hexdigest() for f in frames]


def test_files_hold_what_was_drawn_once_per_seed(tmp_path):
    """Seeds 0, 0 and 1: equal bytes of frames, splits without a common clip, PSNR above 28 dB of the drawing."""
    sizes = {"train": 6, "val": 3, "test": 3}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shapes.make(tmp_path / name, sizes, seed, report=lambda _: None)
    a, b, c = ([h for split in sizes for h in frame_hashes(tmp_path / n, split)] for n in "abc")
    assert a == b and len(set(a)) == len(a) == 12 and not set(a) & set(c)
    captions = json.loads((tmp_path / "a" / "captions.json").read_text())
    assert {split: len(clips) for split, clips in captions.items()} == sizes

    rng = np.random.default_rng([0, 0, 2])  # the stream of train clip 2
    drawn, _ = shapes.render(shapes.draw_scene(rng), U, rng)
    read = data.read_frames(tmp_path / "a/train/00002.mp4", shapes.FRAMES, shapes.SIDE).numpy()
    error = np.square(read.transpose(0, 2, 3, 1).astype(float) - drawn).mean()
    assert 10 * math.log10(255**2 / error) > 28


def test_made_once_gone_on_with_when_cut_short_and_never_over_something_else(tmp_path, monkeypatch):
    told = []
    sizes = {"train": 2, "val": 1, "test": 1}
    shapes.make(tmp_path, sizes, report=told.append)
    first = (tmp_path / "train/00000.mp4").stat().st_mtime_ns
    shapes.make(tmp_path, sizes, report=told.append)
    assert (tmp_path / "train/00000.mp4").stat().st_mtime_ns == first and len(told) == 3
    with pytest.raises(InputError, match="not .*'train': 3"):
        shapes.make(tmp_path, sizes | {"train": 3})
    assert len(data.load("shapes", tmp_path, (2, 1, 1))["train"]) == 2

    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "partial", lambda *_, **__: 1 / 0)  # stopped while it writes clips
        with pytest.raises(ZeroDivisionError):
            shapes.make(cut, sizes)
    shapes.make(cut, sizes)
    assert len(data.load("shapes", cut, (2, 1, 1))["train"]) == 2 and not list(cut.rglob("*.part*"))

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/captions.json").write_text("precious")
    with pytest.raises(InputError, match="something else"):
        shapes.make(tmp_path / "mine", sizes)
    assert (tmp_path / "mine/captions.json").read_text() == "precious"


def test_true_captions_are_captions_of_the_scene():
    """Each of the 18 of 20 scenes (seed 0) is among what `describe` says of the scene in 2,000 tries."""
    rng = np.random.default_rng(0)
    scenes = [shapes.draw_scene(rng) for _ in range(20)]
    told = {str(i): [shapes.describe(scene, rng)] for i, scene in enumerate(scenes)}
    possible = [{shapes.describe(scene, rng) for _ in range(2000)} for scene in scenes]
    assert any("an orange" in texts[0] for texts in told.values())
    for wording in range(6):
        for phrase in range(3):
            for i, caption in shapes.true_captions(told, wording, phrase).items():
                assert caption in possible[int(i)]


@pytest.mark.parametrize(("content", "word"), [("{}", "test"), ('{"test": {}}', "empty"), ("{", "JSON")])
def test_scoring_true_captions_names_what_is_wrong_with_the_folder(tmp_path, content, word, monkeypatch, capsys):
    (tmp_path / "captions.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["shapes.py", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.run(shapes.main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and word in said and len(said.splitlines()) == 1


def test_it_is_a_script():
    """Started as the README does; with --help nothing is read."""
    done = subprocess.run([sys.executable, "shapes.py", "--help"], cwd=Path(__file__).parent.parent,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and "test split" in done.stdout and not done.stderr
