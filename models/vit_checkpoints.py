"""Public vision models: their configs, tensors and preprocessing, as `vit.py` needs them.

Four families. Three are folders, told apart by `model_type` in config.json; torchvision's models are bare files of
weights (.pth).

    family       model_type                     peculiarities
    CLIP         clip_vision_model, clip        a norm before the blocks
    SigLIP       siglip_vision_model, siglip    no class token; pooling by attention, or no pooling
    DINOv2       dinov2                         LayerScale; trained at 518 pixels, mostly used at 224
    torchvision  -                              ImageNet classifiers, vit_*

Models of type `clip` and `siglip` also contain a text encoder, which is ignored. Three more families exist only within
multimodal models: `idefics3` (`smolvlm.py`), SigLIP without pooling, `internvl` (`internvl.py`), DINOv2 without its
last norm, and `qwen3_vl` (`qwen3_vl.py`), on pairs of frames. Configs are dicts of the fields of `vit.ViTConfig`.

Shapes: P tokens per image, D width.

References
[1] CLIP, https://arxiv.org/abs/2103.00020; SigLIP, https://arxiv.org/abs/2303.15343; DINOv2,
    https://arxiv.org/abs/2304.07193; ViT, https://arxiv.org/abs/2010.11929.
[2] Defaults: transformers, models/{clip,siglip,dinov2,idefics3,internvl}/configuration_*.py. Shapes and preprocessing
    of published weights: torchvision, models/vision_transformer.py.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import InputError, reading
from common.files import field, one_of, read_json
from common.preprocessing import HALF, IMAGENET_MEAN, IMAGENET_STD, Preprocessing, preprocessor_file, read_preprocessing
from models.names import OLD_MLP, VITS, read_columns, read_fields

VIT_FIELDS = read_columns("""
    ours         config.json         clip         siglip              idefics3            dinov2 internvl torchvision
    image_size   image_size          224          224                 224                 224    448      224
    patch_size   patch_size          32           16                  32                  14     14       16
    width        hidden_size         768          768                 1152                768    1024     768
    depth        num_hidden_layers   12           12                  12                  12     24       12
    heads        num_attention_heads 12           12                  16                  12     16       12
    mlp_width    intermediate_size   3072         3072                3072                -      4096     3072
    mlp_ratio    mlp_ratio           -            -                   -                   4.0    -        -
    activation   hidden_act          'quick_gelu' 'gelu_pytorch_tanh' 'gelu_pytorch_tanh' 'gelu' 'gelu'   'gelu'
    norm_eps     layer_norm_eps      1e-5         1e-6                1e-6                1e-6   1e-6     1e-6
    pooling_head vision_use_head     -            True                -                   -      -        -
    class_token  -                   True         False               False               True   True     True
    patch_bias   -                   False        True                True                True   True     True
    pre_norm     -                   True         False               False               False  False    False
    layer_scale  -                   False        False               False               True   True     False
    post_norm    -                   True         True                True                True   False    True
    final_norm   -                   False        True                True                True   False    True
""")  # defaults of [2]
VIT_FIELDS["qwen3_vl"] = VIT_FIELDS["idefics3"] | {
    "depth": "27", "patch_size": "16", "mlp_width": "4304", "post_norm": "False", "final_norm": "False"}
MODEL_TYPES = ("clip_vision_model", "clip", "siglip_vision_model", "siglip", "dinov2")
HEADS = {768: 12, 1024: 16, 1280: 16}  # of torchvision's models, for each width


@dataclass(frozen=True)
class PublicViT:
    """What is known of a public ViT before its tensors are copied."""

    family: str
    config: dict[str, Any]  # image_size is that of the position embeddings
    preprocessing: Preprocessing
    names: dict[str, str]  # a column of `names.VITS`
    where: Path  # the file that errors name


# --------------------------------------------------------------------------------------- configs


def read_vit_folder(folder: Path) -> PublicViT:
    """Reads a folder's config.json and preprocessor_config.json. Raises InputError if they are not supported."""
    path, where = preprocessor_file(folder), folder / "config.json"
    config = read_json(where)
    kind = one_of(config, "model_type", MODEL_TYPES, where)
    family = kind.removesuffix("_vision_model")
    if kind in ("clip", "siglip"):
        config = field(config, "vision_config", dict, where)
    config = parse_vit_config(config, family, where)
    preprocessing = default_preprocessing(family, config)
    if path.exists():
        preprocessing = read_preprocessing(path, preprocessing)
    if family != "dinov2":
        check_frame_size(preprocessing, config, path)
    return PublicViT(family, config, preprocessing, VITS[family], where)


