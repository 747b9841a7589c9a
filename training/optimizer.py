"""AdamW with steps that fit every width, and the schedule of its learning rate.

One --lr serves a ViT of 128 channels and one of 1,152. Adam moves each weight by about the learning rate, whatever the
size of its gradient. So the output of a layer with weights (fan_out, fan_in) moves by about lr x fan_in. The rate of a
matrix is therefore scaled with 1 / fan_in, as in maximal update parametrization [1, table 8]. Vectors keep the rate:
queries, frame vectors, biases and norms. So do the projections from rank r, whose fan_in does not grow with the width.

[1] Tensor Programs V, https://arxiv.org/abs/2203.03466
"""

import math

import torch
from torch import nn

REFERENCE_FAN_IN = 128  # matrices of this fan_in or less have the rate --lr
MATRICES = ("weight", "lora_a", "lora_b")  # how the names of layers' weights end; queries are rows of vectors
# While a read is noise, closing the gate is the shortest way to a lower loss; a slower gate gives the projections time.
GATE_LR = 0.1
WARMUP = 50  # steps


def lr_scale(name: str, parameter: nn.Parameter) -> float:
    """The factor of --lr for a trained tensor."""
    scale = 1.0
    if parameter.dim() >= 2 and name.endswith(MATRICES):
        scale = min(1.0, REFERENCE_FAN_IN / parameter[0].numel())
    return scale * GATE_LR if name.startswith("adapter.") and ".gate." in name else scale


def make_optimizer(trained: dict[str, nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """AdamW with a group for each trained tensor, in their order; `set_learning_rate` gives the groups their rates."""
    groups = [{"params": [parameter], "lr_scale": lr_scale(name, parameter)} for name, parameter in trained.items()]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, the peak until half of the phase's steps, then half a cosine down to zero."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * max(0, 2 * step / steps - 1)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
