"""The ViT: every family against its own code [1, 2], with small random models in real files.

All parameters are random, so that no two tensors can be confused.

References
[1] transformers, models/clip/modeling_clip.py, models/siglip/modeling_siglip.py, models/dinov2/modeling_dinov2.py:
    values, tensor names, parameter counts, interpolate_pos_encoding.
[2] torchvision, models/vision_transformer.py: VisionTransformer, interpolate_embeddings.
"""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.models import vision_transformer as torchvision_vit
from transformers import AutoConfig, AutoModel, Dinov2Model

from common.errors import InputError
from models.vit import ViT
from tests.common.helpers import refused
from tests.models.helpers import assert_near, write_weights

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
VISION = SIZES | {"image_size": 24, "patch_size": 4}
TEXT = SIZES | {"vocab_size": 30, "bos_token_id": 0, "eos_token_id": 1}
CROP_24 = {"size": {"shortest_edge": 24}, "crop_size": 24}  # a preprocessor_config.json for a DINOv2 of 24 pixels


# ------------------------------------------------------------------------------- models and files


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Draws every parameter: matrices that preserve the scale of their inputs, norm weights near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.eval().requires_grad_(False).named_parameters():
        is_matrix = p.dim() > 1 and "embedding" not in name.replace("patch_embedding", "")
        std = p[0].numel() ** -0.5 if is_matrix else 0.2
        p.normal_(float("norm" in name and name.endswith("weight")), std, generator=generator)
    return model


def make_transformers(folder: Path, kind: str, seed: int = 0, **fields) -> nn.Module:
    """Saves a random model of model_type `kind` with `save_pretrained`; returns its vision model."""
    fields = VISION | fields
    if kind == "dinov2":
        del fields["intermediate_size"]
    elif "_" not in kind:
        fields = {"text_config": TEXT, "vision_config": fields}
    model = AutoModel.from_config(AutoConfig.for_model(kind, **fields))
    randomize(model, seed).save_pretrained(folder)
    if kind == "dinov2":
        (folder / "preprocessor_config.json").write_text(json.dumps(CROP_24))
    return getattr(model, "vision_model", model)


def make_torchvision(path: Path, seed: int = 0, image_size: int = 32, width: int = 768, heads: int = 12):
    """Saves a random ViT of two blocks as torchvision does."""
    theirs = torchvision_vit.VisionTransformer(image_size, 8, 2, heads, width, 40, num_classes=7)
    torch.save(randomize(theirs, seed).state_dict(), path)
    return theirs


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path) if path.suffix == ".pth" else safetensors.torch.load_file(path / "model.safetensors")


# ------------------------------------------------------------------------------ equal outputs


@torch.no_grad()
def assert_same(ours: ViT, theirs: nn.Module, size: int, seed: int, **options) -> None:
    """Embeddings, every block, last hidden state, pooled feature and patches of two images are equal within 1e-5."""
    assert (ours.config.image_size, ours.preprocessing.size) == (size, size)
    ours_eps, theirs_eps = ({m.eps for m in vit.modules() if isinstance(m, nn.LayerNorm)} for vit in (ours, theirs))
    assert ours_eps == theirs_eps  # the tolerance would hide 1e-5 instead of 1e-6
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    blocks = theirs.encoder.layer if isinstance(theirs, Dinov2Model) else theirs.encoder.layers
    is_torchvision, states = isinstance(theirs, torchvision_vit.VisionTransformer), []
    blocks[0].register_forward_pre_hook(lambda _module, inputs: states.append(inputs[0]))
    for layer in [*blocks, theirs.encoder] if is_torchvision else blocks:
        layer.register_forward_hook(lambda _module, _inputs, output: states.append(output))
    output = theirs(pixels, **options)
    if is_torchvision:
        last = states.pop()
        pooled = last[:, 0]
    else:
        last, pooled = output.last_hidden_state, output.pooler_output
        pooled = last.mean(1) if pooled is None else pooled  # SigLIP without its head

    x = ours.embed(pixels)
    assert_near(x, states[0], min_std=0.05)
    for block, state in zip(ours.blocks, states[1:], strict=True):
        x = block(x)
        assert_near(x, state, min_std=0.05)
    assert_near(ours(pixels), last, min_std=0.05)
    assert_near(ours.pool(x), pooled, min_std=0.05)
    normed = last if ours.config.final_norm else theirs.post_layernorm(last)  # CLIP norms its class token alone
    assert_near(ours.patches(x), normed[:, int(ours.config.class_token) :], min_std=0.05)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_pytorch_tanh", "quick_gelu"])
@pytest.mark.parametrize("kind", ["clip_vision_model", "clip", "siglip_vision_model", "siglip", "dinov2"])
def test_a_saved_model_equals_the_reference(tmp_path, kind, activation):
    """Model seed 0, pixels seed 1; whole models and vision models alone, each activation and the family's own."""
    theirs = make_transformers(tmp_path, kind, seed=0, **({"hidden_act": activation} if activation else {}))
    assert_same(ViT.from_pretrained(tmp_path), theirs, 24, seed=1)


