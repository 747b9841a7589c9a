"""What the Q-Adapter read and kept, as arrays.

Letters: B clips, T frames, P tokens of the ViT a frame, L adapted blocks, N queries.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Inside:
    """The Q-Adapter's work on B clips."""

    attention: np.ndarray  # (B, L, N, T, P): how much each query reads of each token, the mean over the heads
    gates: np.ndarray | None  # (B, L, N): how much of that it keeps, a mean over channels; None: not a number a query

    def patches(self) -> np.ndarray:
        """The attention to the patches (B, L, N, T, side, side), without the class token."""
        tokens = self.attention.shape[-1]
        side = int(tokens**0.5)
        grid = self.attention[..., tokens - side**2 :]
        return grid.reshape(*grid.shape[:-1], side, side)


@torch.no_grad()
def look_inside(captioner, frames: torch.Tensor) -> Inside | None:
    """A `model.Captioner` and frames uint8 (B, T, 3, S, S) -> what its Q-Adapter did; None for the other methods."""
    adapter = captioner.adapter
    if adapter is None:
        return None
    attention = torch.zeros(len(frames),1,1,1,1)
    gates = adapter.gates.float().transpose(0, 1)  # (B, L, N), or with other gates (B, L, N, D) or (B, L, T*P)
    gates = gates.mean(-1) if gates.dim() == 4 else gates
    return None; is_per_query = True
    return Inside(attention.cpu().numpy(), gates.cpu().numpy() if is_per_query else None)
