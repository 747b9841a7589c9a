"""LLaVA [1] and LLaVA-OneVision [2]: an MLP maps each patch of the ViT.

    model_type        ViT            language model   published models
    llava             CLIP, SigLIP   Llama, Qwen 2    LLaVA 1.5, LLaVA interleave
    llava_onevision   SigLIP         Qwen 2           LLaVA-OneVision, for videos

The output of any block may be taken. OneVision also shrinks the grid of each frame to half its side, and puts one
learned token after the last frame.

Shapes: n images, P tokens of the ViT per image, P' visual tokens per image, C width of the language model.

References
[1] https://arxiv.org/abs/2310.03744; transformers' modeling_llava.py
[2] https://arxiv.org/abs/2408.03326; modeling_llava_onevision.py, get_video_features and apply_pooling
[3] chat_template.jinja of llava-hf/llava-1.5-7b-hf
[4] transformers, convert_llava_onevision_weights_to_hf.py and the processor's tests. White space around the control
    tokens of Qwen's two formats differs between revisions of the published templates.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError
from common.files import field, one_of
from common.preprocessing import Preprocessing, read_preprocessing, read_processor
from models.lm_checkpoints import check_supported
from models.mllm import INSTRUCTION, MLLM, MLLMConfig
from models.names import find_prefix
from models.vit_checkpoints import default_preprocessing


class MLPProjector(nn.Module):
    """Maps single vectors."""

    def __init__(self, config: MLLMConfig):
        super().__init__()
        self.linear1 = nn.Linear(config.vit.width, config.lm.width)
        self.linear2 = nn.Linear(config.lm.width, config.lm.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x)))  # (..., C)


def halve_grid(x: Tensor) -> Tensor:
    """Squares of tokens (n, P, C) -> squares of half the side, rounded up (n, P', C), by bilinear interpolation."""
    side = math.isqrt(x.shape[1])
    x = x.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (n, C, side, side)
    x = F.interpolate(x, [math.ceil(side / 2)] * 2, mode="bilinear")
    return x.flatten(2).transpose(1, 2)


class LLaVA(MLLM):
    projects_vectors = True
    vision_types = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
    text_types = "llama", "qwen2"
    make_projector = MLPProjector
    projector_names = {"linear1.*": "linear_1.*", "linear2.*": "linear_2.*"}

    def prompt_texts(self, frames: int, times: Sequence[float]) -> list[str]:
        if self.config.lm_family == "llama":  # [3]
            return ["USER: ", *["\n"] * (frames - 1), f"\n{INSTRUCTION} ASSISTANT:"]
        return ["<|im_start|>user\n", *["\n"] * (frames - 1), f"\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"]

    @classmethod
    def read_config(cls, published: dict, path: Path) -> dict:
        fields = super().read_config(published, path)
        check_supported(published, {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}, path)
        vit, depth = fields["vit"], fields["vit"]["depth"]
        layer = field(published, "vision_feature_layer", int, path)
        blocks = layer if layer >= 0 else depth + 1 + layer  # up to the one whose output is taken; -1 is the last one
        if not 1 <= blocks <= depth:
            raise InputError(f"{path}: vision_feature_layer is {layer}, expected 1 to {depth} or -{depth} to -1")
        # "default" leaves out the first token of an image: CLIP's class token, but of SigLIP it would be a patch.
        one_of(published, "vision_feature_select_strategy", ("default" if vit["class_token"] else "full",), path)
        vit |= {"depth": blocks, "final_norm": False, "pooling_head": False}
        fields["lm"]["tied"] |= field(published["text_config"], "tie_word_embeddings", bool, path, False)  # either
        return fields | {"unused_blocks": depth - blocks}

    @staticmethod
    def read_preprocessing(path: Path, vit: dict) -> Preprocessing:
        check_supported(read_processor(path), {"do_pad": False}, path)
        return read_preprocessing(path, default_preprocessing("clip" if vit["class_token"] else "siglip", vit))


class OneVision(LLaVA):
    vision_types = {"siglip_vision_model": "siglip"}
    text_types = ("qwen2",)
    has_video_file = True

    def __init__(self, config: MLLMConfig):
        super().__init__(config)
        self.newline = nn.Parameter(torch.randn(config.lm.width) / config.lm.width**0.5)  # (C,)
        self.grid = tuple(math.ceil(side / 2) for side in self.grid)

    def connect(self, features: Tensor) -> Tensor:
        return halve_grid(super().connect(features))

    def prompt_texts(self, frames: int, times: Sequence[float]) -> list[str]:  # [4]
        return ["<|im_start|>user ", *[""] * (frames - 1), f"\n{INSTRUCTION}<|im_end|><|im_start|>assistant\n"]

    def merge(self, texts: Sequence[Tensor], visual: Sequence[Tensor]) -> Tensor:
        """The newline follows the last group."""
        newline = self.newline.expand(len(visual[-1]), 1, -1)
        last = torch.cat([visual[-1], newline.to(visual[-1].dtype)], dim=1)
        return super().merge(texts, [*visual[:-1], last])

    def names_in(self, file: Iterable[str]) -> dict[str, str]:
        return super().names_in(file) | {"newline": find_prefix(file, "image_newline") + "image_newline"}

    @staticmethod
    def read_preprocessing(path: Path, vit: dict) -> Preprocessing:
        return read_preprocessing(path, Preprocessing(384, 384, squash=True))  # by default with CLIP's mean, as in [2]
