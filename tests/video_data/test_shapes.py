"""The embedded dataset against geometry, its own grammar, and its own files.

References: areas of the shapes by elementary geometry; time reversal (a motion to the left, played backwards, goes to
the right); the scenes given to `describe` as ground truth for `parse_claims`; a hash of the first version's captions.
"""

import hashlib
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import video_data
from common.files import read_json
from tests.common.helpers import refused
from video_data import shapes

SIZES = (2, 1, 1)
U = np.linspace(0, 1, shapes.FRAMES)
AREAS = {  # at radius 1
    "circle": math.pi * 0.9**2,
    "square": 1.6**2,
    "triangle": 3 * math.sqrt(3) / 4,
    "cross": 4 / 3 + 4 / 3 - 4 / 9,
    "ring": math.pi * (0.95**2 - 0.55**2),
}


def draw_scene(seed: int) -> tuple[shapes.Shape, ...]:
    return shapes.draw_scene(np.random.default_rng(seed))


def coverage(kind: str, radius: float, angle: float = 0.0) -> np.ndarray:
    """Of the pixels (64, 64) by a shape that is turned, with its centre at (31.3, 31.3)."""
    y, x = np.mgrid[0:64, 0:64] + 0.5 - 31.3
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return shapes.coverage(kind, u, v, np.full((1, 1), radius))


@pytest.mark.parametrize("kind", AREAS)
def test_coverage_has_the_area_the_centre_and_the_symmetry_of_the_shape(kind):
    """Within 2% at radius 20 pixels and several angles; the centre of mass within 0.1 pixel. A rotation by 360/n
    degrees keeps the coverage of each pixel within 1e-6. Half of that rotation does not."""
    for angle in (0.0, 0.4, 1.9):
        mask = coverage(kind, 20.0, angle)
        assert mask.sum() == pytest.approx(AREAS[kind] * 400, rel=0.02)
        assert abs((mask * (np.mgrid[0:64, 0:64] - 30.8)).sum((1, 2)) / mask.sum()).max() < 0.1
    if n := shapes.SYMMETRY.get(kind):
        still, whole, half = (coverage(kind, 15.0, angle) for angle in (0, 2 * math.pi / n, math.pi / n))
        assert abs(still - whole).max() < 1e-6 < 0.5 < abs(still - half).max()


@pytest.mark.parametrize(("motion", "opposite"), [("left", "right"), ("up", "down"), ("grow", "shrink")])
def test_a_reversed_motion_is_its_opposite_so_no_single_frame_tells_them_apart(motion, opposite):
    """20 shapes, seeds 0..19: bit-identical frames in the opposite order."""
    for seed in range(20):
        shape = replace(draw_scene(seed)[0], motion=motion, speed=1.0 if motion == "grow" else 20.0)
        forward, _ = shapes.render((shape,), U, np.random.default_rng(seed))
        backward, _ = shapes.render((replace(shape, motion=opposite),), 1 - U, np.random.default_rng(seed))
        assert np.array_equal(forward, backward)


def test_place_size_and_angle_at_mid_clip_do_not_depend_on_the_motion():
    """20,000 shapes, seed 1: each motion's mean place and size within 4 standard errors of all shapes'."""
    rng = np.random.default_rng(1)
    drawn = [shapes.draw_shape(rng) for _ in range(20000)]
    for name in ("x", "y", "radius", "angle"):
        values = np.array([getattr(s, name) for s in drawn])
        for motion in shapes.MOTIONS:
            group = values[[s.motion == motion for s in drawn]]
            assert abs(group.mean() - values.mean()) < 4 * values.std() / len(group) ** 0.5, (name, motion)


def test_every_motion_but_still_changes_the_frames():
    for seed in range(60):
        for shape in draw_scene(seed):
            _, masks = shapes.render((shape,), U, np.random.default_rng(seed))
            change = abs(masks[0] - masks[0][:1]).max()
            assert (change == 0) == (shape.motion == "still"), shape


def test_parse_claims_is_the_inverse_of_describe():
    """2,000 scenes, seeds 0..1999, six captions each. Every motion, colour, kind and phrase occurs."""
    words = set()
    for seed in range(2000):
        scene = draw_scene(seed)
        expected = sorted((f"{s.colour} {s.kind}", s.motion) for s in scene)
        captions = shapes.reference_captions(scene, np.random.default_rng(seed))
        assert len(set(captions)) == 6
        for caption in captions:
            assert shapes.parse_claims(caption) == expected, caption
            words.update(caption.split())
    motion_words = {w for pairs in shapes.MOTIONS.values() for pair in pairs for p in pair for w in p.split()}
    assert words >= motion_words | set(shapes.COLOURS) | set(shapes.KINDS)


