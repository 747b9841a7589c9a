"""The captioner: a frozen ViT, an adapter, a connector, a frozen causal language model.

    BOS | N visual tokens | "a video of" | caption | EOS        the language model's input; Qwen has no BOS

The visual tokens are connector(LN(Q)), scaled to the root mean square of the word embeddings (`--method qadapter`).
The other methods make one visual token per frame, connector(pooled feature + frame vector), with the ViT frozen
(`linear`), with LoRA in its attention (`lora`), or with everything trained (`full`).

Letters: B clips, T frames, S side in pixels, D ViT width, Q the Q-Adapter's queries, C width of the language model,
N visual tokens, P positions before a caption, s positions of a packed row, K captions per clip, L tokens of the longest
caption with its EOS, n tokens of all captions.
"""

from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import InputError
from common.json_fields import field
from models.generation import generate, make_generation_config
from models.lm import CausalLM
from models.mllm import MLLM
from models.safetensors import read_safetensors, write_safetensors
from models.tokenizer import load_tokenizer
from models.vit import ViT
from qadapter import QAdapter, add_lora, init_time_embed, interpolate_time_embed

# For users: the parts can be imported from here, too.
__all__ = ["MLLM", "AdapterConfig", "Captioner", "CausalLM", "ViT", "generate", "load_tokenizer"]

PROMPT = "a video of"
MAX_CAPTION_TOKENS = 40  # longer training captions are truncated
LOGITS_PER_CHUNK = 2**25  # of the loss: 128 MB in float32


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained; with the two backbones it determines the name and shape of every trained tensor."""

    method: str = "qadapter"  # qadapter | linear | lora | full
    write_back: bool = False
    queries: int = 16
    rank: int = 32
    heads: int = 8
    last_blocks: int = 3  # 0: all
    gate: str = "normed"  # normed | sigmoid | none
    query_self_attention: bool = False
    frames: int = 8

    @classmethod
    def from_dict(cls, values: dict, where: str) -> "AdapterConfig":
        """Fields that are missing keep their defaults: older runs lack the newest ones.

        Raises an InputError that starts with `where` for unexpected fields and for values of another type.
        """
        types = {f.name: f.type for f in fields(cls)}
        if unexpected := sorted(values.keys() - types.keys()):
            raise InputError(f"{where}: expected the fields {', '.join(types)}, found {unexpected[0]!r}")
        return cls(**{name: field(values, name, types[name], where) for name in values})


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies without waiting for a GPU. That takes pinned memory: other memory is copied after all queued work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class FrozenHeadCrossEntropy(torch.autograd.Function):
    """Cross-entropy behind a frozen head, summed: hidden states (n, C) and ids (n,) -> float32 ().

    The logits of all n tokens never exist at once: with 262,144 words they take 1 MB a token. They are computed in
    chunks, and the gradient with respect to the hidden states in the same pass, so that no chunk is computed twice.
    """

    @staticmethod
    def forward(ctx, x: Tensor, ids: Tensor, head: nn.Module, vocab: int) -> Tensor:
        chunk_size, total, gradients = max(1, LOGITS_PER_CHUNK // vocab), x.new_zeros((), dtype=torch.float32), []
        for chunk, chunk_ids in zip(x.split(chunk_size), ids.split(chunk_size), strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                chunk = chunk.detach().requires_grad_(ctx.needs_input_grad[0])
                loss = F.cross_entropy(head(chunk).float(), chunk_ids, reduction="sum")
            if ctx.needs_input_grad[0]:
                gradients += torch.autograd.grad(loss, chunk)
            total += loss.detach()
        ctx.gradient = torch.cat(gradients) if gradients else None  # (n, C)
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple:
        return ctx.gradient * grad_output, None, None, None


def packed_attention_inputs(prefix_length: int, k: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """Inputs of `CausalLM.hidden` for k texts of `length` tokens, packed in one row of s tokens after a shared prefix.

    Each token has the position that it would have in a row of its own, and sees the prefix and its own text:
    `positions` (s,), `visible` (1, s, s). A single text needs neither.
    """
    if k == 1:
        return {}
    prefix_ids = torch.full((prefix_length,), -1, device=device)
    segment_ids = torch.cat([prefix_ids, torch.arange(k * length, device=device) // length])  # (s,)
    position_ids = torch.arange(prefix_length + length, device=device)
    positions = torch.cat([position_ids[:prefix_length], position_ids[prefix_length:].repeat(k)])  # (s,)
    same_segment = (segment_ids == segment_ids[:, None]) | (segment_ids == -1)  # (s, s)
    return {"positions": positions, "visible": (same_segment & (positions <= positions[:, None]))[None]}


def make_adapter(vit: ViT, config: AdapterConfig) -> QAdapter:
    """The Q-Adapter of a config. Raises InputError where it does not fit the ViT."""
    if config.rank % config.heads:
        raise InputError(f"--rank {config.rank}: expected a multiple of --heads {config.heads}")
    if config.last_blocks > vit.config.depth:
        raise InputError(f"--last-blocks {config.last_blocks}: the ViT has {vit.config.depth} blocks")
    return QAdapter(vit.config.width, vit.config.depth, config.queries, config.rank, config.heads, config.frames,
                    config.last_blocks, config.gate, config.write_back, config.query_self_attention)  # fmt: skip


def current_name(name: str) -> str:
    """A tensor's name in a file of version 0.1 -> its name today."""
    if name in ("frames", "adapter.frames"):
        return name.replace("frames", "time_embed")
    return name.replace(".back_", ".write_") if name.startswith("adapter.blocks.") else name


