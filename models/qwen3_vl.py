"""Qwen3-VL [1]: a ViT on pairs of frames, mergers, and a Qwen 3 that is told where its visual tokens are.

    pairs of frames -> ViT with rotated queries and keys -> merger -> visual tokens in a prompt with times -> Qwen 3
                            | blocks 5, 11, 17 -> mergers (DeepStack) -> added behind its blocks 0, 1, 2

The ViT encodes pairs of frames: both frames of a pair are mixed by the patch embedding, and patches attend within their
pair. So a clip of T frames has T/2 steps, which is what the Q-Adapter reads, and the output of every block contains the
motion within a pair. Frame vectors are interpolated to the steps. Of an odd number of frames the last one counts twice.
A table of learned positions is resampled to the grid of patches; besides, queries and keys are rotated by their row and
column.

The language model's positions are time, row and column. Each token of a text, such as the time stamp of a pair, is one
further in all three; a visual token stands in its row and column from there on; what follows a grid of tokens has the
positions behind its longer side. How many seconds lie between two pairs is said by the stamps alone.

Queries in the place of an image (`--visual queries`) pass through no merger, and are a text to the language model.
Frames are squashed to `SIDE` pixels, or to a height and a width, `--image-size H W`, for the usual shape of the videos;
the published processor keeps the aspect ratio of each.

Shapes: B clips, n pairs, T frames, S height of the images in pixels (their width may differ), P patches of a pair, P'
visual tokens of a pair, D width of the ViT, h heads, d = D/h, C width of the language model, s side of a square, j
blocks of DeepStack, L positions.

References
[1] https://arxiv.org/abs/2511.21631; transformers' configuration_qwen3_vl.py, modeling_qwen3_vl.py,
    video_processing_qwen3_vl.py and processing_qwen3_vl.py
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError
from common.files import field
from common.preprocessing import HALF, Preprocessing, read_colours, read_processor
from models.lm import VisualPlaces, apply_rotary
from models.lm_checkpoints import check_supported
from models.mllm import INSTRUCTION, MLLM, MLLMConfig, shuffle_pixels
from models.vit import ViT, ViTAttention, ViTConfig

SIDE = 448  # S by default; the published models take any multiple of 32
PAIR, SQUARE = 2, 2  # frames of a step; patches on the side of a visual token
THETA = 10000.0


def rotary_2d(grid: tuple[int, int], tokens: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (tokens, d) of the rotation of each patch of a grid, row by row: the first half of the channel
    pairs is rotated by the row, the other half by the column. The sine is negated in the first half, as in
    `lm.py`. Tokens behind the patches, deep prompts, are not rotated."""
    frequencies = THETA ** (-torch.arange(0, d // 2, 2, device=device).float() / (d // 2))  # (d/4,)
    places = torch.cartesian_prod(*(torch.arange(side, device=device) for side in grid))  # (P, 2), row and column
    angles = (places[..., None] * frequencies).flatten(1)  # (P, d/2)
    angles = F.pad(angles, (0, 0, 0, tokens - len(angles)))  # (tokens, d/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


class RotaryViTAttention(ViTAttention):
    def __init__(self, config: ViTConfig):
        super().__init__(config.width, config.heads)
        self.grid = config.grid

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(memory), self.v(memory)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (n, h, P, d)
        rotation = rotary_2d(self.grid, x.shape[1], q.shape[-1], x.device)
        q, k = (apply_rotary(t.float(), *rotation).to(v.dtype) for t in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (n, P, D)


class PairViT(ViT):
    """A ViT on pairs of frames."""

    frames_per_step = PAIR

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        size, width = config.patch_size, config.width
        self.patch = nn.Conv2d(3 * PAIR, width, kernel_size=size, stride=size)
        for block in self.blocks:
            block.attn = RotaryViTAttention(config)

    def normalize(self, frames: Tensor) -> Tensor:
        """uint8 frames (..., T, 3, S, S) -> float32 pairs (..., T/2, 6, S, S). An odd T repeats the last frame."""
        x = super().normalize(frames)
        if x.shape[-4] % PAIR:
            x = torch.cat([x, x[..., -1:, :, :, :]], dim=-4)
        return x.unflatten(-4, (-1, PAIR)).flatten(-4, -3)


class Merger(nn.Module):
    """Squares of neighbouring patches side by side, an MLP; a norm of each patch, in DeepStack of each square."""

    def __init__(self, config: MLLMConfig, norm_squares: bool = False):
        super().__init__()
        width = config.vit.width * config.shuffle**2
        self.grid, self.shuffle, self.norm_squares = config.vit.grid, config.shuffle, norm_squares
        self.norm = nn.LayerNorm(width if norm_squares else config.vit.width, eps=1e-6)
        self.linear1 = nn.Linear(width, width)
        self.linear2 = nn.Linear(width, config.lm.width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, P, D) -> (n, P', C)."""
        x = shuffle_pixels(x if self.norm_squares else self.norm(x), self.grid, self.shuffle)  # (n, P', s*s*D)
        x = self.norm(x) if self.norm_squares else x
        return self.linear2(F.gelu(self.linear1(x)))


class Mergers(Merger):
    """The merger of the last output, and those of DeepStack."""

    def __init__(self, config: MLLMConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(Merger(config, norm_squares=True) for _ in config.deepstack)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of blocks side by side, the last block's first (n, P, D + jD) -> (n, P', C + jC)."""
        last, *others = x.chunk(1 + len(self.blocks), dim=-1)
        merged = [merge(z) for merge, z in zip(self.blocks, others, strict=True)]
        return torch.cat([super().forward(last), *merged], dim=-1)


def mrope_positions(lengths: Sequence[int], grid: tuple[int, int], device: torch.device) -> tuple[Tensor, int]:
    """Lengths of M + 1 texts, with M grids of visual tokens between them, rows and columns -> time, row and column of
    each position (3, L), and the position that comes next."""
    places = torch.cartesian_prod(*(torch.arange(side, device=device) for side in (1, *grid))).T  # (3, P')
    parts, start = [], 0
    for length in lengths:
        parts += [torch.arange(start, start + length, device=device).expand(3, -1), places + start + length]
        start += length + max(grid)
    return torch.cat(parts[:-1], dim=1), start - max(grid)


class Qwen3VL(MLLM):
    vision_types = dict.fromkeys(("qwen3_vl", "qwen3_vl_vision"), "qwen3_vl")
    text_types = ("qwen3_vl_text",)
    make_vit, make_projector = PairViT, Mergers
    projector_names = {
        "linear1.*": "merger.linear_fc1.*", "linear2.*": "merger.linear_fc2.*", "norm.*": "merger.norm.*",
        "N.": "deepstack_merger_list.N.",
        "N.linear1.*": "N.linear_fc1.*", "N.linear2.*": "N.linear_fc2.*", "N.norm.*": "N.norm.*",
    }
    vit_names = {
        "N.": "blocks.N.", "patch.*": "patch_embed.proj.*", "position": "pos_embed.weight",
        "N.norm1.*": "N.norm1.*", "N.norm2.*": "N.norm2.*",
        "N.attn.q.*": "N.attn.qkv.*[q]", "N.attn.k.*": "N.attn.qkv.*[k]", "N.attn.v.*": "N.attn.qkv.*[v]",
        "N.attn.out.*": "N.attn.proj.*", "N.mlp.up.*": "N.mlp.linear_fc1.*", "N.mlp.down.*": "N.mlp.linear_fc2.*",
    }
    has_video_file = states_times = any_size = True

    def prompt_texts(self, frames: int, times: Sequence[float]) -> list[str]:
        """A text more than there are pairs. States the mean time of each pair; a single frame is an image."""
        *seconds, _ = times
        pairs = zip(seconds[::PAIR], (seconds + seconds[-1:])[1::PAIR], strict=False)
        stamps = [f"<{(a + b) / 2:.1f} seconds>" for a, b in pairs] if frames > 1 else [""]
        end = f"<|vision_end|>{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
        between = [f"<|vision_end|>{stamp}<|vision_start|>" for stamp in stamps[1:]]
        return [f"<|im_start|>user\n{stamps[0]}<|vision_start|>", *between, end]

    def merge(self, texts: Sequence[Tensor], visual: Sequence[Tensor]) -> Tensor:
        return super().merge(texts, [tokens[..., : self.visual_width] for tokens in visual])

    def places(self, texts: Sequence[Tensor], visual: Sequence[Tensor]) -> VisualPlaces | None:
        """None for queries, to which nothing is added."""
        lengths, width = [ids.shape[-1] for ids in texts], self.visual_width
        if visual[0].shape[-1] == width:
            return None
        count = visual[0].shape[1]
        grid = self.grid if count == math.prod(self.grid) else (math.isqrt(count),) * 2  # with --grid, a smaller square
        positions, following = mrope_positions(lengths, grid, visual[0].device)
        added = [F.pad(tokens[..., width:], (0, 0, length, 0))  # behind zeros for the text
                 for tokens, length in zip(visual, lengths[:-1], strict=True)]
        deepstack = torch.cat(added, dim=1).chunk(len(self.deepstack), dim=-1)  # (B, L - last text, C) each
        return VisualPlaces(positions, following - positions.shape[1], list(deepstack))

    @classmethod
    def read_config(cls, published: dict, path: Path) -> dict:
        vision, where = field(published, "vision_config", dict, path), f"{path}: vision_config"
        check_supported(vision, {"spatial_merge_size": SQUARE, "temporal_patch_size": PAIR, "in_channels": 3}, where)
        deepstack = field(vision, "deepstack_visual_indexes", list, where, [8, 16, 24])
        vision = vision | {"num_hidden_layers": vision.get("depth"), "num_attention_heads": vision.get("num_heads")}
        fields = super().read_config(published | {"vision_config": vision | {"image_size": SIDE}}, path)
        if not deepstack or deepstack != [i for i in range(fields["vit"]["depth"]) if i in deepstack]:
            raise InputError(f"{where}: deepstack_visual_indexes is {deepstack!r:.50}, expected numbers of blocks")
        return fields | {"shuffle": SQUARE, "deepstack": tuple(deepstack)}

    def adapt(self, tensors: dict[str, Tensor], names: dict[str, str]) -> None:
        """The two frames of a patch become six channels; the table of positions is resampled, as the reference does for
        every grid of patches."""
        super().adapt(tensors, names)
        patch, position = names["vit.patch.weight"], names["vit.position"]
        if patch in tensors and tensors[patch].dim() == 5:
            tensors[patch] = tensors[patch].transpose(1, 2).flatten(1, 2)  # (D, 3, 2, p, p) -> (D, 6, p, p)
        if position in tensors and (side := math.isqrt(len(tensors[position]))) ** 2 == len(tensors[position]):
            table = tensors[position].float().T.unflatten(1, (side, side))[None]  # (1, D, side, side)
            table = F.interpolate(table, self.config.vit.grid, mode="bilinear", align_corners=True)
            tensors[position] = table[0].flatten(1).T.contiguous()  # (P, D)

    @staticmethod
    def read_preprocessing(path: Path, vit: dict) -> Preprocessing:
        config, (height, width) = read_processor(path), (vit["image_size"], vit.get("image_width"))
        sizes = {"patch_size": vit["patch_size"], "temporal_patch_size": PAIR, "merge_size": SQUARE}
        check_supported(config, sizes, path)
        return read_colours(config, path, Preprocessing(height, height, squash=True, mean=HALF, std=HALF, width=width))
