"""The embedded dataset `shapes`: scenes, their pixels, their captions, and what a caption claims.

`python shapes.py` prints what captions without a mistake score on its test split, for comparison.

A clip is 2 seconds of one or two coloured shapes on a varied background. Each shape moves left, right,
up or down, grows, shrinks, blinks, spins or stays still, on its own. The clips are ordinary
MPEG-4 files, read afterwards like anybody's video. A still tells colour, kind and place, but not a motion
from its opposite nor from staying still: place, size and angle at mid-clip are drawn alike for all of them.

Letters: F frames a clip, S side of a frame in pixels, 3 colour channels.

References
[1] MPEG-4 in an MP4 container through PyAV (https://pyav.org/docs/stable/).
[2] Signed distances of simple polygons: https://iquilezles.org/articles/distfunctions2d/
"""

import json
import math
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

import cli
import metrics
from weights import InputError, field, read_json, replace_atomically

SIDE, FRAMES, RATE = 64, 16, 8  # pixels, frames a clip, frames a second

COLOURS = {
    "red": (215, 40, 40), "green": (40, 170, 60), "blue": (50, 90, 225), "yellow": (240, 220, 50),
    "orange": (245, 135, 25), "purple": (140, 55, 185), "white": (242, 242, 242), "pink": (250, 150, 195),
}  # fmt: skip
KINDS = ("circle", "square", "triangle", "cross", "ring")
SYMMETRY = {"square": 4, "triangle": 3, "cross": 4}  # a turn by 360/n degrees shows nothing

# motion -> what people write, as (finite verb, participle)
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

ONE = ("a {n} {f}", "a {n} is {p}", "there is a {n} that {f}", "the {n} {f}", "one {n} {p}",
       "we see a {n} that is {p}")  # fmt: skip
TWO = ("a {n} {f} and a {m} {g}", "a {n} is {p} and a {m} is {q}", "a {n} {f} while a {m} {g}",
       "there is a {n} that {f} and a {m} that {g}", "the {n} {f} and the {m} {g}",
       "one {n} {p} and one {m} {q}")  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One shape of a scene. Lengths in pixels, angles in radians, `speed` in the motion's own unit."""

    colour: str
    kind: str
    motion: str
    x: float  # centre at mid-clip
    y: float
    radius: float  # geometric mean over the clip
    angle: float
    speed: float  # pixels, log-scale, radians over the whole clip; for blinking, cycles a clip
    phase: float  # where in its cycle a blink starts

    def at(self, u: np.ndarray) -> tuple[np.ndarray, ...]:
        """Centre x, y, radius, angle and visibility at times u in [0, 1], each of u's shape."""
        d = (u - 0.5) * self.speed
        still = np.zeros_like(u)
        x = self.x + {"left": -d, "right": d}.get(self.motion, still)
        y = self.y + {"up": -d, "down": d}.get(self.motion, still)
        radius = self.radius * np.exp({"grow": d, "shrink": -d}.get(self.motion, still))
        angle = self.angle + (d if self.motion == "spin" else still)
        visible = np.ones_like(u)
        if self.motion == "blink":
            visible = ((u * self.speed + self.phase) % 1 < 0.5).astype(u.dtype)
        return x, y, radius, angle, visible


def draw_shape(rng: np.random.Generator) -> Shape:
    """A random shape. Place and size at mid-clip do not depend on the motion, so they cannot betray it;
    the price is that some shapes leave the frame in part."""
    motion = str(rng.choice(list(MOTIONS)))
    kinds = [k for k in KINDS if motion != "spin" or k in SYMMETRY]  # a turning circle shows nothing
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
    """One or two shapes (equally likely); two differ in colour or kind and are well apart at mid-clip."""
    shapes = [draw_shape(rng)]
    if rng.random() < 0.5:
        return tuple(shapes)
    while True:
        other = draw_shape(rng)
        same = (other.colour, other.kind) == (shapes[0].colour, shapes[0].kind)
        near = math.hypot(other.x - shapes[0].x, other.y - shapes[0].y) < 20
        if not same and not near:
            return (shapes[0], other)


# ------------------------------------------------------------------------------------------ pixels


