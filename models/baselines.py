"""What the Q-Adapter is compared with: other small trained parts in the blocks of a frozen model.

    LoRA            x W^T + b + (x A^T) B^T                       in the query and value projections [1]
    AdaptFormer     MLP(y) + s relu(y W_down + b) W_up + b'       beside the MLP of a ViT's block, y its input [2]
    deep prompts    block([Z ; prompts]) without the last rows    new learned tokens for each block of a ViT [3]
    ST-Adapter      block(Z + conv(Z W_down + b) W_up + b')       before each block of a ViT; the convolution is over
                                                                  three frames, each channel by itself [4]

In the ViT, ST-Adapter alone compares frames; the others encode each by itself. Trained weights are float32 and are cast
to the dtype of the frozen model. All but the prompts add zero at first, so step 0 is the frozen model. The frozen
tensors keep their names. There is no dropout, and LoRA's A starts with a standard deviation of 1 / sqrt(inputs).

Shapes: n images, P tokens of the ViT per image, p of them patches, D width, r rank, N prompts, B clips, T frames.

References
[1] LoRA, https://arxiv.org/abs/2106.09685, eq. 3.
[2] AdaptFormer, https://arxiv.org/abs/2205.13535, eq. 3 to 5: parallel, s = 0.1.
[3] Visual prompt tuning, https://arxiv.org/abs/2203.12119, eq. 3 (VPT-deep) and its uniform start.
[4] ST-Adapter, https://arxiv.org/abs/2206.13559, and its authors' code: no class token, no activation, a convolution
    over time alone that starts at zero. Here it is before each block; that code has it before the MLP, or before both
    the attention and the MLP.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.lm import CausalLM
from models.vit import ViT, ViTBlock, ViTMLP

ADAPTER_SCALE = 0.1  # s


def cast_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A float32 layer in the dtype of its input."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


class LoRALinear(nn.Linear):
    """A frozen linear layer plus a trained update of rank r. The usual factor alpha / r is 1 here."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))


class AdaptedMLP(ViTMLP):
    """The frozen MLP of a block, and beside it a trained bottleneck of r channels."""

    def __init__(self, base: ViTMLP, rank: int):
        nn.Module.__init__(self)
        self.up, self.down, self.activation, self.scale = base.up, base.down, base.activation, base.scale
        width = base.up.in_features
        self.adapter_down, self.adapter_up = nn.Linear(width, rank), nn.Linear(rank, width)
        for zero in (self.adapter_down.bias, self.adapter_up.weight, self.adapter_up.bias):
            nn.init.zeros_(zero)

    def forward(self, y: Tensor) -> Tensor:
        """(n, P, D) -> (n, P, D)."""
        x = F.relu(cast_linear(self.adapter_down, y))  # (n, P, r)
        return super().forward(y) + ADAPTER_SCALE * cast_linear(self.adapter_up, x)  # (n, P, D)


class WrappedBlock(ViTBlock):
    """A frozen block of a ViT, whose tensors keep their names."""

    def __init__(self, base: ViTBlock):
        nn.Module.__init__(self)
        for name, child in base.named_children():
            self.add_module(name, child)


class PromptedBlock(WrappedBlock):
    """With N trained prompts beside its tokens; what becomes of them is dropped."""

    def __init__(self, base: ViTBlock, prompts: int, width: int, patch_size: int):
        super().__init__(base)
        bound = (6 / (3 * patch_size**2 + width)) ** 0.5
        self.prompts = nn.Parameter(torch.empty(prompts, width).uniform_(-bound, bound))

    def forward(self, z: Tensor) -> Tensor:
        """(n, P, D) -> (n, P, D)."""
        prompts = self.prompts.to(z.dtype).expand(len(z), -1, -1)  # (n, N, D)
        return super().forward(torch.cat([z, prompts], dim=1))[:, : z.shape[1]]


class SpaceTimeBlock(WrappedBlock):
    """Before it, a trained bottleneck of r channels adds to each patch what it reads at that place in this frame, the
    one before and the one after."""

    def __init__(self, base: ViTBlock, rank: int, width: int, class_tokens: int):
        super().__init__(base)
        self.st_down, self.st_up = nn.Linear(width, rank), nn.Linear(rank, width)
        self.st_time = nn.Conv1d(rank, rank, kernel_size=3, groups=rank)
        for zero in (self.st_down.bias, self.st_up.bias, self.st_time.weight, self.st_time.bias):
            nn.init.zeros_(zero)
        self.class_tokens, self.frames = class_tokens, 1  # T, see `set_frames`

    def forward(self, z: Tensor) -> Tensor:
        """(B*T, P, D) -> (B*T, P, D)."""
        class_token, patches = z.split([self.class_tokens, z.shape[1] - self.class_tokens], dim=1)
        x = cast_linear(self.st_down, patches).unflatten(0, (-1, self.frames))  # (B, T, p, r)
        x = x.permute(0, 2, 3, 1).flatten(0, 1)  # (B*p, r, T)
        weight, bias = self.st_time.weight.to(z.dtype), self.st_time.bias.to(z.dtype)
        x = F.conv1d(x, weight, bias, padding=1, groups=len(weight))  # (B*p, r, T)
        x = x.unflatten(0, (-1, patches.shape[1])).permute(0, 3, 1, 2).flatten(0, 1)  # (B*T, p, r)
        return super().forward(torch.cat([class_token, patches + cast_linear(self.st_up, x)], dim=1))


def set_frames(vit: ViT, frames: int) -> None:
    """Tells the ST-Adapters of a ViT how many of its next images are one clip."""
    for block in vit.blocks:
        block.frames = frames


def add_baseline(vit: ViT, lm: CausalLM, config) -> None:
    """Adds what `config.method` trains in the blocks of the frozen models, in place. Other methods add nothing here."""
    method, rank, shape = config.method, config.rank, vit.config
    for i, block in enumerate(lm.blocks if method == "lora-lm" else vit.blocks):
        if method in ("lora", "lora-lm"):
            block.attn.q, block.attn.v = LoRALinear(block.attn.q, rank), LoRALinear(block.attn.v, rank)
        elif method == "adapter":
            block.mlp = AdaptedMLP(block.mlp, rank)
        elif method == "st-adapter":
            vit.blocks[i] = SpaceTimeBlock(block, rank, shape.width, int(shape.class_token))
        elif method == "prompt":
            vit.blocks[i] = PromptedBlock(block, config.queries, shape.width, shape.patch_size)
