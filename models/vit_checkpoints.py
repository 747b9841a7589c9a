"""Public vision models: their configs, tensors and preprocessing, as `vit.py` needs them.

Four families, told apart by `model_type` in config.json, or by the names of the tensors in a bare file of
weights (.pth):

    family       model_type                     file of weights   peculiarities
    CLIP         clip_vision_model, clip        -                 a norm before the blocks
    SigLIP       siglip_vision_model, siglip    -                 no class token; pooling by attention, or no pooling
    DINOv2       dinov2                         facebookresearch  LayerScale; trained at 518 pixels, mostly used at 224
    torchvision  -                              vit_*             ImageNet classifiers

Models of type `clip` and `siglip` also contain a text encoder, which is ignored. A `kind` is a model_type or
"FAMILY file". Configs are dicts of the fields of `vit.ViTConfig`. A fifth family, `idefics3`, exists only within
multimodal models (`mllm_checkpoints.py`): SigLIP without pooling.

Letters: P tokens an image, D width.

References
[1] CLIP, https://arxiv.org/abs/2103.00020; SigLIP, https://arxiv.org/abs/2303.15343; DINOv2,
    https://arxiv.org/abs/2304.07193; ViT, https://arxiv.org/abs/2010.11929.
[2] Defaults: transformers, models/{clip,siglip,dinov2}/configuration_*.py. Shapes and preprocessing of published
    weights: torchvision, models/vision_transformer.py; https://github.com/facebookresearch/dinov2.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError
from common.files import REQUIRED, bounded, field, read_json
from common.preprocessing import HALF, IMAGENET_MEAN, IMAGENET_STD, Preprocessing, read_preprocessing
from models.vit_names import (
    CLIP,
    DINOV2,
    DINOV2_FILE,
    IGNORED_TENSORS,
    SIGLIP,
    TORCHVISION,
    TORCHVISION_2022,
    expand,
)
from models.weights import read_tensors

NOT_CLIP = {"patch_bias": True, "pre_norm": False, "final_norm": True}
FAMILY_FIELDS = {  # where a family differs from ViTConfig's defaults
    "clip": {},
    "siglip": NOT_CLIP | {"class_token": False},
    "idefics3": NOT_CLIP | {"class_token": False},
    "dinov2": NOT_CLIP | {"layer_scale": True},
    "torchvision": NOT_CLIP,
}


def clip_tensor_names(config) -> dict[str, str]:
    """For a `vit.ViTConfig`: our parameter name -> the name in a public CLIP vision checkpoint."""
    return expand(CLIP, config.depth)


# --------------------------------------------------------------------------------------- configs

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
BASE = {"image_size": 224, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072}  # fmt: skip
VISION_DEFAULTS = {  # of `vision_config`
    "clip": BASE | {"patch_size": 32}, "siglip": BASE | {"patch_size": 16},
    "idefics3": {"num_hidden_layers": 12, "intermediate_size": 3072},
}  # fmt: skip


def read_vit_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Reads a public config.json; returns its model_type and the ViT's config. Raises InputError."""
    config = read_json(path)
    kind = field(config, "model_type", str, path)
    if kind not in IGNORED_TENSORS:
        supported = [kind for kind in IGNORED_TENSORS if not kind.endswith("file")]
        raise InputError(f"{path}: model_type is {kind!r}, supported vision models: {', '.join(supported)}, "
                         "and the .pth files of torchvision's vit_* and of DINOv2")  # fmt: skip
    family = kind.removesuffix("_vision_model")
    where, defaults = str(path), VISION_DEFAULTS.get(kind, {})
    if kind in VISION_DEFAULTS:
        config, where = field(config, "vision_config", dict, path), f"{path}: vision_config"
    return kind, parse_vit_config(config, family, where, defaults)


