"""The embedded dataset `shapes`: scenes, their pixels, their captions, and the claims of a caption.

A clip shows one or two coloured shapes on a varied background for 2 seconds. Each shape moves left, right, up or down,
grows, shrinks, blinks, spins or stays still, independently. The clips are ordinary MPEG-4 files [1], which are read
like any other video. A single frame shows colour, kind and place, but does not tell a motion from its opposite or from
staying still: place, size and angle at mid-clip have the same distribution for all motions.

Letters: F frames per clip, S side of a frame in pixels, N shapes.

References
[1] MPEG-4 in an MP4 container through PyAV, https://pyav.org/docs/stable/
[2] Signed distances of simple polygons, https://iquilezles.org/articles/distfunctions2d/
"""

import json
import math
import os
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from common.errors import InputError
from common.files import acquire_lock, read_json, replace_atomically
from common.workers import worker_pool

SIDE, FRAMES, RATE = 64, 16, 8  # pixels, frames per clip, frames per second

COLOURS = {
    "red": (215, 40, 40), "green": (40, 170, 60), "blue": (50, 90, 225), "yellow": (240, 220, 50),
    "orange": (245, 135, 25), "purple": (140, 55, 185), "white": (242, 242, 242), "pink": (250, 150, 195),
}  # fmt: skip
KINDS = ("circle", "square", "triangle", "cross", "ring")
SYMMETRY = {"square": 4, "triangle": 3, "cross": 4}  # a rotation by 360/n degrees maps the shape onto itself

# motion -> phrases for it, each (finite verb, participle)
MOTIONS = {
    "left": (("moves left", "moving left"), ("slides to the left", "sliding to the left"),
             ("drifts leftward", "drifting leftward")),
    "right": (("moves right", "moving right"), ("slides to the right", "sliding to the right"),
              ("drifts rightward", "drifting rightward")),
    "up": (("moves up", "moving up"), ("rises", "rising"), ("drifts upward", "drifting upward")),
    "down": (("moves down", "moving down"), ("sinks", "sinking"), ("drifts downward", "drifting downward")),
    "grow": (("grows", "growing"), ("gets bigger", "getting bigger"), ("becomes larger", "becoming larger")),
    "shrink": (("shrinks", "shrinking"), ("gets smaller", "getting smaller"),
               ("becomes tiny", "becoming tiny")),
    "blink": (("blinks", "blinking"), ("flashes on and off", "flashing on and off"),
              ("comes and goes", "coming and going")),
    "spin": (("spins", "spinning"), ("turns around", "turning around"), ("rotates", "rotating")),
    "still": (("stays still", "staying still"), ("does not move", "not moving"),
              ("rests in place", "resting in place")),
}  # fmt: skip

# Captions of one and of two shapes: nouns n, m; finite verbs f, g; participles p, q.
ONE_SHAPE = ("a {n} {f}", "a {n} is {p}", "there is a {n} that {f}", "the {n} {f}", "one {n} {p}",
             "we see a {n} that is {p}")  # fmt: skip
TWO_SHAPES = ("a {n} {f} and a {m} {g}", "a {n} is {p} and a {m} is {q}", "a {n} {f} while a {m} {g}",
              "there is a {n} that {f} and a {m} that {g}", "the {n} {f} and the {m} {g}",
              "one {n} {p} and one {m} {q}")  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One shape of a scene. Lengths in pixels, angles in radians, time u in [0, 1] over the clip."""

    colour: str
    kind: str
    motion: str
    x: float  # centre at mid-clip
    y: float
    radius: float  # geometric mean over the clip
    angle: float
    speed: float  # change over the whole clip: pixels, log of the size, radians; blinking: cycles per clip
    phase: float  # of the blinking at u = 0, in cycles

    def state_at(self, u: np.ndarray) -> tuple[np.ndarray, ...]:
        """Centre x, y, radius, angle and visibility at times u, each of u's shape."""
        change = (u - 0.5) * self.speed
        zero = np.zeros_like(u)
        x = self.x + {"left": -change, "right": change}.get(self.motion, zero)
        y = self.y + {"up": -change, "down": change}.get(self.motion, zero)
        radius = self.radius * np.exp({"grow": change, "shrink": -change}.get(self.motion, zero))
        angle = self.angle + (change if self.motion == "spin" else zero)
        visible = np.ones_like(u)
        if self.motion == "blink":
            visible = ((u * self.speed + self.phase) % 1 < 0.5).astype(u.dtype)
        return x, y, radius, angle, visible


