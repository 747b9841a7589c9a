"""The ViT of every family it can be, against the family's own code on small random models, through real files.

Every parameter is drawn anew, so that no two tensors could be mixed up unseen. test_vit.py holds CLIP alone.

References
[1] transformers, models/clip/modeling_clip.py, models/siglip/modeling_siglip.py, models/dinov2/modeling_dinov2.py:
    values, names of tensors, counts of parameters, interpolate_pos_encoding.
[2] torchvision, models/vision_transformer.py: VisionTransformer, interpolate_embeddings.
[3] facebookresearch's names of DINOv2's tensors: the table `FACEBOOK` below, after transformers'
    convert_dinov2_to_hf.py (release 4.40), read from right to left.
"""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn
from torchvision.models import get_model_weights
from torchvision.models import vision_transformer as torchvision_vit
from transformers import CLIPModel, CLIPVisionModel, Dinov2Model, SiglipModel, SiglipVisionModel

import vit_public
from pixels import HALF, IMAGENET_MEAN, IMAGENET_STD, Pixels
from vit import ViT, ViTConfig
from vit_public import expand, read_config, read_public
from weights import InputError

CONFIGS = Path(__file__).parent / "configs"
TOWER = {"image_size": 24, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
         "intermediate_size": 24}  # fmt: skip
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30,
        "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
CROP = {"size": {"shortest_edge": 24}, "crop_size": 24}  # what a DINOv2 of 24 pixels is fed

FACEBOOK = {
    "embeddings.cls_token": "cls_token", "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed", "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer": "blocks", "attention.output.dense": "attn.proj", "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma", "layernorm": "norm",
}  # fmt: skip


# ------------------------------------------------------------------------------- models and files


def draw(model: nn.Module, seed: int) -> nn.Module:
    """Every parameter anew: matrices keep the size of what goes through, gains of norms are about 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.eval().requires_grad_(False).named_parameters():
        spread = p[0].numel() ** -0.5 if p.dim() > 1 and "embedding" not in name.replace("patch_embedding", "") else 0.2
        p.normal_(float("norm" in name and name.endswith("weight")), spread, generator=generator)
    return model


def make_hf(folder: Path, kind: str, seed: int = 0, **fields) -> nn.Module:
    """Saves a random model of `kind` with the library's own `save_pretrained`; -> its vision tower."""
    fields = TOWER | fields
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=TEXT | {"projection_dim": 8}, vision_config=fields)
        model = draw(CLIPModel(config), seed)
    elif kind == "siglip":
        model = draw(SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=fields)), seed)
    elif kind == "dinov2":
        fields = {name: value for name, value in fields.items() if name != "intermediate_size"}
        model = draw(Dinov2Model(transformers.Dinov2Config(**fields)), seed)
    elif kind == "clip_vision_model":
        model = draw(CLIPVisionModel(transformers.CLIPVisionConfig(**fields)), seed)
    else:
        model = draw(SiglipVisionModel(transformers.SiglipVisionConfig(**fields)), seed)
    model.save_pretrained(folder)
    if kind == "dinov2":
        (folder / "preprocessor_config.json").write_text(json.dumps(CROP))
    return getattr(model, "vision_model", model)


