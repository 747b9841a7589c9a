"""The frozen eye: a CLIP vision tower, loaded from a public model's folder.

Letters: n images, P tokens an image (class token and patches), D width, h heads, d = D/h, S side in pixels.

References
[1] CLIP, https://arxiv.org/abs/2103.00020.
[2] Tensor names and the order of operations: transformers' modeling_clip.py (CLIPVisionModel). Its
    activation is usually QuickGELU, x * sigmoid(1.702 x), which is not GELU.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights import InputError, copy_strict, field, read_json, read_safetensors

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pixels, in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ViTConfig:
    """Shape of a CLIP vision tower; sizes in pixels and channels."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str
    norm_eps: float

    @classmethod
    def from_json(cls, path: Path) -> "ViTConfig":
        config = read_json(path)
        kind = field(config, "model_type", str, path)
        if kind != "clip_vision_model":
            raise InputError(f"{path}: model_type is {kind!r}, supported vision models: clip_vision_model")
        activation = field(config, "hidden_act", str, path, "quick_gelu")
        if activation not in ("quick_gelu", "gelu"):
            raise InputError(f"{path}: hidden_act is {activation!r}, expected 'quick_gelu' or 'gelu'")
        size, patch = field(config, "image_size", int, path), field(config, "patch_size", int, path)
        width, heads = field(config, "hidden_size", int, path), field(config, "num_attention_heads", int, path)
        if not (1 <= patch <= size and 1 <= heads <= width) or width % heads:
            raise InputError(f"{path}: expected image_size {size} to be at least patch_size {patch}, "
                             f"hidden_size {width} a multiple of num_attention_heads {heads}")  # fmt: skip
        return cls(
            image_size=size,
            patch_size=patch,
            width=width,
            depth=field(config, "num_hidden_layers", int, path),
            heads=heads,
            mlp_width=field(config, "intermediate_size", int, path),
            activation=activation,
            norm_eps=field(config, "layer_norm_eps", float, path, 1e-5),
        )


def _channels(path: Path, name: str, default: tuple) -> tuple:
    value = field(read_json(path), name, list, path, list(default))
    if len(value) != 3 or not all(type(x) in (int, float) for x in value):
        raise InputError(f"{path}: field {name!r}: expected three numbers, found {value!r}")
    return tuple(value)


class ViTAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v)  # (n, h, P, d)
        return self.out(x.transpose(1, 2).flatten(2))  # (n, P, D)


class ViTMLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)  # (n, P, hidden)
        x = F.gelu(x) if self.activation == "gelu" else x * torch.sigmoid(1.702 * x)
        return self.down(x)  # (n, P, D)


class ViTBlock(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = ViTAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = ViTMLP(config.width, config.mlp_width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A CLIP vision tower. `vit(pixels)` is the last block's output, before the final norm."""

    def __init__(self, config: ViTConfig, mean=CLIP_MEAN, std=CLIP_STD):
        super().__init__()
        self.config = config
        self.pixel_mean, self.pixel_std = tuple(mean), tuple(std)
        size = config.patch_size
        self.patch = nn.Conv2d(3, config.width, kernel_size=size, stride=size, bias=False)
        self.cls = nn.Parameter(torch.randn(config.width) * 0.02)
        self.position = nn.Parameter(torch.randn((config.image_size // size) ** 2 + 1, config.width) * 0.02)
        self.pre_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.depth))
        self.post_norm = nn.LayerNorm(config.width, config.norm_eps)

    def normalise(self, frames: Tensor) -> Tensor:
        """uint8 (..., 3, S, S) -> float32 with the mean and spread this ViT was trained with."""
        scale = torch.tensor(self.pixel_std, device=frames.device)[:, None, None] * 255
        shift = torch.tensor(self.pixel_mean, device=frames.device)[:, None, None] * 255
        return (frames.float() - shift) / scale

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (n, 3, S, S) -> class token and patches with their positions (n, P, D)."""
        x = self.patch(pixels).flatten(2).transpose(1, 2)  # (n, P-1, D)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)  # (n, P, D)
        return self.pre_norm(x + self.position)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return x  # (n, P, D)

    def pooled(self, pixels: Tensor) -> Tensor:
        """The class token after the final norm (n, D): one feature a frame."""
        return self.post_norm(self(pixels)[:, 0])

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "ViT":
        """Loads `config.json`, `model.safetensors` and, if there, `preprocessor_config.json`; all or an error."""
        folder = Path(folder)
        config = ViTConfig.from_json(folder / "config.json")
        mean, std = CLIP_MEAN, CLIP_STD
        if (folder / "preprocessor_config.json").exists():
            pixels = folder / "preprocessor_config.json"
            mean, std = _channels(pixels, "image_mean", mean), _channels(pixels, "image_std", std)
            if min(std) <= 0:
                raise InputError(f"{pixels}: image_std is {list(std)}, expected numbers above 0")
        with torch.device("meta"):
            vit = cls(config, mean, std)
        path = folder / "model.safetensors"
        copy_strict(vit, read_safetensors(path), vit_names(config), path, ["vision_model.embeddings.position_ids"])
        return vit.to(dtype)


def vit_names(config: ViTConfig) -> dict[str, str]:
    """Our parameter name -> the name in a public CLIP vision checkpoint ("layrn" is how CLIP spells it)."""
    top = "vision_model."
    names = {
        "patch.weight": top + "embeddings.patch_embedding.weight",
        "cls": top + "embeddings.class_embedding",
        "position": top + "embeddings.position_embedding.weight",
    }
    for kind in ("weight", "bias"):
        names[f"pre_norm.{kind}"] = f"{top}pre_layrnorm.{kind}"
        names[f"post_norm.{kind}"] = f"{top}post_layernorm.{kind}"
        for i in range(config.depth):
            theirs = f"{top}encoder.layers.{i}."
            names |= {
                f"blocks.{i}.norm1.{kind}": f"{theirs}layer_norm1.{kind}",
                f"blocks.{i}.attn.q.{kind}": f"{theirs}self_attn.q_proj.{kind}",
                f"blocks.{i}.attn.k.{kind}": f"{theirs}self_attn.k_proj.{kind}",
                f"blocks.{i}.attn.v.{kind}": f"{theirs}self_attn.v_proj.{kind}",
                f"blocks.{i}.attn.out.{kind}": f"{theirs}self_attn.out_proj.{kind}",
                f"blocks.{i}.norm2.{kind}": f"{theirs}layer_norm2.{kind}",
                f"blocks.{i}.mlp.up.{kind}": f"{theirs}mlp.fc1.{kind}",
                f"blocks.{i}.mlp.down.{kind}": f"{theirs}mlp.fc2.{kind}",
            }
    return names
