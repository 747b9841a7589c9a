"""Public vision models -> the shape, the tensors and the pixels of our ViT (`vit.py`).

Four families, told apart by `model_type` in config.json, or by the names of the tensors when there is nothing but
a file of weights (.pth):

    family       model_type                     file of weights   what is peculiar
    CLIP         clip_vision_model, clip        -                 a norm before the blocks
    SigLIP       siglip_vision_model, siglip    -                 no class token; a head pools with attention
    DINOv2       dinov2                         facebookresearch  LayerScale; made for 518 pixels, mostly fed 224
    torchvision  -                              vit_*             classifiers of ImageNet

`clip` and `siglip` are whole models: the text half is known by name, and left. Letters: P tokens an image, D width.

References
[1] CLIP, https://arxiv.org/abs/2103.00020; SigLIP, https://arxiv.org/abs/2303.15343; DINOv2,
    https://arxiv.org/abs/2304.07193; ViT, https://arxiv.org/abs/2010.11929.
[2] Defaults: transformers, models/{clip,siglip,dinov2}/configuration_*.py; the shapes and the pixels of published
    weights: torchvision, models/vision_transformer.py; https://github.com/facebookresearch/dinov2.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import read_tensors
from pixels import HALF, IMAGENET_MEAN, IMAGENET_STD, Pixels, read_pixels
from vit_layouts import CLIP, DINOV2, DINOV2_FILE, LEFT, SIGLIP, TORCHVISION, TORCHVISION_2022, expand
from weights import REQUIRED, InputError, bounded, field, read_json


@dataclass(frozen=True)
class ViTConfig:
    """Shape of a ViT; sizes in pixels and channels. The switches' defaults make it CLIP's."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str  # quick_gelu, gelu or gelu_pytorch_tanh
    norm_eps: float
    class_token: bool = True
    patch_bias: bool = False
    pre_norm: bool = True  # a norm between the embeddings and the blocks
    layer_scale: bool = False  # learnt gains of what attention and MLP add, one a channel
    final_norm: bool = False  # the reference's last hidden state is after the final norm
    attention_head: bool = False  # a learnt query attends to the patches: `pooled`


PLAIN = {"patch_bias": True, "pre_norm": False, "final_norm": True}
SWITCHES = {
    "clip": {},
    "siglip": PLAIN | {"class_token": False, "attention_head": True},
    "dinov2": PLAIN | {"layer_scale": True},
    "torchvision": PLAIN,
}


def vit_names(config: ViTConfig) -> dict[str, str]:
    """Our parameter name -> the name in a public CLIP vision checkpoint."""
    return expand(CLIP, config.depth)


# --------------------------------------------------------------------------------------- configs

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
BASE = {"image_size": 224, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072}  # fmt: skip
WHOLE = {"clip": BASE | {"patch_size": 32}, "siglip": BASE | {"patch_size": 16}}  # what `vision_config` may leave out


