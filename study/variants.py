"""Experiments, each beside the method that it replaces: `train.py --variant NAME`. No variant of the Q-Adapter gained.
Some that taught nothing new are gone: `study/tables.toml` names the commit that has them.

Read `qadapter.py` first; letters and shapes are those. A variant of a block replaces one method of
`GatedCrossAttention`, a variant of what is around the blocks one of `QAdapter`, and a variant of another `--method`
replaces one of `Captioner` in `model.py`. A new idea is a class here and a line in VARIANTS. docs/study-tables.md has
the scores. The gating layer of a variant is called `gate`, which gives it that layer's learning rate
(`training/optimizer.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError
from model import Captioner
from models.baselines import LoRALinear
from models.vit import ViTMLP
from qadapter import HEADS, GatedCrossAttention, QAdapter, init_time_embed, multi_head_attention, zero_linear

# --------------------------------------------------------------------------------------- the gate


class OpenGate(GatedCrossAttention):
    """g = 1, which is what a log shows: the gating layer acts elsewhere, by default with one number per token."""

    def make_gate(self, width: int) -> nn.Module:
        return zero_linear(width, 1)

    def compute_gates(self, normed_queries: Tensor, read: Tensor) -> Tensor:
        return read.new_ones(*read.shape[:2], 1)


class TokenGate(OpenGate):
    """sigmoid((Y + E) w + b), one number per token of the ViT, scales the token's value."""

    def keys_and_values(self, z: Tensor, time_embed: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().keys_and_values(z, time_embed)  # (B, T*P, r)
        return k, v * self.project(self.gate, z, time_embed).flatten(1, 2).sigmoid()


class HeadGate(OpenGate):
    """A = [g_1 R_1 ; .. ; g_h R_h] W_o for the reads R_i of the heads, with g_i = sigmoid(LN(Q) W_g + b_g), one number
    per head (2505.06708)."""

    def make_gate(self, width: int) -> nn.Module:
        return zero_linear(width, HEADS)

    def read(self, z: Tensor, normed_queries: Tensor, time_embed: Tensor) -> Tensor:
        k, v = self.keys_and_values(z, time_embed)  # (B, T*P, r)
        read = multi_head_attention(self.q(normed_queries), k, v, self.mask(z))  # (B, N, r)
        gates = self.gate(normed_queries).sigmoid()  # (B, N, h)
        return self.o(read * gates.repeat_interleave(read.shape[-1] // gates.shape[-1], dim=-1))  # (B, N, D)


class RankGate(HeadGate):
    """The same with one number per channel of the rank."""

    def make_gate(self, width: int) -> nn.Module:
        return zero_linear(width, self.o.in_features)


class WriteGate(OpenGate):
    """Z <- Z + sigmoid((Y + E) w + b) * what Z reads of the queries: one number per token of the ViT."""

    def __init__(self, width: int, config, write_back: bool):
        super().__init__(width, config, write_back)
        if not write_back:  # behind the last block nothing is written
            self.gate = None

    def write(self, z: Tensor, queries: Tensor, tokens: Tensor, time_embed: Tensor) -> Tensor:
        gates = self.project(self.gate, z, time_embed).sigmoid().to(z.dtype)  # (B, T, P, 1)
        return tokens.lerp(super().write(z, queries, tokens, time_embed), gates)


# ------------------------------------------------------------------------------- what tells frames apart


class NoChanges(GatedCrossAttention):
    """X = Y + E: the queries read each token alone, not its change since the frame before."""

    def __init__(self, width: int, config, write_back: bool):
        super().__init__(width, config, write_back)
        self.kv_change = None

    def project_changes(self, z: Tensor) -> Tensor:
        return z.new_zeros(())


class PerFrame(NoChanges):
    """Query i sees frame i T / N, rounded down, and no other. Without changes, which tell of the frame before."""

    def __init__(self, width: int, config, write_back: bool):
        super().__init__(width, config, write_back)
        self.queries = config.queries

    def mask(self, z: Tensor) -> Tensor:
        frames, tokens = z.shape[1:3]
        frame_of_query = torch.arange(self.queries, device=z.device) * frames // self.queries  # (N,)
        frame_of_token = torch.arange(frames, device=z.device).repeat_interleave(tokens)  # (T*P,)
        same = frame_of_query[:, None] == frame_of_token  # (N, T*P)
        visible = super().mask(z)  # (B, 1, 1, T*P)
        return same if visible is None else same & visible  # (B, 1, N, T*P)


class NoTime(QAdapter):
    """No frame vectors: E = 0."""

    def __init__(self, width: int, depth: int, config):
        super().__init__(width, depth, config)
        nn.init.zeros_(self.time_embed).requires_grad_(False)


class NoTimeNoChanges(NoTime):
    """Nothing tells frames apart."""

    Block = NoChanges


class RawChannels(QAdapter):
    """Y = LN(Z): channels are not standardized, m = 0 and s = 1."""

    def measure_channels(self, outputs: Tensor) -> None:
        pass


class SameBlock(QAdapter):
    """All reads are of the last block."""

    def measure_channels(self, outputs: Tensor) -> None:
        super().measure_channels(outputs[:, :, -1:].expand_as(outputs))

    def read_outputs(self, outputs: Tensor) -> Tensor:
        return super().read_outputs(outputs[:, :, -1:].expand_as(outputs))


class Blind(QAdapter):
    """Every token is zero: what a captioner learns without the video."""

    def read_outputs(self, outputs: Tensor) -> Tensor:
        return super().read_outputs(torch.zeros_like(outputs))


# ------------------------------------------------------------------------- of the other methods


class WithChanges(Captioner):
    """The connector also reads, through a matrix, how each token differs from that of the frame before, at the same
    place. The queries read such changes, too, of three blocks. A method from an MLLM that has no connector gets that of
    `linear`."""

    def add_trained_parts(self) -> None:
        super().add_trained_parts()
        width = self.backbone.visual_width
        if self.time_embed is None:
            self.time_embed = nn.Parameter(init_time_embed(self.config.frames, width))
            self.connector = zero_linear(width, width)
        self.change = nn.Linear(width, width, bias=False)

    def add_time(self, tokens: Tensor) -> Tensor:
        changes = F.pad(tokens.float().diff(dim=1), (0, 0, 0, 0, 1, 0))  # (B, T, N', D), zero in the first frame
        return super().add_time(tokens) + self.change(changes)


class AllLinear(Captioner):
    """LoRA in every linear layer of the blocks, not in queries and values alone (2305.14314)."""

    class CalledMLP(ViTMLP):
        """A ViT's MLP that calls its layers: the usual one takes their weights alone, and LoRA would do nothing."""

        def __init__(self, base: ViTMLP):
            nn.Module.__init__(self)
            self.up, self.down, self.activation, self.scale = base.up, base.down, base.activation, base.scale

        def forward(self, x: Tensor) -> Tensor:
            """(n, P, D) -> (n, P, D)."""
            return self.down(self.activation(self.scale * self.up(x)) / self.scale)

    def add_trained_parts(self) -> None:
        if self.config.method not in ("lora", "lora-lm"):
            raise InputError("--variant all-linear: expected --method lora or lora-lm")
        super().add_trained_parts()
        blocks = self.vit.blocks if self.config.method == "lora" else self.lm.blocks
        if self.config.method == "lora":
            for block in blocks:
                block.mlp = self.CalledMLP(block.mlp)
        for module in list(blocks.modules()):
            for name, layer in module.named_children():
                if type(layer) is nn.Linear:
                    setattr(module, name, LoRALinear(layer, self.config.rank))


class TrainedProjector(Captioner):
    """The projector of an MLLM is trained, too, in float32."""

    class Projector(nn.Module):
        def __init__(self, frozen: nn.Module):
            super().__init__()
            self.trained = frozen.float().requires_grad_()

        def forward(self, features: Tensor) -> Tensor:
            """What the frozen projector maps, in its dtype, computed in float32."""
            return self.trained(features.float()).to(features.dtype)

    def add_trained_parts(self) -> None:
        if not self.backbone.trained_together:
            raise InputError("--variant train-projector: expected --mllm")
        super().add_trained_parts()
        self.backbone.projector = self.Projector(self.backbone.projector)


def with_block(block: type[GatedCrossAttention]) -> type[QAdapter]:
    """The Q-Adapter with another block."""
    return type(block.__name__, (QAdapter,), {"Block": block})


VARIANTS = {
    "gate-patch": with_block(TokenGate),
    "gate-head": with_block(HeadGate),
    "gate-rank": with_block(RankGate),
    "gate-write": with_block(WriteGate),
    "no-changes": with_block(NoChanges),
    "per-frame": with_block(PerFrame),
    "no-time": NoTime,
    "no-time-no-changes": NoTimeNoChanges,
    "raw-channels": RawChannels,
    "same-block": SameBlock,
    "blind": Blind,
    "with-changes": WithChanges,
    "all-linear": AllLinear,
    "train-projector": TrainedProjector,
}


def choose(base: type, config) -> type:
    """The variant of a config if it is a kind of `base`, else `base`. Raises InputError for an unknown name, and for a
    variant that does not fit --method, --gate or --write-back."""
    is_qadapter = config.method == "qadapter"
    names = [name for name, variant in VARIANTS.items()
             if issubclass(variant, QAdapter) == is_qadapter and config.method != "none"]
    if config.variant not in names:
        expected = f"one of {', '.join(names)}" if names else "no variant"
        raise InputError(f"--variant {config.variant}: expected {expected} for --method {config.method}")
    if config.gate == "none" and config.variant.startswith("gate-"):
        raise InputError(f"--variant {config.variant}: expected without --gate none")
    if config.write_back and "read_outputs" in vars(VARIANTS[config.variant]):
        raise InputError(f"--variant {config.variant}: expected without --write-back")
    if config.variant == "gate-write" and not config.write_back:
        raise InputError("--variant gate-write: expected with --write-back")
    return VARIANTS[config.variant] if issubclass(VARIANTS[config.variant], base) else base
