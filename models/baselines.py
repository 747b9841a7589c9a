"""What the Q-Adapter is compared with: other small trained parts in the blocks of a frozen model.

    LoRA            x W^T + b + (x A^T) B^T                       in the query and value projections [1]
    AdaptFormer     MLP(y) + s relu(y W_down + b) W_up + b'       beside the MLP of a ViT's block, y its input [2]
    deep prompts    block([Z ; prompts]) without the last rows    new learned tokens for each block of a ViT [3]

Trained weights are float32 and are cast to the dtype of the frozen model. LoRA and AdaptFormer start from zero, so step
0 is the frozen model; prompts change it from the start. The frozen tensors keep their names. There is no dropout, and
LoRA's A starts with a standard deviation of 1 / sqrt(inputs).

Shapes: n images, P tokens of the ViT per image, D width, r rank, N prompts.

References
[1] LoRA, https://arxiv.org/abs/2106.09685, eq. 3.
[2] AdaptFormer, https://arxiv.org/abs/2205.13535, eq. 3 to 5: parallel, s = 0.1.
[3] Visual prompt tuning, https://arxiv.org/abs/2203.12119, eq. 3 (VPT-deep) and its uniform start.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vit import ViT, ViTBlock, ViTMLP

ADAPTER_SCALE = 0.1  # s


class LoRALinear(nn.Linear):
    """A frozen linear layer plus a trained update of rank r. The usual factor alpha / r is 1 here."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))


def add_lora(blocks: nn.ModuleList, rank: int) -> None:
    """Replaces the query and value projections of the blocks of a ViT or language model by LoRALinear, in place."""
    for block in blocks:
        block.attn.q = LoRALinear(block.attn.q, rank)
        block.attn.v = LoRALinear(block.attn.v, rank)


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
        down, up = self.adapter_down, self.adapter_up
        x = F.relu(F.linear(y, down.weight.to(y.dtype), down.bias.to(y.dtype)))  # (n, P, r)
        x = F.linear(x, up.weight.to(y.dtype), up.bias.to(y.dtype))  # (n, P, D)
        return super().forward(y) + ADAPTER_SCALE * x


def add_adapters(vit: ViT, rank: int) -> None:
    """Puts an adapter beside the MLP of each block of a ViT, in place."""
    for block in vit.blocks:
        block.mlp = AdaptedMLP(block.mlp, rank)


class PromptedBlock(ViTBlock):
    """A frozen block of a ViT, to whose tokens N trained prompts are added; what becomes of them is dropped."""

    def __init__(self, base: ViTBlock, prompts: int, width: int, patch_size: int):
        nn.Module.__init__(self)
        for name, child in base.named_children():
            self.add_module(name, child)
        bound = (6 / (3 * patch_size**2 + width)) ** 0.5
        self.prompts = nn.Parameter(torch.empty(prompts, width).uniform_(-bound, bound))

    def forward(self, z: Tensor) -> Tensor:
        """(n, P, D) -> (n, P, D)."""
        prompts = self.prompts.to(z.dtype).expand(len(z), -1, -1)  # (n, N, D)
        return super().forward(torch.cat([z, prompts], dim=1))[:, : z.shape[1]]


def add_prompts(vit: ViT, prompts: int) -> None:
    """Puts N prompts before each block of a ViT, in place."""
    config = vit.config
    for i, block in enumerate(vit.blocks):
        vit.blocks[i] = PromptedBlock(block, prompts, config.width, config.patch_size)
