"""AdamW with steps that fit every width: one --lr for a ViT of 128 channels and for one of 1,152.

Adam moves each weight by about the learning rate, whatever the size of its gradient. So the output of a layer with
weights (fan_out, fan_in) moves by about lr x fan_in. The rate of a matrix is therefore scaled with 1 / fan_in, as in
maximal update parametrization [1, table 8]. Vectors keep the rate: queries, frame vectors, biases and norms. So do the
projections from rank r, whose fan_in does not grow with the width.

[1] Tensor Programs V, https://arxiv.org/abs/2203.03466
"""

import torch
from torch import nn

REFERENCE_FAN_IN = 128  # matrices of this fan_in or less have the rate --lr
MATRICES = ("weight", "lora_a", "lora_b")  # how the names of layers' weights end; queries are rows of vectors


def lr_scale(name: str, parameter: nn.Parameter) -> float:
    """The factor of --lr for a trained tensor."""
    if parameter.dim() < 2 or not name.endswith(MATRICES):
        return 1.0
    return min(1.0, REFERENCE_FAN_IN / parameter[0].numel())


def is_gate(name: str) -> bool:
    """Whether the tensor is of the adapter's gates. With `--method full` the language model trains a "gate", too."""
    return name.startswith("adapter.") and ".gate." in name


def make_optimizer(trained: dict[str, nn.Parameter], scaling: str, weight_decay: float,
                   gate_lr: float) -> torch.optim.AdamW:  # fmt: skip
    """AdamW with a group for each trained tensor, in their order; `set_learning_rate` gives the groups their rates.

    scaling: fan-in | none. gate_lr: a factor of the rates of the adapter's gates. While a read is noise, closing the
    gate is the shortest way to a lower loss; a slower gate gives the projections time to learn.
    """
    groups = []
    for name, parameter in trained.items():
        scale = lr_scale(name, parameter) if scaling == "fan-in" else 1.0
        groups.append({"params": [parameter], "lr_scale": scale * (gate_lr if is_gate(name) else 1.0)})
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
