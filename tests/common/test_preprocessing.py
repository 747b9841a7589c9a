"""What preprocessor_config.json asks for, in every spelling, against transformers' own image processors [1].

Each file is read by ours and by theirs; ours is then applied to random pictures with torchvision's resize and crop, and
what comes out must be what their processor makes of them: same side, same place, same filter, same figures.

[1] transformers, models/{clip,siglip,bit}/image_processing_*.py; DINOv2 is published with BiT's.
"""

import json
from pathlib import Path

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from transformers import BitImageProcessor, CLIPImageProcessor, SiglipImageProcessor

from pixels import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, Pixels, read_pixels
from weights import InputError

CLIP = Pixels(24, 24)
SIGLIP = Pixels(24, 24, True, "bicubic", HALF, HALF)
DINOV2 = Pixels(24, 27, False, "bicubic", IMAGENET_MEAN, IMAGENET_STD)
NORM = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}

SPELLINGS = [
    # openai's files of 2021, and what transformers writes today
    (CLIPImageProcessor, CLIP, {"do_resize": True, "size": 24, "do_center_crop": True, "crop_size": 24, "resample": 3,
                                "do_normalize": True, "feature_extractor_type": "CLIPFeatureExtractor"} | NORM),
    (CLIPImageProcessor, CLIP, {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24},
                                "do_rescale": True, "rescale_factor": 0.00392156862745098}),
    (CLIPImageProcessor, CLIP, {"size": {"shortest_edge": 30}, "crop_size": 24, "do_center_crop": None}),
    (CLIPImageProcessor, CLIP, {"size": {"height": 24, "width": 24}, "crop_size": 24}),
    (CLIPImageProcessor, CLIP, {"size": {"height": 30, "width": 30}, "crop_size": 24, "resample": 2}),
    (CLIPImageProcessor, CLIP, {"size": {"height": 24, "width": 24}, "do_center_crop": False}),
    (BitImageProcessor, DINOV2, {"size": {"shortest_edge": 27}, "crop_size": {"height": 24, "width": 24},
                                 "do_center_crop": True, "resample": 3} | NORM),
    (SiglipImageProcessor, SIGLIP, {"size": {"height": 24, "width": 24}, "resample": 3, "do_convert_rgb": None}),
    (SiglipImageProcessor, SIGLIP, {"size": {"height": 24, "width": 24}, "resample": 2}),  # SigLIP 2
    (SiglipImageProcessor, SIGLIP, {"size": {"height": 24, "width": 24}, "do_center_crop": False, "crop_size": 12}),
    (SiglipImageProcessor, SIGLIP, {"size": {"height": 24, "width": 24}, "crop_size": 12}),
]  # fmt: skip


def read(tmp_path: Path, default: Pixels, **fields) -> Pixels:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(fields))
    return read_pixels(path, default)


@pytest.mark.parametrize("processor, default, fields", SPELLINGS)
def test_each_spelling_means_what_transformers_reads_in_it(tmp_path, processor, default, fields):
    """Seed 0, pictures of five aspects, tolerance 1e-5 of figures of about 1."""
    pixels = read(tmp_path, default, **fields)
    theirs = processor(**{name: value for name, value in fields.items() if value is not None})
    draw = torch.Generator().manual_seed(0)
    for height, width in ((24, 24), (40, 90), (91, 41), (20, 33), (60, 60)):
        picture = torch.randint(256, (3, height, width), generator=draw, dtype=torch.uint8)
        expected = theirs(images=[picture], return_tensors="pt")["pixel_values"][0]
        found = TF.resize(picture, [pixels.resize] * (2 if pixels.squash else 1),
                          InterpolationMode(pixels.interpolation), antialias=True)  # fmt: skip
        top, left = ((side - pixels.size) // 2 for side in found.shape[1:])
        found = TF.crop(found, top, left, pixels.size, pixels.size) / 255
        found = TF.normalize(found, pixels.mean, pixels.std)
        assert found.shape == (3, 24, 24)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_what_a_file_leaves_out_is_the_family_s(tmp_path):
    for default in (CLIP, SIGLIP, DINOV2, Pixels(24, 27, False, "bilinear", HALF, HALF)):
        assert read(tmp_path, default) == default
        nulls = dict.fromkeys(["size", "crop_size", "resample", "do_resize", "do_center_crop", "image_mean"])
        assert read(tmp_path, default, **nulls) == default


def test_the_families_statistics_are_the_published_ones():
    """transformers, image_utils.py, which calls one half IMAGENET_STANDARD."""
    from transformers import image_utils as theirs

    assert (list(CLIP_MEAN), list(CLIP_STD)) == (theirs.OPENAI_CLIP_MEAN, theirs.OPENAI_CLIP_STD)
    assert (list(IMAGENET_MEAN), list(IMAGENET_STD)) == (theirs.IMAGENET_DEFAULT_MEAN, theirs.IMAGENET_DEFAULT_STD)
    assert list(HALF) == theirs.IMAGENET_STANDARD_MEAN == theirs.IMAGENET_STANDARD_STD


def test_another_size_scales_what_is_before_the_crop():
    assert Pixels(224, 256).scaled(448) == Pixels(448, 512)
    assert Pixels(224, 256).scaled(98) == Pixels(98, 112)
    assert SIGLIP.scaled(30) == Pixels(30, 30, True, "bicubic", HALF, HALF)


@pytest.mark.parametrize("fields, words", [
    ({"do_resize": False}, ["do_resize", "expected true"]),
    ({"do_rescale": False}, ["do_rescale", "expected true"]),
    ({"do_normalize": False}, ["do_normalize", "expected true"]),
    ({"do_resize": "yes"}, ["'do_resize'", "true or false"]),
    ({"rescale_factor": 0.5}, ["rescale_factor", "1/255"]),
    ({"resample": 0}, ["resample is 0", "bilinear", "bicubic"]),
    ({"size": {"longest_edge": 24}}, ["size", "shortest_edge", "longest_edge"]),
    ({"size": "24"}, ["size", "whole number", "'24'"]),
    ({"size": {"shortest_edge": 24.5}}, ["size", "'shortest_edge'", "whole number"]),
    ({"size": {"height": 24, "width": 30}}, ["size", "24", "30", "square"]),
    ({"size": {"height": 24}}, ["size", "'width'", "missing"]),
    ({"crop_size": {"height": 24, "width": 20}}, ["crop_size", "24", "20", "square"]),
    ({"size": 24, "crop_size": 25}, ["crop_size", "25", "24"]),
    ({"size": 24, "crop_size": 0}, ["crop_size", "0"]),
    ({"size": 24, "do_center_crop": False}, ["do_center_crop", "squares"]),
    ({"image_std": [0.5, 0, 0.5]}, ["image_std", "above 0"]),
    ({"image_mean": [0.5]}, ["image_mean", "three numbers"]),
])  # fmt: skip
def test_what_is_no_square_of_pixels_is_refused(tmp_path, fields, words):
    with pytest.raises(InputError) as error:
        read(tmp_path, CLIP, **fields)
    text = str(error.value)
    assert text.startswith(str(tmp_path / "preprocessor_config.json"))
    for word in words:
        assert word in text, text
