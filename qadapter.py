"""The Q-Adapter: query tokens that read a frozen ViT through a gate; and LoRA, its rival.

Our reading of the abstract of [1], which is all of that paper we could read. N learnable queries flow
alongside the ViT's blocks. After each adapted block they attend to all patches of all frames at once,
and a gating layer decides, query by query, how much of what they read is kept:

    X  = LN(Z) + E_t                                  Z: the block's output, E: a vector a frame,
                                                      this LN without scale and shift
    A  = softmax((LN(Q) W_q)(X W_k)^T / sqrt(d)) (X W_v) W_o
    g  = sigmoid([Q ; A] W_g + b_g)                   the gating layer
    Q <- Q + g * A

Reading `read` leaves Z alone, so the ViT needs no gradients. Reading `write` lets the patches read the
gated queries back through a projection that starts at zero: deeper frozen blocks then work on adapted
patches, and the ViT must carry gradients.

Letters: B clips, T frames of S x S pixels, P tokens a frame, D ViT width, N queries, L adapted blocks,
r rank, h heads, d = r/h; n and m count any queries and keys.

References
[1] Q-Adapter, https://arxiv.org/abs/2510.10022 (abstract only).
[2] Flamingo's Perceiver resampler (https://arxiv.org/abs/2204.14198, sec. 3.1): queries among the keys.
[3] LoRA, https://arxiv.org/abs/2106.09685, eq. 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS_AT_ONCE = {"cpu": 3200, "gpu": 102400}  # that the frozen ViT works on: 16 and 519 images of ViT-B/16


class Linear(nn.Linear):
    """A trained layer beside a frozen model: its weights stay in float32 and work in the dtype of their input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention on (B, n, r) queries and (B, m, r) keys and values, split into heads -> (B, n, r)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, h, n|m, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, n, r)


def time_ramp(count: int, width: int) -> Tensor:
    """What frame vectors begin as: time from -1 to 1 along one random direction -> (count, D).

    As loud as LN(Z), and not a ViT's usual 0.02: times must be told apart at once. Along a ramp, one
    direction of W_k makes a head early or late, and the difference of two such heads is motion.
    """
    return torch.linspace(-1, 1, count)[:, None] * torch.randn(width)


def frame_vectors(learned: Tensor, count: int) -> Tensor:
    """Learned frame vectors for another number of frames, by linear interpolation in time -> (count, D)."""
    if count == len(learned):
        return learned
    return F.interpolate(learned.T[None], size=count, mode="linear", align_corners=False)[0].T


class GatedRead(nn.Module):
    """What stands beside one ViT block: the queries' read, its gate and, for `write`, the way back."""

    def __init__(self, width: int, rank: int, heads: int, gate: str, write: bool, talk: bool):
        super().__init__()
        self.heads, self.talk = heads, talk
        self.norm = nn.LayerNorm(width)
        self.q = Linear(width, rank, bias=False)
        self.kv = Linear(width, 2 * rank, bias=False)
        self.o = Linear(rank, width, bias=False)
        self.gate = nn.Linear(2 * width, 1) if gate == "sigmoid" else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)  # every gate opens at one half
            nn.init.zeros_(self.gate.bias)
        self.back_q = self.back_kv = self.back_o = None
        if write:
            self.back_q = Linear(width, rank, bias=False)
            self.back_kv = Linear(width, 2 * rank, bias=False)
            self.back_o = Linear(rank, width, bias=False)
            nn.init.zeros_(self.back_o.weight)  # step 0 is the frozen ViT, bit for bit

    def forward(self, queries: Tensor, patches: Tensor, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, D), patches (B, T, P, D), frame vectors (T, D) -> new queries, gates (B, N), patches.

        What is D wide and there is P of has the dtype of the patches, all else is float32.
        """
        x = F.layer_norm(patches, patches.shape[-1:])  # unscaled: W_k and W_v would learn its scale again
        # (LN(Z) + E) W = LN(Z) W + E W: the sum is then r wide and not D wide
        kv = self.kv(x) + self.kv(frames)[:, None]  # (B, T, P, 2r)
        kv = kv.flatten(1, 2)  # (B, T*P, 2r)
        own = self.norm(queries)
        if self.talk:
            kv = torch.cat([kv, self.kv(own)], dim=1)  # (B, T*P+N, 2r)
        read = self.o(attend(self.q(own), *kv.chunk(2, dim=-1), self.heads))  # (B, N, D)
        gates = queries.new_ones(queries.shape[:2])  # (B, N)
        if self.gate is not None:
            gates = self.gate(torch.cat([queries, read], dim=-1)).sigmoid().squeeze(-1)
        queries = queries + gates[..., None] * read
        if self.back_q is not None:
            asked = (self.back_q(x) + self.back_q(frames)[:, None]).flatten(1, 2)  # (B, T*P, r)
            given = self.back_kv(self.norm(queries))  # (B, N, 2r)
            written = attend(asked, *given.chunk(2, dim=-1), self.heads)  # (B, T*P, r)
            patches = patches + self.back_o(written.to(x.dtype)).view_as(patches)
        return queries, gates, patches


def naive_read(block: GatedRead, queries: Tensor, patches: Tensor, frames: Tensor) -> Tensor:
    """The docstring's four lines for reading `read`, one clip and one head at a time; slow, for reading."""
    new = []
    for q, z in zip(queries, patches, strict=True):  # (N, D), (T, P, D)
        x = (F.layer_norm(z, z.shape[-1:]) + frames[:, None]).flatten(0, 1)  # (T*P, D)
        own = block.norm(q)
        if block.talk:
            x = torch.cat([x, own])  # (T*P+N, D)
        wk, wv = block.kv.weight.chunk(2)
        heads = []
        for hq, hk, hv in zip(*(w.chunk(block.heads) for w in (block.q.weight, wk, wv)), strict=True):
            logits = (own @ hq.T) @ (x @ hk.T).T / len(hq) ** 0.5  # (N, T*P)
            heads.append(logits.softmax(-1) @ (x @ hv.T))  # (N, d)
        a = torch.cat(heads, -1) @ block.o.weight.T  # (N, D)
        g = torch.sigmoid(block.gate(torch.cat([q, a], -1))) if block.gate is not None else 1
        new.append(q + g * a)
    return torch.stack(new)


