"""A multimodal language model (MLLM): a ViT, a projector and a language model that were trained together.

    frames -> ViT -> projector -> visual tokens -> instead of the image tokens of a prompt -> language model

The families differ between the ViT and the language model. LLaVA [1] maps each patch by an MLP. LLaVA-OneVision [2]
also shrinks the grid of each frame to half its side, and puts one learned token after the last frame. Idefics3 [3] and
SmolVLM [4] join squares of s x s patches and map each by one matrix.

Shapes: B clips, T frames a clip, n images, S image side in pixels, P tokens of the ViT an image, D their width,
P' visual tokens an image, C width of the language model, L its positions, V its vocabulary, s the side of a square.

References
[1] https://arxiv.org/abs/2310.03744; order of operations: transformers' modeling_llava.py
[2] https://arxiv.org/abs/2408.03326; modeling_llava_onevision.py, get_video_features and apply_pooling
[3] https://arxiv.org/abs/2408.12637; modeling_idefics3.py
[4] https://arxiv.org/abs/2504.05299; modeling_smolvlm.py
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError, reading
from common.preprocessing import VIDEO_PREPROCESSORS
from models import hub
from models.lm import CausalLM, LMConfig
from models.mllm_checkpoints import copy_mllm_tensors, read_mllm_config, read_mllm_preprocessing
from models.mllm_prompts import encode_prompt
from models.tokenizer import Tokenizer
from models.vit import ViT, ViTConfig
from models.weights import read_tensors


@dataclass(frozen=True)
class MLLMConfig:
    """Shape of an MLLM."""

    family: str  # llava | llava_onevision | idefics3 | smolvlm
    vit: ViTConfig  # up to the block whose output is taken
    lm: LMConfig
    vit_family: str  # clip | siglip | idefics3
    lm_family: str  # llama | qwen2
    image_token_id: int  # stands for one visual token in the ids of a prompt
    unused_blocks: int = 0  # of the published ViT, behind the last one of `vit`
    class_token: bool = False  # whether the ViT's class token becomes a visual token, too
    shuffle: int = 1  # s

    @property
    def grid(self) -> int:
        """The side of the square of visual tokens that an image becomes, row by row."""
        side = self.vit.grid
        return math.ceil(side / 2) if self.family == "llava_onevision" else side // self.shuffle

    @property
    def tokens_per_image(self) -> int:
        """P'. A class token comes before the grid."""
        return self.class_token + self.grid**2

    def __post_init__(self):
        if self.vit.grid % self.shuffle:
            raise InputError(
                f"scale_factor is {self.shuffle}, expected a divisor of the side of {self.vit.grid} patches"
            )


class MLPProjector(nn.Module):
    """LLaVA's projector: maps single vectors."""

    def __init__(self, width: int, lm_width: int):
        super().__init__()
        self.linear1 = nn.Linear(width, lm_width)
        self.linear2 = nn.Linear(lm_width, lm_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x)))  # (..., C)