def read_config(path: Path) -> tuple[str, ViTConfig]:
    """A model's config.json -> its model_type, the shape of its ViT. Raises InputError."""
    config = read_json(path)
    kind = field(config, "model_type", str, path)
    if kind not in LEFT:
        known = [kind for kind in LEFT if not kind.endswith("file")]
        raise InputError(f"{path}: model_type is {kind!r}, supported vision models: {', '.join(known)}, "
                         "and the .pth files of torchvision's vit_* and of DINOv2")  # fmt: skip
    family = kind.removesuffix("_vision_model")
    where, default = str(path), WHOLE.get(kind, {})
    if kind in WHOLE:
        config, where = field(config, "vision_config", dict, path), f"{path}: vision_config"

    def number(name: str) -> int:
        most = {"num_hidden_layers": 1000, "image_size": 2**14}.get(name, 2**24)
        return bounded(config, name, int, where, 1, most, default.get(name, REQUIRED))

    activation = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh", "dinov2": "gelu"}[family]
    activation = field(config, "hidden_act", str, where, activation)
    if activation not in ACTIVATIONS:
        raise InputError(f"{where}: hidden_act is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if field(config, "use_swiglu_ffn", bool, where, False):
        raise InputError(f"{where}: use_swiglu_ffn is true: DINOv2 giant and its SwiGLU are not supported")
    if not field(config, "vision_use_head", bool, where, True):
        raise InputError(f"{where}: vision_use_head is false: SigLIP without its pooling head is not supported")
    size, patch, width, heads = map(number, ("image_size", "patch_size", "hidden_size", "num_attention_heads"))
    if not (1 <= patch <= size and 1 <= heads <= width) or width % heads:
        raise InputError(f"{where}: expected image_size {size} to be at least patch_size {patch}, "
                         f"hidden_size {width} a multiple of num_attention_heads {heads}")  # fmt: skip
    depth = number("num_hidden_layers")
    if family == "dinov2":
        mlp_width = int(width * bounded(config, "mlp_ratio", float, where, 1e-3, 1000, 4.0))
    else:
        mlp_width = number("intermediate_size")
    if min(depth, mlp_width) < 1:
        raise InputError(f"{where}: expected blocks and MLPs of at least one, found {depth} and {mlp_width}")
    return kind, ViTConfig(
        image_size=size,
        patch_size=patch,
        width=width,
        depth=depth,
        heads=heads,
        mlp_width=mlp_width,
        activation=activation,
        norm_eps=bounded(config, "layer_norm_eps", float, where, 0, 1, 1e-5 if family == "clip" else 1e-6),
        **SWITCHES[family],
    )


def _sizes(tensors: dict[str, Tensor], name: str, form: str, where: Path) -> list[int]:
    """The tensor's shape, of as many sizes as `form` has words."""
    if name not in tensors:
        raise InputError(f"{where}: tensor {name} is missing, expected [{form}]")
    if tensors[name].dim() != len(form.split()):
        raise InputError(f"{where}: tensor {name} is {list(tensors[name].shape)}, expected [{form}]")
    return list(tensors[name].shape)


def config_of(family: str, names: dict[str, str], tensors: dict[str, Tensor], where: Path) -> ViTConfig:
    """The shape of a ViT told by its tensors and, for the number of heads, by what has been published."""
    kernel = names["patch.*"].replace("*", "weight")
    width, _, patch, _ = _sizes(tensors, kernel, "D 3 patch patch", where)
    _, positions, _ = _sizes(tensors, names["position"], "1 P D", where)
    up = names["blocks.N.mlp.up.*"].replace("*", "weight")
    mlp_width, _ = _sizes(tensors, up.replace("N", "0"), "hidden D", where)
    published = {"dinov2": {384: 6, 768: 12, 1024: 16}, "torchvision": {768: 12, 1024: 16, 1280: 16}}[family]
    if width not in published or patch < 1:
        raise InputError(f"{where}: tensor {kernel} is {list(tensors[kernel].shape)}, expected a width of "
                         f"{', '.join(map(str, published))} (of others the number of heads is not known)")  # fmt: skip
    side = math.isqrt(max(positions - 1, 0))
    if side < 1 or side**2 + 1 != positions:
        raise InputError(f"{where}: tensor {names['position']} is {list(tensors[names['position']].shape)}, "
                         "expected a class token's row and those of a square of patches")  # fmt: skip
    before = up.partition("N")[0]
    depth = len({name.removeprefix(before).split(".")[0] for name in tensors if name.startswith(before)})
    return ViTConfig(side * patch, patch, width, depth, published[width], mlp_width, "gelu", 1e-6, **SWITCHES[family])


def default_pixels(family: str, config: ViTConfig) -> Pixels:
    """What the family's authors fed to a ViT of this shape."""
    size = config.image_size
    if family == "siglip":
        return Pixels(size, size, squash=True, mean=HALF, std=HALF)
    if family == "clip":
        return Pixels(size, size)
    imagenet = Pixels(224, 256, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    if family == "dinov2":
        return imagenet
    # torchvision's only weights of these sizes are SWAG's. (Its SWAG_LINEAR files of 224 pixels and narrower models
    # cannot be told from older ones, and get those' view.)
    if size > 224 or config.width == 1280:
        return replace(imagenet, size=size, resize=size)
    resize = 242 if (config.width, config.patch_size) == (1024, 16) else 256  # vit_l_16
    return replace(imagenet, resize=resize, interpolation="bilinear").scaled(size)


# ----------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class PublicViT:
    """A checkpoint, ready for `copy_strict`."""

    config: ViTConfig  # image_size is the position table's
    pixels: Pixels
    tensors: dict[str, Tensor]
    names: dict[str, str]
    where: Path  # the file that errors name
    left: list[str]  # tensors that are no part of the ViT
    align_corners: bool = False  # how the family interpolates its position table


def read_public(path: str | Path) -> PublicViT:
    """A model's folder, or a .pth file of torchvision or facebookresearch. Raises InputError.

    Tensors stay as the file has them, but for views: fused query, key and value are three, `cls`, `position` and
    `head.probe` lose their leading sizes of 1.
    """
    path = Path(path)
    if path.is_file() or path.suffix == ".pth":
        tensors, where = read_tensors(path)
        family, names = _family_of_file(tensors, where)
        kind, config = f"{family} file", config_of(family, names, tensors, where)
        pixels = default_pixels(family, config)
    else:
        kind, config = read_config(path / "config.json")
        family = kind.removesuffix("_vision_model")
        pixels = _pixels_of_folder(path, family, config)
        tensors, where = read_tensors(path)
        names = {"clip": CLIP, "siglip": SIGLIP, "dinov2": DINOV2}[family]
        if "embeddings.patch_embedding.weight" in tensors:  # as transformers 5 writes a tower alone
            names = {name: theirs.removeprefix("vision_model.") for name, theirs in names.items()}
    full = expand(names, config.depth)
    tensors = _without_ones(_split(tensors, full), full)
    left = [name for name in tensors if any(name == x or x[-1] == "." and name.startswith(x) for x in LEFT[kind])]
    return PublicViT(config, pixels, tensors, full, where, left, align_corners=family == "torchvision")


def check_vit(folder: Path) -> None:
    """Raises InputError where the folder's configs are of no ViT that can be read, before there are any weights."""
    kind, config = read_config(folder / "config.json")
    _pixels_of_folder(folder, kind.removesuffix("_vision_model"), config)


def _pixels_of_folder(folder: Path, family: str, config: ViTConfig) -> Pixels:
    pixels, path = default_pixels(family, config), folder / "preprocessor_config.json"
    if path.exists():
        pixels = read_pixels(path, pixels)
    if family != "dinov2" and pixels.size != config.image_size:
        raise InputError(f"{path}: makes {pixels.size} pixels a side, expected {config.image_size}, the image_size of "
                         "config.json")  # fmt: skip
    return pixels


def _family_of_file(tensors: dict[str, Tensor], where: Path) -> tuple[str, dict[str, str]]:
    if any(name.startswith("encoder.layers.encoder_layer_") for name in tensors):
        older = any(".mlp.linear_1." in name for name in tensors)
        return "torchvision", TORCHVISION_2022 if older else TORCHVISION
    if any(name.endswith("ls1.gamma") for name in tensors):
        for name, what in (("register_tokens", "register tokens"), ("blocks.0.mlp.w12.weight", "SwiGLU (giant)")):
            if name in tensors:
                raise InputError(f"{where}: holds {name}: DINOv2 with {what} is not supported")
        return "dinov2", DINOV2_FILE
    found = ", ".join(sorted(tensors)[:3]) or "none"
    raise InputError(f"{where}: expected the tensors of torchvision's vit_* or of DINOv2, found {found}; other models "
                     "need their folder with config.json")  # fmt: skip


def _split(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Each fused NAME becomes NAME[q], NAME[k] and NAME[v]."""
    tensors = dict(tensors)
    for name in [theirs.removesuffix("[q]") for theirs in names.values() if theirs.endswith("[q]")]:
        fused = tensors.pop(name, None)
        if fused is not None:  # else copy_strict will miss it by name
            thirds = torch.atleast_1d(fused).tensor_split(3)  # of what is no three either: copy_strict will say so
            tensors |= zip((f"{name}[{letter}]" for letter in "qkv"), thirds, strict=True)
    return tensors


def _without_ones(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    tensors = dict(tensors)
    for name, dims in (("cls", 1), ("position", 2), ("head.probe", 1)):
        theirs = names.get(name)
        while theirs in tensors and tensors[theirs].dim() > dims and len(tensors[theirs]) == 1:
            tensors[theirs] = tensors[theirs][0]
    return tensors
