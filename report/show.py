"""Pictures of a clip: a strip of its frames for a page, and one PNG of its frames, what the queries read of them after
each adapted block, and the caption.

Shapes: T frames, S side in pixels, H height of a row, J adapted blocks, N queries.
"""

import base64
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import encode_jpeg, encode_png
from torchvision.utils import draw_bounding_boxes

from common.files import replace_atomically
from report.attention import AttentionMaps, record_attention

MAX_FRAMES = 64  # that are shown: a JPEG has at most 65,500 pixels in a row
STRIP_HEIGHT, QUALITY = 96, 75  # of a page's strip: pixels at most, JPEG's 1 to 100
HEIGHT, LINE, LETTER, MARGIN = 160, 32, 12, 12  # of the PNG, in pixels: H, a line of text, a wide letter, margins
FADED = 0.25  # opacity of a patch that is not read, over white


def shown_frames(count: int) -> list[int]:
    """Indices of the frames of `count` that are shown: MAX_FRAMES from the first to the last, or all."""
    return torch.linspace(0, count - 1, min(count, MAX_FRAMES)).round().long().tolist()


def side_by_side(frames: Tensor, height: int) -> Tensor:
    """Frames (T, 3, S, any) with values from 0 to 255 -> one picture uint8 (3, H, any)."""
    if frames.shape[-2] != height:
        size = height, round(height * frames.shape[-1] / frames.shape[-2])
        frames = F.interpolate(frames.float(), size, mode="bilinear", antialias=True)  # (T, 3, H, any)
    return torch.cat(list(frames.round().clamp(0, 255).to(torch.uint8)), dim=2)  # (3, H, any)


def film_strip(frames: Tensor) -> str:
    """Frames uint8 (T, 3, S, S) -> "data:image/jpeg;base64,...": those that are shown, side by side, not enlarged."""
    picture = side_by_side(frames[shown_frames(len(frames))], min(STRIP_HEIGHT, frames.shape[-2]))
    return f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(picture.cpu(), QUALITY).numpy()).decode()}"


def draw_text(words: str, width: int) -> Tensor:
    """Text, black on white (3, lines * LINE, width). torchvision writes labels of boxes; these boxes have no size."""
    pictures = []
    for line in textwrap.wrap(words, width // LETTER) or [""]:
        picture = torch.full((3, LINE // 2, width // 2), 255, dtype=torch.uint8)  # its letters are small
        picture = draw_bounding_boxes(picture, torch.zeros(1, 4), [line], colors="white", label_colors="black")
        pictures.append(F.interpolate(picture[None].float(), (LINE, width), mode="bilinear")[0].to(torch.uint8))
    return torch.cat(pictures, dim=1)


def opacity(maps: AttentionMaps) -> Tensor:
    """How opaque each patch is drawn (J, T, rows, columns), FADED to 1: what all queries read of it, by their gates."""
    read = (maps.gates[:, 0, :, None, None, None] * maps.patches()).sum(1)  # (J, T, rows, columns)
    return FADED + (1 - FADED) * read / read.amax((1, 2, 3), keepdim=True).clamp(min=1e-12)


def draw_clip(frames: Tensor, caption: str, maps: AttentionMaps | None, first_block: int) -> Tensor:
    """Frames uint8 (T, 3, S, S), and what was read of this clip -> a picture uint8 (3, *, *). first_block: the number
    of the first adapted block."""
    shown = shown_frames(len(frames))
    frames = frames[shown]
    strip = side_by_side(frames, HEIGHT)  # (3, H, W)
    width = strip.shape[-1]
    parts = [strip, draw_text(caption, width)]  # (3, H, W), (3, lines * LINE, W)
    for i, row in enumerate(opacity(maps) if maps is not None else ()):
        opaque = F.interpolate(row[shown, None], frames.shape[-2:], mode="nearest")  # (T, 1, S, any)
        label = f"read after block {first_block + i}, mean gate {maps.gates[i, 0].mean():.2f}"
        parts += [side_by_side(frames * opaque + 255 * (1 - opaque), HEIGHT), draw_text(label, width)]
    return F.pad(torch.cat(parts, dim=1), (MARGIN,) * 4, value=255)


def show_video(path: Path, captioner, caption: str, frames: Tensor) -> None:
    """Writes one PNG of a video's frames uint8 (T, 3, S, S), what was read of them, and the caption."""
    picture = draw_clip(frames, caption, record_attention(captioner, frames[None]), captioner.first_block + 1)
    with replace_atomically(path) as file:
        file.write(encode_png(picture).numpy().tobytes())