def test_attribute_accuracy_binds_motions_to_shapes():
    """By hand: the order of the shapes does not matter; motions swapped between two shapes are wrong."""
    references = {str(i): ["a red circle moves left and a blue square spins"] for i in range(4)}
    references["4"] = ["a red circle moves left"]
    captions = {
        "0": "the blue square rotates and the red circle slides to the left",  # correct
        "1": "a red circle spins and a blue square moves left",  # motions swapped
        "2": "a red circle moves left and a green square spins",  # wrong colour
        "3": "a red circle moves left",  # one shape missing
        "4": "a red circle moves left moves right",  # two motions for one shape
    }
    expected = {"shapes": 3 / 5, "motion": 1 / 5, "motion_one": 0.0, "motion_two": 1 / 4}
    assert shapes.attribute_accuracy(references, captions) == expected
    backwards = {"0": "a blue square spins and a red circle drifts rightward", "4": "a red circle moves left"}
    assert shapes.attribute_accuracy(references, backwards, is_reversed=True)["motion"] == 1 / 2


def test_files_contain_the_rendered_scenes_and_depend_only_on_the_seed(tmp_path, monkeypatch):
    """Seeds 0, 0 and, by the command, 1: equal files for equal seeds, no clip in two splits; PSNR of the codec above
    28 dB."""
    for name in "ab":
        shapes.make_dataset(tmp_path / name, (6, 3, 3))
    monkeypatch.setattr("sys.argv", ["shapes", str(tmp_path / "c"), *"--sizes 6 3 3 --seed 1".split()])
    shapes.main()
    a, b, c = ([path.read_bytes() for path in sorted((tmp_path / n).glob("*/*.mp4"))] for n in "abc")
    assert a == b and len(set(a)) == len(a) == len(c) == 12 and not set(a) & set(c)

    rng = np.random.default_rng([1, 0, 2])  # the stream of train clip 2
    rendered, _ = shapes.render(scene := shapes.draw_scene(rng), U, rng)
    clip = video_data.load("shapes", tmp_path / "c")["train"][2]
    assert list(clip.captions) == shapes.reference_captions(scene, rng)
    read = video_data.read_frames(clip.path, shapes.FRAMES, shapes.SIDE).numpy()
    error = np.square(read.transpose(0, 2, 3, 1).astype(float) - rendered).mean()
    assert 10 * math.log10(255**2 / error) > 28


def test_captions_never_change_and_a_complete_folder_is_kept(tmp_path):
    """SHA-256 of captions.json as the first version wrote it for seed 3."""
    shapes.make_dataset(tmp_path / "a", (6, 3, 3), seed=3)
    text = json.dumps(read_json(tmp_path / "a/captions.json"), indent=1)
    expected = "8874b84e50ea848219162825e9df1b41aa48e32b5a4a99ec73bfb10d0c22b977"
    assert hashlib.sha256(text.encode()).hexdigest() == expected
    (tmp_path / "a/train/00000.mp4").unlink()
    shapes.make_dataset(tmp_path / "a", (6, 3, 3))
    assert not (tmp_path / "a/train/00000.mp4").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/precious").touch()
    with refused(f"{tmp_path}/b: contains something other than shapes"):
        shapes.make_dataset(tmp_path / "b", SIZES)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["precious"]


def test_an_interrupted_folder_is_made_again(tmp_path):
    """As after a kill in the first clip: only the lock and half of a file are there."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train/00000.mp4").write_bytes(b"half")
    (tmp_path / ".lock").touch()
    shapes.make_dataset(tmp_path, SIZES)
    assert len(video_data.load("shapes", tmp_path)["train"]) == 2
    assert video_data.read_frames(tmp_path / "train/00000.mp4", 2, 64).shape == (2, 3, 64, 64)


def test_processes_that_make_one_folder_at_once_all_succeed(tmp_path, monkeypatch):
    """Three processes: one writes, the others wait and find the folder complete."""
    context, write = multiprocessing.get_context("fork"), shapes.write_clip
    written = context.SimpleQueue()
    monkeypatch.setattr(shapes, "write_clip", lambda *args: (time.sleep(0.05), write(*args), written.put(1)))
    with ProcessPoolExecutor(3, context) as processes:
        list(processes.map(shapes.make_dataset, [tmp_path / "a"] * 3, [SIZES] * 3))
    assert [written.get() for _ in range(4)] and written.empty()
