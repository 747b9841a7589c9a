"""read_preprocessing for every spelling of preprocessor_config.json, against transformers' image processors [1].

Each file is read by both. Our result is applied to random images with torchvision's resize, crop and normalization;
the output must equal that of their processor: same size, same crop, same filter, same values.

[1] transformers, models/{clip,siglip,bit}/image_processing_*.py; DINOv2 is published with BiT's.
"""

import json
from pathlib import Path

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from transformers import BitImageProcessor, CLIPImageProcessor, SiglipImageProcessor

from common.preprocessing import HALF, IMAGENET_MEAN, IMAGENET_STD, Preprocessing, read_preprocessing
from tests.common.helpers import refused

CLIP = Preprocessing(24, 24)
SIGLIP = Preprocessing(24, 24, True, "bicubic", HALF, HALF)
DINOV2 = Preprocessing(24, 27, False, "bicubic", IMAGENET_MEAN, IMAGENET_STD)
NORM = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}

SQUARE_24 = {"size": {"height": 24, "width": 24}}
OPENAI = {"do_resize": True, "size": 24, "do_center_crop": True, "crop_size": 24, "resample": 3, "do_normalize": True}
BIT = {"size": {"shortest_edge": 27}, "crop_size": {"height": 24, "width": 24}, "do_center_crop": True, "resample": 3}
RESCALE = {"do_rescale": True, "rescale_factor": 0.00392156862745098}
SPELLINGS = [  # OpenAI's files of 2021, then those of transformers today
    (CLIPImageProcessor, CLIP, OPENAI | NORM | {"feature_extractor_type": "CLIPFeatureExtractor"}),
    (CLIPImageProcessor, CLIP, {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}} | RESCALE),
    (CLIPImageProcessor, CLIP, {"size": {"shortest_edge": 30}, "crop_size": 24, "do_center_crop": None}),
    (CLIPImageProcessor, CLIP, {"size": {"height": 30, "width": 30}, "crop_size": 24, "resample": 2}),
    (BitImageProcessor, DINOV2, BIT | NORM),
    (SiglipImageProcessor, SIGLIP, SQUARE_24 | {"do_convert_rgb": None, "do_center_crop": False, "crop_size": 12}),
    (SiglipImageProcessor, SIGLIP, SQUARE_24 | {"resample": 2, "crop_size": 12}),  # SigLIP 2
]


def read(tmp_path: Path, default: Preprocessing, **fields) -> Preprocessing:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(fields))
    return read_preprocessing(path, default)


@pytest.mark.parametrize("processor, default, fields", SPELLINGS)
def test_each_spelling_is_read_as_transformers_reads_it(tmp_path, processor, default, fields):
    """Seed 0, images of five aspect ratios, tolerance 1e-5 for values of about 1."""
    ours = read(tmp_path, default, **fields)
    theirs = processor(**{name: value for name, value in fields.items() if value is not None})
    generator = torch.Generator().manual_seed(0)
    for height, width in ((24, 24), (40, 90), (91, 41), (20, 33), (60, 60)):
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        expected = theirs(images=[image], return_tensors="pt")["pixel_values"][0]
        found = TF.resize(
            image, [ours.resize] * (1 + ours.squash), InterpolationMode(ours.interpolation), antialias=True
        )
        top, left = ((side - ours.size) // 2 for side in found.shape[1:])
        found = TF.crop(found, top, left, ours.size, ours.size) / 255
        found = TF.normalize(found, ours.mean, ours.std)
        assert found.shape == (3, 24, 24)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_missing_fields_and_nulls_have_the_default_values(tmp_path):
    nulls = dict.fromkeys(["size", "crop_size", "resample", "do_resize", "do_center_crop", "image_mean"])
    for default in (CLIP, SIGLIP, DINOV2, Preprocessing(24, 27, False, "bilinear", HALF, HALF)):
        assert read(tmp_path, default) == read(tmp_path, default, **nulls) == default


def test_scaling_keeps_the_cropped_share():
    assert Preprocessing(224, 256).scaled(448) == Preprocessing(448, 512)
    assert Preprocessing(224, 256).scaled(98) == Preprocessing(98, 112)
    assert SIGLIP.scaled(30) == Preprocessing(30, 30, True, "bicubic", HALF, HALF)


REFUSED = [
    ({"do_rescale": False}, "do_rescale"), ({"resample": 0}, "resample"), ({"rescale_factor": 0.5}, "rescale_factor"),
    ({"size": {"longest_edge": 24}}, "size"), ({"size": {"height": 24, "width": 30}}, "square"),
    ({"size": 24, "crop_size": 25}, "crop_size"), ({"size": 24, "do_center_crop": False}, "do_center_crop"),
    ({"image_std": [0.5, 0, 0.5]}, "image_std"), ({"image_mean": [0.5]}, "image_mean"),
]


@pytest.mark.parametrize("fields, word", REFUSED)
def test_unsupported_preprocessing_is_refused(tmp_path, fields, word):
    with refused(f"{tmp_path / 'preprocessor_config.json'}: ", word):
        read(tmp_path, CLIP, **fields)
