"""The vision tower, against transformers' CLIPVisionModel [1] on tiny random models, through real files.

Every parameter is drawn anew, norms and biases too, so that no two tensors could be mixed up unseen.
transformers 5 writes the tensors without the prefix `vision_model.` under which CLIP checkpoints are
published; the tests put it back and load the published layout.

[1] transformers, models/clip/modeling_clip.py
"""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from vit import CLIP_MEAN, CLIP_STD, ViT
from weights import InputError

# image side, patch side, width, depth, heads, width of the MLP, activation
SIZES = [
    (16, 8, 16, 2, 2, 24, "quick_gelu"),
    (16, 8, 16, 2, 2, 24, "gelu"),
    (24, 4, 24, 3, 3, 96, "quick_gelu"),
    (20, 6, 32, 1, 8, 40, "gelu"),  # the picture is not a whole number of patches
    (32, 32, 40, 4, 1, 16, "quick_gelu"),  # one patch, one head
]


def make(folder: Path, image, patch, width, depth, heads, hidden, activation, seed=0, **fields) -> CLIPVisionModel:
    """A random reference model, and the folder of it as published."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        image_size=image, patch_size=patch, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=hidden, hidden_act=activation, **fields,
    )  # fmt: skip
    theirs = CLIPVisionModel(config).eval().requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.normal_(centre, 0.2)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    write(folder, published(theirs))
    return theirs


def published(theirs: CLIPVisionModel) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of a published checkpoint."""
    tensors = {"vision_model." + name.removeprefix("vision_model."): t for name, t in theirs.state_dict().items()}
    return {name: t.contiguous() for name, t in tensors.items() if not name.endswith("position_ids")}


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change(folder: Path, name: str, **fields) -> None:
    """Sets fields of a JSON file; None takes them out."""
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= fields
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def assert_near(found: torch.Tensor, expected: torch.Tensor, within: float = 1e-5) -> None:
    assert expected.std() > 0.1  # so the tolerance, an absolute one, means something
    torch.testing.assert_close(found, expected, rtol=0, atol=within)


# ------------------------------------------------------------------------------ the same figures