OPTIONS = [
    ("clip_vision_model", {"layer_norm_eps": 0.5}),  # the default would be far off
    ("siglip", {"layer_norm_eps": 0.5, "vision_use_head": False}),  # pooled: the mean of the patches
    ("dinov2", {"layer_norm_eps": 0.5}),
    ("clip_vision_model", {"image_size": 20, "patch_size": 6}),  # the image is not a whole number of patches
    ("clip_vision_model", {"image_size": 32, "patch_size": 32, "num_attention_heads": 1}),  # one patch, one head
    ("siglip_vision_model", {"hidden_size": 1152, "num_attention_heads": 16}),  # SigLIP so400m: heads are 72 wide
]


@pytest.mark.parametrize("kind, fields", OPTIONS)
def test_options_and_shapes(tmp_path, kind, fields):
    """Model seed 2, pixels seed 3; a vision model alone has the names of published files."""
    theirs = make_transformers(tmp_path, kind, seed=2, **fields)
    if kind.endswith("_vision_model"):  # transformers 5 saves it without the prefix of published files
        write_weights(tmp_path, {f"vision_model.{name}": tensor for name, tensor in read_weights(tmp_path).items()})
    assert_same(ViT.from_pretrained(tmp_path), theirs, fields.get("image_size", 24), seed=3)


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("width, heads", [(768, 12), (1024, 16), (1280, 16)])
def test_the_format_of_torchvision(tmp_path, width, heads, old_names):
    """Model seed 8, pixels seed 9; the widths of vit_b, vit_l and vit_h; new and old names of the MLP's layers."""
    path = tmp_path / "vit.pth"
    theirs = make_torchvision(path, 8, 32, width, heads)
    if old_names:
        pairs = [(name.replace("mlp.0", "mlp.linear_1"), tensor) for name, tensor in read_weights(path).items()]
        write_weights(path, {name.replace("mlp.3", "mlp.linear_2"): tensor for name, tensor in pairs})
    assert_same(ViT.from_pretrained(path), theirs, 32, seed=9)
    planned = {name: tensor.shape for name, tensor in ViT.from_config(path).state_dict().items()}
    assert planned == {name: tensor.shape for name, tensor in ViT.from_pretrained(path).state_dict().items()}


def test_half_precision(tmp_path):
    """Model seed 8, pixels seed 9. An fp16 file computes in float32, within 1e-5 of the reference with its weights
    rounded. Positions are interpolated in float32 and rounded at the end, if fp16 is requested."""
    theirs = make_transformers(tmp_path, "clip_vision_model", seed=8).half()
    write_weights(tmp_path, {name: tensor.half() for name, tensor in read_weights(tmp_path).items()})
    ours = ViT.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_same(ours, theirs.float(), 24, seed=9)
    exact, half = (ViT.from_pretrained(tmp_path, dtype, image_size=40) for dtype in (torch.float32, torch.float16))
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert torch.equal(half.position, exact.position.half()) and not torch.equal(half.position, exact.position)


# ------------------------------------------------------------------------------- other image sizes


@pytest.mark.parametrize("size", [8, 28, 52])
@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip", "dinov2"])
def test_positions_are_interpolated_as_the_reference_does(tmp_path, kind, size):
    """Model seed 14, pixels seed 15; sizes below and above the model's 24."""
    theirs = make_transformers(tmp_path, kind, seed=14)
    options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    assert_same(ViT.from_pretrained(tmp_path, image_size=size), theirs, size, seed=15, **options)


@pytest.mark.parametrize("size", [16, 24, 56])
def test_positions_are_interpolated_as_torchvision_does(tmp_path, size):
    """Model seed 16, pixels seed 17; from 32 pixels."""
    state = make_torchvision(tmp_path / "vit.pth", 16).state_dict()
    theirs = torchvision_vit.VisionTransformer(size, 8, 2, 12, 768, 40, num_classes=7).eval()
    theirs.load_state_dict(torchvision_vit.interpolate_embeddings(size, 8, state))
    assert_same(ViT.from_pretrained(tmp_path / "vit.pth", image_size=size), theirs, size, seed=17)


def test_a_size_that_is_not_a_multiple_of_the_patch_size_is_refused(tmp_path):
    make_transformers(tmp_path, "siglip")
    for size in (26, 3, 0, -4):
        with refused(f"{tmp_path}/config.json: image size {size}: expected a multiple of the patch size 4"):
            ViT.from_pretrained(tmp_path, image_size=size)


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_the_last_blocks_can_be_left_out(kind, tmp_path):
    """Two of three blocks. Reference: transformers' hidden states after the second, within 1e-5, and the norm that
    follows the last block; a ViT of three has no fourth."""
    reference = make_transformers(tmp_path, kind)
    vit, pixels = ViT.from_pretrained(tmp_path), torch.rand(2, 3, 24, 24)
    with pytest.raises(InputError, match="--vit-blocks 4: the ViT has 3 blocks"):
        vit.keep_blocks(4)
    vit.keep_blocks(2)
    hidden = reference(pixels, output_hidden_states=True).hidden_states[2]
    assert_near(vit.run_blocks(pixels), hidden, 1e-5)
    assert_near(vit(pixels), reference.layernorm(hidden) if kind == "dinov2" else hidden, 1e-5)
    assert vit.config.depth == 2
