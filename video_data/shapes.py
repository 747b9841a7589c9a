"""The embedded dataset `shapes`: scenes, their pixels, their captions, and the claims of a caption.

A clip shows one or two coloured shapes on a varied background for 2 seconds. Each shape moves left, right, up or down,
grows, shrinks, blinks, spins or stays still, independently. The clips are ordinary MPEG-4 files [1], which are read
like any other video. A single frame shows colour, kind and place, but does not tell a motion from its opposite or from
staying still: place, size and angle at mid-clip have the same distribution for all motions.

`python -m video_data.shapes FOLDER` makes a folder of clips. It is complete when captions.json is there, which is
written last: {split: {file: [caption, ...]}}.

Shapes: F frames per clip, S side of a frame in pixels, N shapes.

References
[1] MPEG-4 in an MP4 container through PyAV, https://pyav.org/docs/stable/
[2] Signed distances of simple polygons, https://iquilezles.org/articles/distfunctions2d/
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from common import cli
from common.errors import InputError
from common.files import acquire_lock, write_json
from video_data.annotations import SPLITS
from video_data.batches import run_in_processes

SIDE, FRAMES, RATE = 64, 16, 8  # pixels, frames per clip, frames per second
DEFAULT_SIZES = (9000, 200, 500)  # clips for training, validation, test

COLOURS = {"red": (215, 40, 40), "green": (40, 170, 60), "blue": (50, 90, 225), "yellow": (240, 220, 50),
           "orange": (245, 135, 25), "purple": (140, 55, 185), "white": (242, 242, 242), "pink": (250, 150, 195)}
GREY = (128, 128, 128)  # of a shape that no caption names
KINDS = ("circle", "square", "triangle", "cross", "ring")
SYMMETRY = {"square": 4, "triangle": 3, "cross": 4}  # a rotation by 360/n degrees maps the shape onto itself

# motion -> phrases for it, each (finite verb, participle)
MOTIONS = {
    "left": "moves left/moving left, slides to the left/sliding to the left, drifts leftward/drifting leftward",
    "right": "moves right/moving right, slides to the right/sliding to the right, drifts rightward/drifting rightward",
    "up": "moves up/moving up, rises/rising, drifts upward/drifting upward",
    "down": "moves down/moving down, sinks/sinking, drifts downward/drifting downward",
    "grow": "grows/growing, gets bigger/getting bigger, becomes larger/becoming larger",
    "shrink": "shrinks/shrinking, gets smaller/getting smaller, becomes tiny/becoming tiny",
    "blink": "blinks/blinking, flashes on and off/flashing on and off, comes and goes/coming and going",
    "spin": "spins/spinning, turns around/turning around, rotates/rotating",
    "still": "stays still/staying still, does not move/not moving, rests in place/resting in place",
}
MOTIONS = {motion: [phrase.split("/") for phrase in phrases.split(", ")] for motion, phrases in MOTIONS.items()}
REVERSED = {"left": "right", "right": "left", "up": "down", "down": "up", "grow": "shrink", "shrink": "grow"}
# The range of a motion's speed, see Shape. Spinning goes either way, standing still has none.
SPEEDS = dict.fromkeys(("left", "right", "up", "down"), (12, 28))
SPEEDS |= {"grow": (0.6, 1.1), "shrink": (0.6, 1.1), "blink": (1.5, 4)}

# Captions of one and of two shapes: nouns n, m; finite verbs f, g; participles p, q.
ONE_SHAPE = "a {n} {f}, a {n} is {p}, there is a {n} that {f}, the {n} {f}, one {n} {p}, we see a {n} that is {p}"
TWO_SHAPES = ("a {n} {f} and a {m} {g}, a {n} is {p} and a {m} is {q}, a {n} {f} while a {m} {g}, "
              "there is a {n} that {f} and a {m} that {g}, the {n} {f} and the {m} {g}, one {n} {p} and one {m} {q}")


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
        change = dict.fromkeys(MOTIONS, np.zeros_like(u)) | {self.motion: (u - 0.5) * self.speed}
        x, y = self.x + change["right"] - change["left"], self.y + change["down"] - change["up"]
        radius = self.radius * np.exp(change["grow"] - change["shrink"])
        angle = self.angle + change["spin"]
        visible = (u * self.speed + self.phase) % 1 < 0.5 if self.motion == "blink" else np.ones_like(u)
        return x, y, radius, angle, visible


def draw_shape(rng: np.random.Generator) -> Shape:
    """A random shape. Place and size at mid-clip do not depend on the motion, so a single frame cannot reveal it.
    As a consequence, some shapes leave the frame in part."""
    motion = str(rng.choice(list(MOTIONS)))
    kinds = [k for k in KINDS if motion != "spin" or k in SYMMETRY]  # a spinning circle looks still
    speeds = {name: rng.uniform(*limits) for name, limits in SPEEDS.items()} | {"still": 0.0}
    speeds["spin"] = float(rng.choice([-1, 1]) * rng.uniform(2, 6))
    colour, kind = str(rng.choice(list(COLOURS))), str(rng.choice(kinds))
    x, y, radius = rng.uniform(16, SIDE - 16), rng.uniform(16, SIDE - 16), rng.uniform(8, 12)
    angle, phase = rng.uniform(0, 2 * math.pi), rng.uniform(0, 1)
    return Shape(colour, kind, motion, x, y, radius, angle, speeds[motion], phase)


def draw_scene(rng: np.random.Generator) -> tuple[Shape, ...]:
    """One or two shapes with equal probability. Two differ in colour or kind and are well apart at mid-clip."""
    first = draw_shape(rng)
    if rng.random() < 0.5:
        return (first,)
    while True:
        second = draw_shape(rng)
        same = (second.colour, second.kind) == (first.colour, first.kind)
        if not same and math.hypot(second.x - first.x, second.y - first.y) >= 20:
            return (first, second)


# ------------------------------------------------------------------------------------------ pixels


# Signed distance from a shape of radius r at the origin, in pixels [2].
DISTANCES = {
    "circle": lambda x, y, r: np.hypot(x, y) - 0.9 * r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.8 * r,
    "triangle": lambda x, y, r: np.maximum.reduce([x * math.cos(a) + y * math.sin(a) for a in NORMALS]) - r / 2,
    "cross": lambda x, y, r: np.minimum(np.maximum(abs(x) - r, abs(y) - r / 3), np.maximum(abs(y) - r, abs(x) - r / 3)),
    "ring": lambda x, y, r: abs(np.hypot(x, y) - 0.75 * r) - 0.2 * r,
}
NORMALS = (math.pi / 2, math.pi * 7 / 6, -math.pi / 6)  # of the triangle's sides


def coverage(kind: str, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """The fraction of each pixel that a shape covers."""
    return np.clip(0.5 - DISTANCES[kind](x, y, r), 0, 1)


# Camera noise is a random slice of this: drawing it for each clip would take half of the time.
NOISE = np.random.default_rng(0).standard_normal(2**20, np.float32)


def draw_background(rng: np.random.Generator) -> np.ndarray:
    """A plain, graded, striped, checked or blocky background in a dull colour, float32 (S, S, 3)."""
    grid = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    direction = rng.uniform(0, 2 * math.pi)
    ramp = grid[0] * math.cos(direction) + grid[1] * math.sin(direction)
    patterns = (
        lambda: np.zeros((SIDE, SIDE)),
        lambda: ramp / SIDE,
        lambda: np.sin(ramp * rng.uniform(0.3, 0.9)) * 0.5,
        lambda: np.add(*(grid // rng.integers(6, 14))) % 2 - 0.5,
        lambda: np.kron(rng.uniform(-0.5, 0.5, (8, 8)), np.ones((8, 8))),
    )
    pattern = patterns[rng.integers(5)]()
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
        colour = np.array(COLOURS.get(shape.colour, GREY), np.float32) + rng.uniform(-12, 12, 3).astype(np.float32)
        frames += mask[..., None] * (colour - frames)
    amplitude, start = rng.uniform(0, 7), rng.integers(len(NOISE) - frames.size)
    frames += amplitude * NOISE[start : start + frames.size].reshape(frames.shape)
    return np.clip(frames, 0, 255).astype(np.uint8), masks


# ---------------------------------------------------------------------------------------- captions


def describe(scene: tuple[Shape, ...], rng: np.random.Generator) -> str:
    """One caption with random wording and a random order of the shapes."""
    words = []  # noun, finite verb, participle
    for shape in (scene[i] for i in rng.permutation(len(scene))):
        phrases = MOTIONS[shape.motion]
        words.append((f"{shape.colour} {shape.kind}", *phrases[rng.integers(len(phrases))]))
    (n, f, p), (m, g, q) = words[0], words[-1]
    templates = (ONE_SHAPE if len(scene) == 1 else TWO_SHAPES).split(", ")
    text = templates[rng.integers(len(templates))].format(n=n, f=f, p=p, m=m, g=g, q=q)
    return text.replace("a orange", "an orange")


def reference_captions(scene: tuple[Shape, ...], rng: np.random.Generator, count: int = 6) -> list[str]:
    """`count` different captions of one scene."""
    captions: dict[str, None] = {}
    while len(captions) < count:
        captions[describe(scene, rng)] = None
    return list(captions)


def parse_claims(caption: str) -> list[tuple[str, str]]:
    """The sorted claims of a caption, (colour and kind, motion). The motion is "" if none or several are named.

    The words between a shape's name and the next shape's name describe its motion.
    """
    parts = re.split(rf"\b((?:{'|'.join(COLOURS)}) (?:{'|'.join(KINDS)}))\b", caption)
    claims = []
    for noun, clause in zip(parts[1::2], parts[2::2], strict=True):
        motions = [m for m, pairs in MOTIONS.items() if any(f" {p} " in f"{clause} " for pair in pairs for p in pair)]
        claims.append((noun, motions[0] if len(motions) == 1 else ""))
    return sorted(claims)


def attribute_accuracy(references: dict[str, list[str]], captions: dict[str, str],
                       is_reversed: bool = False) -> dict[str, float]:
    """Fractions of captions, 0 to 1, with correct attributes; of clips that were shown backwards, if is_reversed.

    `shapes`: exactly the clip's colours and kinds. `motion`: in addition, the right motion for each shape.
    `motion_one`, `motion_two`: `motion` among the clips with one and with two shapes.
    """
    rows = []
    for key, caption in captions.items():
        expected, claimed = parse_claims(references[key][0]), parse_claims(caption)
        if is_reversed:
            expected = sorted((noun, REVERSED.get(motion, motion)) for noun, motion in expected)
        same_nouns = [noun for noun, _ in expected] == [noun for noun, _ in claimed]
        rows.append((same_nouns, expected == claimed, len(expected) == 2))
    shapes, motion, two = np.array(rows).T
    accuracy = {"shapes": float(shapes.mean()), "motion": float(motion.mean())}
    if two.any() and not two.all():
        accuracy |= {"motion_one": float(motion[~two].mean()), "motion_two": float(motion[two].mean())}
    return accuracy


# ------------------------------------------------------------------------------------------- files


def write_clip(path: Path, frames: np.ndarray) -> None:
    """Encodes uint8 (F, S, S, 3) as MPEG-4 in MP4.

    Not H.264: on frames this small, x264's fast presets do not produce the same bytes twice.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE, options={"qmin": "2", "qmax": "4"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def draw_clip(path: Path, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Frames, masks (see `render`) and captions of the clip ROOT/SPLIT/INDEX.mp4 of a seed. Each clip has its own
    random stream."""
    rng = np.random.default_rng([seed, SPLITS.index(path.parent.name), int(path.stem)])
    scene = draw_scene(rng)
    return *render(scene, np.linspace(0, 1, FRAMES), rng), reference_captions(scene, rng)


def make_clip(path: Path, seed: int, draw: Callable[[Path, int], tuple]) -> list[str]:
    """Writes a clip; returns its captions. draw: see `draw_clip`; frames come first, captions last."""
    frames, *_, captions = draw(path, seed)
    write_clip(path, frames)
    return captions


def make_dataset(root: Path, sizes: Sequence[int] = DEFAULT_SIZES, seed: int = 0,
                 draw: Callable[[Path, int], tuple] = draw_clip) -> None:
    """Makes a folder of clips, `sizes` in its splits. One that is complete stays as it is.

    A lock lets only one call write; others wait for it. Raises InputError if the folder contains something else.
    """
    if (root / "captions.json").exists():
        return
    if root.is_file():
        raise InputError(f"{root}: expected a folder for the clips, found a file")
    root.mkdir(parents=True, exist_ok=True)
    ours = "captions.json", *SPLITS  # the first of another process, which has just ended
    if any(path.name not in ours and not path.name.startswith(".") for path in root.iterdir()):
        raise InputError(f"{root}: contains something other than shapes; give an empty or new folder")
    with open(acquire_lock(root / ".lock", wait=True), "w"):
        if (root / "captions.json").exists():
            return
        content = {}
        for split, size in zip(SPLITS, sizes, strict=True):
            (root / split).mkdir(exist_ok=True)
            names = [f"{split}/{i:05d}.mp4" for i in range(size)]
            captions = run_in_processes(f"shapes: {split}", make_clip, [(root / name, seed, draw) for name in names])
            content[split] = dict(zip(names, captions, strict=True))
        write_json(root / "captions.json", content)


def main() -> None:
    parser = cli.Parser("Makes clips of moving shapes.",
                        "python -m video_data.shapes FOLDER --sizes 9000 200 500 --seed 0")
    parser.add_argument("folder", type=cli.path, help="where the clips go, a new or empty folder")
    size = cli.number(int, 1, 10**6)
    parser.add_argument("--sizes", type=size, nargs=3, default=DEFAULT_SIZES, help="clips to train, validate, test on")
    parser.add_argument("--seed", type=cli.number(int, 0), default=0, help="of the scenes")
    args = parser.parse_args()
    make_dataset(args.folder, args.sizes, args.seed)


if __name__ == "__main__":
    cli.run(main)
