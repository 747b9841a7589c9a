"""The captioner: a frozen ViT, an adapter, a frozen causal language model.

    frames -> ViT -> visual tokens in a prompt -> language model -> caption

The frozen models are an MLLM (`models/mllm.py`), or a pair, that is a separate ViT and language model
(`models/pair.py`). Both answer the same questions: what is read of a frame, how wide it is, which texts surround it.
The visual tokens are the N queries of the Q-Adapter (`--visual queries`) or tokens of each frame.

What is trained is said by `method`: the Q-Adapter (`qadapter`), a linear layer (`linear`), one of the baselines in
`models/baselines.py` (`lora`, `adapter`, `st-adapter` and `prompt` in the ViT, `lora-lm` in the language model),
everything (`full`) or nothing (`none`); and a connector to the language model where it needs one, see
`add_trained_parts`.

Shapes: B clips, T frames, S side in pixels, P tokens of the ViT per frame, D ViT width, N queries Q, C width of the
language model, N' visual tokens per frame, M groups of visual tokens in a prompt, n images, K captions per clip, L
tokens of the longest caption with its EOS, J `read_blocks`, j blocks of DeepStack (Qwen3-VL's; others have none).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from common.config import Config
from common.errors import InputError
from models.baselines import add_baseline, set_frames
from models.caption_loss import caption_loss, to_device
from models.deep import TEXT, DeepVectors
from models.generation import generate
from models.lm import CausalLM, VisualPlaces
from models.mllm import MLLM
from models.pair import Pair
from models.safetensors import checksum, read_with_metadata, write_safetensors
from models.tokenizer import load_tokenizer
from models.vit import ViT
from qadapter import QAdapter, init_time_embed, interpolate_time_embed, zero_linear

__all__ = ["MLLM", "Captioner", "CausalLM", "Pair", "ViT", "generate", "load_tokenizer"]

MAX_CAPTION_TOKENS = 40  # longer training captions are truncated
MAX_NEW_TOKENS = 30  # of a generated caption; hardly any that people wrote has more


def variant_of(base: type, config: Config) -> type:
    """The Captioner or QAdapter itself, or an experiment, `--variant`, of which nothing else here knows."""
    return base if config.variant is None else import_module("study.variants").choose(base, config)


class Captioner(nn.Module):
    """Frames to captions. Only the `trained()` parameters change; the rest is frozen and stays in eval mode.

    Its input `frames` is uint8 (B, T, 3, S, S), or `block_outputs` of such frames from a cache, bf16 (B, T, J, P, D).
    The ViT and the language model compute in the dtype of their frozen weights. Trained weights are float32.
    """

    def __init__(self, backbone: MLLM | Pair, tokenizer, config: Config):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vit, self.lm, self.backbone = backbone.vit, backbone.lm, backbone
        self.dtype = self.vit.position.dtype
        assert config.method != "full" or {self.dtype, self.lm.embed.weight.dtype} == {torch.float32}
        self.requires_grad_(config.method == "full")
        self.adapter = self.time_embed = self.connector = self.deep = None
        self.deepstack = () if config.reads_queries else backbone.deepstack
        self.states_times = backbone.states_times and not config.reads_queries
        # The language model expects inputs as large as its embeddings.
        self.register_buffer("prefix_scale", self.lm.embedding_rms(), persistent=False)
        self.add_trained_parts()
        self.check_fit()
        self.train()

    def check_fit(self) -> None:
        """Raises InputError if the grid or the visual tokens do not fit the frozen models."""
        config = self.config
        if config.grid > (largest := min(self.backbone.grid) if self.num_visual_tokens(config.frames) else 0):
            raise InputError(f"--grid {config.grid}: expected at most {largest}, a side of a frame's grid of tokens")
        self.check_length(config.frames, config.beams, MAX_CAPTION_TOKENS + 1)  # with EOS

    def add_trained_parts(self) -> None:
        """Makes what the method adds to the frozen models, and the connector and frame vectors where it needs them.

        The connector maps what is read to the width C of the language model. A pair always needs it. An MLLM has a
        projector: it needs one only for queries that this projector cannot map, and for `linear`, from C to C."""
        config, width, lm_width = self.config, self.vit.config.width, self.lm.config.width
        pair_connector = not self.backbone.trained_together and config.method != "none"
        if config.method == "qadapter":
            if config.last_blocks > self.vit.config.depth:
                raise InputError(f"--last-blocks {config.last_blocks}: the ViT has {self.vit.config.depth} blocks")
            self.adapter = variant_of(QAdapter, config)(width, self.vit.config.depth, config)
            self.adapter.norm.requires_grad_(config.reads_queries)  # else nothing reads LN(Q)
        elif config.method == "linear" or pair_connector:
            self.time_embed = nn.Parameter(init_time_embed(config.frames, self.backbone.visual_width))
        add_baseline(self.vit, self.lm, config)
        if pair_connector or (config.reads_queries and not self.backbone.projects_vectors):
            self.connector = nn.Linear(width, lm_width)
            nn.init.normal_(self.connector.weight, std=width**-0.5)
            nn.init.zeros_(self.connector.bias)
        elif config.method == "linear":  # of an MLLM, which step 0 leaves as it is
            self.connector = zero_linear(lm_width, lm_width)
        if config.deep_rank:  # visual tokens act on every block of the language model, not on its input alone
            text = torch.tensor(self.tokenizer.encode(TEXT), device=self.lm.embed.weight.device)
            self.deep = DeepVectors(width, self.lm, config.deep_rank, self.prefix_length(config.frames), text)

    def train(self, mode: bool = True) -> "Captioner":
        super().train(mode)
        if self.config.method != "full":
            self.backbone.eval()
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by name: those that are trained, and the statistics that were measured."""
        return self.trained() | {name: buffer for name, buffer in self.named_buffers()
                                 if name.startswith(("adapter.", "deep."))}

    # -------------------------------------------------------------------------------- what the ViT sees

    @property
    def first_block(self) -> int:
        """The first block of the ViT whose output is read by what comes after the ViT."""
        return len(self.vit.blocks) - 1 if self.adapter is None else self.adapter.first

    @property
    def read_blocks(self) -> list[int]:
        """The blocks of the frozen ViT whose outputs are read: the adapter's, or DeepStack's and the last one."""
        return [*(self.deepstack if self.adapter is None else ()), *range(self.first_block, len(self.vit.blocks))]

    def block_outputs_shape(self, num_frames: int) -> tuple[int, ...]:
        """The shape of `block_outputs` for one clip: (T, J, P, D). With Qwen3-VL T counts pairs of frames."""
        return self.vit.num_steps(num_frames), len(self.read_blocks), *self.vit.position.shape

    def block_outputs(self, frames: Tensor) -> Tensor:
        """Frames uint8 (B, T, 3, S, S) -> outputs of the frozen `read_blocks` (B, T, J, P, D), without write-back. A
        cache stores them in bf16."""
        pixels = self.vit.normalize(frames).to(self.dtype)
        return self.vit.block_outputs(pixels.flatten(0, 1), self.read_blocks).unflatten(0, pixels.shape[:2])

    def run_encoder(self, frames: Tensor) -> tuple[Tensor | None, Tensor]:
        """The input -> the Q-Adapter's LN(Q) (B, N, D), None for the other methods, and the output of the ViT's last
        block with those of DeepStack's blocks beside it (B, T, P, D + jD)."""
        if frames.dtype != torch.uint8:
            outputs = frames.to(self.dtype)  # (B, T, J, P, D)
        elif self.config.can_cache_vit:  # cached or not, no trained weight acts inside the ViT
            outputs = self.block_outputs(frames)  # (B, T, J, P, D)
        else:
            pixels = self.vit.normalize(frames).to(self.dtype)
            if self.adapter is not None:
                return self.adapter.read_and_write(self.vit, pixels, self.deepstack)
            set_frames(self.vit, pixels.shape[1])
            return None, self.vit.run_blocks(pixels.flatten(0, 1), self.deepstack).unflatten(0, pixels.shape[:2])
        *others, z = outputs.unbind(2)  # (B, T, P, D) each
        if self.adapter is not None:
            return self.adapter.read_outputs(outputs), z
        return None, torch.cat([z, *others], dim=-1) if others else z

    @torch.no_grad()
    def measure_channels(self, frames: Tensor) -> None:
        """Gives the adapter the channel statistics of frames uint8 (B, T, 3, S, S), or of their `block_outputs`."""
        if frames.dtype == torch.uint8:
            frames = self.block_outputs(frames).bfloat16()  # as from a cache
        self.adapter.measure_channels(frames)

    # ------------------------------------------------------------------ what the language model reads

    def num_frames(self, frames: Tensor) -> int:
        """T of the input, in whose block outputs several frames may be one step."""
        return frames.shape[1] * (1 if frames.dtype == torch.uint8 else self.vit.frames_per_step)

    def prompt(self, num_frames: int, times: list[float] | None = None) -> list[list[int]]:
        """The ids before, between and after the M groups of visual tokens: M + 1 texts for T = `num_frames` frames."""
        frames = 1 if self.config.reads_queries else num_frames
        return self.backbone.prompt(self.tokenizer, frames, times)

    def group_by_prompt(self, frames: Tensor, times: Tensor | None) -> Iterator[tuple[list[int], list[Tensor]]]:
        """The input, and its times -> for each group of clips with equally long texts: their numbers, and the M + 1
        texts, (clips, any), or (1, any) if they are the same for all."""
        if timed := times is not None and self.states_times:
            prompts = [self.prompt(len(seconds) - 1, seconds) for seconds in times.tolist()]
        else:  # one frame per second, if it matters
            prompts = [self.prompt(self.num_frames(frames))]
        groups: dict[tuple, dict[int, list[list[int]]]] = {}
        for clip, texts in enumerate(prompts):
            groups.setdefault(tuple(map(len, texts)), {})[clip] = texts
        for group in groups.values():
            texts = (torch.tensor(ids, dtype=torch.long) for ids in zip(*group.values(), strict=True))
            clips = list(group if timed else range(len(frames)))
            yield clips, [to_device(ids, self.prefix_scale.device) for ids in texts]

    def num_visual_tokens(self, num_frames: int) -> int:
        """Visual tokens of all groups. A pair that nothing connects has none."""
        if self.config.reads_queries:
            return self.config.queries
        connected = self.backbone.trained_together or self.connector is not None
        steps = self.vit.num_steps(num_frames)
        return steps * self.backbone.num_frame_tokens(self.config.grid) if connected else 0

    def prefix_length(self, num_frames: int) -> int:
        """Positions before a caption: texts, visual tokens, and OneVision's newline."""
        newline = self.backbone.newline is not None
        return sum(map(len, self.prompt(num_frames))) + self.num_visual_tokens(num_frames) + newline

    def frame_tokens(self, z: Tensor) -> Tensor:
        """Outputs of the last block (B, T, P, D + jD) -> visual tokens of each frame (B, T, N', C + jC or C + D)."""
        tokens = self.backbone.frame_tokens(z.flatten(0, 1), self.config.grid).unflatten(0, z.shape[:2])
        if self.connector is None:
            return tokens
        if self.backbone.trained_together:  # the connector adds what it has learned
            tokens, deep = tokens[..., : self.lm.config.width], tokens[..., self.lm.config.width :]
            tokens = tokens + self.connector(self.add_time(tokens / self.prefix_scale)) * self.prefix_scale
            return torch.cat([tokens, deep], dim=-1)
        return self.connect(self.add_time(tokens))

    def add_time(self, tokens: Tensor) -> Tensor:
        """What is read of frames (B, T, N', D), of an MLLM (B, T, N', C), plus a vector for each frame."""
        return tokens + interpolate_time_embed(self.time_embed, tokens.shape[1])[:, None]  # (T, 1, D or C)

    def connect(self, vectors: Tensor) -> Tensor:
        """LN(Q) (B, N, D), or what a pair reads of frames (B, T, N', D) -> visual tokens (..., C), with the vectors
        beside them (..., C + D) for `deep`."""
        if self.connector is None:
            tokens = self.backbone.projector(vectors.to(self.dtype))
        else:
            tokens = self.connector(vectors) * self.prefix_scale
        return tokens if self.deep is None else torch.cat([tokens, vectors], dim=-1)

    def encode(self, frames: Tensor) -> list[Tensor]:
        """The input -> M groups of visual tokens and what is beside them: one for the queries (B, N, C), one for a pair
        (B, T*N', C), one per frame or pair of frames (B, N', C + jC) for an MLLM."""
        if not self.num_visual_tokens(self.num_frames(frames)):
            return [self.prefix_scale.new_empty(len(frames), 0, self.lm.config.width)]
        queries, z = self.run_encoder(frames)
        if self.config.reads_queries:
            return [self.connect(queries)]
        tokens = self.frame_tokens(z)  # (B, T, N', C), (B, T, N', C + D) or (B, T, N', C + jC)
        images = self.backbone.num_images(self.num_frames(frames))
        return list(tokens.unflatten(1, (images, -1)).flatten(2, 3).unbind(1))

    def prefixes(self, frames: Tensor, times: Tensor | None = None) -> Iterator[tuple]:
        """The input, and its times -> for each group of clips with equally long texts: their numbers, the embeddings of
        texts and visual tokens (clips, positions before a caption, C), and the places of the visual tokens."""
        visual = self.encode(frames)
        for clips, texts in self.group_by_prompt(frames, times):
            groups = visual if len(clips) == len(frames) else [tokens[clips] for tokens in visual]
            if self.deep is None:
                places = self.backbone.places(texts, groups)
            else:
                tokens, vectors = groups[0].split([self.lm.config.width, self.vit.config.width], dim=-1)
                groups, places = [tokens], VisualPlaces(None, 0, self.deep(vectors, texts[0].shape[-1]))
            yield clips, self.backbone.merge(texts, groups), places

    def prefix(self, frames: Tensor) -> Tensor:
        """The embeddings alone (B, positions before a caption, C), of frames without times."""
        return next(self.prefixes(frames))[1]

    def forward(self, frames: Tensor, labels: Tensor, times: Tensor | None = None,
                weights: Tensor | None = None) -> Tensor:
        """The input, and K captions each: ids (B, K, L), padded with -100, on the CPU -> the cross-entropy summed over
        all caption tokens and EOS, from the first one on, which the last position of the prefix predicts. A clip is
        encoded once for its K captions. times (B, T + 1), on the CPU: when each frame is shown, and the duration of the
        video, in seconds; by default one frame per second. weights (B, K), of samples: see `caption_loss`."""
        return sum(caption_loss(self.lm, prefix, labels[clips], places, None if weights is None else weights[clips])
                   for clips, prefix, places in self.prefixes(frames, times))

    def check_length(self, num_frames: int, beams: int, max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        """Raises InputError, before any work, for a search that the language model has no positions or tokens for, or
        --deep-rank no vectors."""
        length, lm = self.prefix_length(num_frames), self.lm.config
        if self.deep is not None and length != self.deep.prefix.shape[1]:
            raise InputError(f"--frames {num_frames}: expected {self.config.frames}, as in training with --deep-rank")
        most = lm.vocab - len(lm.eos_ids)
        if not 1 <= beams <= most:
            raise InputError(f"beams: {beams}, expected 1 to {most}, the vocabulary without EOS")
        if max_new_tokens < 1:
            raise InputError(f"tokens of a caption: {max_new_tokens}, expected at least 1")
        needed = length + max_new_tokens - 1  # the last token is not fed back
        if needed > lm.max_positions:
            raise InputError(f"--queries, --frames or --grid: expected {lm.max_positions} positions at most, found "
                             f"{needed}: {length} before a caption of {max_new_tokens}, the last of them not read")

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # --compile is for losses; a cache that grows would be compiled again
    def generate_ids(self, frames: Tensor, times: Tensor | None, method: Callable) -> list:
        """The input, and its times, see `forward` -> what a function of models/generation.py returns for each clip."""
        found: dict[int, list] = {}
        for clips, prefix, places in self.prefixes(frames, times):
            found |= zip(clips, method(self.lm, prefix, places=places), strict=True)
        return [found[i] for i in range(len(frames))]

    def caption(self, frames: Tensor, beams: int = 1, max_new_tokens: int = MAX_NEW_TOKENS,
                times: Tensor | None = None) -> list[str]:
        """The input, and its times, see `forward` -> one caption per clip; greedy with one beam."""
        self.check_length(self.num_frames(frames), beams, max_new_tokens)
        method = partial(generate, beams=beams, max_new_tokens=max_new_tokens)
        return self.tokenizer.decode(self.generate_ids(frames, times, method))

    # ---------------------------------------------------------------------------------------- files

    def save(self, path: Path) -> None:
        """Writes `checkpoint_tensors`, and nothing else, as a safetensors file, with their checksum in its metadata."""
        tensors = self.checkpoint_tensors()
        write_safetensors(path, tensors, {"sha256": checksum(tensors)})

    def load(self, path: Path) -> None:
        """Reads what `save` wrote. Raises InputError for a damaged file and for tensors of another model."""
        tensors, metadata = read_with_metadata(path)
        if metadata.get("sha256") != checksum(tensors):
            raise InputError(f"{path}: is damaged, its tensors do not have the SHA-256 in its metadata")
        self.load_tensors(tensors, path)

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor], where: Path) -> None:
        """Takes the values of `checkpoint_tensors`. Raises InputError for other names or shapes than this model's."""
        targets = self.checkpoint_tensors()
        for name in sorted(tensors.keys() | targets.keys()):
            shapes = [list(group[name].shape) if name in group else "none" for group in (tensors, targets)]
            if shapes[0] != shapes[1]:
                raise InputError(f"{where}: tensor {name} is {shapes[0]}, this model expects {shapes[1]}")
        for name, target in targets.items():
            target.copy_(tensors[name])

    def parameter_table(self) -> str:
        """Trained and total parameters of each part, and the trained share."""
        trained, total = Counter(), Counter()
        for name, parameter in self.named_parameters():
            part = name.removeprefix("backbone.").partition(".")[0]
            total[part] += parameter.numel()
            trained[part] += parameter.numel() * parameter.requires_grad
        rows = [*((part, trained[part], total[part]) for part in total), ("sum", trained.total(), total.total())]
        table = "\n".join([f"{'part':12}{'trained':>12}{'total':>14}", *(f"{a:12}{b:12,}{c:14,}" for a, b, c in rows)])
        return f"{table}   trained: {100 * trained.total() / total.total():.2f}%"