class Captioner(nn.Module):
    """Frames to captions. Only the `trained()` parameters change; the rest is frozen and stays in eval mode.

    The ViT and the language model compute in the dtype of their frozen weights. Trained weights are float32.
    """

    def __init__(self, vit: ViT, lm: CausalLM, tokenizer, config: AdapterConfig):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vit, self.lm = vit, lm
        self.dtype = vit.position.dtype
        assert config.method != "full" or {self.dtype, lm.embed.weight.dtype} == {torch.float32}, "trained in float32"
        self.requires_grad_(config.method == "full")
        width = vit.config.width
        self.adapter = self.time_embed = None
        if config.method == "qadapter":
            self.adapter = make_adapter(vit, config)
        else:
            self.time_embed = nn.Parameter(init_time_embed(config.frames, width))
            if config.method == "lora":
                add_lora(vit, config.rank)
        self.connector = nn.Linear(width, lm.config.width)
        nn.init.normal_(self.connector.weight, std=width**-0.5)
        nn.init.zeros_(self.connector.bias)
        # The language model expects inputs as large as its embeddings; the connector need not learn that.
        self.register_buffer("prefix_scale", lm.embedding_rms(), persistent=False)
        bos_ids = [tokenizer.bos_id()] if tokenizer.bos_id() >= 0 else []
        # Buffers, not lists: a tensor made from a list would be copied to a GPU at each step, which waits for the GPU.
        self.register_buffer("bos_ids", torch.tensor(bos_ids, dtype=torch.long), persistent=False)
        self.register_buffer("prompt_ids", torch.tensor(tokenizer.encode(PROMPT)), persistent=False)
        prefix_length = self.prefix_length(config.frames)
        if (positions := prefix_length + MAX_CAPTION_TOKENS) > lm.config.max_positions:  # EOS is not fed back
            visual = prefix_length - len(self.bos_ids) - len(self.prompt_ids)
            raise InputError(f"{visual} visual tokens need {positions} positions, the language model has "
                             f"{lm.config.max_positions}")  # fmt: skip
        self.lm_hidden = lm.hidden  # or a compiled version of it
        self.train()

    def train(self, mode: bool = True) -> "Captioner":
        super().train(mode)
        if self.config.method != "full":
            self.vit.eval()
            self.lm.eval()
        return self

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles both models for training. Modules stay in place, and so do the names of their tensors."""
        for block in self.vit.blocks:
            block.compile(backend=backend)
        # Not the blocks of the language model: generation calls them with a new shape at each step.
        self.lm_hidden = torch.compile(self.lm.hidden, dynamic=True, backend=backend)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def saved(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by name: those that are trained, and the adapter's channel statistics."""
        buffers = {} if self.adapter is None else self.adapter.named_buffers("adapter")
        return self.trained() | dict(buffers)

    @torch.no_grad()
    def measure_channels(self, frames: Tensor) -> None:
        """Frames uint8 (B, T, 3, S, S), or their `block_outputs`: the adapter's statistics become those of them."""
        outputs = self.block_outputs(frames) if frames.dtype == torch.uint8 else frames
        self.adapter.measure_channels(outputs)

    def prefix_length(self, frames: int) -> int:
        """Positions before a caption: BOS, one visual token per query or frame, the prompt."""
        visual = self.config.queries if self.adapter is not None else frames
        return len(self.bos_ids) + visual + len(self.prompt_ids)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames uint8 (B, T, 3, S, S), or their `block_outputs` -> visual tokens (B, N, C)."""
        if frames.dtype != torch.uint8:
            x = self.adapter.read(frames.to(self.dtype))  # (B, N, D)
        elif self.adapter is not None:
            x = self.adapter(self.vit, self.vit.normalize(frames).to(self.dtype))  # (B, N, D)
        else:
            images = self.vit.normalize(frames).to(self.dtype).flatten(0, 1)  # (B*T, 3, S, S)
            pooled = self.vit.pooled(images).unflatten(0, frames.shape[:2])  # (B, T, D)
            x = pooled + interpolate_time_embed(self.time_embed, frames.shape[1])
        return self.connector(x) * self.prefix_scale

    def block_outputs(self, frames: Tensor) -> Tensor:
        """Frames uint8 (B, T, 3, S, S) -> outputs of the frozen blocks that the adapter reads, without write-back: bf16
        (B, T, adapted blocks, tokens per frame, D)."""
        return self.adapter.block_outputs(self.vit, self.vit.normalize(frames).to(self.dtype)).bfloat16()

    def block_outputs_shape(self, frames: int) -> tuple[int, ...]:
        """The shape of `block_outputs` for one clip: (T, adapted blocks, tokens per frame, D)."""
        return frames, len(self.adapter.blocks), *self.vit.position.shape

    def prefix(self, frames: Tensor) -> Tensor:
        """Embeddings of BOS, visual tokens and prompt (B, P, C)."""
        visual = self.encode(frames)  # (B, N, C)
        bos, prompt = (self.lm.embed(ids).expand(len(frames), -1, -1) for ids in (self.bos_ids, self.prompt_ids))
        return torch.cat([bos, visual.to(prompt.dtype), prompt], dim=1)

    def forward(self, frames: Tensor, labels: Tensor) -> Tensor:
        """Frames (B, T, 3, S, S), or their block outputs, and K captions each: ids (B, K, L), padded with -100.

        Returns the cross-entropy summed over all caption tokens and EOS. A clip is encoded once for its K captions, and
        its prefix is read once: the captions follow it in one row. The head runs on caption positions only. The labels
        are on the CPU, where the positions are found without waiting for a GPU.
        """
        k, length = labels.shape[1:]
        positions = (labels >= 0).flatten().nonzero().squeeze(1)  # (n,)
        positions, ids = to_device(positions, frames.device), to_device(labels, frames.device)
        prefix = self.prefix(frames)  # (B, P, C)
        prefix_length = prefix.shape[1]
        captions = self.lm.embed(ids[:, :, :-1].clamp(min=0))  # (B, K, L-1, C)
        x = torch.cat([prefix, captions.flatten(1, 2)], dim=1)  # (B, P + K(L-1), C)
        # On a CPU the backward pass of fused attention can take 2.7 times as long in bf16 as that of plain attention.
        plain = x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled()
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            x = self.lm_hidden(x, **packed_attention_inputs(prefix_length, k, length - 1, x.device))
        # The last position of the prefix predicts the first token of each caption.
        first = x[:, None, prefix_length - 1 : prefix_length].expand(-1, k, -1, -1)  # (B, K, 1, C)
        x = torch.cat([first, x[:, prefix_length:].unflatten(1, (k, length - 1))], dim=2)  # (B, K, L, C)
        x, ids = x.flatten(0, 2)[positions], ids.flatten()[positions]  # (n, C), (n,)
        if self.config.method == "full":
            return F.cross_entropy(self.lm.head(x).float(), ids, reduction="sum")
        return FrozenHeadCrossEntropy.apply(x, ids, self.lm.head, self.lm.config.vocab)

    @torch.no_grad()
    def caption(self, frames: Tensor, max_new_tokens: int = 30, min_new_tokens: int = 0, beams: int = 1,
                length_penalty: float = 1.0) -> list[str]:  # fmt: skip
        """Frames uint8 (B, T, 3, S, S), or their `block_outputs` -> one caption per clip; greedy with one beam, see
        `models.generation`."""
        options = max_new_tokens, min_new_tokens, beams, length_penalty
        make_generation_config(self.lm.config, self.prefix_length(frames.shape[1]), *options)  # fails before the ViT
        return self.tokenizer.decode(generate(self.lm, self.prefix(frames), *options))

    def parameter_table(self) -> str:
        """Trained and total parameters of each part, and the trained share."""
        parts = {name: list(part.parameters()) for name, part in self.named_children()}  # a tied head counts once
        if self.time_embed is not None:
            parts["time_embed"] = [self.time_embed]
        rows = [(name, sum(p.numel() for p in part if p.requires_grad), sum(p.numel() for p in part))
                for name, part in parts.items()]  # fmt: skip
        trained, total = (sum(row[i] for row in rows) for i in (1, 2))
        lines = [f"{'part':12}{'trained':>12}{'total':>14}"]
        lines += [f"{name:12}{part:>12,}{whole:>14,}" for name, part, whole in [*rows, ("sum", trained, total)]]
        return "\n".join(lines) + f"   trained: {100 * trained / total:.2f} %"

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Writes the tensors of `saved`, and nothing else, as a safetensors file."""
        write_safetensors(path, self.saved(), metadata)

    def load(self, path: Path) -> None:
        """Reads what `save` wrote. Raises InputError unless names and shapes are exactly those of `saved()`.

        Versions before 0.5 had no channel statistics, which are then m = 0 and s = 1.
        """
        tensors = {current_name(name): tensor for name, tensor in read_safetensors(path).items()}
        targets = self.saved()
        if not tensors.keys() & (buffers := targets.keys() - self.trained().keys()):
            targets = {name: target for name, target in targets.items() if name not in buffers}
        if mismatched := sorted(tensors.keys() ^ targets.keys()):
            raise InputError(f"{path}: expected exactly the tensors that this model trains, differs in {mismatched[0]}")
        for name, target in targets.items():
            if tensors[name].shape != target.shape:
                raise InputError(f"{path}: {name} is {list(tensors[name].shape)}, expected {list(target.shape)}")
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(tensors[name])
