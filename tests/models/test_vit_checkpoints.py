"""Public vision models: configs and parameter counts, strict loading, preprocessing, and refused files.

References
[1] transformers, models/{clip,siglip,dinov2}: defaults and parameter counts.
[2] torchvision, transforms/_presets.py: preprocessing of its published weights.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from torchvision.models import get_model_weights
from torchvision.models import vision_transformer as torchvision_vit
from transformers import CLIPVisionModel, Dinov2Model, SiglipVisionModel

from common.preprocessing import HALF, IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from models import vit_checkpoints
from models.vit import ViT, ViTConfig
from models.vit_checkpoints import read_vit_checkpoint, read_vit_config
from models.vit_names import expand
from tests.common.helpers import refused
from tests.models.helpers import CONFIGS, change_json, write_weights
from tests.models.test_vit import add_prefix, make_facebook, make_torchvision, make_transformers, read_weights

FORMATS = ["clip_vision_model", "clip", "siglip_vision_model", "siglip", "dinov2", "dinov2.pth", "torchvision.pth"]


def make(tmp_path: Path, file_format: str) -> Path:
    """Writes a random model; returns the path to load."""
    if file_format.endswith(".pth"):
        path = tmp_path / file_format
        (make_facebook if file_format == "dinov2.pth" else make_torchvision)(path)
        return path
    make_transformers(tmp_path, file_format)
    return tmp_path


def refuse(path: Path, *words: str) -> None:
    with refused(*words):
        ViT.from_pretrained(path)


# -------------------------------------------------------------------------- configs and counts


@pytest.mark.parametrize("name, count", [
    ("clip-vit-base-patch16", 85_799_424), ("clip-vit-large-patch14", 303_179_776),
    ("siglip-base-patch16-224", 92_884_224), ("siglip-so400m-patch14-384", 428_225_600), ("dinov2-small", 22_056_576),
])  # fmt: skip
def test_a_public_config_has_the_published_number_of_parameters(name, count):
    """On the meta device. DINOv2's count includes the mask token, which we ignore."""
    kind, fields = read_vit_config(CONFIGS / f"{name}.json")
    config, theirs = ViTConfig(**fields), transformers.AutoConfig.from_pretrained(CONFIGS / f"{name}.json")
    with torch.device("meta"):
        ours = ViT(config)
        reference = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel, "dinov2": Dinov2Model}[kind]
        theirs = reference(getattr(theirs, "vision_config", theirs))
    assert sum(p.numel() for p in theirs.parameters()) == count
    assert sum(p.numel() for p in ours.parameters()) + (config.width if kind == "dinov2" else 0) == count


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_missing_fields_of_vision_config_have_the_defaults_of_transformers(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "vision_config": {"num_hidden_layers": 2}}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).vision_config
    ours = ViTConfig(**read_vit_config(tmp_path / "config.json")[1])
    assert ours.depth == 2
    found = (ours.image_size, ours.patch_size, ours.width, ours.heads, ours.mlp_width, ours.activation, ours.norm_eps)
    assert found == (
        theirs.image_size, theirs.patch_size, theirs.hidden_size, theirs.num_attention_heads, theirs.intermediate_size,
        theirs.hidden_act, theirs.layer_norm_eps)  # fmt: skip


# --------------------------------------------------------------------------------- strict loading


