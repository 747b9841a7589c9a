"""The whole captioner: a frozen ViT, an adapter, a connector, a frozen causal language model.

    BOS | N visual tokens | "a video of" | caption | EOS        what the language model reads

The visual tokens are connector(LN(Q)) times the size of a word embedding (`--method qadapter`), or one
a frame for its rivals: the ViT's pooled feature plus a frame vector, through the connector, with the
ViT frozen (`linear`), with LoRA in its attention (`lora`), or with everything trained (`full`).

Letters: B clips, T frames, S side in pixels, D ViT width, Q the Q-Adapter's queries, C width of the
language model, V vocabulary, N visual tokens, p tokens of the prompt, P = 1+N+p positions before a
caption, K captions a clip, L tokens of the longest caption with its EOS.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from decode import generate, rules_for
from lm import CausalLM
from qadapter import QAdapter, add_lora, frame_vectors, time_ramp
from vit import ViT
from weights import InputError, read_safetensors, write_safetensors

__all__ = ["AdapterConfig", "Captioner", "CausalLM", "ViT", "generate"]

PROMPT = "a video of"
IGNORED = -100  # a target that pads a row
LONGEST = 40  # tokens of a caption; longer ones are cut


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained, and in which shape; with the two backbones it determines every trained tensor."""

    method: str = "qadapter"  # qadapter | linear | lora | full
    reading: str = "read"  # read | write
    queries: int = 16
    rank: int = 32
    heads: int = 8
    last_blocks: int = 3  # 0: all
    gate: str = "sigmoid"  # sigmoid | none
    talk: bool = False
    frames: int = 8