class ShuffleProjector(nn.Module):
    """Idefics3's projector: maps squares of s x s neighbouring patches, the pixel shuffle."""

    def __init__(self, width: int, lm_width: int, shuffle: int):
        super().__init__()
        self.shuffle = shuffle
        self.linear = nn.Linear(width * shuffle**2, lm_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        s, side = self.shuffle, math.isqrt(x.shape[1])
        x = x.unflatten(1, (side // s, s, side // s, s))  # (n, rows, s, columns, s, D)
        x = x.transpose(2, 3).flatten(3).flatten(1, 2)  # (n, P', s*s*D)
        return self.linear(x)  # (n, P', C)


def halve_grid(x: Tensor) -> Tensor:
    """Squares of tokens (n, P, C) -> squares of half the side, rounded up (n, P', C), by bilinear interpolation."""
    side = math.isqrt(x.shape[1])
    x = x.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (n, C, side, side)
    x = F.interpolate(x, [math.ceil(side / 2)] * 2, mode="bilinear")
    return x.flatten(2).transpose(1, 2)


def average_grid(tokens: Tensor, grid: int) -> Tensor:
    """Squares of tokens (n, side * side, C), row by row -> averages of neighbours (n, grid * grid, C)."""
    side = math.isqrt(tokens.shape[1])
    x = tokens.transpose(1, 2).unflatten(2, (side, side))  # (n, C, side, side)
    return F.adaptive_avg_pool2d(x, grid).flatten(2).transpose(1, 2)


def interleave(lm: CausalLM, texts: Sequence[Tensor], visual: Sequence[Tensor]) -> Tensor:
    """Ids of one text more than there are groups of visual tokens (B, any, C) -> text, group, text, ..., text as input
    of the language model (B, L, C)."""
    x = lm.embed(torch.cat(list(texts))).expand(len(visual[0]), -1, -1)
    parts = x.split([len(ids) for ids in texts], dim=1)
    pairs = zip(parts, [*visual, x[:, :0]], strict=True)
    return torch.cat([part.to(x.dtype) for pair in pairs for part in pair], dim=1)


class MLLM(nn.Module):
    """A frozen public MLLM, for images and videos of one size. Larger images are not split into parts."""

    CONFIG_FILES = (*ViT.CONFIG_FILES, *VIDEO_PREPROCESSORS, "generation_config.json")
    trained_together = True

    def __init__(self, config: MLLMConfig):
        super().__init__()
        self.config = config
        self.vit = ViT(config.vit)
        self.lm = CausalLM(config.lm)
        widths = config.vit.width, config.lm.width
        is_llava = config.family.startswith("llava")
        self.projector = MLPProjector(*widths) if is_llava else ShuffleProjector(*widths, config.shuffle)
        has_newline = config.family == "llava_onevision"
        self.newline = nn.Parameter(torch.randn(widths[1]) / widths[1] ** 0.5) if has_newline else None  # (C,)

        self.projects_vectors = is_llava  # whether the projector maps single vectors, such as queries
        self.visual_width = config.lm.width
        self.grid = 0 if config.class_token else config.grid  # the side of a frame's square of tokens; 0: no square

    def frame_tokens(self, z: Tensor, grid: int) -> Tensor:
        """Outputs of the ViT's last block (n, P, D) -> visual tokens or averages of them (n, P' or grid^2, C)."""
        tokens = self.connect(self.vit.finish(z))
        return average_grid(tokens, grid) if grid else tokens

    def num_frame_tokens(self, grid: int) -> int:
        """How many tokens the language model reads per frame."""
        return grid**2 or self.config.tokens_per_image

    def num_images(self, frames: int) -> int:
        """Groups of visual tokens in a prompt: one per frame."""
        return frames

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Normalized pixels (n, 3, S, S) -> visual tokens (n, P', C), what the language model reads of each image."""
        return self.connect(self.vit(pixels))

    def connect(self, features: Tensor) -> Tensor:
        """Last hidden states of the ViT (n, P, D) -> visual tokens (n, P', C).

        If the outputs of the last block are at hand, `vit.finish` makes them the last hidden states.
        """
        if self.config.vit.class_token and not self.config.class_token:
            features = features[:, 1:]
        x = self.projector(features)
        return halve_grid(x) if self.config.family == "llava_onevision" else x

    def embed(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """Ids (1, L) with an image token for each visual token, pixels (n, 3, S, S) -> the language model's input
        (1, L, C). Raises InputError unless there are as many image tokens as visual tokens."""
        visual = self.image_tokens(pixels).flatten(0, 1)  # (n*P', C)
        if self.newline is not None:
            visual = torch.cat([visual, self.newline[None]])
        is_image = ids == self.config.image_token_id
        if (found := int(is_image.sum())) != len(visual):
            raise InputError(
                f"ids: image token {self.config.image_token_id} occurs {found} times, expected {len(visual)}"
            )
        x = self.lm.embed(ids)
        return x.masked_scatter(is_image[..., None], visual.to(x.dtype))

    def logits(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """Ids (1, L) and pixels as for `embed` -> logits of each next token (1, L, V)."""
        return self.lm(self.embed(ids, pixels))

    def prompt(self, tokenizer: Tokenizer, frames: int, instruction: str, seconds: float | None = None) -> list[list]:
        """The model's own prompt for T = `frames` frames and an instruction: T + 1 lists of ids, which come before,
        between and after the frames' visual tokens. See `encode_prompt`."""
        return encode_prompt(tokenizer, self.config.family, self.config.lm_family, frames, instruction, seconds)

    def merge(self, texts: Sequence[Tensor], visual: Sequence[Tensor]) -> Tensor:
        """Ids of T + 1 texts, those of `prompt`, and T groups of visual tokens (B, any, C) -> the language model's
        input (B, L, C): text, group, text, ..., group, text. OneVision's newline follows the last group."""
        if self.newline is not None:
            newline = self.newline.expand(len(visual[-1]), 1, -1)
            visual = [*visual[:-1], torch.cat([visual[-1], newline.to(visual[-1].dtype)], dim=1)]
        return interleave(self.lm, texts, visual)

    @classmethod
    def from_config(cls, folder: str | Path) -> "MLLM":
        """The model of a folder on the meta device, from CONFIG_FILES alone. Raises InputError."""
        path = Path(folder) / "config.json"
        fields = read_mllm_config(path)
        preprocessing = read_mllm_preprocessing(Path(folder), fields)
        with reading(path), torch.device("meta"):
            parts = {"vit": ViTConfig(**fields["vit"]), "lm": LMConfig(**fields["lm"])}
            mllm = cls(MLLMConfig(**fields | parts))
        mllm.vit.preprocessing = preprocessing
        return mllm

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "MLLM":
        """Loads a folder or hub id. Missing, unexpected and misshapen tensors raise an InputError that names them."""
        folder = hub.resolve(folder, check=cls.from_config)
        mllm = cls.from_config(folder)
        tensors, path = read_tensors(folder)
        copy_mllm_tensors(mllm, tensors, path)
        tensors.clear()  # so that each tensor is freed as soon as it has been converted
        return mllm.to(dtype)
