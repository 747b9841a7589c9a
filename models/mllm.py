"""A multimodal language model (MLLM): a ViT, a projector and a language model that were trained together.

    frames -> ViT -> projector -> visual tokens -> instead of the image tokens of a prompt -> language model

The families differ between the ViT and the language model. LLaVA [1] maps each patch by an MLP. LLaVA-OneVision [2]
also shrinks the grid of each frame to half its side, and puts one learned token after the last frame. Idefics3 [3] and
SmolVLM [4] join squares of s x s patches and map each by one matrix.

A prompt is one turn with the frames of a video and an instruction: T + 1 texts, with the visual tokens of a frame
between any two of them. Control tokens such as <|im_start|> are one token each.

    <|im_start|>User:<fake_token_around_image><global-img> FRAME <fake_token_around_image>Describe it.<end_of_utterance>
    Assistant:

Shapes: B clips, T frames a clip, n images, S image side in pixels, P tokens of the ViT an image, D their width,
P' visual tokens an image, C width of the language model, L its positions, V its vocabulary, s the side of a square.

References
[1] https://arxiv.org/abs/2310.03744; order of operations: transformers' modeling_llava.py
[2] https://arxiv.org/abs/2408.03326; modeling_llava_onevision.py, get_video_features and apply_pooling
[3] https://arxiv.org/abs/2408.12637; modeling_idefics3.py
[4] https://arxiv.org/abs/2504.05299; modeling_smolvlm.py
[5] chat_template.jinja of llava-hf/llava-1.5-7b-hf
[6] transformers, processing_smolvlm.py, DEFAULT_CHAT_TEMPLATE and the texts of videos; processing_idefics3.py
[7] transformers, convert_llava_onevision_weights_to_hf.py and the processor's tests. White space around the control
    tokens of Qwen's two formats differs between revisions of the published templates.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from reprlib import repr as short

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError, reading
from models import hub
from models.bpe import BPETokenizer
from models.lm import CausalLM, LMConfig
from models.mllm_checkpoints import copy_mllm_tensors, read_mllm_config, read_mllm_preprocessing
from models.tokenizer import Tokenizer
from models.vit import ViT, ViTConfig
from models.weights import read_tensors


@dataclass(frozen=True)
class MLLMConfig:
    """Shape of an MLLM."""

    family: str  # llava | llava_onevision | idefics3 | smolvlm
    vit: ViTConfig  # up to the block whose output is taken
    lm: LMConfig
    lm_family: str  # llama | qwen2
    unused_blocks: int = 0  # of the published ViT, behind the last one of `vit`
    shuffle: int = 1  # s

    def __post_init__(self):
        if self.vit.grid % self.shuffle:
            raise InputError(f"scale_factor is {self.shuffle}, expected a divisor of {self.vit.grid}, the grid's side")


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


# --------------------------------------------------------------------------------------- prompts

CONTROL_TOKEN = re.compile(r"<[\w|-]+>")
AROUND_IMAGE = "<fake_token_around_image><global-img>", "<fake_token_around_image>"  # its visual tokens

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
ONES += "seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = ONES + [f"{ten}-{one}".removesuffix("-zero") for ten in TENS for one in ONES[:10]]  # from 0 to 99


def prompt_texts(family: str, lm_family: str, frames: int, instruction: str) -> list[str]:
    """The T + 1 texts before, between and after T = `frames` frames. Each family has a format of its own, which its
    language model was trained with. SmolVLM2's also states times, here one second per frame, and its prompt for a
    single frame is that for an image."""
    if family == "llava" and lm_family == "llama":  # [5]
        return ["USER: ", *["\n"] * (frames - 1), f"\n{instruction} ASSISTANT:"]
    if family == "llava":
        return ["<|im_start|>user\n", *["\n"] * (frames - 1), f"\n{instruction}<|im_end|>\n<|im_start|>assistant\n"]
    if family == "llava_onevision":  # [7]
        return ["<|im_start|>user ", *[""] * (frames - 1), f"\n{instruction}<|im_end|><|im_start|>assistant\n"]
    before, after = AROUND_IMAGE  # [6]
    end = f"{instruction}<end_of_utterance>\nAssistant:"
    if family == "idefics3" or frames == 1:
        return [f"<|im_start|>User:{before}", *[after + before] * (frames - 1), after + end]
    if frames > 99:
        raise InputError(f"{frames} frames: expected at most 99 for the prompt of {family}")
    labels = [f"\nFrame from {time // 60:02d}:{time % 60:02d}:{before}" for time in range(frames)]
    intro = f"<|im_start|>User: You are provided the following series of {NUMBERS[frames]} frames from a "
    intro += f"{timedelta(seconds=frames)} [H:MM:SS] video.\n"
    return [intro + labels[0], *[after + label for label in labels[1:]], f"{after}\n\n{end}"]


def encode_prompt(tokenizer: Tokenizer, family: str, lm_family: str, frames: int, instruction: str):
    """Returns the ids of `prompt_texts`, T + 1 lists, with BOS where texts begin with one.

    Raises InputError if the tokenizer is of another kind or lacks a control token of the prompt, and if the instruction
    contains a control token of a byte-level BPE.
    """
    added = tokenizer.added if isinstance(tokenizer, BPETokenizer) else {}
    if isinstance(tokenizer, BPETokenizer) and (family, lm_family) == ("llava", "llama"):  # Llama 3 has another prompt
        raise InputError("tokenizer: a byte-level BPE, the prompt of llava with a Llama needs a tokenizer.model")
    template = "".join(prompt_texts(family, lm_family, frames, ""))
    if missing := [token for token in CONTROL_TOKEN.findall(template) if token not in added]:
        raise InputError(f"tokenizer: has no token {missing[0]}, which the prompt of {family} needs")
    if present := [token for token in added if token in instruction]:
        raise InputError(f"instruction: has the control token {short(present[0])}, expected plain text")
    texts = prompt_texts(family, lm_family, frames, instruction)
    if isinstance(tokenizer, BPETokenizer):
        return [tokenizer.encode_with_added(text) for text in texts]
    ids = [tokenizer.processor.encode(text) for text in texts]  # each gets sentencepiece's own space before it
    bos = [tokenizer.bos_id()] if tokenizer.bos_id() >= 0 else []
    return [bos + ids[0], *ids[1:]]


# ----------------------------------------------------------------------------------------- model


class MLLM(nn.Module):
    """A frozen public MLLM, for images and videos of one size. Larger images are not split into parts."""

    trained_together = True

    def __init__(self, config: MLLMConfig):
        super().__init__()
        self.config = config
        self.vit = ViT(config.vit)
        self.lm = CausalLM(config.lm)
        widths = config.vit.width, config.lm.width
        is_llava = config.family.startswith("llava")
        self.projector = MLPProjector(*widths) if is_llava else ShuffleProjector(*widths, config.shuffle)
        is_onevision, side = config.family == "llava_onevision", config.vit.grid
        self.newline = nn.Parameter(torch.randn(widths[1]) / widths[1] ** 0.5) if is_onevision else None  # (C,)

        self.projects_vectors = is_llava  # whether the projector maps single vectors, such as queries
        self.visual_width = config.lm.width
        # The side of the square of P' visual tokens that a frame becomes, row by row.
        self.grid = math.ceil(side / 2) if is_onevision else side // config.shuffle

    def frame_tokens(self, z: Tensor, grid: int) -> Tensor:
        """Outputs of the ViT's last block (n, P, D) -> visual tokens or averages of them (n, P' or grid^2, C)."""
        tokens = self.connect(self.vit.finish(z))
        return average_grid(tokens, grid) if grid else tokens

    def num_frame_tokens(self, grid: int) -> int:
        """How many tokens the language model reads per frame."""
        return (grid or self.grid) ** 2

    def num_images(self, frames: int) -> int:
        """Groups of visual tokens in a prompt: one per frame."""
        return frames

    def connect(self, features: Tensor) -> Tensor:
        """Last hidden states of the ViT (n, P, D) -> visual tokens (n, P', C). A class token becomes none."""
        x = self.projector(features[:, 1:] if self.config.vit.class_token else features)
        return halve_grid(x) if self.config.family == "llava_onevision" else x

    def prompt(self, tokenizer: Tokenizer, frames: int, instruction: str) -> list[list]:
        """The model's own prompt for T = `frames` frames and an instruction: T + 1 lists of ids, which come before,
        between and after the frames' visual tokens. See `encode_prompt`."""
        return encode_prompt(tokenizer, self.config.family, self.config.lm_family, frames, instruction)

    def merge(self, texts: Sequence[Tensor], visual: Sequence[Tensor]) -> Tensor:
        """Ids of T + 1 texts, those of `prompt`, and T groups of visual tokens (B, any, C) -> the language model's
        input (B, L, C): text, group, text, ..., group, text. OneVision's newline follows the last group."""
        if self.newline is not None:
            newline = self.newline.expand(len(visual[-1]), 1, -1)
            visual = [*visual[:-1], torch.cat([visual[-1], newline.to(visual[-1].dtype)], dim=1)]
        return interleave(self.lm, texts, visual)

    @classmethod
    def from_config(cls, folder: str | Path) -> "MLLM":
        """The model of a folder on the meta device, from its configs alone. Raises InputError."""
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