def draw_shape(rng: np.random.Generator) -> Shape:
    """A random shape. Place and size at mid-clip do not depend on the motion, so a single frame cannot reveal it.
    As a consequence, some shapes leave the frame in part."""
    motion = str(rng.choice(list(MOTIONS)))
    kinds = [k for k in KINDS if motion != "spin" or k in SYMMETRY]  # a spinning circle looks still
    speed = {
        "left": rng.uniform(12, 28), "right": rng.uniform(12, 28),
        "up": rng.uniform(12, 28), "down": rng.uniform(12, 28),
        "grow": rng.uniform(0.6, 1.1), "shrink": rng.uniform(0.6, 1.1),
        "blink": rng.uniform(1.5, 4), "spin": rng.choice([-1, 1]) * rng.uniform(2, 6), "still": 0,
    }[motion]  # fmt: skip
    return Shape(
        colour=str(rng.choice(list(COLOURS))),
        kind=str(rng.choice(kinds)),
        motion=motion,
        x=rng.uniform(16, SIDE - 16),
        y=rng.uniform(16, SIDE - 16),
        radius=rng.uniform(8, 12),
        angle=rng.uniform(0, 2 * math.pi),
        speed=float(speed),
        phase=rng.uniform(0, 1),
    )


def draw_scene(rng: np.random.Generator) -> tuple[Shape, ...]:
    """One or two shapes with equal probability. Two differ in colour or kind and are well apart at mid-clip."""
    first = draw_shape(rng)
    if rng.random() < 0.5:
        return (first,)
    while True:
        second = draw_shape(rng)
        same = (second.colour, second.kind) == (first.colour, first.kind)
        near = math.hypot(second.x - first.x, second.y - first.y) < 20
        if not same and not near:
            return (first, second)


# ------------------------------------------------------------------------------------------ pixels