class QAdapter(nn.Module):
    """Queries, frame vectors and one gated block per adapted ViT block.

    width, depth: the ViT's D and number of blocks. queries N, rank r (a multiple of heads), frames T.
    last_blocks: adapt only the last so many blocks; 0 means all. gate: sigmoid | none.
    reading: read | write. talk: the queries stand among their own keys [2].
    """

    def __init__(self, width: int, depth: int, queries: int = 16, rank: int = 32, heads: int = 8,
                 frames: int = 8, last_blocks: int = 0, gate: str = "sigmoid", reading: str = "read",
                 talk: bool = False):  # fmt: skip
        super().__init__()
        self.reading = reading
        self.first = depth - (last_blocks or depth)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.frames = nn.Parameter(time_ramp(frames, width))
        self.blocks = nn.ModuleList(
            # After the last block nobody would read what was written back.
            GatedRead(width, rank, heads, gate, reading == "write" and i < depth - 1, talk)
            for i in range(self.first, depth)
        )
        self.norm = nn.LayerNorm(width)
        self.mean_gates: Tensor | None = None  # (adapted blocks,), of the last forward pass

    @torch.no_grad()
    def outputs(self, vit: nn.Module, pixels: Tensor) -> Tensor:
        """Pixels (B, T, 3, S, S), normalised -> the frozen outputs of the adapted blocks (B, T, L, P, D).

        The ViT takes some images at a time: more at once would need more memory, and on a CPU be slower by a quarter.
        """
        images = pixels.flatten(0, 1)  # (B*T, 3, S, S)
        tokens, width = vit.position.shape
        kept = images.new_empty(len(images), len(self.blocks), tokens, width)  # (B*T, L, P, D)
        at_once = max(1, TOKENS_AT_ONCE["cpu" if images.device.type == "cpu" else "gpu"] // tokens)
        for some, into in zip(images.split(at_once), kept.split(at_once), strict=True):
            z = vit.embed(some)  # (at_once or fewer, P, D)
            for i, block in enumerate(vit.blocks):
                z = block(z)
                if i >= self.first:
                    into[:, i - self.first] = z
        return kept.unflatten(0, pixels.shape[:2])

    def read(self, outputs: Tensor) -> Tensor:
        """Reading `read` of block outputs (B, T, L, P, D), just made or kept from before -> LN(Q_L), (B, N, D)."""
        frames = frame_vectors(self.frames, outputs.shape[1])  # (T, D)
        queries, means = self.queries.expand(len(outputs), -1, -1), []  # (B, N, D)
        for block, z in zip(self.blocks, outputs.unbind(2), strict=True):  # (B, T, P, D)
            queries, gates, _ = block(queries, z, frames)
            means.append(gates.detach().mean())
        self.mean_gates = torch.stack(means)
        return self.norm(queries)

    def read_and_write(self, vit: nn.Module, pixels: Tensor) -> Tensor:
        """Reading `write`: like `read`, but each block works on what the queries wrote before it."""
        batch, count = pixels.shape[:2]
        frames = frame_vectors(self.frames, count)  # (T, D)
        queries, means = self.queries.expand(batch, -1, -1), []  # (B, N, D)
        z = vit.embed(pixels.flatten(0, 1))  # (B*T, P, D)
        for i, block in enumerate(vit.blocks):
            z = block(z)  # below the first adapted block nothing here needs gradients, so none are kept
            if i >= self.first:
                queries, gates, z = self.blocks[i - self.first](queries, z.unflatten(0, (batch, count)), frames)
                z = z.flatten(0, 1)
                means.append(gates.detach().mean())
        self.mean_gates = torch.stack(means)
        return self.norm(queries)

    def forward(self, vit: nn.Module, pixels: Tensor) -> Tensor:
        """Pixels (B, T, 3, S, S), normalised -> LN(Q_L), (B, N, D) however large T."""
        return self.read_and_write(vit, pixels) if self.reading == "write" else self.read(self.outputs(vit, pixels))


class LoRALinear(nn.Linear):
    """A frozen linear layer plus a trained update of rank r: x W^T + b + (x A^T) B^T [3].

    A starts random and B at zero, so step 0 is the frozen layer. The usual factor alpha / r is left at 1.
    """

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))


def add_lora(vit: nn.Module, rank: int) -> None:
    """Puts LoRA on the query and value projections of every block of the ViT, in place."""
    for block in vit.blocks:
        block.attn.q = LoRALinear(block.attn.q, rank)
        block.attn.v = LoRALinear(block.attn.v, rank)
