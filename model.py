"""The captioner: a frozen ViT, an adapter, a frozen causal language model.

    BOS | N visual tokens | "a video of" | caption | EOS        a ViT and a language model; Qwen has no BOS
    text | N' visual tokens | text | ... | text | caption | EOS         an MLLM, whose own prompt makes the texts

A ViT and a language model that never met need a trained connector. With `--method qadapter` the visual tokens are
connector(LN(Q)), scaled to the root mean square of the word embeddings; the other methods make one token per frame,
connector(pooled feature + frame vector), or with `grid` one for each patch or average of patches. An MLLM
(`models/mllm.py`) has a projector of its own. Its language model reads the MLLM's tokens of each frame (`visual`
frames), the queries in place of an image (queries), or both.

What is trained is said by `method`: the Q-Adapter (`qadapter`), a linear layer (`linear`), one of the baselines in
`models/baselines.py` (`lora`, `adapter` and `prompt` in the ViT, `lora-lm` in the language model), everything (`full`) or
nothing (`none`).

Letters: B clips, T frames, S side in pixels, P tokens of the ViT a frame, D ViT width, Q the N queries of the
Q-Adapter, C width of the language model, N' visual tokens of one of M groups, n images, K captions per clip, L tokens
of the longest caption with its EOS.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError
from common.files import field
from models.caption_loss import caption_loss
from models.generation import generate, make_generation_config
from models.lm import CausalLM
from models.mllm import MLLM, MLPProjector, interleave
from models.mllm_prompts import INSTRUCTION
from models.baselines import add_adapters, add_lora, add_prompts
from models.safetensors import read_safetensors, write_safetensors
from models.tokenizer import load_tokenizer
from models.vit import ViT
from qadapter import QAdapter, frozen_block_outputs, init_time_embed, interpolate_time_embed

# For users: the parts can be imported from here, too.
__all__ = ["MLLM", "AdapterConfig", "Captioner", "CausalLM", "ViT", "generate", "load_tokenizer"]

PROMPT = "a video of"
MAX_CAPTION_TOKENS = 40  # longer training captions are truncated


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained; with the frozen models it determines the name and shape of every trained tensor."""

    method: str = "qadapter"  # qadapter | none | linear | lora | lora-lm | adapter | prompt | full
    write_back: bool = False
    queries: int = 16  # or prompts of a block
    rank: int = 32
    heads: int = 4
    last_blocks: int = 3  # 0: all
    gate: str = "normed"  # normed | sigmoid | channel | patch | none
    gate_bias: float = 0.0
    time_embed: str = "ramp"  # ramp | random | none
    per_frame: bool = False
    no_changes: bool = False
    token_dropout: float = 0.0  # in training
    query_self_attention: bool = False
    frames: int = 8
    visual: str = "queries"  # queries | frames | both: of the Q-Adapter in an MLLM; the other methods read frames
    # An MLLM's tokens of a frame, or a ViT's patches, are averaged to grid x grid; 0: the MLLM's as they are, the ViT's
    # pooled feature
    grid: int = 0
    instruction: str = INSTRUCTION  # to an MLLM

    @property
    def reads_queries(self) -> bool:
        return self.method == "qadapter" and self.visual != "frames"

    @property
    def reads_frames(self) -> bool:
        return self.method != "qadapter" or self.visual != "queries"

    @property
    def vit_unchanged(self) -> bool:
        """Whether the outputs of the ViT's blocks are those of the frozen ViT, and can be stored."""
        return self.method in ("none", "linear", "lora-lm") or (self.method == "qadapter" and not self.write_back)

    @classmethod
    def from_dict(cls, values: dict, where: str) -> "AdapterConfig":
        """Fields that are missing keep their defaults: older runs lack the newest ones. But runs before 0.8 had
        no changes.

        Raises an InputError that starts with `where` for unexpected fields and for values of another type.
        """
        types = {f.name: f.type for f in fields(cls)}
        if unexpected := sorted(values.keys() - types.keys()):
            raise InputError(f"{where}: expected the fields {', '.join(types)}, found {unexpected[0]!r}")
        values = {"no_changes": True} | values
        return cls(**{name: field(values, name, types[name], where) for name in values})