def make_facebook(path: Path, seed: int = 0, **fields) -> Dinov2Model:
    """A random DINOv2-S of two blocks in facebookresearch's layout; -> the same model as transformers has it."""
    fields = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 2, "mlp_ratio": 1} | fields
    theirs = make_hf(path.parent / "hf", "dinov2", seed, **fields)
    tensors = {}
    for name, tensor in safetensors.torch.load_file(path.parent / "hf" / "model.safetensors").items():
        for old, new in FACEBOOK.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    for i in range(fields["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"blocks.{i}.attention.attention.{x}.{kind}") for x in ("query", "key", "value")]
            tensors[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    torch.save(tensors, path)
    return theirs


def make_torchvision(path: Path, seed: int = 0, image: int = 32, width: int = 768, heads: int = 12):
    """A random ViT of two blocks as torchvision saves it."""
    theirs = torchvision_vit.VisionTransformer(image, 8, 2, heads, width, 40, num_classes=7)
    torch.save(draw(theirs, seed).state_dict(), path)
    return theirs


def make(tmp_path: Path, layout: str) -> Path:
    """-> what to load."""
    if layout.endswith(".pth"):
        path = tmp_path / layout
        (make_facebook if layout == "dinov2.pth" else make_torchvision)(path)
        return path
    make_hf(tmp_path, layout)
    return tmp_path


LAYOUTS = ["clip_vision_model", "clip", "siglip_vision_model", "siglip", "dinov2", "dinov2.pth", "torchvision.pth"]


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path) if path.suffix == ".pth" else safetensors.torch.load_file(path / "model.safetensors")


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path / "model.safetensors")


def change(path: Path, **fields) -> None:
    """Sets fields of a JSON file; None takes them out."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | fields
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


# ------------------------------------------------------------------------------ the same figures


def near(found: torch.Tensor, expected: torch.Tensor, within: float = 1e-5) -> None:
    assert expected.std() > 0.05  # so the tolerance, an absolute one, means something
    torch.testing.assert_close(found, expected, rtol=0, atol=within)


@torch.no_grad()
def same(ours: ViT, theirs: nn.Module, blocks, size: int, seed: int, **how) -> None:
    """Embeddings, every block, last hidden state and pooled feature of two random pictures, within 1e-5."""
    assert (ours.config.image_size, ours.pixels.size) == (size, size)
    ours_eps, theirs_eps = ({m.eps for m in vit.modules() if isinstance(m, nn.LayerNorm)} for vit in (ours, theirs))
    assert ours_eps == theirs_eps  # 1e-5 for 1e-6 would hide within the tolerance
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    states, hooks = [], [blocks[0].register_forward_pre_hook(lambda _m, inputs: states.append(inputs[0]))]
    for block in blocks:
        hooks.append(block.register_forward_hook(lambda _m, _i, out: states.append(out)))
    if isinstance(theirs, torchvision_vit.VisionTransformer):
        hooks.append(theirs.encoder.register_forward_hook(lambda _m, _i, out: states.append(out)))
        theirs(pixels)
        last = states.pop()
        pooled = last[:, 0]
    else:
        answer = theirs(pixels, **how)
        last, pooled = answer.last_hidden_state, answer.pooler_output
    for hook in hooks:
        hook.remove()

    x = ours.embed(pixels)
    near(x, states[0])
    for block, state in zip(ours.blocks, states[1:], strict=True):
        x = block(x)
        near(x, state)
    near(ours(pixels), last)
    near(ours.pooled(pixels), pooled)


def layers(theirs: nn.Module):
    return theirs.encoder.layer if isinstance(theirs, Dinov2Model) else theirs.encoder.layers


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_pytorch_tanh", "quick_gelu"])
@pytest.mark.parametrize("kind", ["clip_vision_model", "clip", "siglip_vision_model", "siglip", "dinov2"])
def test_a_saved_model_gives_the_reference_s_figures(tmp_path, kind, activation):
    """Model seed 0, pixels seed 1; whole models and towers alone, each activation and the family's own."""
    theirs = make_hf(tmp_path, kind, seed=0, **({"hidden_act": activation} if activation else {}))
    same(ViT.from_pretrained(tmp_path), theirs, layers(theirs), 24, seed=1)


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_a_tower_alone_is_read_under_the_published_names_too(tmp_path, kind):
    """Model seed 2, pixels seed 3; transformers 5 writes without the prefix that published towers have."""
    theirs = make_hf(tmp_path, kind, seed=2)
    write(tmp_path, {f"vision_model.{name}": t for name, t in weights_of(tmp_path).items()})
    same(ViT.from_pretrained(tmp_path), theirs, layers(theirs), 24, seed=3)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_the_norms_epsilon_comes_from_the_config(tmp_path, kind):
    """Model seed 4, pixels seed 5; with an epsilon of 0.5 the default would be far off."""
    theirs = make_hf(tmp_path, kind, seed=4, layer_norm_eps=0.5)
    same(ViT.from_pretrained(tmp_path), theirs, layers(theirs), 24, seed=5)


def test_dinov2_in_facebookresearch_s_layout_gives_the_reference_s_figures(tmp_path):
    """Model seed 6, pixels seed 7; two blocks of ViT-S, nothing but the tensors told."""
    theirs = make_facebook(tmp_path / "dinov2_vits14.pth", seed=6)
    same(ViT.from_pretrained(tmp_path / "dinov2_vits14.pth", image_size=24), theirs, layers(theirs), 24, seed=7)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("width, heads", [(768, 12), (1024, 16), (1280, 16)])
def test_torchvision_s_layout_gives_the_reference_s_figures(tmp_path, width, heads, older):
    """Model seed 8, pixels seed 9; the widths of vit_b, vit_l and vit_h; new and old names of the MLP's layers."""
    path = tmp_path / "vit.pth"
    theirs = make_torchvision(path, 8, 32, width, heads)
    if older:
        write(path, {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): t
                     for k, t in weights_of(path).items()})  # fmt: skip
    same(ViT.from_pretrained(path), theirs, theirs.encoder.layers, 32, seed=9)