def parse_vit_config(published: dict[str, Any], family: str, where: str | Path) -> dict[str, Any]:
    """The fields of a ViTConfig from those of a public config. Raises an InputError that begins with `where`."""
    if field(published, "use_swiglu_ffn", bool, where, False):
        raise InputError(f"{where}: use_swiglu_ffn is true: DINOv2 giant and its SwiGLU are not supported")
    config = read_fields(published, VIT_FIELDS, family, where)
    if family == "dinov2":
        config["mlp_width"] = int(config["width"] * config.pop("mlp_ratio"))
    return config


def read_vit_file(tensors: dict[str, Tensor], path: Path) -> PublicViT:
    """The same of a .pth file of torchvision, from the shapes of its tensors. Raises InputError."""
    blocks = "encoder.layers.encoder_layer_"
    is_old = f"{blocks}0.mlp.linear_1.weight" in tensors
    if "conv_proj.weight" not in tensors:
        raise InputError(f"{path}: expected a folder, or conv_proj.weight and other tensors of torchvision's vit_*")
    with reading(path):
        width, _, patch, _ = tensors["conv_proj.weight"].shape
        _, positions, _ = tensors["encoder.pos_embedding"].shape
        mlp_width, _ = tensors[f"{blocks}0.mlp.{'linear_1' if is_old else '0'}.weight"].shape
        if width not in HEADS:
            raise InputError(f"conv_proj.weight is {width} wide, expected {[*HEADS]}; the heads of others are unknown")
    depth = len({name.removeprefix(blocks).split(".")[0] for name in tensors if name.startswith(blocks)})
    shape = {"image_size": math.isqrt(positions - 1) * patch, "patch_size": patch, "hidden_size": width,
             "num_hidden_layers": depth, "num_attention_heads": HEADS[width], "intermediate_size": mlp_width}
    config, names = parse_vit_config(shape, "torchvision", path), VITS["torchvision"] | (OLD_MLP if is_old else {})
    return PublicViT("torchvision", config, default_preprocessing("torchvision", config), names, path)


def default_preprocessing(family: str, config: dict[str, Any]) -> Preprocessing:
    """The family's usual preprocessing for a ViT of this shape."""
    size, width = config["image_size"], config["width"]
    if family == "siglip":
        return Preprocessing(size, size, squash=True, mean=HALF, std=HALF)
    if family == "clip":
        return Preprocessing(size, size)
    imagenet = Preprocessing(224, 256, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    if family == "dinov2":
        return imagenet
    # torchvision: only its SWAG weights have these sizes. (Its SWAG_LINEAR weights of 224 pixels and smaller widths
    # cannot be told from the older weights, and get their preprocessing.)
    if size > 224 or width == 1280:
        return replace(imagenet, size=size, resize=size)
    resize = 242 if (width, config["patch_size"]) == (1024, 16) else 256  # vit_l_16
    return replace(imagenet, resize=resize, interpolation="bilinear").scaled(size)


def check_frame_size(preprocessing: Preprocessing, config: dict[str, Any], path: Path) -> None:
    """Raises InputError unless frames get the size of the position embeddings."""
    if preprocessing.size != config["image_size"]:
        found, expected = preprocessing.size, config["image_size"]
        raise InputError(f"{path}: its frames are {found} pixels high, expected the {expected} of config.json")


# --------------------------------------------------------------------------------------- tensors


def adapt_tensors(module: nn.Module, tensors: dict[str, Tensor], names: dict[str, str]) -> None:
    """Replaces tensors of a file by views: fused query, key and value are split into three, leading dimensions of size
    1 that ours do not have are removed."""
    for ours, target in module.state_dict().items():
        theirs = names[ours]
        fused = theirs.removesuffix("[q]")
        if fused != theirs and fused in tensors:
            parts = torch.atleast_1d(tensors.pop(fused)).tensor_split(3)
            tensors |= zip((f"{fused}[{letter}]" for letter in "qkv"), parts, strict=True)
        while theirs in tensors and tensors[theirs].dim() > target.dim() and len(tensors[theirs]) == 1:
            tensors[theirs] = tensors[theirs][0]