def make_adapter(vit: ViT, config: AdapterConfig) -> QAdapter:
    """The Q-Adapter of a config. Raises InputError where it does not fit the ViT."""
    if config.rank % config.heads:
        raise InputError(f"--rank {config.rank}: expected a multiple of --heads {config.heads}")
    if config.last_blocks > vit.config.depth:
        raise InputError(f"--last-blocks {config.last_blocks}: the ViT has {vit.config.depth} blocks")
    return QAdapter(
        vit.config.width, vit.config.depth, config.queries, config.rank, config.heads, config.frames,
        config.last_blocks, config.gate, config.write_back, self_attention=config.query_self_attention,
        write_last=config.reads_frames, gate_bias=config.gate_bias, time_embed=config.time_embed,
        per_frame=config.per_frame, changes=not config.no_changes, token_dropout=config.token_dropout,
    )  # fmt: skip


def average_grid(tokens: Tensor, grid: int) -> Tensor:
    """Squares of visual tokens (..., side * side, C), row by row -> (..., grid * grid, C), averages of neighbours."""
    side = math.isqrt(tokens.shape[-2])
    x = tokens.flatten(0, -3).transpose(1, 2).unflatten(2, (side, side))  # (n, C, side, side)
    x = F.adaptive_avg_pool2d(x, grid).flatten(2).transpose(1, 2)  # (n, grid * grid, C)
    return x.unflatten(0, tokens.shape[:-2])


