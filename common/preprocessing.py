"""How a frame becomes the input of a ViT: resize, centre crop, normalization of the channels.

Public models describe it in `preprocessor_config.json`. Its fields have several spellings:

    "size": 224, {"shortest_edge": 224} or {"height": 224, "width": 224}
    "crop_size": 224 or {"height": 224, "width": 224}
    "resample": 2 or 3, PIL's numbers for bilinear and bicubic
    "do_...": left out if it is the default of the model's image processor

SmolVLM and Idefics3 resize twice, each time with LANCZOS and with bytes as the result: the longer side to a given
length, then both sides to S. `read_lanczos_preprocessing` reads their files.

Shapes: S side of the ViT's input in pixels; its height, where the input is not square.

References
[1] transformers, image_processing_backends.py: the meaning of each field; models/{clip,siglip,bit}/
    image_processing_*.py: the defaults (DINOv2 uses BiT's); models/smolvlm/video_processing_smolvlm.py.
[2] torchvision, transforms/_presets.py, ImageClassification, and models/vision_transformer.py.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import InputError
from common.files import field, read_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of channels red, green, blue in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
MAX_SIDE = 2**14  # pixels
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic")  # in the order of PIL's numbers
# transformers 5 describes all parts of a processor in one file.
IMAGE_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
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
    width: int | None = None  # where it is not S, the height; only with squash and without a crop

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the ViT's input."""
        return self.size, self.width or self.size

    def scaled(self, size: int) -> "Preprocessing":
        """The same crop of the frame at another size S."""
        return replace(self, size=size, resize=round(self.resize * size / self.size))


def preprocessor_file(folder: Path, video: bool = False) -> Path:
    """A folder's file about images, or about videos, which may be the one about images; the usual one if there is none.
    """
    files = [folder / name for name in (VIDEO_PREPROCESSORS if video else ()) + IMAGE_PREPROCESSORS]
    return next(filter(Path.is_file, files), files[0])


def read_processor(path: Path) -> dict:
    """The fields about images or videos, in whichever file. Raises InputError."""
    config = read_json(path)
    if path.name != "processor_config.json":
        return config
    return field(config, "video_processor", dict, path, None) or field(config, "image_processor", dict, path)


def read_preprocessing(path: Path, default: Preprocessing) -> Preprocessing:
    """Reads a `preprocessor_config.json`; `default` has the values of missing fields. Raises InputError."""
    config = read_processor(path)
    resize, squash = _read_side(config, "size", path, default.resize, default.squash)
    size = resize
    if field(config, "do_center_crop", bool, path, not default.squash):
        size, _ = _read_side(config, "crop_size", path, default.size, True)
    elif not squash:
        raise InputError(f"{path}: do_center_crop is false, so size needs height and width: the ViT's input is square")
    if size > resize:
        raise InputError(f"{path}: crop_size is {size}, expected at most the size {resize}")
    return read_colours(config, path, replace(default, size=size, resize=resize, squash=squash))


def read_lanczos_preprocessing(path: Path) -> Preprocessing:
    """Reads the `preprocessor_config.json` of SmolVLM or Idefics3, for frames of videos. Raises InputError.

    `video_sampling` says how frames differ from images; the files of older models, which lack it, are about images. A
    frame is never split into parts.
    """
    config = read_json(path)
    sampling = field(config, "video_sampling", dict, path, {})
    first = field(sampling or config, "video_size" if sampling else "size", dict, path)
    second = field(config, "max_image_size", dict, path)
    longest_edge, size = (field(step, "longest_edge", int, path, least=1, most=4096) for step in (first, second))  # [1]
    return read_colours(config, path, Preprocessing(size, size, True, "lanczos", HALF, HALF, longest_edge))


def _read_side(config: dict, name: str, path: Path, side: int, is_both: bool) -> tuple[int, bool]:
    """Returns the side in pixels, and whether both sides get it or only the shorter one; `side, is_both` by default."""
    value, where = config.get(name), f"{path}: {name}"
    if value is None:
        return side, is_both
    if not isinstance(value, dict):
        value = {"shortest_edge": value}
    names = ("shortest_edge",) if value.get("shortest_edge") is not None else ("height", "width")
    sides = [field(value, side, int, where, least=1, most=MAX_SIDE) for side in names]
    if len(set(sides)) > 1:
        raise InputError(f"{where}: height is {sides[0]} and width is {sides[1]}, expected a square")
    return sides[0], len(sides) == 2


def read_colours(config: dict, path: Path, default: Preprocessing) -> Preprocessing:
    """The default with the interpolation, mean and standard deviation of the file.

    Frames have any size and bytes as values, so no step can be left out.
    """
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not field(config, name, bool, path, True):
            raise InputError(f"{path}: {name} is false, only true is supported")
    field(config, "rescale_factor", float, path, 1 / 255, 0.999999 / 255, 1.000001 / 255)
    least, most = (1, 1) if default.interpolation == "lanczos" else (2, 3)
    number = field(config, "resample", int, path, FILTERS.index(default.interpolation), least, most)
    mean = _read_channels(config, "image_mean", path, default.mean, 0)
    std = _read_channels(config, "image_std", path, default.std, 1e-6)
    return replace(default, interpolation=FILTERS[number], mean=mean, std=std)


def _read_channels(config: dict, name: str, path: Path, default: tuple, least: float) -> tuple[float, ...]:
    values = field(config, name, list, path, list(default))
    if len(values) != 3:
        raise InputError(f"{path}: {name}: expected three numbers, found {len(values)}")
    return tuple(field({name: value}, name, float, path, least=least) for value in values)
