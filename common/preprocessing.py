"""How a frame becomes the input of a ViT: resize, centre crop, normalization of the channels.

Public models describe it in `preprocessor_config.json`. Its fields have several spellings:

    "size": 224, {"shortest_edge": 224} or {"height": 224, "width": 224}
    "crop_size": 224 or {"height": 224, "width": 224}
    "resample": 2 or 3, PIL's numbers for bilinear and bicubic
    "do_...": left out if it is the default of the model's image processor

SmolVLM and Idefics3 resize twice, each time with LANCZOS and with bytes as the result: the longer side to a given
length, then both sides to S. This is read by a function of its own.

Letters: S side of the ViT's input in pixels.

References
[1] transformers, image_processing_backends.py: the meaning of each field; models/{clip,siglip,bit}/
    image_processing_*.py: the defaults (DINOv2 uses BiT's); models/smolvlm/video_processing_smolvlm.py.
[2] torchvision, transforms/_presets.py, ImageClassification, and models/vision_transformer.py.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import InputError
from common.files import bounded, field, read_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of channels red, green, blue in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
MAX_SIDE = 2**14  # pixels
# A file for videos, as transformers 5 and 4 name it. Where there is one, preprocessor_config.json is for images.
VIDEO_PREPROCESSORS = ("video_preprocessor_config.json", "video_processor/preprocessor_config.json")


@dataclass(frozen=True)
class Preprocessing:
    """Sides in pixels; mean and standard deviation of the channels red, green, blue in [0, 1]."""

    size: int  # S
    resize: int  # the shorter side is resized to this, then S x S pixels are cropped at the centre
    squash: bool = False  # both sides are resized to `resize`, which changes the aspect ratio
    interpolation: str = "bicubic"  # bicubic | bilinear | lanczos
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    longest_edge: int | None = None  # before all that, the longer side is resized to this; only with lanczos and squash

    def scaled(self, size: int) -> "Preprocessing":
        """The same crop of the frame at another size S."""
        return replace(self, size=size, resize=round(self.resize * size / self.size))


def read_preprocessing(path: Path, default: Preprocessing) -> Preprocessing:
    """Reads a `preprocessor_config.json`; `default` has the values of missing fields. Raises InputError."""
    config = read_json(path)
    _check_steps(config, path)
    filters = {2: "bilinear", 3: "bicubic"}
    number = field(config, "resample", int, path, 2 if default.interpolation == "bilinear" else 3)
    if number not in filters:
        raise InputError(f"{path}: resample is {number}, expected 2 (bilinear) or 3 (bicubic)")

    resize, squash = default.resize, default.squash
    if config.get("size") is not None:
        resize, squash = _read_side(config, "size", path)
    size = resize
    if field(config, "do_center_crop", bool, path, not default.squash):
        size = default.size
        if config.get("crop_size") is not None:
            size, _ = _read_side(config, "crop_size", path)
    elif not squash:
        raise InputError(f"{path}: do_center_crop is false, so size needs height and width: the ViT's input is square")
    if not 1 <= size <= resize <= MAX_SIDE:
        raise InputError(
            f"{path}: crop_size is {size} and size is {resize}, expected 1 <= crop_size <= size <= {MAX_SIDE}"
        )
    return Preprocessing(size, resize, squash, filters[number], *_read_mean_and_std(config, path, default))


def read_lanczos_preprocessing(path: Path) -> Preprocessing:
    """Reads the `preprocessor_config.json` of SmolVLM or Idefics3, for frames of videos. Raises InputError.

    `video_sampling` says how frames differ from images; the files of older models, which lack it, are about images. A
    frame is never split into parts.
    """
    config = read_json(path)
    _check_steps(config, path)
    if (number := field(config, "resample", int, path, 1)) != 1:
        raise InputError(f"{path}: resample is {number}, expected 1 (LANCZOS)")
    size = _read_longest_edge(config, "max_image_size", str(path))
    sampling = field(config, "video_sampling", dict, path, {})
    if sampling:
        longest_edge = _read_longest_edge(sampling, "video_size", f"{path}: video_sampling")
    else:
        longest_edge = _read_longest_edge(config, "size", str(path))
    half = Preprocessing(size, size, squash=True, interpolation="lanczos", mean=HALF, std=HALF)
    mean, std = _read_mean_and_std(config, path, half)
    return replace(half, mean=mean, std=std, longest_edge=longest_edge)


def _check_steps(config: dict, path: Path) -> None:
    """Frames have any size and bytes as values, so no step can be left out."""
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not field(config, name, bool, path, True):
            raise InputError(f"{path}: {name} is false, expected true: frames have any size and values from 0 to 255")
    if abs(255 * (scale := field(config, "rescale_factor", float, path, 1 / 255)) - 1) > 1e-6:
        raise InputError(f"{path}: rescale_factor is {scale}, expected 1/255")


def _read_longest_edge(config: dict, name: str, where: str) -> int:
    return bounded(field(config, name, dict, where), "longest_edge", int, f"{where}: {name}", 1, 4096)  # as in [1]


def _read_mean_and_std(config: dict, path: Path, default: Preprocessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean = _read_channels(config, "image_mean", path, default.mean)
    std = _read_channels(config, "image_std", path, default.std)
    if min(std) <= 0:
        raise InputError(f"{path}: image_std is {list(std)}, expected numbers above 0")
    return mean, std


def _read_side(config: dict, name: str, path: Path) -> tuple[int, bool]:
    """-> the side in pixels; True if both sides are given, False for the shorter side alone."""
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


def _read_channels(config: dict, name: str, path: Path, default: tuple) -> tuple[float, ...]:
    value = field(config, name, list, path, list(default))
    if len(value) != 3 or not all(type(x) in (int, float) and math.isfinite(x) for x in value):
        raise InputError(f"{path}: field {name!r}: expected three numbers, found {value!r:.200}")
    return tuple(value)