def test_torchvision_s_vit_b_16_itself(tmp_path):
    """Model seed 10, pixels seed 11; all twelve blocks at 224 pixels."""
    theirs = draw(torchvision_vit.vit_b_16(), 10)
    torch.save(theirs.state_dict(), tmp_path / "vit_b_16.pth")
    ours = ViT.from_pretrained(tmp_path / "vit_b_16.pth")
    same(ours, theirs, theirs.encoder.layers, 224, seed=11)
    counted = sum(p.numel() for p in ours.parameters()) + sum(p.numel() for p in theirs.heads.parameters())
    assert counted == torchvision_vit.ViT_B_16_Weights.IMAGENET1K_V1.meta["num_params"] == 86567656


@pytest.mark.parametrize("kind, width, heads, hidden, patch", [
    ("clip_vision_model", 1024, 16, 4096, 14),  # CLIP L/14
    ("siglip_vision_model", 768, 12, 3072, 16),  # SigLIP B/16
    ("siglip_vision_model", 1152, 16, 4304, 14),  # SigLIP so400m: 72 channels a head
    ("dinov2", 384, 6, 1536, 14),  # DINOv2 S/14
])  # fmt: skip
def test_one_block_of_full_width(tmp_path, kind, width, heads, hidden, patch):
    """Model seed 12, pixels seed 13."""
    theirs = make_hf(tmp_path, kind, seed=12, hidden_size=width, num_attention_heads=heads, intermediate_size=hidden,
                     patch_size=patch, image_size=2 * patch, num_hidden_layers=1)  # fmt: skip
    same(ViT.from_pretrained(tmp_path, image_size=2 * patch), theirs, layers(theirs), 2 * patch, seed=13)


# ----------------------------------------------------------------------------------- other sizes


@pytest.mark.parametrize("size", [8, 20, 28, 52])
@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip", "dinov2"])
def test_positions_are_interpolated_as_the_reference_does(tmp_path, kind, size):
    """Model seed 14, pixels seed 15; smaller and bigger than the table's 24."""
    theirs = make_hf(tmp_path, kind, seed=14)
    how = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    same(ViT.from_pretrained(tmp_path, image_size=size), theirs, layers(theirs), size, seed=15, **how)


@pytest.mark.parametrize("size", [16, 24, 56])
def test_torchvision_s_positions_are_interpolated_as_torchvision_does(tmp_path, size):
    """Model seed 16, pixels seed 17; from 32 pixels."""
    state = make_torchvision(tmp_path / "vit.pth", 16).state_dict()
    theirs = torchvision_vit.VisionTransformer(size, 8, 2, 12, 768, 40, num_classes=7).eval()
    theirs.load_state_dict(torchvision_vit.interpolate_embeddings(size, 8, state))
    same(ViT.from_pretrained(tmp_path / "vit.pth", image_size=size), theirs, theirs.encoder.layers, size, seed=17)


def test_facebookresearch_s_and_transformers_files_give_the_same_positions(tmp_path):
    """Model seed 18, bit for bit, at the 224 pixels that both are fed by default."""
    make_facebook(tmp_path / "dinov2.pth", seed=18, patch_size=14, image_size=70)
    (tmp_path / "hf" / "preprocessor_config.json").unlink()
    ours, others = ViT.from_pretrained(tmp_path / "dinov2.pth"), ViT.from_pretrained(tmp_path / "hf")
    assert ours.config.image_size == others.config.image_size == 224
    assert torch.equal(ours.position, others.position) and len(ours.position) == 1 + 16**2


def test_positions_of_half_precision_are_interpolated_in_float32(tmp_path):
    """Model seed 19; rounded to fp16 once, at the end, when fp16 is asked for, and not at all when it is not."""
    make_hf(tmp_path, "siglip_vision_model", seed=19)
    tensors = weights_of(tmp_path)
    for dtype in (torch.float32, torch.float16):
        write(tmp_path, {name: t.to(dtype) for name, t in tensors.items()})
        exact = ViT.from_pretrained(tmp_path, image_size=40).position
        half = ViT.from_pretrained(tmp_path, torch.float16, image_size=40)
        assert exact.dtype == torch.float32 and not torch.equal(exact, exact.half().float())
        assert {p.dtype for p in half.parameters()} == {torch.float16}
        assert torch.equal(half.position, exact.half())