def vision_tensors(path: Path) -> list[str]:
    """The names of all tensors of the vision model in a file."""
    others = ("text_model", "logit", "text_projection", "visual_projection", "heads", "mask_token", "embeddings.mask")
    return [name for name in read_weights(path) if not name.startswith(others)]


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_missing_tensor_is_named(tmp_path, file_format):
    path = make(tmp_path, file_format)
    tensors = read_weights(path)
    for name in vision_tensors(path):
        write_weights(path, {other: tensor for other, tensor in tensors.items() if other != name})
        refuse(path, str(tmp_path), "missing", name)


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_misshapen_tensor_is_named_with_its_shape(tmp_path, file_format):
    """Each tensor gets another row, or three rows if three tensors are fused. For a .pth file the MLP's first weight
    defines its width, so its bias is reported instead."""
    path = make(tmp_path, file_format)
    tensors = read_weights(path)
    for name in vision_tensors(path):
        tensor = tensors[name]
        parts = 3 if "in_proj" in name or "qkv" in name else 1
        if tensor.dim() > 1 and len(tensor) == 1:  # a leading dimension of 1 is optional
            wrong = torch.cat([tensor, tensor[..., :1, :]], dim=-2)
            shape = list(wrong.shape[1:])
        else:
            wrong = torch.cat([tensor, tensor[:parts]])
            shape = [len(wrong) // parts, *wrong.shape[1:]]
        write_weights(path, tensors | {name: wrong})
        if path.suffix == ".pth" and name.endswith((".0.mlp.fc1.weight", "encoder_layer_0.mlp.0.weight")):
            refuse(path, str(tmp_path), name.replace("weight", "bias"), "expected")
        else:
            refuse(path, str(tmp_path), name, "expected", str(shape)[1:])


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_unexpected_tensor_is_named(tmp_path, file_format):
    path = make(tmp_path, file_format)
    tensors = read_weights(path)
    known = vision_tensors(path)[0]
    for name in (f"{known}.more", "logit_scale_2", "head.weight", "embeddings.mask_tokens"):
        write_weights(path, tensors | {name: torch.zeros(2)})
        refuse(path, str(tmp_path), "unexpected", name)


def test_a_vision_model_with_tensors_of_other_models_is_refused(tmp_path):
    """A block more than in the config, and a tensor of a whole CLIP."""
    make_transformers(tmp_path, "clip_vision_model")
    add_prefix(tmp_path)
    tensors = read_weights(tmp_path)
    for name in ("vision_model.encoder.layers.3.mlp.fc1.weight", "visual_projection.weight"):
        write_weights(tmp_path, tensors | {name: torch.zeros(24, 16)})
        refuse(tmp_path, str(tmp_path / "model.safetensors"), "unexpected", name)


def test_a_pooling_head_that_the_config_denies_is_refused(tmp_path):
    make_transformers(tmp_path, "siglip_vision_model")
    change_json(tmp_path / "config.json", vision_use_head=False)
    refuse(tmp_path, str(tmp_path / "model.safetensors"), "unexpected", "head.attention.in_proj_weight")


def test_a_config_of_another_size_is_refused(tmp_path):
    make_transformers(tmp_path, "clip_vision_model")
    change_json(tmp_path / "config.json", intermediate_size=25)
    refuse(tmp_path, str(tmp_path / "model.safetensors"), "mlp.fc1.weight", "[24, 16]", "[25, 16]")


@pytest.mark.parametrize("file_format", ["clip", "siglip", "dinov2", "dinov2.pth", "torchvision.pth"])
def test_every_tensor_is_used_or_ignored(tmp_path, file_format):
    checkpoint = read_vit_checkpoint(make(tmp_path, file_format))
    assert set(checkpoint.tensors) == set(checkpoint.names.values()) | set(checkpoint.ignored)
    assert checkpoint.ignored and not set(checkpoint.ignored) & set(checkpoint.names.values())
    assert checkpoint.names == expand(checkpoint.names, 1)  # no N or * is left


@pytest.mark.parametrize("kind", ["clip_vision_model", "clip", "siglip"])
def test_position_ids_of_old_files_are_ignored(tmp_path, kind):
    """Files of transformers before 4.31 contain them."""
    make_transformers(tmp_path, kind)
    if kind == "clip_vision_model":
        add_prefix(tmp_path)
    prefixes = ("vision_model",) if kind == "clip_vision_model" else ("vision_model", "text_model")
    ids = {f"{prefix}.embeddings.position_ids": torch.arange(7)[None] for prefix in prefixes}
    write_weights(tmp_path, read_weights(tmp_path) | ids)
    expected = read_weights(tmp_path)["vision_model.embeddings.position_embedding.weight"]
    assert torch.equal(ViT.from_pretrained(tmp_path).position, expected)


# ---------------------------------------------------------------------------------- refused models


@pytest.mark.parametrize("kind, fields, words", [
    ("clip_vision_model", {"model_type": "vit"}, ["'vit'", "clip_vision_model", "dinov2", "torchvision"]),
    ("clip_vision_model", {"model_type": None}, ["'model_type'", "missing"]),
    ("clip_vision_model", {"patch_size": None}, ["'patch_size'", "missing"]),
    ("clip_vision_model", {"hidden_size": "16"}, ["'hidden_size'", "whole number"]),
    ("clip_vision_model", {"hidden_act": "relu"}, ["hidden_act", "'relu'"]),
    ("dinov2", {"use_swiglu_ffn": True}, ["use_swiglu_ffn", "SwiGLU", "not supported"]),
    ("dinov2", {"model_type": "dinov2_with_registers"}, ["'dinov2_with_registers'", "siglip", "dinov2", "torchvision"]),
    ("dinov2", {"hidden_act": "relu"}, ["hidden_act", "'relu'", "gelu_pytorch_tanh"]),
    ("dinov2", {"mlp_ratio": "4"}, ["'mlp_ratio'", "a number"]),
    ("dinov2", {"mlp_ratio": 0.01}, ["mlp_ratio", "at least 1"]),
    ("dinov2", {"num_hidden_layers": 0}, ["num_hidden_layers is 0", "at least 1"]),
    ("dinov2", {"num_hidden_layers": 2**40}, ["num_hidden_layers", "at most 1000"]),
    ("dinov2", {"image_size": 2**40}, ["image_size", "at most 16384"]),
    ("dinov2", {"mlp_ratio": 1e300}, ["mlp_ratio", "at most 1000"]),
    ("dinov2", {"layer_norm_eps": -1}, ["layer_norm_eps", "at least 0"]),
    ("siglip_vision_model", {"vision_use_head": 0}, ["'vision_use_head'", "true or false"]),
    ("siglip_vision_model", {"patch_size": None}, ["'patch_size'", "missing"]),
    ("siglip", {"vision_config": None}, ["'vision_config'", "missing"]),
    ("siglip", {"vision_config": {"image_size": [24, 24]}}, ["vision_config", "'image_size'", "whole number"]),
    ("siglip", {"vision_config": {"image_size": 15}}, ["image_size 15", "patch_size 16"]),
    ("siglip", {"model_type": "siglip2"}, ["model_type", "'siglip2'", "supported vision models: clip_vision_model"]),
    ("clip", {"vision_config": {"hidden_size": 770}}, ["vision_config", "770", "num_attention_heads 12"]),
])  # fmt: skip
def test_an_unsupported_config_is_refused(tmp_path, kind, fields, words):
    make_transformers(tmp_path, kind)
    change_json(tmp_path / "config.json", **fields)
    refuse(tmp_path, str(tmp_path / "config.json"), *words)
    with refused(str(tmp_path / "config.json"), *words):
        vit_checkpoints.check_vit_config(tmp_path)


@pytest.mark.parametrize("file_format, changes, words", [
    ("dinov2.pth", {"register_tokens": (1, 4, 384)}, ["register_tokens", "not supported"]),
    ("dinov2.pth", {"blocks.0.mlp.w12.weight": (8, 384)}, ["w12", "SwiGLU", "not supported"]),
    ("dinov2.pth", {"patch_embed.proj.weight": (400, 3, 4, 4)}, ["[400, 3, 4, 4]", "384, 768, 1024", "heads"]),
    ("dinov2.pth", {"patch_embed.proj.weight": (384, 3, 0, 0)}, ["patch_embed.proj.weight", "[384, 3, 0, 0]"]),
    ("dinov2.pth", {"pos_embed": (1, 36, 384)}, ["pos_embed", "[1, 36, 384]", "square"]),
    ("dinov2.pth", {"pos_embed": (37, 384)}, ["pos_embed", "[37, 384]", "[1 P D]"]),
    ("torchvision.pth", {"conv_proj.weight": (384, 3, 8, 8)}, ["conv_proj.weight", "768, 1024, 1280", "heads"]),
])  # fmt: skip
def test_an_unsupported_file_is_refused(tmp_path, file_format, changes, words):
    path = make(tmp_path, file_format)
    write_weights(path, read_weights(path) | {name: torch.zeros(shape) for name, shape in changes.items()})
    refuse(path, str(path), *words)


def test_other_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "resnet.pth"
    write_weights(path, {"conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)})
    refuse(path, str(path), "torchvision", "DINOv2", "conv1.weight")
    for missing in (tmp_path / "missing.pth", tmp_path / "missing"):
        refuse(missing, str(missing), "expected a folder, a file or a hub id")
    make_transformers(tmp_path, "clip")
    (tmp_path / "model.safetensors").unlink()
    refuse(tmp_path, str(tmp_path), "expected one of model.safetensors")


# ---------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("kind, expected", [
    ("clip", Preprocessing(24, 24)),
    ("siglip", Preprocessing(24, 24, True, "bicubic", HALF, HALF)),
    ("dinov2", Preprocessing(224, 256, False, "bicubic", IMAGENET_MEAN, IMAGENET_STD)),
])  # fmt: skip
def test_the_default_preprocessing_is_that_of_the_family(tmp_path, kind, expected):
    make_transformers(tmp_path, kind, patch_size=8)
    (tmp_path / "preprocessor_config.json").unlink(missing_ok=True)
    vit = ViT.from_pretrained(tmp_path)
    assert vit.preprocessing == expected and vit.config.image_size == expected.size


def test_preprocessing_of_another_size_than_the_model_is_refused(tmp_path):
    make_transformers(tmp_path, "clip")
    change_json(tmp_path / "preprocessor_config.json", size={"shortest_edge": 32}, crop_size=32)
    refuse(tmp_path, "preprocessor_config.json", "32", "24", "image_size")


def test_another_image_size_keeps_the_cropped_share(tmp_path):
    make_facebook(tmp_path / "dinov2.pth", patch_size=14, image_size=70)
    for size, resize in ((448, 512), (70, 80)):
        found = ViT.from_pretrained(tmp_path / "dinov2.pth", image_size=size).preprocessing
        assert found == Preprocessing(size, resize, False, "bicubic", IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("build, weights", [
    ("vit_b_16", "IMAGENET1K_V1"), ("vit_b_32", "IMAGENET1K_V1"), ("vit_l_16", "IMAGENET1K_V1"),
    ("vit_l_32", "IMAGENET1K_V1"), ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"), ("vit_l_16", "IMAGENET1K_SWAG_E2E_V1"),
    ("vit_h_14", "IMAGENET1K_SWAG_E2E_V1"), ("vit_h_14", "IMAGENET1K_SWAG_LINEAR_V1"),
])  # fmt: skip
def test_the_preprocessing_of_torchvision_is_that_of_its_presets(monkeypatch, build, weights):
    """All published weights except for two that cannot be told from older ones; on the meta device."""
    weights = get_model_weights(build)[weights]
    preset, size = weights.transforms(), weights.meta["min_size"][0]
    assert preset.crop_size == [size]
    with torch.device("meta"):
        theirs = getattr(torchvision_vit, build)(image_size=size)
    monkeypatch.setattr(vit_checkpoints, "read_tensors", lambda path: (theirs.state_dict(), path))
    found = read_vit_checkpoint("vit.pth").preprocessing
    expected = (preset.resize_size[0], preset.interpolation.value, tuple(preset.mean), tuple(preset.std))
    assert (found.size, found.squash) == (size, False)
    assert (found.resize, found.interpolation, found.mean, found.std) == expected