def coverage(kind: str, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """How much of each pixel a shape covers, 0..1, from its signed distance in pixels [2]."""
    if kind == "circle":
        distance = np.hypot(x, y) - 0.9 * r
    elif kind == "square":
        distance = np.maximum(abs(x), abs(y)) - 0.8 * r
    elif kind == "cross":
        across = np.maximum(abs(x) - r, abs(y) - r / 3)
        along = np.maximum(abs(x) - r / 3, abs(y) - r)
        distance = np.minimum(across, along)
    elif kind == "triangle":
        sides = [x * math.cos(a) + y * math.sin(a) for a in (math.pi / 2, math.pi * 7 / 6, -math.pi / 6)]
        distance = np.maximum.reduce(sides) - r / 2
    else:  # ring
        distance = abs(np.hypot(x, y) - 0.75 * r) - 0.2 * r
    return np.clip(0.5 - distance, 0, 1)


# Camera noise is cut out of one long strip of it: drawing it anew would take half of the time.
GRAIN = np.random.default_rng(0).standard_normal(2**20, np.float32)


def draw_background(rng: np.random.Generator) -> np.ndarray:
    """A plain, graded, striped, checked or cloudy ground in a dull colour, float32 (S, S, 3)."""
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

    Returns the frames, uint8 (F, S, S, 3), and how much of each pixel each shape covers in them where
    no later shape hides it, float32 (shapes, F, S, S).
    """
    rows, columns = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5
    frames = np.broadcast_to(draw_background(rng), (len(u), SIDE, SIDE, 3)).copy()
    covers = np.zeros((len(scene), len(u), SIDE, SIDE), np.float32)
    for i, shape in enumerate(scene):
        cx, cy, r, a, visible = (v.astype(np.float32)[:, None, None] for v in shape.at(u))
        dx, dy = columns - cx, rows - cy  # (F, S, S)
        x, y = dx * np.cos(a) + dy * np.sin(a), dy * np.cos(a) - dx * np.sin(a)
        cover = coverage(shape.kind, x, y, r) * visible
        covers[:i] *= 1 - cover
        covers[i] = cover
        colour = np.array(COLOURS[shape.colour], np.float32) + rng.uniform(-12, 12, 3).astype(np.float32)
        frames += cover[..., None] * (colour - frames)
    frames += rng.uniform(0, 7) * GRAIN[rng.integers(len(GRAIN) - frames.size) :][: frames.size].reshape(frames.shape)
    return np.clip(frames, 0, 255).astype(np.uint8), covers


# ---------------------------------------------------------------------------------------- captions


def tell(one: str, two: str, words: list[tuple[str, str, str]]) -> str:
    """A template, `one` or `two`, filled with (noun, finite verb, participle) of each of one or two shapes."""
    (n, f, p), (m, g, q) = words[0], words[-1]
    return (one if len(words) == 1 else two).format(n=n, f=f, p=p, m=m, g=g, q=q).replace("a orange", "an orange")


def describe(scene: tuple[Shape, ...], rng: np.random.Generator) -> str:
    """One caption; which words and which shape comes first are left to chance."""
    words = []
    for shape in (scene[i] for i in rng.permutation(len(scene))):
        phrases = MOTIONS[shape.motion]
        words.append((f"{shape.colour} {shape.kind}", *phrases[rng.integers(len(phrases))]))
    choice = rng.integers(len(ONE))
    return tell(ONE[choice], TWO[choice], words)


def references(scene: tuple[Shape, ...], rng: np.random.Generator, count: int = 6) -> list[str]:
    """`count` differently worded captions of one scene."""
    captions: list[str] = []
    while len(captions) < count:
        caption = describe(scene, rng)
        if caption not in captions:
            captions.append(caption)
    return captions


NOUN = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(KINDS)})\b")


def claims(caption: str) -> list[tuple[str, str]]:
    """What a caption says: sorted (colour and kind, motion), the motion "" where none or two are named.

    The words after a shape's name, up to the next shape's, are taken to tell its motion.
    """
    found = []
    nouns = list(NOUN.finditer(caption))
    for noun, after in zip(nouns, [*nouns[1:], None], strict=False):
        clause = f" {caption[noun.end() : after.start() if after else None]} "
        motions = [m for m, pairs in MOTIONS.items() if any(f" {p} " in clause for pair in pairs for p in pair)]
        found.append((noun.group(), motions[0] if len(motions) == 1 else ""))
    return sorted(found)


def attributes(references: dict[str, list[str]], captions: dict[str, str]) -> dict[str, float]:
    """Shares of captions that name the shapes rightly, the motions rightly, and both, from 0 to 1.

    `shapes`: exactly the clip's colours and kinds. `motion`: exactly the clip's motions, each told of
    the shape that makes it; a caption that names the wrong shapes has no motion right.
    `motion_one`, `motion_two`: the same among clips of one and of two shapes.
    """
    shapes, motion, two = [], [], []
    for key, caption in captions.items():
        truth, said = claims(references[key][0]), claims(caption)
        shapes.append([n for n, _ in truth] == [n for n, _ in said])
        motion.append(truth == said)
        two.append(len(truth) == 2)
    motion, two = np.array(motion), np.array(two)
    share = {"shapes": float(np.mean(shapes)), "motion": float(np.mean(motion))}
    if two.any() and not two.all():
        share |= {"motion_one": float(motion[~two].mean()), "motion_two": float(motion[two].mean())}
    return share


# ------------------------------------------------------------------------------------------- files


def write_clip(path: Path, frames: np.ndarray) -> None:
    """Encodes uint8 (F, S, S, 3) as MPEG-4 in MP4.

    Not as H.264: x264's fast presets do not give the same bytes twice on frames this small.
    """
    to_yuv = VideoReformatter()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE, options={"qmin": "2", "qmax": "4"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        for i, picture in enumerate(frames):
            frame = to_yuv.reformat(av.VideoFrame.from_ndarray(picture, format="rgb24"), format="yuv420p", threads=1)
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_clip(index: int, split: str, root: Path, seed: int) -> list[str]:
    """Writes clip `index` of a split and returns its captions; every clip has a random stream of its own."""
    rng = np.random.default_rng([seed, ("train", "val", "test").index(split), index])
    scene = draw_scene(rng)
    frames, _ = render(scene, np.linspace(0, 1, FRAMES), rng)
    path = root / split / f"{index:05d}.mp4"
    beside = path.with_suffix(".part.mp4")
    write_clip(beside, frames)
    os.replace(beside, path)
    return references(scene, rng)


def make(root: Path, sizes: dict[str, int], seed: int = 0, report=print) -> None:
    """Writes `root/SPLIT/*.mp4`, then `captions.json` ({split: {file: [captions]}}).

    `made.json` says which seed and sizes the folder is of, and whether it is whole. A whole one is left
    as it is; raises InputError where it is of another seed or sizes, or `root` holds something else.
    """
    stamp, made = {"seed": seed, "sizes": sizes}, root / "made.json"
    if made.exists():
        found = read_json(made)
        if found == stamp | {"whole": True}:
            return
        if found.get("whole"):
            raise InputError(f"{root}: holds {found.get('sizes')} clips of seed {found.get('seed')}, not {sizes} of "
                             f"{seed}; give another folder or delete this one")  # fmt: skip
    elif root.exists() and any(root.iterdir()):
        raise InputError(f"{root}: holds something else than shapes; give an empty or new folder")
    root.mkdir(parents=True, exist_ok=True)
    with replace_atomically(made) as file:
        file.write(json.dumps(stamp | {"whole": False}).encode())
    captions = {}
    with ProcessPoolExecutor() as pool:
        for split, count in sizes.items():
            (root / split).mkdir(parents=True, exist_ok=True)
            job = partial(make_clip, split=split, root=root, seed=seed)
            told = []
            for i, lines in enumerate(pool.map(job, range(count), chunksize=32), start=1):
                told.append(lines)
                if i % 1000 == 0 or i == count:
                    report(f"shapes: {split} clip {i}/{count} written")
            captions[split] = {f"{split}/{i:05d}.mp4": lines for i, lines in enumerate(told)}
    for path, content in ((root / "captions.json", captions), (made, stamp | {"whole": True})):
        with replace_atomically(path) as file:
            file.write(json.dumps(content, indent=1).encode())


# ------------------------------------------------------------------------------- perfect captions


def true_captions(references: dict[str, list[str]], wording: int, phrase: int) -> dict[str, str]:
    """Captions that tell every shape and motion rightly, all in one of the wordings and of the phrases."""
    return {
        key: tell(ONE[wording], TWO[wording], [(noun, *MOTIONS[motion][phrase]) for noun, motion in claims(texts[0])])
        for key, texts in references.items()
    }


def main() -> None:
    parser = cli.Parser("Scores captions without a mistake on the test split, each time all of them worded alike.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/shapes"), help="where shapes was made")
    path = parser.parse_args().folder / "captions.json"
    references = field(read_json(path), "test", dict, path)
    if not references:
        raise InputError(f"{path}: split 'test' is empty, expected {{file: [caption, ...]}}")
    rows = []
    for wording in range(len(ONE)):
        for phrase in range(3):
            captions = true_captions(references, wording, phrase)
            cider = metrics.score(references, captions, metrics=("CIDEr",)).corpus["CIDEr"]
            rows.append((cider, f"{ONE[wording]} | {TWO[wording]}", MOTIONS["up"][phrase]))
    for cider, wording, verb in sorted(rows, reverse=True):
        print(f"CIDEr {100 * cider:.1f}  {wording}, {' or '.join(verb)}")


if __name__ == "__main__":
    cli.run(main)
