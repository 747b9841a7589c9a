"""Qwen3-VL [1], read by queries (`--visual queries`): its vision encoder and its language model.

    pairs of frames -> ViT with rotated queries and keys -> the Q-Adapter's queries as the vectors of an image -> Qwen 3

The ViT encodes pairs of frames: both frames of a pair are mixed by the patch embedding, and patches attend within their
pair. So a clip of T frames has T/2 steps, which is what the Q-Adapter reads; its frame vectors are interpolated to
them. Of an odd number of frames the last one counts twice. A table of learned positions is resampled to the grid of
patches; besides, queries and keys are rotated by their row and column.

Frames themselves cannot be passed on yet (`--visual frames` and the other methods): their tokens need positions in
three dimensions, the outputs of earlier blocks (DeepStack) and the times of frames in the prompt. Queries in the place
of an image are text to the language model: their positions are those of Qwen 3. Frames are squashed to `SIDE` pixels;
the published processor keeps their aspect ratio.

Shapes: n pairs, T frames, S image side in pixels, P patches of a pair, D width of the ViT, h heads, d = D/h, C width of
the language model, s = 2 the side of a square of patches.

References
[1] https://arxiv.org/abs/2511.21631; transformers' configuration_qwen3_vl.py, modeling_qwen3_vl.py and
    video_processing_qwen3_vl.py
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError
from common.files import field
from common.preprocessing import HALF, Preprocessing, read_colours, read_processor
from models.lm import apply_rotary
from models.lm_checkpoints import check_supported
from models.mllm import MLLM, MLLMConfig, shuffle_pixels
from models.vit import ViT, ViTAttention, ViTConfig

SIDE = 448  # S; the published models take any multiple of 32
PAIR, SQUARE = 2, 2  # frames of a step; s
THETA = 10000.0


def rotary_2d(side: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (P, d) of the rotation of each patch of a square grid, row by row: the first half of the channel
    pairs is rotated by the row, the other half by the column. The sine is negated in the first half, as in `lm.py`."""
    frequencies = THETA ** (-torch.arange(0, d // 2, 2, device=device).float() / (d // 2))  # (d/4,)
    angles = torch.outer(torch.arange(side, device=device).float(), frequencies)  # (side, d/4)
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (P, d/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


class RotaryViTAttention(ViTAttention):
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(memory), self.v(memory)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (n, h, P, d)
        rotation = rotary_2d(math.isqrt(x.shape[1]), q.shape[-1], x.device)
        q, k = (apply_rotary(t.float(), *rotation).to(v.dtype) for t in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (n, P, D)


class PairViT(ViT):
    """A ViT on pairs of frames."""

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        size, width = config.patch_size, config.width
        self.patch = nn.Conv2d(3 * PAIR, width, kernel_size=size, stride=size)
        for block in self.blocks:
            block.attn = RotaryViTAttention(width, config.heads)

    def num_steps(self, frames: int) -> int:
        return math.ceil(frames / PAIR)

    def normalize(self, frames: Tensor) -> Tensor:
        """uint8 frames (..., T, 3, S, S) -> float32 pairs (..., T/2, 6, S, S). An odd T repeats the last frame."""
        x = super().normalize(frames)
        if x.shape[-4] % PAIR:
            x = torch.cat([x, x[..., -1:, :, :, :]], dim=-4)
        return x.unflatten(-4, (-1, PAIR)).flatten(-4, -3)


class Merger(nn.Module):
    """A norm of each patch, squares of s x s patches side by side, an MLP. Queries do not pass through it."""

    def __init__(self, config: MLLMConfig):
        super().__init__()
        width = config.vit.width * config.shuffle**2
        self.shuffle = config.shuffle
        self.norm = nn.LayerNorm(config.vit.width, eps=1e-6)
        self.linear1 = nn.Linear(width, width)
        self.linear2 = nn.Linear(width, config.lm.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(shuffle_pixels(self.norm(x), self.shuffle))))


class Qwen3VL(MLLM):
    vision_types = dict.fromkeys(("qwen3_vl", "qwen3_vl_vision"), "qwen3_vl")
    text_types = ("qwen3_vl_text",)
    make_vit, make_projector = PairViT, Merger
    projector_names = {
        "linear1.*": "merger.linear_fc1.*",
        "linear2.*": "merger.linear_fc2.*",
        "norm.*": "merger.norm.*",
    }
    vit_names = {
        "N.": "blocks.N.",
        "patch.*": "patch_embed.proj.*",
        "position": "pos_embed.weight",
        "N.norm1.*": "N.norm1.*",
        "N.attn.q.*": "N.attn.qkv.*[q]",
        "N.attn.k.*": "N.attn.qkv.*[k]",
        "N.attn.v.*": "N.attn.qkv.*[v]",
        "N.attn.out.*": "N.attn.proj.*",
        "N.norm2.*": "N.norm2.*",
        "N.mlp.up.*": "N.mlp.linear_fc1.*",
        "N.mlp.down.*": "N.mlp.linear_fc2.*",
    }
    unused_tensors = ("deepstack_merger_list.",)
    has_video_file = True

    def num_frame_tokens(self, grid: int) -> int:
        raise InputError("this --mllm passes no frames on: expected --method qadapter and --visual queries")

    def prompt_texts(self, frames: int, instruction: str) -> list[str]:
        """For a single image."""
        end = f"<|vision_end|>{instruction}<|im_end|>\n<|im_start|>assistant\n"
        return ["<|im_start|>user\n<|vision_start|>", *["<|vision_end|><|vision_start|>"] * (frames - 1), end]

    @classmethod
    def read_config(cls, published: dict, path: Path) -> dict:
        vision, where = field(published, "vision_config", dict, path), f"{path}: vision_config"
        sizes = {"spatial_merge_size": SQUARE, "temporal_patch_size": PAIR, "in_channels": 3}
        check_supported(vision, sizes, where)
        vision = vision | {"num_hidden_layers": vision.get("depth"), "num_attention_heads": vision.get("num_heads")}
        published = published | {"vision_config": vision | {"image_size": SIDE}}
        return super().read_config(published, path) | {"shuffle": SQUARE}

    def adapt(self, tensors: dict[str, Tensor], names: dict[str, str]) -> None:
        """The two frames of a patch become six channels; the table of positions is resampled, as the reference does for
        every grid of patches."""
        super().adapt(tensors, names)
        patch, position = names["vit.patch.weight"], names["vit.position"]
        if patch in tensors and tensors[patch].dim() == 5:
            tensors[patch] = tensors[patch].transpose(1, 2).flatten(1, 2)  # (D, 3, 2, p, p) -> (D, 6, p, p)
        if position in tensors and (side := math.isqrt(len(tensors[position]))) ** 2 == len(tensors[position]):
            table = tensors[position].float().T.unflatten(1, (side, side))[None]  # (1, D, side, side)
            table = F.interpolate(table, [self.config.vit.grid] * 2, mode="bilinear", align_corners=True)
            tensors[position] = table[0].flatten(1).T.contiguous()  # (P, D)

    @staticmethod
    def read_preprocessing(path: Path, vit: dict) -> Preprocessing:
        config, side = read_processor(path), vit["image_size"]
        sizes = {"patch_size": vit["patch_size"], "temporal_patch_size": PAIR, "merge_size": SQUARE}
        check_supported(config, sizes, path)
        return read_colours(config, path, Preprocessing(side, side, squash=True, mean=HALF, std=HALF))
