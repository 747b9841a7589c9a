"""Public vision models: configs and parameter counts, preprocessing, and refused files.

References
[1] transformers, models/{clip,siglip,dinov2,idefics3,internvl}: defaults and parameter counts.
[2] torchvision, transforms/_presets.py: preprocessing of its published weights.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torchvision.models import get_model_weights
from torchvision.models import vision_transformer as torchvision_vit
from transformers import CLIPVisionModel, Dinov2Model, SiglipVisionModel

from common.preprocessing import HALF, IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from models.vit import ViT
from models.vit_checkpoints import parse_vit_config, read_vit_file
from tests.common.helpers import refused
from tests.models.helpers import CONFIGS, change_json, last_field, write_weights
from tests.models.test_vit import make_torchvision, make_transformers, read_weights

COUNTS = {
    "clip-vit-base-patch16": 85_799_424,
    "clip-vit-large-patch14": 303_179_776,
    "siglip-base-patch16-224": 92_884_224,
    "siglip-so400m-patch14-384": 428_225_600,
    "dinov2-small": 22_056_576,
}


def refuse(path: Path, *words: str) -> None:
    with refused(*words):
        ViT.from_pretrained(path)


@pytest.mark.parametrize("name", COUNTS)
def test_a_public_config_has_the_published_number_of_parameters(tmp_path, name):
    """On the meta device. DINOv2's count includes the mask token, which we ignore."""
    shutil.copy(CONFIGS / f"{name}.json", tmp_path / "config.json")
    ours, theirs = ViT.from_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    reference = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel, "dinov2": Dinov2Model}[theirs.model_type]
    with torch.device("meta"):
        theirs = reference(getattr(theirs, "vision_config", theirs))
    ours.resize(theirs.config.image_size)  # DINOv2's frames are smaller than its table of positions
    assert sum(p.numel() for p in theirs.parameters()) == COUNTS[name]
    assert sum(p.numel() for p in ours.parameters()) + ours.config.width * ("dino" in name) == COUNTS[name]


@pytest.mark.parametrize("family", ["clip_vision_model", "siglip_vision_model", "dinov2", "idefics3_vision",
                                    "internvl_vision"])
def test_missing_fields_have_the_defaults_of_transformers(family):
    """transformers gives InternVL's sizes twice, height and width."""
    ours, theirs = parse_vit_config({}, family.split("_")[0], "config.json"), transformers.AutoConfig.for_model(family)
    for name in ("image_size", "patch_size"):
        assert getattr(theirs, name) in (ours[name], (ours[name], ours[name]))
    expected = theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads
    assert (ours["width"], ours["depth"], ours["heads"]) == expected
    assert (ours["activation"], ours["norm_eps"]) == (theirs.hidden_act, theirs.layer_norm_eps)
    mlp_width = theirs.mlp_ratio * theirs.hidden_size if family == "dinov2" else theirs.intermediate_size
    assert ours["mlp_width"] == mlp_width


# ---------------------------------------------------------------------------------- refused models


REFUSED = [  # a kind, fields of its config, and a word of the message, if that is not the name of the last field
    ("clip_vision_model", {"model_type": "vit"}, "clip_vision_model or clip or siglip_vision_model"),
    ("clip_vision_model", {"hidden_size": "16"}), ("clip_vision_model", {"hidden_act": "relu"}),
    ("dinov2", {"use_swiglu_ffn": True}), ("dinov2", {"num_hidden_layers": 2**40}), ("dinov2", {"mlp_ratio": 1e300}),
    ("siglip", {"vision_config": None}), ("siglip", {"vision_config": {"image_size": 15}}, "image_size=15"),
    ("clip", {"vision_config": {"hidden_size": 770}}, "width=770"),
]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_an_unsupported_config_is_refused(tmp_path, case):
    kind, fields, *words = case
    make_transformers(tmp_path, kind)
    change_json(tmp_path / "config.json", **fields)
    for load in (ViT.from_pretrained, ViT.from_config):
        with refused(str(tmp_path / "config.json"), *(words or [last_field(fields)])):
            load(tmp_path)