def side_by_side(start: int, k: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """What `CausalLM.hidden` needs to read k texts of `length` tokens that follow the same `start` positions, in a row.

    Each token stands where it would in a text of its own and sees the beginning and its own text only: `positions`
    (start + k*length,) and `seen` (1, start + k*length, the same). One text needs neither.
    """
    if k == 1:
        return {}
    text = torch.cat([torch.full((start,), -1), torch.arange(k).repeat_interleave(length)]).to(device)
    place = torch.arange(start + length, device=device)
    positions = torch.cat([place[:start], place[start:].repeat(k)])
    mine = (text == text[:, None]) | (text == -1)
    return {"positions": positions, "seen": (mine & (positions <= positions[:, None]))[None]}


class Captioner(nn.Module):
    """Frames to captions. Only `trained()` parameters change; the rest is frozen and stays in eval mode.

    Frozen weights may be of another dtype than float32, in which the ViT and the language model then compute. Trained
    ones are float32.
    """

    def __init__(self, vit: ViT, lm: CausalLM, tokenizer, config: AdapterConfig):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vit, self.lm = vit, lm
        self.dtype = vit.position.dtype
        assert config.method != "full" or {self.dtype, lm.embed.weight.dtype} == {torch.float32}, "trained in float32"
        self.requires_grad_(config.method == "full")
        width, depth = vit.config.width, vit.config.depth
        self.adapter = self.frames = None
        if config.method == "qadapter":
            if config.rank % config.heads:
                raise InputError(f"--rank {config.rank}: expected a multiple of --heads {config.heads}")
            if config.last_blocks > depth:
                raise InputError(f"--last-blocks {config.last_blocks}: the vision tower has {depth} blocks")
            self.adapter = QAdapter(width, depth, config.queries, config.rank, config.heads,
                                    config.frames, config.last_blocks, config.gate, config.reading,
                                    config.talk)  # fmt: skip
        else:
            self.frames = nn.Parameter(time_ramp(config.frames, width))
            if config.method == "lora":
                add_lora(vit, config.rank)
        self.connector = nn.Linear(width, lm.config.width)
        nn.init.normal_(self.connector.weight, std=width**-0.5)
        nn.init.zeros_(self.connector.bias)
        # The language model knows inputs as large as its embeddings; the connector need not learn that.
        self.register_buffer("prefix_scale", lm.embedding_rms(), persistent=False)
        self.prompt_ids = tokenizer.encode(PROMPT)
        # What texts began with in the model's training; some public configs name another token.
        self.bos_id = tokenizer.bos_id() if tokenizer.bos_id() >= 0 else lm.config.bos_id
        prefix = self.prefix_length(config.frames)
        if (need := prefix + LONGEST + 1) > lm.config.max_positions:
            visual = prefix - 1 - len(self.prompt_ids)
            raise InputError(f"{visual} visual tokens need {need} positions, the language model has "
                             f"{lm.config.max_positions}")  # fmt: skip
        self.read_text = lm.hidden  # or a compiled one
        self.train()

    def train(self, mode: bool = True) -> "Captioner":
        super().train(mode)
        if self.config.method != "full":
            self.vit.eval()
            self.lm.eval()
        return self

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles the two models' blocks for training. They stay in place, and so do the names of their tensors."""
        for block in self.vit.blocks:
            block.compile(backend=backend)
        # Not its blocks: decoding calls those with another shape at each step, and each would be compiled anew.
        self.read_text = torch.compile(self.lm.hidden, dynamic=True, backend=backend)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def prefix_length(self, frames: int) -> int:
        """Positions before a caption: BOS, a visual token a query or a frame, the prompt."""
        return 1 + (self.config.queries if self.adapter is not None else frames) + len(self.prompt_ids)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames uint8 (B, T, 3, S, S), or what `block_outputs` made of them -> visual tokens (B, N, C)."""
        if frames.dtype != torch.uint8:
            return self.connector(self.adapter.read(frames.to(self.dtype))) * self.prefix_scale
        pixels = self.vit.normalise(frames).to(self.dtype)
        if self.adapter is not None:
            x = self.adapter(self.vit, pixels)  # (B, N, D)
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.method != "linear"):
                pooled = self.vit.pooled(pixels.flatten(0, 1)).unflatten(0, frames.shape[:2])  # (B, T, D)
            x = pooled + frame_vectors(self.frames, frames.shape[1])
        return self.connector(x) * self.prefix_scale

    def block_outputs(self, frames: Tensor) -> Tensor:
        """Frames uint8 (B, T, 3, S, S) -> all that reading `read` needs of them, bf16 (B, T, blocks, P, D)."""
        return self.adapter.outputs(self.vit, self.vit.normalise(frames).to(self.dtype)).bfloat16()

    def prefix(self, frames: Tensor) -> Tensor:
        """BOS, visual tokens and prompt, embedded: what a caption follows (B, 1+N+p, C)."""
        visual = self.encode(frames)
        ids = torch.tensor([self.bos_id, *self.prompt_ids], device=frames.device)
        text = self.lm.embed(ids).expand(len(frames), -1, -1)
        return torch.cat([text[:, :1], visual.to(text.dtype), text[:, 1:]], dim=1)

    def forward(self, frames: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """Frames (B, T, 3, S, S), or their block outputs, and K captions each, ids (B, K, L), padded with -100.

        Returns the cross-entropy summed over all caption tokens and EOS, and their number. A clip is encoded once for
        its K captions and read once by the language model, they follow it side by side; the head runs on caption
        positions only.
        """
        k, length = targets.shape[1:]
        prefix = self.prefix(frames)  # (B, P, C)
        start = prefix.shape[1]
        said = self.lm.embed(targets[:, :, :-1].clamp(min=0))  # (B, K, L-1, C)
        x = torch.cat([prefix, said.flatten(1, 2)], dim=1)  # (B, P + K(L-1), C)
        # On a CPU the fused attention's way back can take 2.7 times as long in bf16 as the plain one's.
        plain = x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled()
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            x = self.read_text(x, **side_by_side(start, k, length - 1, x.device))
        first = x[:, None, start - 1 : start].expand(-1, k, -1, -1)  # foretells each caption's first token
        x = torch.cat([first, x[:, start:].unflatten(1, (k, length - 1))], dim=2)  # (B, K, L, C)
        counted = targets != IGNORED
        logits = self.lm.head(x[counted]).float()  # (tokens, V)
        return F.cross_entropy(logits, targets[counted], reduction="sum"), int(counted.sum())

    @torch.no_grad()
    def caption(self, frames: Tensor, max_new_tokens: int = 30, min_new_tokens: int = 0, beams: int = 1,
                length_penalty: float = 1.0) -> list[str]:  # fmt: skip
        """Frames uint8 (B, T, 3, S, S) -> one caption a clip; greedy with one beam, see `decode.generate`."""
        decoding = max_new_tokens, min_new_tokens, beams, length_penalty
        rules_for(self.lm.config, self.prefix_length(frames.shape[1]), *decoding)  # an error, if any, before the ViT
        return self.tokenizer.decode(generate(self.lm, self.prefix(frames), *decoding))

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Writes the trained tensors, and nothing else."""
        write_safetensors(path, dict(self.trained()), metadata)

    def load(self, path: Path) -> None:
        """Reads what `save` wrote; names and shapes must be exactly those of `trained()`."""
        tensors, mine = read_safetensors(path), self.trained()
        if odd := sorted(tensors.keys() ^ mine.keys()):
            raise InputError(f"{path}: holds other tensors than this model trains, for one {odd[0]}")
        for name, parameter in mine.items():
            if tensors[name].shape != parameter.shape:
                raise InputError(f"{path}: {name} is {list(tensors[name].shape)}, expected {list(parameter.shape)}")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(tensors[name])