def parse_vit_config(config: dict[str, Any], family: str, where: str, defaults: dict[str, int]) -> dict[str, Any]:
    """The ViT's config from the fields of a public one; `defaults` has the values of missing sizes.

    Raises an InputError that starts with `where`.
    """

    def number(name: str) -> int:
        most = {"num_hidden_layers": 1000, "image_size": 2**14}.get(name, 2**24)
        return bounded(config, name, int, where, 1, most, defaults.get(name, REQUIRED))

    activation = {"clip": "quick_gelu", "dinov2": "gelu"}.get(family, "gelu_pytorch_tanh")
    activation = field(config, "hidden_act", str, where, activation)
    if activation not in ACTIVATIONS:
        raise InputError(f"{where}: hidden_act is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if field(config, "use_swiglu_ffn", bool, where, False):
        raise InputError(f"{where}: use_swiglu_ffn is true: DINOv2 giant and its SwiGLU are not supported")
    size, patch, width, heads = map(number, ("image_size", "patch_size", "hidden_size", "num_attention_heads"))
    if patch > size or width % heads:
        raise InputError(f"{where}: expected image_size {size} to be at least patch_size {patch}, "
                         f"hidden_size {width} a multiple of num_attention_heads {heads}")  # fmt: skip
    depth = number("num_hidden_layers")
    if family == "dinov2":
        mlp_width = int(width * bounded(config, "mlp_ratio", float, where, 1e-3, 1000, 4.0))
        if mlp_width < 1:
            raise InputError(f"{where}: mlp_ratio: expected hidden_size * mlp_ratio of at least 1")
    else:
        mlp_width = number("intermediate_size")
    norm_eps = bounded(config, "layer_norm_eps", float, where, 0, 1, 1e-5 if family == "clip" else 1e-6)
    return FAMILY_FIELDS[family] | dict(
        image_size=size, patch_size=patch, width=width, depth=depth, heads=heads, mlp_width=mlp_width,
        activation=activation, norm_eps=norm_eps,
        pooling_head=family == "siglip" and field(config, "vision_use_head", bool, where, True),
    )  # fmt: skip


def infer_vit_config(family: str, names: dict[str, str], tensors: dict[str, Tensor], where: Path) -> dict[str, Any]:
    """The ViT's config from the shapes of its tensors; the number of heads is that of the published model."""
    kernel = names["patch.*"].replace("*", "weight")
    width, _, patch, _ = _shape(tensors, kernel, "D 3 patch patch", where)
    _, positions, _ = _shape(tensors, names["position"], "1 P D", where)
    up = names["blocks.N.mlp.up.*"].replace("*", "weight")
    mlp_width, _ = _shape(tensors, up.replace("N", "0"), "mlp_width D", where)
    heads = {"dinov2": {384: 6, 768: 12, 1024: 16}, "torchvision": {768: 12, 1024: 16, 1280: 16}}[family]
    if width not in heads or patch < 1:
        raise InputError(f"{where}: tensor {kernel} is {list(tensors[kernel].shape)}, expected a width of "
                         f"{', '.join(map(str, heads))} (the number of heads of others is unknown)")  # fmt: skip
    side = math.isqrt(max(positions - 1, 0))
    if side < 1 or side**2 + 1 != positions:
        raise InputError(f"{where}: tensor {names['position']} is {list(tensors[names['position']].shape)}, "
                         "expected a row for the class token and rows for a square of patches")  # fmt: skip
    prefix = up.partition("N")[0]
    depth = len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})
    return FAMILY_FIELDS[family] | dict(
        image_size=side * patch, patch_size=patch, width=width, depth=depth, heads=heads[width], mlp_width=mlp_width,
        activation="gelu", norm_eps=1e-6,
    )  # fmt: skip


def _shape(tensors: dict[str, Tensor], name: str, expected: str, where: Path) -> list[int]:
    """The shape of a tensor, which must have as many dimensions as `expected` has words."""
    if name not in tensors:
        raise InputError(f"{where}: tensor {name} is missing, expected [{expected}]")
    if tensors[name].dim() != len(expected.split()):
        raise InputError(f"{where}: tensor {name} is {list(tensors[name].shape)}, expected [{expected}]")
    return list(tensors[name].shape)


# --------------------------------------------------------------------------------- preprocessing


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


def read_folder_preprocessing(folder: Path, family: str, config: dict[str, Any]) -> Preprocessing:
    """What preprocessor_config.json says, if the folder has one. Raises InputError if it does not fit config.json."""
    preprocessing, path = default_preprocessing(family, config), folder / "preprocessor_config.json"
    if path.exists():
        preprocessing = read_preprocessing(path, preprocessing)
    if family != "dinov2" and preprocessing.size != config["image_size"]:
        raise InputError(f"{path}: its images are {preprocessing.size} pixels wide, expected {config['image_size']}, "
                         "the image_size of config.json")  # fmt: skip
    return preprocessing


def check_vit_config(folder: Path) -> None:
    """Raises InputError unless the folder's configs, without its weights, are of a supported ViT."""
    kind, config = read_vit_config(folder / "config.json")
    read_folder_preprocessing(folder, kind.removesuffix("_vision_model"), config)


