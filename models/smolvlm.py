"""Idefics3 [1] and SmolVLM [2]: squares of s x s patches side by side, each mapped by one matrix.

    model_type   ViT                             language model   published models
    idefics3     SigLIP: the last output after   Llama            SmolVLM
    smolvlm      its norm, no pooling            Llama            SmolVLM2

Shapes: n images, P tokens of the ViT per image, D their width, P' visual tokens per image, C width of the language
model, s the side of a square.

References
[1] https://arxiv.org/abs/2408.12637; transformers' modeling_idefics3.py, processing_idefics3.py
[2] https://arxiv.org/abs/2504.05299; modeling_smolvlm.py; processing_smolvlm.py, DEFAULT_CHAT_TEMPLATE and the texts of
    videos
"""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from torch import Tensor, nn

from common.errors import InputError
from common.files import field
from common.preprocessing import Preprocessing, read_lanczos_preprocessing
from models.mllm import INSTRUCTION, MLLM, MLLMConfig, shuffle_pixels

BEFORE, AFTER = "<fake_token_around_image><global-img>", "<fake_token_around_image>"  # around the tokens of an image
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
ONES += "seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = ONES + [f"{ten}-{one}".removesuffix("-zero") for ten in TENS for one in ONES[:10]]  # from 0 to 99


class ShuffleProjector(nn.Module):
    """Maps squares of s x s neighbouring patches."""

    def __init__(self, config: MLLMConfig):
        super().__init__()
        self.grid, self.shuffle = config.vit.grid, config.shuffle
        self.linear = nn.Linear(config.vit.width * config.shuffle**2, config.lm.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(shuffle_pixels(x, self.grid, self.shuffle))  # (n, P', C)


class Idefics3(MLLM):
    vision_types = dict.fromkeys(("idefics3_vision", "smolvlm_vision", "idefics3"), "idefics3")
    text_types = ("llama",)
    make_projector = ShuffleProjector
    projector_names = {"linear.weight": "modality_projection.proj.weight"}

    def prompt_texts(self, frames: int, times: Sequence[float]) -> list[str]:
        end = f"{AFTER}{INSTRUCTION}<end_of_utterance>\nAssistant:"
        return [f"<|im_start|>User:{BEFORE}", *[AFTER + BEFORE] * (frames - 1), end]

    @classmethod
    def read_config(cls, published: dict, path: Path) -> dict:
        fields = super().read_config(published, path)
        return fields | {"shuffle": field(published, "scale_factor", int, path, 2, 1, 2**10)}

    @staticmethod
    def read_preprocessing(path: Path, vit: dict) -> Preprocessing:
        return read_lanczos_preprocessing(path)


class SmolVLM(Idefics3):
    states_times = True

    def prompt_texts(self, frames: int, times: Sequence[float]) -> list[str]:
        """States the times of frames. For a single frame it is the prompt for an image."""
        if frames == 1:
            return super().prompt_texts(frames, times)
        if frames > 99:
            raise InputError(f"{frames} frames: expected at most 99 for the prompt of smolvlm")
        *seconds, duration = map(int, times)
        labels = [f"\nFrame from {time // 60:02d}:{time % 60:02d}:{BEFORE}" for time in seconds]
        intro = f"<|im_start|>User: You are provided the following series of {NUMBERS[frames]} frames from a "
        intro += f"{timedelta(seconds=duration)} [H:MM:SS] video.\n"
        end = f"{AFTER}\n\n{INSTRUCTION}<end_of_utterance>\nAssistant:"
        return [intro + labels[0], *[AFTER + label for label in labels[1:]], end]
