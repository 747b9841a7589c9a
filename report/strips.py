"""Frames as pictures inside a page: one JPEG for the frames of a clip, side by side.

Letters: T frames, S side in pixels, H height of the strip.
"""

import base64

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import encode_jpeg

HEIGHT, QUALITY = 96, 75  # of a strip: pixels at most, JPEG's 1 to 100
MAX_FRAMES = 64  # a JPEG is at most 65,500 pixels wide


def side_by_side(frames: Tensor, height: int) -> Tensor:
    """Frames (T, 3, S, S) with values from 0 to 255 -> one picture uint8 (3, H, T * H)."""
    if frames.shape[-1] != height:
        frames = F.interpolate(frames.float(), (height, height), mode="bilinear", antialias=True)  # (T, 3, H, H)
    return torch.cat(list(frames.round().clamp(0, 255).to(torch.uint8)), dim=2)  # (3, H, T * H)


def shown_frames(count: int) -> list[int]:
    """Indices of the frames that a strip of `count` frames shows: MAX_FRAMES from the first to the last, or all."""
    return torch.linspace(0, count - 1, min(count, MAX_FRAMES)).round().long().tolist()


def film_strip(frames: Tensor) -> Tensor:
    """Frames uint8 (T, 3, S, S) -> one picture uint8 (3, H, T * H) of those that are shown, never enlarged."""
    return side_by_side(frames[shown_frames(len(frames))], min(HEIGHT, frames.shape[-1]))


def jpeg_uri(picture: Tensor) -> str:
    """A picture uint8 (3, H, W) -> "data:image/jpeg;base64,..."."""
    data = encode_jpeg(picture.cpu().contiguous(), QUALITY).numpy().tobytes()
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
