"""Visual vectors in every block of the language model (`--deep-rank`).

What a frozen language model reads at its input changes its wording little: those vectors are small beside what its
blocks add to them. So at the positions of the prefix each block but the first reads more, all of it zero at first:

    x_l <- x_l + s_l (u V D_l U_l + e_l)    V: LN(Q), or what the other methods read of the frames
                                            D_l, U_l: of rank r, for the positions of the visual tokens
                                            e_l: a vector for each position, as in [1] and [2]
                                            s_l: root mean square of what the block reads of a text

Nothing is added behind the prefix, so a caption's own tokens pass through the frozen blocks alone.

Shapes: B clips, N visual vectors V, D width of the ViT, C width of the language model, L blocks but the first, r rank,
P positions of the prefix.

References
[1] Prefix-Tuning, https://arxiv.org/abs/2101.00190
[2] P-Tuning v2, https://arxiv.org/abs/2110.07602: vectors in every block are what small language models need.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.lm import CausalLM

TEXT = "a man is playing a guitar in a room"  # whose vectors give s
STEP = 0.2  # u: U starts at zero, so this is the size of its steps


@torch.no_grad()
def measure_sizes(lm: CausalLM, ids: Tensor) -> Tensor:
    """Returns s (L,) of a text (S,). Its first token is left out: language models make its vectors very large."""
    inputs: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0][:, 1:])) for block in lm.blocks]
    lm.hidden(lm.embed(ids)[None])
    for hook in hooks:
        hook.remove()
    return torch.stack([x.float().square().mean().sqrt() for x in inputs[1:]])


class DeepVectors(nn.Module):
    """D, U, e and s of all blocks of a language model but the first, for a prefix of `positions`."""

    def __init__(self, width: int, lm: CausalLM, rank: int, positions: int, text: Tensor):
        """text: the ids of TEXT (S,)."""
        super().__init__()
        blocks, lm_width = lm.config.depth - 1, lm.config.width
        self.down = nn.Linear(width, blocks * rank, bias=False)
        nn.init.normal_(self.down.weight, std=width**-0.5)
        self.up = nn.Parameter(torch.zeros(blocks, rank, lm_width))
        self.prefix = nn.Parameter(torch.zeros(blocks, positions, lm_width))
        self.register_buffer("sizes", measure_sizes(lm, text))  # s

    def forward(self, vectors: Tensor, start: int) -> list[Tensor]:
        """V (B, N, D), which stand from position `start` on -> what is added to the output of each block, which is the
        input of the next one (B, P, C)."""
        h = self.down(vectors).unflatten(-1, (len(self.sizes), -1))  # (B, N, L, r)
        added = STEP * torch.einsum("bnlr,lrc->lbnc", h, self.up)  # (L, B, N, C)
        behind = self.prefix.shape[1] - start - vectors.shape[1]
        added = F.pad(added, (0, 0, start, behind)) + self.prefix[:, None]  # (L, B, P, C)
        return list((added * self.sizes[:, None, None, None]).unbind())