def coverage(kind: str, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """The fraction of each pixel that a shape covers, from its signed distance in pixels [2]."""
    if kind == "circle":
        distance = np.hypot(x, y) - 0.9 * r
    elif kind == "square":
        distance = np.maximum(abs(x), abs(y)) - 0.8 * r
    elif kind == "cross":
        horizontal = np.maximum(abs(x) - r, abs(y) - r / 3)
        vertical = np.maximum(abs(x) - r / 3, abs(y) - r)
        distance = np.minimum(horizontal, vertical)
    elif kind == "triangle":
        sides = [x * math.cos(a) + y * math.sin(a) for a in (math.pi / 2, math.pi * 7 / 6, -math.pi / 6)]
        distance = np.maximum.reduce(sides) - r / 2
    else:  # ring
        distance = abs(np.hypot(x, y) - 0.75 * r) - 0.2 * r
    return np.clip(0.5 - distance, 0, 1)


# Camera noise is a random slice of this: drawing it for each clip would take half of the time.
NOISE = np.random.default_rng(0).standard_normal(2**20, np.float32)


def draw_background(rng: np.random.Generator) -> np.ndarray:
    """A plain, graded, striped, checked or blocky background in a dull colour, float32 (S, S, 3)."""
    grid = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    direction = rng.uniform(0, 2 * math.pi)
    ramp = grid[0] * math.cos(direction) + grid[1] * math.sin(direction)
    style = rng.integers(5)
    if style == 0:
        pattern = np.zeros((SIDE, SIDE))
    elif style == 1:
        pattern = ramp / SIDE
    elif style == 2:
        pattern = np.sin(ramp * rng.uniform(0.3, 0.9)) * 0.5
    elif style == 3:
        cell = rng.integers(6, 14)
        pattern = ((grid[0] // cell + grid[1] // cell) % 2) - 0.5
    else:
        pattern = np.kron(rng.uniform(-0.5, 0.5, (8, 8)), np.ones((8, 8)))
    base = rng.uniform(25, 110) + rng.uniform(-18, 18, 3)
    return (base + pattern[..., None] * rng.uniform(10, 45)).astype(np.float32)


def render(scene: tuple[Shape, ...], u: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene at times u (F,) in [0, 1].

    Returns the frames, uint8 (F, S, S, 3), and masks, float32 (N, F, S, S): the fraction of each pixel that each shape
    covers and no later shape hides.
    """
    rows, columns = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5
    frames = np.broadcast_to(draw_background(rng), (len(u), SIDE, SIDE, 3)).copy()
    masks = np.zeros((len(scene), len(u), SIDE, SIDE), np.float32)
    for i, shape in enumerate(scene):
        cx, cy, radius, angle, visible = (v.astype(np.float32)[:, None, None] for v in shape.state_at(u))
        dx, dy = columns - cx, rows - cy  # (F, S, S)
        x, y = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        mask = coverage(shape.kind, x, y, radius) * visible  # (F, S, S)
        masks[:i] *= 1 - mask
        masks[i] = mask
        colour = np.array(COLOURS[shape.colour], np.float32) + rng.uniform(-12, 12, 3).astype(np.float32)
        frames += mask[..., None] * (colour - frames)
    amplitude, start = rng.uniform(0, 7), rng.integers(len(NOISE) - frames.size)
    frames += amplitude * NOISE[start : start + frames.size].reshape(frames.shape)
    return np.clip(frames, 0, 255).astype(np.uint8), masks


# ---------------------------------------------------------------------------------------- captions


def fill_template(template: int, words: list[tuple[str, str, str]]) -> str:
    """Caption template number `template` with the (noun, finite verb, participle) of each of one or two shapes."""
    (n, f, p), (m, g, q) = words[0], words[-1]
    text = (ONE_SHAPE if len(words) == 1 else TWO_SHAPES)[template]
    return text.format(n=n, f=f, p=p, m=m, g=g, q=q).replace("a orange", "an orange")


def describe(scene: tuple[Shape, ...], rng: np.random.Generator) -> str:
    """One caption with random wording and a random order of the shapes."""
    words = []
    for shape in (scene[i] for i in rng.permutation(len(scene))):
        phrases = MOTIONS[shape.motion]
        words.append((f"{shape.colour} {shape.kind}", *phrases[rng.integers(len(phrases))]))
    return fill_template(rng.integers(len(ONE_SHAPE)), words)


def reference_captions(scene: tuple[Shape, ...], rng: np.random.Generator, count: int = 6) -> list[str]:
    """`count` different captions of one scene."""
    captions: list[str] = []
    while len(captions) < count:
        caption = describe(scene, rng)
        if caption not in captions:
            captions.append(caption)
    return captions


NOUN = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(KINDS)})\b")


def parse_claims(caption: str) -> list[tuple[str, str]]:
    """The sorted claims of a caption, (colour and kind, motion). The motion is "" if none or several are named.

    The words between a shape's name and the next shape's name describe its motion.
    """
    claims = []
    nouns = list(NOUN.finditer(caption))
    for noun, following in zip(nouns, [*nouns[1:], None], strict=False):
        clause = f" {caption[noun.end() : following.start() if following else None]} "
        motions = [m for m, pairs in MOTIONS.items() if any(f" {p} " in clause for pair in pairs for p in pair)]
        claims.append((noun.group(), motions[0] if len(motions) == 1 else ""))
    return sorted(claims)


def attribute_accuracy(references: dict[str, list[str]], captions: dict[str, str]) -> dict[str, float]:
    """Fractions of captions, 0 to 1, with correct attributes.

    `shapes`: exactly the clip's colours and kinds. `motion`: in addition, the right motion for each shape.
    `motion_one`, `motion_two`: `motion` among the clips with one and with two shapes.
    """
    shapes, motion, two = [], [], []
    for key, caption in captions.items():
        expected, claimed = parse_claims(references[key][0]), parse_claims(caption)
        shapes.append([noun for noun, _ in expected] == [noun for noun, _ in claimed])
        motion.append(expected == claimed)
        two.append(len(expected) == 2)
    motion, two = np.array(motion), np.array(two)
    accuracy = {"shapes": float(np.mean(shapes)), "motion": float(np.mean(motion))}
    if two.any() and not two.all():
        accuracy |= {"motion_one": float(motion[~two].mean()), "motion_two": float(motion[two].mean())}
    return accuracy


def perfect_captions(references: dict[str, list[str]], template: int, phrase: int) -> dict[str, str]:
    """Captions that name every shape and motion correctly, all with one template and the same phrase per motion."""
    return {
        key: fill_template(template, [(noun, *MOTIONS[motion][phrase]) for noun, motion in parse_claims(texts[0])])
        for key, texts in references.items()
    }


# ------------------------------------------------------------------------------------------- files


def write_clip(path: Path, frames: np.ndarray) -> None:
    """Encodes uint8 (F, S, S, 3) as MPEG-4 in MP4.

    Not H.264: on frames this small, x264's fast presets do not produce the same bytes twice.
    """
    reformatter = VideoReformatter()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE, options={"qmin": "2", "qmax": "4"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        for i, pixels in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = reformatter.reformat(picture, format="yuv420p", threads=1)
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_clip(index: int, split: str, root: Path, seed: int) -> list[str]:
    """Writes clip `index` of a split and returns its captions. Each clip has its own random stream."""
    rng = np.random.default_rng([seed, ("train", "val", "test").index(split), index])
    scene = draw_scene(rng)
    frames, _ = render(scene, np.linspace(0, 1, FRAMES), rng)
    write_clip(root / split / f"{index:05d}.mp4", frames)
    return reference_captions(scene, rng)


def make_dataset(root: Path, sizes: dict[str, int], seed: int = 0, report=print, workers: int = 0) -> None:
    """Writes `root/SPLIT/*.mp4`, then `captions.json` ({split: {file: [captions]}}).

    `made.json` records seed and sizes, and whether the folder is complete. A complete folder is left unchanged. An
    incomplete one is made again from the start by `workers` processes; 0: one per core. A lock lets only one call
    write; others wait for it. Raises InputError if the folder has another seed or other sizes, or contains something
    else.
    """
    settings = {"seed": seed, "sizes": sizes}
    if _is_complete(root, settings):
        return
    root.mkdir(parents=True, exist_ok=True)
    lock = acquire_lock(root / ".lock", wait=True)
    try:
        if not _is_complete(root, settings):  # another process may have made it in the meantime
            _write_dataset(root, settings, report, workers or os.cpu_count() or 1)
    finally:
        os.close(lock)


def _is_complete(root: Path, settings: dict) -> bool:
    """Whether the folder contains these clips. Raises InputError if it contains anything else. Ignores hidden files."""
    made = root / "made.json"  # the first file to be written that is not hidden
    if root.exists() and any(not path.name.startswith(".") for path in root.iterdir()) and not made.exists():
        raise InputError(f"{root}: contains something other than shapes; give an empty or new folder")
    found = read_json(made) if made.exists() else {}
    if found.get("whole") and found != settings | {"whole": True}:
        expected = f"{settings['sizes']} of seed {settings['seed']}"
        raise InputError(f"{root}: contains {found.get('sizes')} clips of seed {found.get('seed')}, not {expected}; "
                         "give another folder, or train with its --shapes-sizes and --shapes-seed")  # fmt: skip
    return bool(found.get("whole"))


def _write_dataset(root: Path, settings: dict, report, workers: int) -> None:
    _write_json(root / "made.json", settings | {"whole": False})
    captions = {}
    with worker_pool(workers) as pool:
        for split, count in settings["sizes"].items():
            (root / split).mkdir(exist_ok=True)
            job = partial(make_clip, split=split, root=root, seed=settings["seed"])
            captions[split] = {}
            for i, references in enumerate(pool.map(job, range(count), chunksize=32)):
                captions[split][f"{split}/{i:05d}.mp4"] = references
                if (i + 1) % 1000 == 0 or i + 1 == count:
                    report(f"shapes: {split} clip {i + 1}/{count} written")
    _write_json(root / "captions.json", captions)
    _write_json(root / "made.json", settings | {"whole": True})


def _write_json(path: Path, content: dict) -> None:
    with replace_atomically(path) as file:
        file.write(json.dumps(content, indent=1).encode())