def test_a_side_that_is_no_whole_number_of_patches(tmp_path):
    """Model seed 20, pixels seed 21. The model's own, as of SigLIP so400m at 384: pixels are left over, as in the
    reference. Asked for: refused."""
    theirs = make_hf(tmp_path, "siglip", seed=20, image_size=22)
    same(ViT.from_pretrained(tmp_path), theirs, layers(theirs), 22, seed=21)
    for size in (26, 3, 0, -4):
        with pytest.raises(InputError, match=f"{tmp_path}: image size {size}: expected a multiple of the patch size 4"):
            ViT.from_pretrained(tmp_path, image_size=size)


# -------------------------------------------------------------------------- configs and counts


@pytest.mark.parametrize("name, count", [
    ("clip-vit-base-patch16", 85_799_424), ("clip-vit-large-patch14", 303_179_776),
    ("siglip-base-patch16-224", 92_884_224), ("siglip-so400m-patch14-384", 428_225_600), ("dinov2-small", 22_056_576),
])  # fmt: skip
def test_a_published_config_has_the_published_number_of_parameters(name, count):
    """On the meta device, from configs as published; DINOv2's count holds the mask token, which we leave."""
    kind, config = read_config(CONFIGS / f"{name}.json")
    theirs = transformers.AutoConfig.from_pretrained(CONFIGS / f"{name}.json")
    with torch.device("meta"):
        ours = ViT(config)
        tower = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel, "dinov2": Dinov2Model}[kind]
        theirs = tower(getattr(theirs, "vision_config", theirs))
    assert sum(p.numel() for p in theirs.parameters()) == count
    assert sum(p.numel() for p in ours.parameters()) + (config.width if kind == "dinov2" else 0) == count


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_what_a_whole_model_s_vision_config_leaves_out_is_the_library_s_default(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "vision_config": {"num_hidden_layers": 2}}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).vision_config
    _, ours = read_config(tmp_path / "config.json")
    assert ours.depth == 2
    found = (ours.image_size, ours.patch_size, ours.width, ours.heads, ours.mlp_width, ours.activation, ours.norm_eps)
    assert found == (
        theirs.image_size, theirs.patch_size, theirs.hidden_size, theirs.num_attention_heads, theirs.intermediate_size,
        theirs.hidden_act, theirs.layer_norm_eps)  # fmt: skip


# ------------------------------------------------------------------------- every tensor, strictly


def used(path: Path) -> list[str]:
    """The tensors of the file that the ViT is made of, by the reference's account: all of the vision tower."""
    others = ("text_model", "logit", "text_projection", "visual_projection", "heads", "mask_token", "embeddings.mask")
    return [name for name in weights_of(path) if not name.startswith(others)]


