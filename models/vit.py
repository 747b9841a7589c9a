"""The frozen eye: a vision transformer (ViT), loaded from a public model of one of four families (`vit_public.py`).

The families differ in what stands before and behind the blocks, hardly in the blocks:

    frame -> patches [class token] + position [norm] -> blocks -> norm -> [class token | pooling head]

Letters: n images, P tokens an image (class token, if any, and patches), D width, h heads, d = D/h, S side in pixels.

References
[1] ViT, https://arxiv.org/abs/2010.11929; CLIP, https://arxiv.org/abs/2103.00020.
[2] The order of operations: transformers' modeling_{clip,siglip,dinov2}.py, torchvision's vision_transformer.py.
[3] QuickGELU, CLIP's usual activation, is x * sigmoid(1.702 x) = SiLU(1.702 x) / 1.702, which is not GELU; SigLIP's is
    GELU with tanh.
[4] LayerScale, https://arxiv.org/abs/2103.17239.
[5] The pooling head: "Scaling Vision Transformers", https://arxiv.org/abs/2106.04560, section 3.2.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hub
from pixels import CLIP_MEAN, CLIP_STD, Pixels
from vit_public import ViTConfig, read_public, vit_names
from weights import InputError, copy_strict

__all__ = ["CLIP_MEAN", "CLIP_STD", "ViT", "ViTConfig", "vit_names"]


ACTIVATIONS = {  # f and s: the activation of x is f(s x) / s
    "quick_gelu": (F.silu, 1.702), "gelu": (F.gelu, 1), "gelu_pytorch_tanh": (partial(F.gelu, approximate="tanh"), 1),
}  # fmt: skip


class ViTAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Queries of x (n, Q, D) attend to keys and values of `memory` (n, P, D)."""
        q, k, v = self.q(x), self.k(memory), self.v(memory)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (n, h, Q or P, d)
        x = F.scaled_dot_product_attention(q, k, v)  # (n, h, Q, d)
        return self.out(x.transpose(1, 2).flatten(2))  # (n, Q, D)


class ViTMLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.activation, self.scale = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """down(activation(up(x))), [3]; factors before and after a product cost nothing, elsewhere two passes."""
        s, up, down = self.scale, self.up, self.down
        y = torch.addmm(up.bias, x.flatten(0, -2), up.weight.T, beta=s, alpha=s)  # (n*P, hidden)
        return torch.addmm(down.bias, self.activation(y), down.weight.T, alpha=1 / s).view_as(x)  # (n, P, D)


class LayerScale(nn.Module):
    """One learnt gain a channel [4]."""

    def __init__(self, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class ViTBlock(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = ViTAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = ViTMLP(config.width, config.mlp_width, config.activation)
        self.scale1 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.scale2 = LayerScale(config.width) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.scale1(self.attn(y, y))
        return x + self.scale2(self.mlp(self.norm2(x)))


class PoolingHead(nn.Module):
    """SigLIP's way from patches to one vector [5]: a learnt query attends to them, then an MLP adds to it."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(config.width))
        self.attn = ViTAttention(config.width, config.heads)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = ViTMLP(config.width, config.mlp_width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.probe.expand(len(x), 1, -1), x)[:, 0]  # (n, D)
        return x + self.mlp(self.norm(x))


class ViT(nn.Module):
    """A ViT. `vit(pixels)` is what the family's reference calls the last hidden state: for CLIP the last block's
    output, for the others that after the final norm. `pixels` says how frames become what it is fed.
    """

    def __init__(self, config: ViTConfig, mean=CLIP_MEAN, std=CLIP_STD):
        super().__init__()
        self.config = config
        self.pixels = Pixels(config.image_size, config.image_size, mean=tuple(mean), std=tuple(std))
        size, width = config.patch_size, config.width
        self.patch = nn.Conv2d(3, width, kernel_size=size, stride=size, bias=config.patch_bias)
        self.cls = nn.Parameter(torch.randn(width) * 0.02) if config.class_token else None
        positions = (config.image_size // size) ** 2 + config.class_token
        self.position = nn.Parameter(torch.randn(positions, width) * 0.02)
        self.pre_norm = nn.LayerNorm(width, config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.depth))
        self.post_norm = nn.LayerNorm(width, config.norm_eps)
        self.head = PoolingHead(config) if config.attention_head else None

    def normalise(self, frames: Tensor) -> Tensor:
        """uint8 (..., 3, S, S) -> float32 with the mean and spread this ViT was trained with."""
        scale = torch.tensor(self.pixels.std, device=frames.device)[:, None, None] * 255
        shift = torch.tensor(self.pixels.mean, device=frames.device)[:, None, None] * 255
        return (frames.float() - shift) / scale

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (n, 3, S, S) -> class token, if any, and patches with their positions (n, P, D)."""
        x = self.patch(pixels).flatten(2).transpose(1, 2)  # (n, patches, D)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)  # (n, P, D)
        return self.pre_norm(x + self.position)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return self.post_norm(x) if self.config.final_norm else x  # (n, P, D)

    def pooled(self, pixels: Tensor) -> Tensor:
        """One feature a frame (n, D): the class token after the final norm, or what SigLIP's head makes of patches."""
        x = self(pixels)
        if self.head is not None:
            return self.head(x)
        return x[:, 0] if self.config.final_norm else self.post_norm(x[:, 0])

    def resize(self, image_size: int, align_corners: bool = False) -> None:
        """From now on S is `image_size`, for which the grid of position vectors is interpolated, bicubic.

        Raises InputError when S is no multiple of the patch's side. (A public ViT whose own S is none ignores the
        pixels left over at the right and at the bottom, as its reference does.) `align_corners` is torchvision's way
        to lay the new grid over the old one. facebookresearch's own code stretches DINOv2's new grid by a tenth of a
        patch more; here, as in transformers, its weights give the same figures from either file.
        """
        patch, tokens = self.config.patch_size, int(self.config.class_token)
        if image_size < 1 or image_size % patch:
            raise InputError(f"image size {image_size}: expected a multiple of the patch size {patch}")
        old, new = self.config.image_size // patch, image_size // patch
        table = self.position.detach()
        grid = table[tokens:].float().T.unflatten(1, (old, old))  # (D, old, old)
        grid = F.interpolate(grid[None], (new, new), mode="bicubic", align_corners=align_corners)[0]  # (D, new, new)
        table = torch.cat([table[:tokens], grid.flatten(1).T.to(table.dtype)])  # (P, D)
        self.position = nn.Parameter(table, self.position.requires_grad)
        self.config = replace(self.config, image_size=image_size)
        self.pixels = self.pixels.scaled(image_size)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, image_size: int | None = None
    ) -> "ViT":
        """Loads a public model whole, or raises InputError: a folder, a .pth file (`vit_public.py`) or a hub id.

        `image_size` is S in pixels; without it S is what the model's own `preprocessor_config.json` makes.
        """
        public = read_public(hub.local(path))
        with torch.device("meta"):
            vit = cls(public.config)
        copy_strict(vit, public.tensors, public.names, public.where, public.left)
        vit.pixels = public.pixels
        vit.to(torch.float32)  # half precision would blur the positions
        size = public.pixels.size if image_size is None else image_size
        if size != public.config.image_size:
            try:
                vit.resize(size, public.align_corners)
            except InputError as error:
                raise InputError(f"{path}: {error}") from error
        vit.pixels = public.pixels.scaled(size)
        return vit.to(dtype)
