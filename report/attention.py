"""What the queries of the Q-Adapter read, as numbers.

The adapter computes its attention in one fused call, which never gives its weights away. A hook computes them again
from each block's input.

Shapes: B clips, T frames, S side in pixels, P tokens of the ViT per frame, D ViT width, J adapted blocks, N queries, h
heads, r rank, d = r/h.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from qadapter import GatedCrossAttention, split_heads


@dataclass(frozen=True)
class AttentionMaps:
    """What the queries read of B clips, and how much of it they keep."""

    weights: Tensor  # (J, B, h, N, T, P); each query's sum to 1, where no two frames share a step of the ViT
    gates: Tensor  # (J, B, N)
    grid: tuple[int, int]  # rows and columns of patches

    def patches(self) -> Tensor:
        """The attention to the patches of the first clip (J, N, T, rows, columns), the mean over the heads, without
        class token."""
        mean = self.weights[:, 0].mean(1)  # (J, N, T, P)
        return mean[..., -math.prod(self.grid) :].unflatten(-1, self.grid)


def attention_weights(block, queries: Tensor, patches: Tensor, time_embed: Tensor) -> Tensor:
    """The weights of a `qadapter.GatedCrossAttention` for its inputs (B, N, D), (B, T, P, D), (T, D). Returns
    (B, h, N, T, P)."""
    z = F.layer_norm(patches, patches.shape[-1:])  # (B, T, P, D)
    q = split_heads(block.q(block.norm(queries)))  # (B, h, N, d)
    k = split_heads(block.keys_and_values(z, time_embed)[0])  # (B, h, T*P, d)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, h, N, T*P)
    mask = block.mask(z)  # see `GatedCrossAttention.mask`
    return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(-1).unflatten(-1, z.shape[1:3])


@torch.no_grad()
def record_attention(captioner, frames: Tensor) -> AttentionMaps | None:
    """What the Q-Adapter of a `model.Captioner` reads of frames uint8 (B, T, 3, S, S); None for the other methods."""
    if captioner.adapter is None:
        return None
    weights: list[Tensor] = []

    def record(module, inputs: tuple, _) -> None:
        if isinstance(module, GatedCrossAttention):
            weights.append(attention_weights(module, *inputs).float().cpu())

    with register_module_forward_hook(record):  # of all modules, until the block ends
        captioner.run_encoder(frames.to(next(captioner.parameters()).device))
    steps = [t // captioner.vit.frames_per_step for t in range(frames.shape[1])]  # a step may be a pair of frames
    gates = captioner.adapter.last_gates.float().cpu()  # (J, B, N)
    return AttentionMaps(torch.stack(weights)[..., steps, :], gates, captioner.vit.config.grid)