@pytest.mark.parametrize("size", SIZES)
def test_last_hidden_state_and_pooled_are_the_reference_s(tmp_path, size):
    """Model seed 0, pixels seed 1, tolerance 1e-5."""
    theirs, ours = make(tmp_path, *size), ViT.from_pretrained(tmp_path)
    pixels = torch.randn(3, 3, size[0], size[0], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(pixels)
        assert_near(ours(pixels), expected.last_hidden_state)
        assert_near(ours.pooled(pixels), expected.pooler_output)


@pytest.mark.parametrize("size", SIZES)
def test_every_block_gives_the_reference_s_hidden_state(tmp_path, size):
    """Model seed 2, pixels seed 3, tolerance 1e-5, from the embeddings to the last block."""
    theirs, ours = make(tmp_path, *size, seed=2), ViT.from_pretrained(tmp_path)
    pixels = torch.randn(2, 3, size[0], size[0], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states
        assert len(expected) == len(ours.blocks) + 1
        x = ours.embed(pixels)
        assert_near(x, expected[0])
        for block, state in zip(ours.blocks, expected[1:], strict=True):
            x = block(x)
            assert_near(x, state)


def test_the_norms_epsilon_comes_from_the_config(tmp_path):
    """Model seed 4, pixels seed 5, tolerance 1e-5; with an epsilon of 0.5 the default would be far off."""
    theirs = make(tmp_path, *SIZES[0], seed=4, layer_norm_eps=0.5)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert_near(ViT.from_pretrained(tmp_path)(pixels), theirs(pixels).last_hidden_state)


def test_what_a_config_leaves_out_is_clip_s_default(tmp_path):
    """Model seed 6, pixels seed 7, tolerance 1e-5: QuickGELU and an epsilon of 1e-5, as in CLIPVisionConfig."""
    theirs = make(tmp_path, *SIZES[0], seed=6)
    change(tmp_path, "config.json", hidden_act=None, layer_norm_eps=None)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert_near(ViT.from_pretrained(tmp_path)(pixels), theirs(pixels).last_hidden_state)


def test_half_precision_files_load_and_compute_in_float32(tmp_path):
    """Model seed 8, pixels seed 9, tolerance 1e-5 from the reference with its weights rounded to fp16."""
    theirs = make(tmp_path, *SIZES[2], seed=8).half()
    write(tmp_path, published(theirs))
    ours = ViT.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        assert_near(ours(pixels), theirs.float()(pixels).last_hidden_state)
    assert {p.dtype for p in ViT.from_pretrained(tmp_path, torch.float16).parameters()} == {torch.float16}


def test_position_ids_of_older_checkpoints_are_no_weights(tmp_path):
    """Model seed 10, bit for bit."""
    theirs = make(tmp_path, *SIZES[0], seed=10)
    write(tmp_path, published(theirs) | {"vision_model.embeddings.position_ids": torch.arange(5)[None]})
    found = ViT.from_pretrained(tmp_path).position
    assert torch.equal(found, published(theirs)["vision_model.embeddings.position_embedding.weight"])


# ---------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("mean, std", [(None, None), ([0.5, 0.4, 0.3], [0.25, 0.5, 1])])
def test_pixels_are_normalised_by_the_published_formula(tmp_path, mean, std):
    """(x / 255 - mean) / std a channel, CLIP's own or those of preprocessor_config.json. Seed 11, tolerance 1e-5."""
    make(tmp_path, *SIZES[0])
    if mean is not None:
        change(tmp_path, "preprocessor_config.json", image_mean=mean, image_std=std)
    frames = torch.randint(256, (2, 5, 3, 16, 16), generator=torch.Generator().manual_seed(11), dtype=torch.uint8)
    found = ViT.from_pretrained(tmp_path).normalise(frames)
    assert found.dtype == torch.float32
    for channel in range(3):
        m, s = (mean or CLIP_MEAN)[channel], (std or CLIP_STD)[channel]
        assert_near(found[:, :, channel].double(), (frames[:, :, channel].double() / 255 - m) / s)


def test_clip_s_pixel_statistics_are_the_published_ones():
    """The figures of OpenAI's own preprocessing, clip/clip.py, _transform."""
    assert CLIP_MEAN == (0.48145466, 0.4578275, 0.40821073)
    assert CLIP_STD == (0.26862954, 0.26130258, 0.27577711)


# ---------------------------------------------------------------------------------------- errors


def refusal(folder: Path, *words: str) -> None:
    """Loading raises an InputError of one line that holds the words."""
    with pytest.raises(InputError) as error:
        ViT.from_pretrained(folder)
    text = str(error.value)
    assert text.isprintable(), text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("name", [
    "vision_model.pre_layrnorm.bias", "vision_model.embeddings.class_embedding",
    "vision_model.encoder.layers.1.self_attn.out_proj.weight",
])  # fmt: skip
def test_a_missing_tensor_is_named(tmp_path, name):
    theirs = make(tmp_path, *SIZES[0])
    write(tmp_path, {k: v for k, v in published(theirs).items() if k != name})
    refusal(tmp_path, str(tmp_path / "model.safetensors"), "missing", name)


def test_an_extra_tensor_is_named(tmp_path):
    """A block more than the config says, and a part of the whole CLIP that the tower lacks."""
    theirs = make(tmp_path, *SIZES[0])
    for name in ("vision_model.encoder.layers.2.mlp.fc1.weight", "visual_projection.weight"):
        write(tmp_path, published(theirs) | {name: torch.zeros(24, 16)})
        refusal(tmp_path, str(tmp_path / "model.safetensors"), "unexpected", name)


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path):
    theirs = make(tmp_path, *SIZES[0])
    name = "vision_model.embeddings.position_embedding.weight"
    write(tmp_path, published(theirs) | {name: torch.zeros(50, 16)})
    refusal(tmp_path, str(tmp_path / "model.safetensors"), name, "[50, 16]", "[5, 16]")


def test_a_config_of_another_size_is_refused(tmp_path):
    make(tmp_path, *SIZES[0])
    change(tmp_path, "config.json", intermediate_size=25)
    refusal(tmp_path, str(tmp_path / "model.safetensors"), "mlp.fc1.weight", "[24, 16]", "[25, 16]")


@pytest.mark.parametrize("field, value, words", [
    ("model_type", "vit", ["model_type", "'vit'", "clip_vision_model", "dinov2", "torchvision"]),
    ("model_type", None, ["'model_type'", "missing"]),
    ("hidden_act", "relu", ["hidden_act", "'relu'"]),
    ("patch_size", None, ["'patch_size'", "missing"]),
    ("hidden_size", "16", ["'hidden_size'", "whole number"]),
])  # fmt: skip
def test_a_config_that_is_not_clip_s_is_refused(tmp_path, field, value, words):
    make(tmp_path, *SIZES[0])
    change(tmp_path, "config.json", **{field: value})
    refusal(tmp_path, str(tmp_path / "config.json"), *words)


@pytest.mark.parametrize("value", [0.5, [0.5, 0.5], [0.5, 0.5, "0.5"]])
def test_pixel_statistics_that_are_not_three_numbers_are_refused(tmp_path, value):
    make(tmp_path, *SIZES[0])
    change(tmp_path, "preprocessor_config.json", image_mean=value)
    refusal(tmp_path, str(tmp_path / "preprocessor_config.json"), "image_mean")


def test_a_missing_folder_or_file_is_named(tmp_path):
    refusal(tmp_path / "nowhere", str(tmp_path / "nowhere"), "expected a folder")
    make(tmp_path, *SIZES[0])
    (tmp_path / "model.safetensors").unlink()
    refusal(tmp_path, str(tmp_path), "expected one of model.safetensors")
