"""Rotary position embeddings [1], and two published ways to scale them to longer texts.

At position p, the channel pair i of a head is rotated by the angle p f_i, with f_i = theta^(-2i/d). The first
pairs rotate fast and encode short distances; the last pairs rotate slowly and encode long ones. Scaling lowers
the frequencies, so that positions beyond the pretraining length L meet angles that the model knows:

    f_i' = f_i (keep_i + (1 - keep_i) / factor)

    linear    keep = 0: all positions are divided by the factor [2]
    llama3    keep grows from 0 to 1 with the pair's rotations in L positions, between `low` and `high` rotations:
              fast pairs keep their frequency [3]

Letters: B rows, h heads, S positions, d head width, L pretraining length in positions.

References
[1] https://arxiv.org/abs/2104.09864
[2] https://arxiv.org/abs/2306.15595
[3] Llama 3.1, apply_scaling in models/llama3/model.py of https://github.com/meta-llama/llama-models
Names in config.json: transformers' modeling_rope_utils.py.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError
from common.files import bounded, field

ORIGINAL = "original_max_position_embeddings"
# The fields that each rope_type may have beside rope_type, rope_theta and factor.
FIELDS = {"default": set(), "linear": set(), "llama3": {ORIGINAL, "low_freq_factor", "high_freq_factor"}}


@dataclass(frozen=True)
class RopeScaling:
    kind: str  # linear | llama3
    factor: float
    original_positions: int = 0  # L; this and the rest are for llama3 only
    low: float = 0.0  # pairs with fewer rotations in L positions are divided by the factor
    high: float = 0.0  # pairs with more rotations are kept


def read_rope_scaling(rope: dict[str, Any], config: dict[str, Any], where: str | Path) -> RopeScaling | None:
    """Reads `rope_scaling` or `rope_parameters` of a config; None if frequencies are not scaled.

    Raises InputError, which starts with `where`, for an unsupported rope_type or field.
    """
    kind = field(rope, "rope_type", str, where, field(rope, "type", str, where, "default"))
    if kind not in FIELDS:
        raise InputError(f"{where}: rope_type is {kind!r}, supported: {', '.join(FIELDS)}")
    present = {name for name, value in rope.items() if value is not None}
    if unexpected := sorted(present - FIELDS[kind] - {"type", "rope_type", "rope_theta", "factor"}):
        name = unexpected[0]
        raise InputError(f"{where}: {name} is {rope[name]!r}, not supported with rope_type {kind!r}")
    if kind == "default":
        return None
    factor = bounded(rope, "factor", float, where, 1, 1e6)
    if kind == "linear":
        return RopeScaling(kind, factor)
    length = bounded(rope, ORIGINAL, int, where, 1, 2**24, field(config, "max_position_embeddings", int, where))
    length = bounded(config, ORIGINAL, int, where, 1, 2**24, length)  # overrides the nested field, as in transformers
    low, high = (bounded(rope, f"{name}_freq_factor", float, where, 1e-3, 1e6) for name in ("low", "high"))
    if low >= high:
        raise InputError(f"{where}: low_freq_factor is {low}, expected less than high_freq_factor {high}")
    return RopeScaling(kind, factor, length, low, high)


def frequencies(theta: float, d: int, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """f' of each channel pair, float32 (d/2,)."""
    pairs = torch.arange(d // 2, dtype=torch.float32, device=device)
    unscaled = theta ** (-2 * pairs / d)
    if scaling is None:
        return unscaled
    if scaling.kind == "linear":
        keep = torch.zeros_like(unscaled)
    else:
        rotations = scaling.original_positions * unscaled / (2 * math.pi)
        keep = ((rotations - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return unscaled * (keep + (1 - keep) / scaling.factor)


def rotary_cos_sin(positions: Tensor, d: int, theta: float, scaling: RopeScaling | None,
                   dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cosine and sine (S, d) of the rotation angles of positions (S,); the sine is negated in the first half."""
    angles = torch.outer(positions.float(), frequencies(theta, d, scaling, positions.device))  # (S, d/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates heads (B, h, S, d) by the angles of their positions. Channel i is paired with i + d/2, not with i + 1."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