class Captioner(nn.Module):
    """Frames to captions. Only the `trained()` parameters change; the rest is frozen and stays in eval mode.

    The ViT and the language model compute in the dtype of their frozen weights. Trained weights are float32.
    """

    def __init__(self, vit: ViT, lm: CausalLM, tokenizer, config: AdapterConfig, mllm: MLLM | None = None):
        """With an MLLM, `vit` and `lm` are its own."""
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vit, self.lm, self.mllm = vit, lm, mllm
        self.dtype = vit.position.dtype
        assert config.method != "full" or {self.dtype, lm.embed.weight.dtype} == {torch.float32}, "trained in float32"
        self.check_visual()
        self.requires_grad_(config.method == "full")
        self.adapter = self.time_embed = self.connector = self.query_scale = None
        # The language model expects inputs as large as its embeddings; the connector need not learn that.
        self.register_buffer("prefix_scale", lm.embedding_rms(), persistent=False)
        self.add_trained_parts()
        self._texts: dict[tuple, list[Tensor]] = {}
        visual = self.num_visual_tokens(config.frames)
        prompt = self.prefix_length(config.frames) - visual
        if (positions := visual + prompt + MAX_CAPTION_TOKENS) > lm.config.max_positions:  # EOS is not fed back
            flags = ["--queries"] if config.reads_queries else []
            flags += ["--frames"] if config.reads_frames else []
            flags += ["--grid"] if config.reads_frames and (mllm is not None or config.grid) else []
            raise InputError(
                f"{visual} visual tokens, {prompt} of the prompt and {MAX_CAPTION_TOKENS} of a caption need "
                f"{positions} positions, the language model has {lm.config.max_positions}: expected smaller "
                f"{' or '.join(flags)}"
            )
        self.lm_hidden = lm.hidden  # or a compiled version of it
        self.train()

    def check_visual(self) -> None:
        """Raises InputError where `visual` or `grid` do not fit the frozen models."""
        config = self.config
        if self.mllm is None and config.visual != "queries":
            raise InputError("--visual: expected an --mllm, whose language model can read frames")
        if config.method == "qadapter" and config.visual == "frames" and not config.write_back:
            raise InputError("--visual frames: expected --write-back, else nothing reads the queries")
        if not config.grid:
            return
        if not config.reads_frames or (self.mllm is None and config.method == "none"):
            raise InputError(f"--grid {config.grid}: expected 0, no frames are read")
        if self.mllm is not None and self.mllm.config.class_token:
            raise InputError(f"--grid {config.grid}: expected 0, this MLLM's tokens of a frame are not a grid")
        side = self.vit.config.grid if self.mllm is None else self.mllm.config.grid
        if config.grid > side:
            raise InputError(f"--grid {config.grid}: expected at most {side}, the side of this model's grid of a frame")

    def add_trained_parts(self) -> None:
        """Makes what the method adds to the frozen models, and the connector and frame vectors where it needs them."""
        config, width, lm_width = self.config, self.vit.config.width, self.lm.config.width
        is_pair = self.mllm is None
        if config.method == "qadapter":
            self.adapter = make_adapter(self.vit, config)
            self.adapter.norm.requires_grad_(config.reads_queries)  # else nothing reads LN(Q)
            if config.reads_queries and config.reads_frames:
                self.query_scale = nn.Parameter(torch.zeros(1))  # random queries would spoil what is read of the frames
        elif config.method == "linear" or (is_pair and config.method != "none"):
            self.time_embed = nn.Parameter(init_time_embed(config.frames, width if is_pair else lm_width))
        if config.method in ("lora", "lora-lm"):
            add_lora((self.vit if config.method == "lora" else self.lm).blocks, config.rank)
        elif config.method == "adapter":
            add_adapters(self.vit, config.rank)
        elif config.method == "prompt":
            add_prompts(self.vit, config.queries)
        if is_pair:
            needs_connector = config.method != "none"
        else:
            needs_connector = config.reads_queries and not self.projects_queries
        if needs_connector:
            self.connector = nn.Linear(width, lm_width)
            nn.init.normal_(self.connector.weight, std=width**-0.5)
            nn.init.zeros_(self.connector.bias)
        elif config.method == "linear":  # of an MLLM, which step 0 leaves as it is
            self.connector = nn.Linear(lm_width, lm_width)
            nn.init.zeros_(self.connector.weight)
            nn.init.zeros_(self.connector.bias)

    @property
    def projects_queries(self) -> bool:
        """Whether queries go through the MLLM's own projector, which has to map single vectors for that."""
        return self.mllm is not None and isinstance(self.mllm.projector, MLPProjector)

    def train(self, mode: bool = True) -> "Captioner":
        super().train(mode)
        if self.config.method != "full":
            for frozen in (self.vit, self.lm, self.mllm):
                if frozen is not None:
                    frozen.eval()
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

    # -------------------------------------------------------------------------------- what the ViT sees

    @property
    def first_block(self) -> int:
        """The first block of the ViT whose output is read by what comes after the ViT."""
        return len(self.vit.blocks) - 1 if self.adapter is None else self.adapter.first

    def block_outputs(self, frames: Tensor) -> Tensor:
        """Frames uint8 (B, T, 3, S, S) -> outputs of the frozen blocks from `first_block` on, without write-back: bf16
        (B, T, blocks, P, D)."""
        pixels = self.vit.normalize(frames).to(self.dtype)
        return frozen_block_outputs(self.vit, pixels, self.first_block).bfloat16()

    def block_outputs_shape(self, frames: int) -> tuple[int, ...]:
        """The shape of `block_outputs` for one clip: (T, blocks, P, D)."""
        return frames, len(self.vit.blocks) - self.first_block, *self.vit.position.shape

    def look(self, frames: Tensor) -> tuple[Tensor | None, Tensor]:
        """Frames uint8 (B, T, 3, S, S), or their `block_outputs` -> the Q-Adapter's LN(Q) (B, N, D), None for the other
        methods, and the output of the ViT's last block (B, T, P, D)."""
        if frames.dtype != torch.uint8:
            outputs = frames.to(self.dtype)  # (B, T, blocks, P, D)
        else:
            pixels = self.vit.normalize(frames).to(self.dtype)
            if self.config.write_back and self.adapter is not None:
                return self.adapter.read_and_write(self.vit, pixels)
            if not self.config.vit_unchanged:
                z = self.vit.run_blocks(pixels.flatten(0, 1))  # (B*T, P, D)
                return None, z.unflatten(0, frames.shape[:2])
            outputs = frozen_block_outputs(self.vit, pixels, self.first_block)  # (B, T, blocks, P, D)
        return None if self.adapter is None else self.adapter.read(outputs), outputs[:, :, -1]

    # ------------------------------------------------------------------ what the language model reads

    def texts(self, frames: int) -> list[Tensor]:
        """The ids before, between and after the M groups of visual tokens: M + 1 texts for T = `frames` frames."""
        key = frames, self.prefix_scale.device  # kept: a tensor made from a list is copied to a GPU, which waits for it
        if key not in self._texts:
            if self.mllm is not None:
                images = frames if self.config.reads_frames else 1
                texts = self.mllm.prompt(self.tokenizer, images, self.config.instruction)
            else:
                bos = self.tokenizer.bos_id()
                texts = [[bos] if bos >= 0 else [], self.tokenizer.encode(PROMPT)]
            self._texts[key] = [torch.tensor(ids, dtype=torch.long, device=key[1]) for ids in texts]
        return self._texts[key]

    def num_visual_tokens(self, frames: int) -> int:
        """Visual tokens of all groups."""
        queries = self.config.queries if self.config.reads_queries else 0
        if not self.config.reads_frames:
            return queries
        if self.mllm is None:
            return 0 if self.config.method == "none" else frames * (self.config.grid**2 or 1)
        return queries + frames * (self.config.grid**2 or self.mllm.config.tokens_per_image)

    def prefix_length(self, frames: int) -> int:
        """Positions before a caption: texts, visual tokens, and OneVision's newline."""
        newline = self.mllm is not None and self.mllm.newline is not None
        return sum(map(len, self.texts(frames))) + self.num_visual_tokens(frames) + newline

    def connect_frames(self, z: Tensor) -> Tensor:
        """Without an MLLM: outputs of the last block (B, T, P, D) -> grid^2 tokens a frame, or one, (B, N', C)."""
        frames, grid = z.shape[1], self.config.grid
        z = z.flatten(0, 1)  # (B*T, P, D)
        features = average_grid(self.vit.patches(z), grid) if grid else self.vit.pool(z)[:, None]  # (B*T, N'/T, D)
        time_embed = interpolate_time_embed(self.time_embed, frames)[:, None]  # (T, 1, D)
        x = features.unflatten(0, (-1, frames)) + time_embed  # (B, T, N'/T, D)
        return self.connector(x).flatten(1, 2) * self.prefix_scale  # (B, N', C)

    def frame_tokens(self, z: Tensor) -> Tensor:
        """Outputs of the last block (B, T, P, D) -> the MLLM's tokens of each frame (B, T, N', C)."""
        tokens = self.mllm.connect(self.vit.finish(z.flatten(0, 1)))  # (B*T, N', C)
        tokens = tokens.unflatten(0, z.shape[:2])
        if self.config.grid:
            tokens = average_grid(tokens, self.config.grid)  # (B, T, grid * grid, C)
        if self.config.method == "linear":  # adds what it has learned
            time_embed = interpolate_time_embed(self.time_embed, z.shape[1])[:, None]  # (T, 1, C)
            tokens = tokens + self.connector(tokens / self.prefix_scale + time_embed) * self.prefix_scale
        return tokens

    def project_queries(self, queries: Tensor) -> Tensor:
        """LN(Q) (B, N, D) -> visual tokens (B, N, C)."""
        if self.projects_queries:
            tokens = self.mllm.projector(queries.to(self.dtype))
        else:
            tokens = self.connector(queries) * self.prefix_scale
        return tokens if self.query_scale is None else tokens * self.query_scale

    def encode(self, frames: Tensor) -> list[Tensor]:
        """Frames uint8 (B, T, 3, S, S), or their `block_outputs` -> M groups of visual tokens (B, N', C).

        A group for each frame if frames are read from an MLLM, the queries behind the last of them; else one group.
        """
        if self.mllm is None and self.config.method == "none":
            return [self.prefix_scale.new_empty(len(frames), 0, self.lm.config.width)]
        queries, z = self.look(frames)
        if not self.config.reads_frames:
            return [self.project_queries(queries)]
        if self.mllm is None:
            return [self.connect_frames(z)]
        groups = list(self.frame_tokens(z).unbind(1))  # T times (B, N', C)
        if self.config.reads_queries:
            groups[-1] = torch.cat([groups[-1], self.project_queries(queries).to(groups[-1].dtype)], dim=1)
        return groups

    def prefix(self, frames: Tensor) -> Tensor:
        """Embeddings of texts and visual tokens (B, positions before a caption, C)."""
        texts, groups = self.texts(frames.shape[1]), self.encode(frames)
        return interleave(self.lm, texts, groups) if self.mllm is None else self.mllm.merge(texts, groups)

    def forward(self, frames: Tensor, labels: Tensor) -> Tensor:
        """Frames (B, T, 3, S, S), or their block outputs, and K captions each: ids (B, K, L), padded with -100, on the
        CPU -> the cross-entropy summed over all caption tokens and EOS. A clip is encoded once for its K captions."""
        return caption_loss(self.lm_hidden, self.lm.embed, self.lm.head, self.prefix(frames), labels)

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
        parts = {name: list(part.parameters()) for name, part in self.named_children() if name != "mllm"}
        if self.mllm is not None:
            parts["projector"] = list(self.mllm.projector.parameters())
            parts["projector"] += [] if self.mllm.newline is None else [self.mllm.newline]
        parts |= {name: [parameter] for name, parameter in self.named_parameters(recurse=False)}
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
        tensors = read_safetensors(path)
        targets = self.saved()
        if self.query_scale is not None:
            tensors.setdefault("query_scale", torch.ones(1))  # of version 0.6
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
