"""Harder clips of `shapes`, in which a gate or a deeper read could help. `python -m study TABLE` makes them.

    distractors  0 to 8 grey shapes move, too, behind the others. No caption names them
    sparse       4 seconds, in which the shapes move for half a second: in 4 of the 31 steps from frame to frame

Captions and folders are like those of `video_data/shapes.py`: `train.py --dataset shapes --data FOLDER` trains on them.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from video_data import shapes
from video_data.annotations import SPLITS

MOST_DISTRACTORS = 8
SPARSE_FRAMES, MOVING_STEPS = 32, 4  # of a sparse clip, and in how many of its steps the shapes move


def draw_distracted(path: Path, seed: int) -> tuple:
    """Frames, masks of all shapes, the scene that captions name, the grey shapes behind it, and the captions."""
    rng = np.random.default_rng([seed, SPLITS.index(path.parent.name), int(path.stem), 2])
    scene = shapes.draw_scene(rng)
    others = tuple(replace(shapes.draw_shape(rng), colour="grey") for _ in range(rng.integers(MOST_DISTRACTORS + 1)))
    frames, masks = shapes.render(others + scene, np.linspace(0, 1, shapes.FRAMES), rng)
    return frames, masks, scene, others, shapes.reference_captions(scene, rng)


def draw_sparse(path: Path, seed: int) -> tuple:
    """Frames, the scene, the number of the frame after which it moves, and the captions."""
    rng = np.random.default_rng([seed, SPLITS.index(path.parent.name), int(path.stem), 3])
    scene = tuple(replace(shape, speed=2.0, phase=0.0) if shape.motion == "blink" else shape  # seen while it rests
                  for shape in shapes.draw_scene(rng))
    start = int(rng.integers(SPARSE_FRAMES - MOVING_STEPS))
    u = np.clip((np.arange(SPARSE_FRAMES) - start) / MOVING_STEPS, 0, 1)  # (F,)
    return shapes.render(scene, u, rng)[0], scene, start, shapes.reference_captions(scene, rng)


KINDS = {"usual": shapes.draw_clip, "distractors": draw_distracted, "sparse": draw_sparse}
