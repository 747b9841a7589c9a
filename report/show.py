"""One picture of a clip: its frames, what the queries read after each adapted block, and the caption.

Letters: T frames, S side in pixels, L adapted blocks, N queries, H height of a row.
"""

import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import encode_png
from torchvision.utils import draw_bounding_boxes

from common.files import replace_atomically
from report.inside import Inside
from report.strips import shown_frames, side_by_side

HEIGHT, LINE, LETTER, MARGIN = 160, 32, 12, 12  # pixels: H, a line of text, a wide letter, margins
DARK = 0.15  # how bright that is which is not read


def draw_text(words: str, width: int) -> Tensor:
    """Text, black on white (3, lines * LINE, width). torchvision writes labels of boxes; these boxes have no size."""
    pictures = []
    for line in textwrap.wrap(words, width // LETTER) or [""]:
        picture = torch.full((3, LINE // 2, width // 2), 255, dtype=torch.uint8)  # its letters are small
        corner = torch.zeros(1, 4)
        picture = draw_bounding_boxes(picture, corner, [line], colors="white", label_colors="black")
        pictures.append(F.interpolate(picture[None].float(), (LINE, width), mode="bilinear")[0].to(torch.uint8))
    return torch.cat(pictures, dim=1)


def light(inside: Inside) -> Tensor:
    """How brightly each patch is shown (L, T, side, side), DARK to 1: what all queries read of it, by their gates."""
    attention = torch.from_numpy(inside.patches()[0])  # (L, N, T, side, side)
    if inside.gates is not None:
        attention = attention * torch.from_numpy(inside.gates[0])[..., None, None, None]
    read = attention.sum(1)  # (L, T, side, side)
    return DARK + (1 - DARK) * read / read.amax((1, 2, 3), keepdim=True).clamp(min=1e-12)


def draw_clip(frames: Tensor, caption: str, inside: Inside | None, first_block: int) -> Tensor:
    """Frames uint8 (T, 3, S, S) and what `look_inside` found of this clip alone -> a picture uint8 (3, *, *)."""
    shown = shown_frames(len(frames))
    frames, width = frames[shown], HEIGHT * len(shown)
    parts = [side_by_side(frames, HEIGHT), draw_text(caption, width)]  # (3, H, W), (3, lines * LINE, W)
    for i, row in enumerate(light(inside) if inside is not None else ()):
        bright = F.interpolate(row[shown, None], frames.shape[-2:], mode="nearest")  # (T, 1, S, S)
        gate = "" if inside.gates is None else f", mean gate {inside.gates[0, i].mean():.2f}"
        parts += [side_by_side(frames * bright, HEIGHT),
                  draw_text(f"read after block {first_block + i}{gate}", width)]  # fmt: skip
    return F.pad(torch.cat(parts, dim=1), (MARGIN,) * 4, value=255)


def write_picture(path: Path, picture: Tensor) -> None:
    """Writes a picture uint8 (3, height, width) as PNG. Raises InputError if the disk refuses."""
    with replace_atomically(path) as file:
        file.write(encode_png(picture).numpy().tobytes())