REFUSED_FILES = [
    ({"conv_proj.weight": (384, 3, 8, 8)}, "384 wide"),
    ({"conv_proj.weight": (768, 3, 0, 0)}, "'image_size'"),
    ({"encoder.pos_embedding": (1, 16, 768)}, "encoder.pos_embedding"),  # not a square
    ({"encoder.pos_embedding": (17, 768)}, "damaged"),
]


@pytest.mark.parametrize("changes, word", REFUSED_FILES)
def test_an_unsupported_file_is_refused(tmp_path, changes, word):
    make_torchvision(path := tmp_path / "vit.pth")
    write_weights(path, read_weights(path) | {name: torch.zeros(shape) for name, shape in changes.items()})
    refuse(path, str(path), word)
    for name, words in (("conv_proj.weight", "expected a field 'encoder."), ("fc.bias", "torchvision's vit_*")):
        write_weights(path, {name: torch.zeros(768, 3, 8, 8)})
        refuse(path, str(path), words)


# ---------------------------------------------------------------------------------- preprocessing


def test_preprocessing_is_that_of_the_family_and_of_the_requested_size(tmp_path):
    """The default of the families; another size keeps the cropped share of the frame; one that does not fit the table
    of positions is refused."""
    squashed = Preprocessing(24, 24, True, mean=HALF, std=HALF)
    for kind, expected in (("clip", Preprocessing(24, 24)), ("siglip", squashed)):
        make_transformers(tmp_path, kind, patch_size=8)
        assert ViT.from_pretrained(tmp_path).preprocessing == expected
        assert ViT.from_config(tmp_path, 48).preprocessing == expected.scaled(48)
    change_json(tmp_path / "processor_config.json", image_processor={"image_std": [0.25] * 3})  # of transformers 5
    assert ViT.from_config(tmp_path).preprocessing == replace(expected, std=(0.25,) * 3)
    change_json(tmp_path / "preprocessor_config.json", size={"height": 32, "width": 32})
    refuse(tmp_path, "preprocessor_config.json", "32 pixels", "24")
    make_transformers(tmp_path / "dinov2", "dinov2", patch_size=14, image_size=70)
    (tmp_path / "dinov2/preprocessor_config.json").unlink()
    for size, resize in ((None, 256), (448, 512), (70, 80)):
        vit = ViT.from_pretrained(tmp_path / "dinov2", image_size=size)
        assert vit.preprocessing == Preprocessing(size or 224, resize, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        assert vit.config.image_size == (size or 224)


PRESETS = {"vit_b_16": "V1 SWAG_E2E_V1", "vit_b_32": "V1", "vit_l_16": "V1 SWAG_E2E_V1", "vit_l_32": "V1",
           "vit_h_14": "SWAG_E2E_V1 SWAG_LINEAR_V1"}


@pytest.mark.parametrize("build, name", [(build, name) for build in PRESETS for name in PRESETS[build].split()])
def test_the_preprocessing_of_torchvision_is_that_of_its_presets(build, name):
    """All published weights except for two that cannot be told from older ones; on the meta device."""
    weights = get_model_weights(build)[f"IMAGENET1K_{name}"]
    preset, size = weights.transforms(), weights.meta["min_size"][0]
    with torch.device("meta"):
        theirs = getattr(torchvision_vit, build)(image_size=size)
    found = read_vit_file(theirs.state_dict(), Path("vit.pth")).preprocessing
    expected = (preset.resize_size[0], preset.interpolation.value, tuple(preset.mean), tuple(preset.std))
    assert (found.size, found.squash, preset.crop_size) == (size, False, [size])
    assert (found.resize, found.interpolation, found.mean, found.std) == expected
