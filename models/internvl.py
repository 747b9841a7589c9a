"""InternVL 3 and 3.5 [1], in transformers' layout (repositories that end in "-hf").

    ViT          DINOv2's blocks, with a class token and LayerScale; the last output, without a norm
    projector    squares of 2 x 2 patches side by side, a norm, an MLP
    LM           Qwen 2 (InternVL 3), Qwen 3 (InternVL 3.5)

The other repositories of the same models have other names and another model_type, internvl_chat. Each frame is one
image of 448 x 448 pixels, never cut into tiles, and 256 visual tokens.

Shapes: n images, P tokens of the ViT per image, D their width, P' visual tokens per image, C width of the language
model, s the side of a square.

References
[1] https://arxiv.org/abs/2504.10479, https://arxiv.org/abs/2508.18265; transformers' configuration_internvl.py,
    modeling_internvl.py, video_processing_internvl.py, processing_internvl.py and the template of OpenGVLab's models
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError
from common.files import field
from common.preprocessing import Preprocessing, read_preprocessing
from models.lm_checkpoints import check_supported
from models.mllm import INSTRUCTION, MLLM, MLLMConfig, shuffle_pixels
from models.names import VITS

VISION = {  # fields with a single supported value; the 38B model's encoder has others
    "attention_bias": True, "use_qk_norm": False, "norm_type": "layer_norm", "use_mask_token": False,
    "use_absolute_position_embeddings": True, "use_mean_pooling": True,  # else there is a norm after the blocks
}
OUTSIDE = {  # of vision_config; patches are joined 1 / downsample_ratio on a side
    "downsample_ratio": 0.5, "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
}


class ShuffleMLPProjector(nn.Module):
    """Maps squares of s x s neighbouring patches."""

    def __init__(self, config: MLLMConfig):
        super().__init__()
        self.grid, self.shuffle, width = config.vit.grid, config.shuffle, config.vit.width * config.shuffle**2
        self.norm = nn.LayerNorm(width, eps=1e-5)  # not the ViT's eps
        self.linear1 = nn.Linear(width, config.lm.width)
        self.linear2 = nn.Linear(config.lm.width, config.lm.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(shuffle_pixels(x, self.grid, self.shuffle))  # (n, P', s*s*D)
        return self.linear2(F.gelu(self.linear1(x)))  # (n, P', C)


class InternVL(MLLM):
    vision_types = {"internvl_vision": "internvl"}
    text_types = "qwen2", "qwen3"
    make_projector = ShuffleMLPProjector
    projector_names = {"linear1.*": "linear_1.*", "linear2.*": "linear_2.*", "norm.*": "layer_norm.*"}
    vit_names = VITS["dinov2"] | {
        "N.norm1.*": "N.layernorm_before.*",
        "N.attn.q.*": "N.attention.q_proj.*",
        "N.attn.k.*": "N.attention.k_proj.*",
        "N.attn.v.*": "N.attention.v_proj.*",
        "N.attn.out.*": "N.attention.projection_layer.*",
        "N.scale1.gain": "N.lambda_1",
        "N.norm2.*": "N.layernorm_after.*",
        "N.scale2.gain": "N.lambda_2",
    }
    has_video_file = True

    def prompt_texts(self, frames: int, times: Sequence[float]) -> list[str]:
        """Numbers the frames of a video. For a single frame it is the prompt for an image."""
        labels = [f"Frame{i + 1}: <img>" for i in range(frames)] if frames > 1 else ["<img>"]
        end = f"</img>\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
        return ["<|im_start|>user\n" + labels[0], *[f"</img>\n{label}" for label in labels[1:]], end]

    @classmethod
    def read_config(cls, published: dict, path: Path) -> dict:
        vision, where = field(published, "vision_config", dict, path), f"{path}: vision_config"
        check_supported({"attention_bias": False} | vision, VISION, where)  # false is its default
        check_supported(published, OUTSIDE, path)
        for name in "image_size", "patch_size":  # a number, or height and width
            if isinstance(sides := vision.get(name), list):
                if len(sides) != 2 or sides[0] != sides[1]:
                    raise InputError(f"{where}: {name} is {sides!r:.50}, expected a square")
                vision = vision | {name: sides[0]}
        fields = super().read_config(published | {"vision_config": vision}, path)
        fields["lm"]["tied"] = False  # whatever config.json says: the file decides, see `names_in`
        return fields | {"shuffle": 2}

    def names_in(self, file: Iterable[str]) -> dict[str, str]:
        """The published models have a head of their own; one without is tied, as in transformers."""
        names = super().names_in(file)
        if names["lm.head.weight"] not in file:
            names["lm.head.weight"] = names["lm.embed.weight"]
        return names

    @staticmethod
    def read_preprocessing(path: Path, vit: dict) -> Preprocessing:
        return read_preprocessing(path, Preprocessing(384, 384, squash=True))  # by default with CLIP's mean, as in [1]
