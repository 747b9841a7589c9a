"""A separate ViT and language model, behind the interface of an MLLM (`mllm.py`).

    BOS | visual tokens | "a video of" | caption | EOS

What an MLLM's own projector does, a trained connector has to learn here (`model.py`); this class only hands it what it
reads of a frame, and writes the prompt.

Shapes: n images, P tokens of the ViT per image, D ViT width.
"""

from torch import Tensor

from models.lm import CausalLM
from models.mllm import FrozenModels, average_grid
from models.vit import ViT

PROMPT = "a video of"


class Pair(FrozenModels):
    """The frozen models of a run without an MLLM."""

    trained_together = states_times = False
    projector = newline = None
    deepstack = ()

    def __init__(self, vit: ViT, lm: CausalLM):
        super().__init__()
        self.vit, self.lm = vit, lm
        self.visual_width = vit.config.width
        self.grid = vit.config.grid  # rows and columns of a frame's tokens

    def frame_tokens(self, z: Tensor, grid: int) -> Tensor:
        """Outputs of the last block (n, P, D) -> what the connector reads of a frame: grid^2 averages of patches, or
        with grid 0 the pooled feature (n, grid^2 or 1, D)."""
        return average_grid(self.vit.patches(z), self.grid, grid) if grid else self.vit.pool(z)[:, None]

    def num_frame_tokens(self, grid: int) -> int:
        """How many tokens the language model reads per frame."""
        return grid**2 or 1

    def num_images(self, frames: int) -> int:
        """Groups of visual tokens in a prompt: one, however many frames."""
        return 1

    def prompt(self, tokenizer, frames: int, times=None) -> list[list[int]]:
        """The ids before and after the visual tokens."""
        return [tokenizer.start, tokenizer.encode(PROMPT)]
