"""What happens to a frame before a ViT sees it: its size, what is cropped away, its channels' mean and spread.

A public model says so in `preprocessor_config.json`. Four fields of it have changed their spelling over the years:

    "size": 224, {"shortest_edge": 224} or {"height": 224, "width": 224}
    "crop_size": 224 or {"height": 224, "width": 224}
    "resample": 2 or 3, as PIL counts: bilinear, bicubic
    "do_...": left out where the model's kind does so anyway

Letters: S side in pixels of what the ViT is fed.

References
[1] transformers, image_processing_backends.py: what each field does; models/{clip,siglip,bit}/image_processing_*.py:
    what holds where a field is left out (DINOv2 uses BiT's).
[2] torchvision, transforms/_presets.py, ImageClassification, and models/vision_transformer.py.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from weights import InputError, field, read_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pixels, in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
MOST = 2**14  # pixels a side


@dataclass(frozen=True)
class Pixels:
    """Sides in pixels; mean and spread of the channels red, green, blue in [0, 1]."""

    size: int  # S
    resize: int  # the shortest side before the crop to S x S at its centre; S when nothing is cropped of a square
    squash: bool = False  # both sides become `resize`, whatever the aspect was
    interpolation: str = "bicubic"  # or "bilinear"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def scaled(self, size: int) -> "Pixels":
        """The same view of the frame, S x S with another S."""
        return replace(self, size=size, resize=round(self.resize * size / self.size))


def read_pixels(path: Path, default: Pixels) -> Pixels:
    """`preprocessor_config.json` -> Pixels; what it leaves out is `default`'s. Raises InputError."""
    config = read_json(path)
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not field(config, name, bool, path, True):
            raise InputError(f"{path}: {name} is false, expected true: frames come in every size, in bytes")
    if abs(255 * (scale := field(config, "rescale_factor", float, path, 1 / 255)) - 1) > 1e-6:
        raise InputError(f"{path}: rescale_factor is {scale}, expected 1/255")
    filters = {2: "bilinear", 3: "bicubic"}
    number = field(config, "resample", int, path, 2 if default.interpolation == "bilinear" else 3)
    if number not in filters:
        raise InputError(f"{path}: resample is {number}, expected 2 (bilinear) or 3 (bicubic)")

    resize, squash = default.resize, default.squash
    if config.get("size") is not None:
        resize, squash = _side(config, "size", path)
    size = resize
    if field(config, "do_center_crop", bool, path, not default.squash):
        size = default.size
        if config.get("crop_size") is not None:
            size, _ = _side(config, "crop_size", path)
    elif not squash:
        raise InputError(f"{path}: do_center_crop is false, so expected a size of height and width: ViTs take squares")
    if not 1 <= size <= resize <= MOST:
        raise InputError(f"{path}: crop_size is {size}, expected 1 to size, {resize}, and that at most {MOST}")

    mean, std = _channels(config, "image_mean", path, default.mean), _channels(config, "image_std", path, default.std)
    if min(std) <= 0:
        raise InputError(f"{path}: image_std is {list(std)}, expected numbers above 0")
    return Pixels(size, resize, squash, filters[number], mean, std)


def _side(config: dict, name: str, path: Path) -> tuple[int, bool]:
    """-> the side in pixels, and whether it is that of both sides."""
    value = config[name]
    if type(value) is int:
        return value, False
    where = f"{path}: {name}"
    if isinstance(value, dict) and value.get("shortest_edge") is not None:
        return field(value, "shortest_edge", int, where), False
    if not isinstance(value, dict) or "height" not in value:
        raise InputError(f"{where}: expected a whole number, shortest_edge, or height and width, found {value!r:.200}")
    height, width = field(value, "height", int, where), field(value, "width", int, where)
    if height != width:
        raise InputError(f"{where}: height is {height} and width is {width}, expected a square")
    return height, True


def _channels(config: dict, name: str, path: Path, default: tuple) -> tuple[float, ...]:
    value = field(config, name, list, path, list(default))
    if len(value) != 3 or not all(type(x) in (int, float) and math.isfinite(x) for x in value):
        raise InputError(f"{path}: field {name!r}: expected three numbers, found {value!r:.200}")
    return tuple(value)