# ----------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class ViTCheckpoint:
    """A checkpoint, ready for `copy_strict`."""

    config: dict[str, Any]  # image_size is that of the position embeddings
    preprocessing: Preprocessing
    tensors: dict[str, Tensor]
    names: dict[str, str]  # our parameter -> its tensor
    where: Path  # the file that errors name
    ignored: list[str]  # tensors that are not part of the ViT
    align_corners: bool = False  # how the family interpolates its position embeddings


def read_vit_checkpoint(path: str | Path) -> ViTCheckpoint:
    """Reads a model's folder, or a .pth file of torchvision or facebookresearch. Raises InputError.

    Tensors are those of the file or views of them: fused query, key and value are split into three; `cls`, `position`
    and `head.probe` lose their leading dimensions of size 1.
    """
    path = Path(path)
    if path.is_file() or path.suffix == ".pth":
        tensors, where = read_tensors(path)
        family, names = _detect_family(tensors, where)
        kind, config = f"{family} file", infer_vit_config(family, names, tensors, where)
        preprocessing = default_preprocessing(family, config)
    else:
        kind, config = read_vit_config(path / "config.json")
        family = kind.removesuffix("_vision_model")
        preprocessing = read_folder_preprocessing(path, family, config)
        tensors, where = read_tensors(path)
        names = vit_tensor_names(family, config)
        if not any(name.startswith("vision_model.") for name in tensors):  # transformers 5 omits the prefix
            names = {ours: theirs.removeprefix("vision_model.") for ours, theirs in names.items()}
    names = expand(names, config["depth"])
    tensors = _squeeze_leading(_split_fused(tensors, names), names)
    prefixes = tuple(name for name in IGNORED_TENSORS[kind] if name.endswith("."))
    ignored = [name for name in tensors if name in IGNORED_TENSORS[kind] or name.startswith(prefixes)]
    return ViTCheckpoint(config, preprocessing, tensors, names, where, ignored, align_corners=family == "torchvision")


def vit_tensor_names(family: str, config: dict[str, Any]) -> dict[str, str]:
    """Our parameter -> the published name of its tensor in a folder, not expanded."""
    names = {"clip": CLIP, "siglip": SIGLIP, "idefics3": SIGLIP, "dinov2": DINOV2}[family]
    has_head = config.get("pooling_head", False)
    return {ours: theirs for ours, theirs in names.items() if has_head or not ours.startswith("head.")}


def _detect_family(tensors: dict[str, Tensor], where: Path) -> tuple[str, dict[str, str]]:
    """The family of a bare file of weights, and its name map."""
    if any(name.startswith("encoder.layers.encoder_layer_") for name in tensors):
        old_names = any(".mlp.linear_1." in name for name in tensors)
        return "torchvision", TORCHVISION_2022 if old_names else TORCHVISION
    if any(name.endswith("ls1.gamma") for name in tensors):
        for name, what in (("register_tokens", "register tokens"), ("blocks.0.mlp.w12.weight", "SwiGLU (giant)")):
            if name in tensors:
                raise InputError(f"{where}: has {name}: DINOv2 with {what} is not supported")
        return "dinov2", DINOV2_FILE
    found = ", ".join(sorted(tensors)[:3]) or "none"
    raise InputError(f"{where}: expected the tensors of torchvision's vit_* or of DINOv2, found {found}; other models "
                     "need their folder with config.json")  # fmt: skip


def _split_fused(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Replaces each fused tensor NAME by NAME[q], NAME[k] and NAME[v]."""
    tensors = dict(tensors)
    for name in [theirs.removesuffix("[q]") for theirs in names.values() if theirs.endswith("[q]")]:
        fused = tensors.pop(name, None)
        if fused is not None:  # copy_strict reports missing tensors, and misshapen parts
            parts = torch.atleast_1d(fused).tensor_split(3)
            tensors |= zip((f"{name}[{letter}]" for letter in "qkv"), parts, strict=True)
    return tensors


def _squeeze_leading(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Removes leading dimensions of size 1 that our parameters do not have."""
    tensors = dict(tensors)
    for ours, dims in (("cls", 1), ("position", 2), ("head.probe", 1)):
        theirs = names.get(ours)
        while theirs in tensors and tensors[theirs].dim() > dims and len(tensors[theirs]) == 1:
            tensors[theirs] = tensors[theirs][0]
    return tensors
