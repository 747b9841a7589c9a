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


def film_strip(frames: Tensor) -> Tensor:
    """Frames uint8 (T, 3, S, S) -> one picture uint8 (3, H, T * H), never enlarged; of many frames, MAX_FRAMES."""
    if len(frames) > MAX_FRAMES:
        frames = frames[torch.linspace(0, len(frames) - 1, MAX_FRAMES).round().long()]
    return side_by_side(frames, min(HEIGHT, frames.shape[-1]))


def jpeg_uri(picture: Tensor) -> str:
    """A picture uint8 (3, H, W) -> "data:image/jpeg;base64,..."."""
    data = encode_jpeg(picture.cpu().contiguous(), QUALITY).numpy().tobytes()
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