def refusal(path: Path, *words: str, **how) -> str:
    """Loading raises an InputError of one line that holds the words."""
    with pytest.raises(InputError) as error:
        ViT.from_pretrained(path, **how)
    text = str(error.value)
    assert text.isprintable()
    for word in words:
        assert word in text, text
    return text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_missing_tensor_is_named(tmp_path, layout):
    path = make(tmp_path, layout)
    tensors = weights_of(path)
    for name in used(path):
        write(path, {k: t for k, t in tensors.items() if k != name})
        refusal(path, str(tmp_path), "missing", name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_misshapen_tensor_is_named_with_its_shapes(tmp_path, layout):
    """One row more, three where there are three parts. A file alone tells the width of the MLP by its first layer:
    when that is wrong, its bias is what does not fit."""
    path = make(tmp_path, layout)
    tensors = weights_of(path)
    for name in used(path):
        tensor = tensors[name]
        rows = 3 if "in_proj" in name or "qkv" in name else 1
        if tensor.dim() > 1 and len(tensor) == 1:  # a leading one counts no rows, and may go untold
            wrong = torch.cat([tensor, tensor[..., :1, :]], dim=-2)
        else:
            wrong = torch.cat([tensor, tensor[:rows]])
        write(path, tensors | {name: wrong})
        told = [n // rows if rows == 3 and i == 0 else n for i, n in enumerate(wrong.shape)]
        first = layout.endswith(".pth") and name.endswith((".0.mlp.fc1.weight", "encoder_layer_0.mlp.0.weight"))
        text = refusal(path, str(tmp_path), name.replace("weight", "bias") if first else name)
        assert "expected" in text and (first or str(told) in text or str(told[1:]) in text), text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_extra_tensor_is_named(tmp_path, layout):
    path = make(tmp_path, layout)
    tensors = weights_of(path)
    known = next(iter(used(path)))
    for name in (f"{known}.more", "logit_scale_2", "head.weight", "embeddings.mask_tokens"):
        write(path, tensors | {name: torch.zeros(2)})
        refusal(path, str(tmp_path), "unexpected", name)


@pytest.mark.parametrize("layout", ["clip", "siglip", "dinov2", "dinov2.pth", "torchvision.pth"])
def test_what_is_left_out_is_named_in_the_map_and_nothing_else(tmp_path, layout):
    public = read_public(make(tmp_path, layout))
    assert set(public.tensors) == set(public.names.values()) | set(public.left)
    assert public.left and not set(public.left) & set(public.names.values())
    assert public.names == expand(public.names, 1)  # no N or * is left


def test_older_files_position_ids_are_no_weights(tmp_path):
    """Model seed 0; towers of transformers before 4.31 hold a row of whole numbers."""
    for kind in ("clip", "siglip"):
        make_hf(tmp_path, kind)
        ids = {f"{half}_model.embeddings.position_ids": torch.arange(7)[None] for half in ("vision", "text")}
        write(tmp_path, weights_of(tmp_path) | ids)
        expected = weights_of(tmp_path)["vision_model.embeddings.position_embedding.weight"]
        assert torch.equal(ViT.from_pretrained(tmp_path).position, expected)


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind, fields, words", [
    ("dinov2", {"use_swiglu_ffn": True}, ["use_swiglu_ffn", "SwiGLU", "not supported"]),
    ("dinov2", {"model_type": "dinov2_with_registers"}, ["'dinov2_with_registers'", "siglip", "dinov2", "torchvision"]),
    ("dinov2", {"hidden_act": "relu"}, ["hidden_act", "'relu'", "gelu_pytorch_tanh"]),
    ("dinov2", {"mlp_ratio": "4"}, ["'mlp_ratio'", "a number"]),
    ("dinov2", {"num_hidden_layers": 0}, ["num_hidden_layers is 0", "at least 1"]),
    ("dinov2", {"num_hidden_layers": 2**40}, ["num_hidden_layers", "at most 1000"]),
    ("dinov2", {"image_size": 2**40}, ["image_size", "at most 16384"]),
    ("dinov2", {"mlp_ratio": 1e300}, ["mlp_ratio", "at most 1000"]),
    ("dinov2", {"layer_norm_eps": -1}, ["layer_norm_eps", "at least 0"]),
    ("siglip_vision_model", {"vision_use_head": False}, ["vision_use_head", "not supported"]),
    ("siglip_vision_model", {"patch_size": None}, ["'patch_size'", "missing"]),
    ("siglip", {"vision_config": None}, ["'vision_config'", "missing"]),
    ("siglip", {"vision_config": {"image_size": [24, 24]}}, ["vision_config", "'image_size'", "whole number"]),
    ("siglip", {"model_type": "siglip2"}, ["model_type", "'siglip2'", "supported vision models: clip_vision_model"]),
    ("clip", {"vision_config": {"hidden_size": 770}}, ["vision_config", "770", "num_attention_heads 12"]),
])  # fmt: skip
def test_an_unsupported_config_is_refused(tmp_path, kind, fields, words):
    make_hf(tmp_path, kind)
    change(tmp_path / "config.json", **fields)
    refusal(tmp_path, str(tmp_path / "config.json"), *words)


@pytest.mark.parametrize("layout, changes, words", [
    ("dinov2.pth", {"register_tokens": (1, 4, 384)}, ["register_tokens", "not supported"]),
    ("dinov2.pth", {"blocks.0.mlp.w12.weight": (8, 384)}, ["w12", "SwiGLU", "not supported"]),
    ("dinov2.pth", {"patch_embed.proj.weight": (400, 3, 4, 4)}, ["[400, 3, 4, 4]", "384, 768, 1024", "heads"]),
    ("dinov2.pth", {"patch_embed.proj.weight": (384, 3, 0, 0)}, ["patch_embed.proj.weight", "[384, 3, 0, 0]"]),
    ("dinov2.pth", {"pos_embed": (1, 36, 384)}, ["pos_embed", "[1, 36, 384]", "square"]),
    ("dinov2.pth", {"pos_embed": (37, 384)}, ["pos_embed", "[37, 384]", "[1 P D]"]),
    ("torchvision.pth", {"conv_proj.weight": (384, 3, 8, 8)}, ["conv_proj.weight", "768, 1024, 1280", "heads"]),
])  # fmt: skip
def test_an_unsupported_file_is_refused(tmp_path, layout, changes, words):
    path = make(tmp_path, layout)
    write(path, weights_of(path) | {name: torch.zeros(shape) for name, shape in changes.items()})
    refusal(path, str(path), *words)


