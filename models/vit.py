"""Vision transformer (ViT) encoder. Public models of four families load into this one class.

The families differ before and after the blocks, hardly within them:

    frame -> patches [class token] + position [norm] -> blocks -> norm -> [class token | pooling head]

Shapes: n images, P tokens per image (class token, if any, and p patches), D width, h heads, d = D/h, S image side
in pixels, Q queries, J blocks whose outputs are read.

References
[1] ViT, https://arxiv.org/abs/2010.11929; CLIP, https://arxiv.org/abs/2103.00020.
[2] The order of operations: transformers' modeling_{clip,siglip,dinov2}.py, torchvision's vision_transformer.py.
[3] QuickGELU, CLIP's usual activation: x * sigmoid(1.702 x) = SiLU(1.702 x) / 1.702. SigLIP's is GELU with tanh.
[4] LayerScale, https://arxiv.org/abs/2103.17239.
[5] The pooling head: "Scaling Vision Transformers", https://arxiv.org/abs/2106.04560, section 3.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError, reading
from common.preprocessing import Preprocessing
from models import hub
from models.names import tensor_names
from models.vit_checkpoints import PublicViT, adapt_tensors, read_vit_file, read_vit_folder
from models.weights import copy_strict, read_tensors

ACTIVATIONS = {  # name: f and s, with activation(x) = f(s x) / s
    "quick_gelu": (F.silu, 1.702),
    "gelu": (F.gelu, 1),
    "gelu_pytorch_tanh": (partial(F.gelu, approximate="tanh"), 1),
}
TOKENS_PER_PASS = {"cpu": 3200, "gpu": 102400}  # of `block_outputs`: 16 and 519 images of ViT-B/16


@dataclass(frozen=True)
class ViTConfig:
    """Shape of a ViT; image_size and patch_size in pixels. The defaults are CLIP's."""

    image_size: int  # S
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str  # quick_gelu | gelu | gelu_pytorch_tanh
    norm_eps: float
    class_token: bool = True
    patch_bias: bool = False
    pre_norm: bool = True  # a norm between the embeddings and the blocks
    layer_scale: bool = False  # a learned factor a channel for the outputs of attention and MLP
    post_norm: bool = True  # a norm behind the blocks
    final_norm: bool = False  # the last hidden state is taken after that norm
    pooling_head: bool = False  # pool by attention to the patches instead of with a class token
    image_width: int | None = None  # where it is not S, the height

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise InputError(f"hidden_act is {self.activation!r}, expected {' or '.join(ACTIVATIONS)}")
        if self.patch_size > self.image_size or self.width % self.heads:
            raise InputError(f"does not fit together: {self}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size // self.patch_size, (self.image_width or self.image_size) // self.patch_size


class ViTAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Queries from x (n, Q, D) attend to keys and values from memory (n, P, D)."""
        q, k, v = self.q(x), self.k(memory), self.v(memory)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (n, h, Q or P, d)
        x = F.scaled_dot_product_attention(q, k, v)  # (n, h, Q, d)
        return self.out(x.transpose(1, 2).flatten(2))  # (n, Q, D)


class ViTMLP(nn.Module):
    def __init__(self, width: int, mlp_width: int, activation: str):
        super().__init__()
        self.up = nn.Linear(width, mlp_width)
        self.down = nn.Linear(mlp_width, width)
        self.activation, self.scale = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """down(activation(up(x))). The matrix products apply the activation's factors [3], which costs nothing."""
        s, up, down = self.scale, self.up, self.down
        y = torch.addmm(up.bias, x.flatten(0, -2), up.weight.T, beta=s, alpha=s)  # (n*P, mlp_width)
        return torch.addmm(down.bias, self.activation(y), down.weight.T, alpha=1 / s).view_as(x)  # (n, P, D)


class LayerScale(nn.Module):
    """A learned factor for each channel [4]."""

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
    """SigLIP's pooling [5]: a learned query attends to the patches, followed by an MLP with a residual."""

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
    """A ViT. `vit(pixels)` is the last hidden state as the family's reference defines it: for CLIP the output of the
    last block, for the others that of the final norm. `preprocessing` says how frames are resized and normalized.
    """

    frames_per_step = 1  # each frame is an image of its own

    def __init__(self, config: ViTConfig, preprocessing: Preprocessing | None = None):
        super().__init__()
        self.config = config
        self.preprocessing = preprocessing or Preprocessing(config.image_size, config.image_size)
        size, width = config.patch_size, config.width
        self.patch = nn.Conv2d(3, width, kernel_size=size, stride=size, bias=config.patch_bias)
        self.cls = nn.Parameter(torch.randn(width) * 0.02) if config.class_token else None
        positions = math.prod(config.grid) + config.class_token
        self.position = nn.Parameter(torch.randn(positions, width) * 0.02)
        self.pre_norm = nn.LayerNorm(width, config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.depth))
        self.post_norm = nn.LayerNorm(width, config.norm_eps) if config.post_norm else nn.Identity()
        self.head = PoolingHead(config) if config.pooling_head else None

    def num_steps(self, frames: int) -> int:
        """How many images the ViT makes of the frames of a clip."""
        return math.ceil(frames / self.frames_per_step)

    def normalize(self, frames: Tensor) -> Tensor:
        """uint8 frames (..., 3, S, S) -> float32, normalized with the model's mean and standard deviation."""
        channels = frames.float().unbind(-3)  # numbers, not tensors: copying one to a GPU would wait for the GPU
        statistics = zip(channels, self.preprocessing.mean, self.preprocessing.std, strict=True)
        return torch.stack([(x - 255 * mean) / (255 * std) for x, mean, std in statistics], dim=-3)

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalized pixels (n, 3, S, S) -> class token, if any, and patches, with position embeddings (n, P, D)."""
        x = self.patch(pixels).flatten(2).transpose(1, 2)  # (n, patches, D)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)  # (n, P, D)
        return self.pre_norm(x + self.position)

    def run_blocks(self, pixels: Tensor, deepstack: Sequence[int] = ()) -> Tensor:
        """Normalized pixels (n, 3, S, S) -> output of the last block (n, P, D), and beside it those of the blocks
        `deepstack`, of which there are j (n, P, D + jD)."""
        x, kept = self.embed(pixels), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in deepstack:
                kept.append(x)
        return torch.cat([x, *kept], dim=-1) if kept else x

    @torch.no_grad()
    def block_outputs(self, pixels: Tensor, numbers: Sequence[int]) -> Tensor:
        """Normalized pixels (n, 3, S, S) -> the outputs of the J blocks with these numbers (n, J, P, D).

        The images pass in chunks: all at once would need more memory and, on a CPU, a quarter more time.
        """
        tokens, width = self.position.shape
        outputs = pixels.new_empty(len(pixels), len(numbers), tokens, width)  # (n, J, P, D)
        chunk_size = max(1, TOKENS_PER_PASS["cpu" if pixels.device.type == "cpu" else "gpu"] // tokens)
        for chunk, out in zip(pixels.split(chunk_size), outputs.split(chunk_size), strict=True):
            z = self.embed(chunk)  # (chunk, P, D)
            for i, block in enumerate(self.blocks):
                z = block(z)
                for j in (j for j, number in enumerate(numbers) if number == i):
                    out[:, j] = z
        return outputs

    def forward(self, pixels: Tensor) -> Tensor:
        return self.finish(self.run_blocks(pixels))

    def finish(self, x: Tensor) -> Tensor:
        """Output of the last block -> last hidden state (n, P, D)."""
        return self.post_norm(x) if self.config.final_norm else x

    def patches(self, x: Tensor) -> Tensor:
        """Output of the last block (n, P, D) -> the normed patches, row by row, no class token (n, p, D)."""
        return self.post_norm(x if self.cls is None else x[:, 1:])

    def pool(self, x: Tensor) -> Tensor:
        """Output of the last block (n, P, D) -> the normed class token (n, D), or the output of SigLIP's pooling head.

        A model with neither has no feature of its own for an image; here it is the normed mean of the patches.
        """
        x = self.finish(x)
        if self.head is not None:
            return self.head(x)
        x = x.mean(1) if self.cls is None else x[:, 0]
        return x if self.config.final_norm else self.post_norm(x)

    def keep_blocks(self, count: int) -> None:
        """Drops all blocks but the first `count`: what comes after the ViT reads the last that is left. The last blocks
        of a ViT serve its own training task; an earlier one can tell more. Raises InputError if there are fewer."""
        if count > self.config.depth:
            raise InputError(f"--vit-blocks {count}: the ViT has {self.config.depth} blocks")
        self.blocks, self.config = self.blocks[:count], replace(self.config, depth=count)

    def resize(self, image_size: int, align_corners: bool = False) -> None:
        """Changes S to `image_size`: the grid of position embeddings is interpolated, bicubic.

        Raises InputError unless the new S is a multiple of the patch size. (A public ViT whose own S is not a multiple
        ignores the pixels left over at the right and at the bottom, as its reference does.) torchvision interpolates
        with `align_corners`.
        """
        self.preprocessing = self.preprocessing.scaled(image_size)
        if image_size == self.config.image_size:
            return
        if image_size < 1 or image_size % self.config.patch_size:
            raise InputError(f"image size {image_size}: expected a multiple of the patch size {self.config.patch_size}")
        class_tokens, side = int(self.config.class_token), image_size // self.config.patch_size
        table = self.position.detach()
        grid = table[class_tokens:].float().T.unflatten(1, self.config.grid)  # (D, rows, columns)
        grid = F.interpolate(grid[None], side, mode="bicubic", align_corners=align_corners)[0]  # (D, side, side)
        table = torch.cat([table[:class_tokens], grid.flatten(1).T.to(table.dtype)])  # (P, D)
        self.position = nn.Parameter(table, self.position.requires_grad)
        self.config = replace(self.config, image_size=image_size)

    @classmethod
    def from_config(cls, path: str | Path, image_size: int | None = None) -> "ViT":
        """The model on the meta device, from a folder's configs alone, or from the shapes in a .pth file. Raises
        InputError."""
        path = Path(path)
        return cls._build(read_vit_file(*read_tensors(path)) if path.is_file() else read_vit_folder(path), image_size)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype=torch.float32, image_size: int | None = None) -> "ViT":
        """Loads a public model: a folder, a hub id or a .pth file (`vit_checkpoints.py`).

        `image_size` is S in pixels; the default is the size in the model's `preprocessor_config.json`. Missing,
        unexpected and misshapen tensors raise an InputError that names them.
        """
        path = hub.resolve(path, check=cls.from_config)
        tensors, file = read_tensors(path)
        public = read_vit_folder(path) if path.is_dir() else read_vit_file(tensors, file)
        return cls._build(public, image_size, tensors, file).to(dtype)

    @classmethod
    def _build(cls, public: PublicViT, image_size: int | None, tensors: dict | None = None, file=None) -> "ViT":
        with reading(public.where), torch.device("meta"):
            vit = cls(ViTConfig(**public.config), public.preprocessing)
        if tensors is not None:
            names = tensor_names(vit, public.names, tensors)
            adapt_tensors(vit, tensors, names)
            copy_strict(vit, tensors, names, file)
            vit.to(torch.float32)  # positions are interpolated in full precision
        try:
            vit.resize(public.preprocessing.size if image_size is None else image_size, public.family == "torchvision")
        except InputError as error:
            raise InputError(f"{public.where}: {error}") from error
        return vit
