"""Rotary position embeddings [1], and the published ways to stretch them over longer texts.

At position p the channel pair i of a head is turned by the angle p f_i, f_i = theta^(-2i/d): the first
pairs turn fast and tell neighbours apart, the last ones slowly and tell near from far. Beyond the L
positions of its first training a model would meet angles it has never seen, unless slow pairs are made
slower still while fast ones, which have seen every angle, are kept:

    f_i' = f_i (keep_i + (1 - keep_i) / factor)

    linear    keep = 0: all positions are squeezed into the old ones [2]
    llama3    keep rises from 0 to 1 with the turns a pair makes in L positions, between `low` and `high` [3]
    yarn      keep falls from 1 to 0 with the pair's index, between the pairs that make `high` and `low`
              turns; cosine and sine are multiplied too, which sharpens attention [4]
    dynamic   keep = 1 up to max_position_embeddings; only beyond, where this program never goes, do
              frequencies change, with every new length

Letters: S positions, d width of a head, L positions of the first training.

References
[1] https://arxiv.org/abs/2104.09864
[2] https://arxiv.org/abs/2306.15595
[3] Llama 3.1, apply_scaling in models/llama3/model.py of https://github.com/meta-llama/llama-models
[4] https://arxiv.org/abs/2309.00071, sec. 3.2 and 3.4; rounded to whole pairs as in its authors' code
Names in config.json: transformers' modeling_rope_utils.py.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights import InputError, bounded, field

ORIGINAL = "original_max_position_embeddings"
# What a config may say beside rope_type, rope_theta and factor; `finetuned` is history, not arithmetic.
FIELDS = {
    "default": set(),
    "linear": set(),
    "dynamic": {ORIGINAL},
    "llama3": {ORIGINAL, "low_freq_factor", "high_freq_factor"},
    "yarn": {ORIGINAL, "beta_slow", "beta_fast", "attention_factor", "truncate", "finetuned"},
}


@dataclass(frozen=True)
class Scaling:
    """How frequencies are changed for longer texts."""

    kind: str  # linear | llama3 | yarn
    factor: float
    original: int = 0  # L
    low: float = 1.0  # turns in L positions: pairs with fewer are slowed down by the whole factor
    high: float = 32.0  # and pairs with more are kept
    gain: float = 1.0  # of cosine and sine
    truncate: bool = True  # yarn: ramp from a whole pair to a whole pair


def read_scaling(rope: dict[str, Any], config: dict[str, Any], where: str | Path) -> Scaling | None:
    """`rope_scaling` or `rope_parameters` of a config -> what it asks for; None where nothing is changed.

    Raises InputError for a kind, or a field of it, that is not computed here.
    """
    kind = field(rope, "rope_type", str, where, field(rope, "type", str, where, "default"))
    if kind not in FIELDS:
        raise InputError(f"{where}: rope_type is {kind!r}, supported: {', '.join(FIELDS)}")
    given = {name for name, value in rope.items() if value is not None}
    if odd := sorted(given - FIELDS[kind] - {"type", "rope_type", "rope_theta", "factor"}):
        raise InputError(f"{where}: {odd[0]} is {rope[odd[0]]!r}, not supported with rope_type {kind!r}")
    if kind in ("default", "dynamic"):
        return None
    factor = bounded(rope, "factor", float, where, 1, 1e6)
    length = bounded(rope, ORIGINAL, int, where, 1, 2**24, field(config, "max_position_embeddings", int, where))
    original = bounded(config, ORIGINAL, int, where, 1, 2**24, length)  # which goes before what the rope says
    if kind == "linear":
        return Scaling(kind, factor)
    if kind == "llama3":
        low, high = (bounded(rope, f"{name}_freq_factor", float, where, 1e-3, 1e6) for name in ("low", "high"))
        scaling = Scaling(kind, factor, original, low, high)
    else:
        low, high = (bounded(rope, f"beta_{name}", float, where, 1e-3, 1e6, usual)
                     for name, usual in (("slow", 1.0), ("fast", 32.0)))  # fmt: skip
        gain = bounded(rope, "attention_factor", float, where, 1e-3, 1e3, 0.1 * math.log(factor) + 1)
        scaling = Scaling(kind, factor, original, low, high, gain, field(rope, "truncate", bool, where, True))
    if not 0 < low < high:
        raise InputError(f"{where}: rope_type {kind!r} changes between {low} and {high} turns, expected 0 < low < high")
    return scaling


def frequencies(theta: float, d: int, scaling: Scaling | None, device: torch.device) -> Tensor:
    """f' of each channel pair, float32 (d/2,)."""
    pairs = torch.arange(d // 2, dtype=torch.float32, device=device)
    plain = theta ** (-2 * pairs / d)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        keep = torch.zeros_like(plain)
    elif scaling.kind == "llama3":
        turns = scaling.original * plain / (2 * math.pi)
        keep = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    else:
        # The pair that makes n turns in L positions: L theta^(-2i/d) = 2 pi n, solved for i.
        first, last = (d * math.log(scaling.original / (2 * math.pi * n)) / (2 * math.log(theta))
                       for n in (scaling.high, scaling.low))  # fmt: skip
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, d - 1)
        keep = 1 - ((pairs - first) / ((last - first) or 0.001)).clamp(0, 1)
    return plain * (keep + (1 - keep) / scaling.factor)


def rotary_angles(positions: Tensor, d: int, theta: float, scaling: Scaling | None,
                  dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cosine and sine, (S, d), of each position's turn of each pair of channels; the sine as `rotate` wants it: less
    than 0 for the first of a pair."""
    turns = torch.outer(positions.float(), frequencies(theta, d, scaling, positions.device))  # (S, d/2)
    gain = 1.0 if scaling is None else scaling.gain
    cos, sin = turns.cos() * gain, turns.sin() * gain
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (B, h, S, d) turned by the angles of their positions; channel i is paired with i + d/2, not with i + 1."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