def test_a_file_of_another_model_is_refused(tmp_path):
    write(tmp_path / "resnet.pth", {"conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)})
    refusal(tmp_path / "resnet.pth", str(tmp_path / "resnet.pth"), "torchvision", "DINOv2", "conv1.weight")
    refusal(tmp_path / "gone.pth", str(tmp_path / "gone.pth"), "expected a folder, a file or a hub id")


def test_pixels_that_contradict_the_model_are_refused(tmp_path):
    make_hf(tmp_path, "clip")
    change(tmp_path / "preprocessor_config.json", size={"shortest_edge": 32}, crop_size=32)
    refusal(tmp_path, "preprocessor_config.json", "32", "24", "image_size")


# ------------------------------------------------------------------------------- published pixels


@pytest.mark.parametrize("kind, expected", [
    ("clip", Pixels(24, 24)),
    ("siglip", Pixels(24, 24, True, "bicubic", HALF, HALF)),
    ("dinov2", Pixels(224, 256, False, "bicubic", IMAGENET_MEAN, IMAGENET_STD)),
])  # fmt: skip
def test_without_a_preprocessor_s_file_pixels_are_the_family_s(tmp_path, kind, expected):
    make_hf(tmp_path, kind, patch_size=8)
    (tmp_path / "preprocessor_config.json").unlink(missing_ok=True)
    vit = ViT.from_pretrained(tmp_path)
    assert vit.pixels == expected and vit.config.image_size == expected.size


def test_a_vit_in_use_can_be_resized():
    """Seed 24; what it is fed and how many tokens come out follow."""
    torch.manual_seed(24)
    vit = ViT(ViTConfig(16, 4, 16, 1, 2, 24, "gelu", 1e-6), HALF, HALF)
    vit.position.requires_grad_(False)
    vit.resize(28)
    assert vit.config.image_size == 28 and vit.pixels == Pixels(28, 28, False, "bicubic", HALF, HALF)
    assert vit(torch.randn(2, 3, 28, 28)).shape == (2, 1 + 7**2, 16)
    assert not vit.position.requires_grad


def test_another_size_keeps_the_share_that_is_cropped_away(tmp_path):
    make_facebook(tmp_path / "dinov2.pth", patch_size=14, image_size=70)
    pixels = ViT.from_pretrained(tmp_path / "dinov2.pth", image_size=448).pixels
    assert pixels == Pixels(448, 512, False, "bicubic", IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("build, weights", [
    ("vit_b_16", "IMAGENET1K_V1"), ("vit_b_32", "IMAGENET1K_V1"), ("vit_l_16", "IMAGENET1K_V1"),
    ("vit_l_32", "IMAGENET1K_V1"), ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"), ("vit_l_16", "IMAGENET1K_SWAG_E2E_V1"),
    ("vit_h_14", "IMAGENET1K_SWAG_E2E_V1"), ("vit_h_14", "IMAGENET1K_SWAG_LINEAR_V1"),
])  # fmt: skip
def test_torchvision_s_pixels_are_those_of_its_own_presets(monkeypatch, build, weights):
    """Every published file but the two that no tensor tells from older ones; its tensors on the meta device."""
    weights = get_model_weights(build)[weights]
    preset, size = weights.transforms(), weights.meta["min_size"][0]
    assert preset.crop_size == [size]
    with torch.device("meta"):
        theirs = getattr(torchvision_vit, build)(image_size=size)
    monkeypatch.setattr(vit_public, "read_tensors", lambda path: (theirs.state_dict(), path))
    found = read_public("vit.pth").pixels
    expected = (preset.resize_size[0], preset.interpolation.value, tuple(preset.mean), tuple(preset.std))
    assert (found.size, found.squash) == (size, False)
    assert (found.resize, found.interpolation, found.mean, found.std) == expected
