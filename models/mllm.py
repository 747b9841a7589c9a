"""A multimodal language model (MLLM): a ViT, a projector and a language model that were trained together.

    frames -> ViT -> projector -> visual tokens -> instead of the image tokens of a prompt -> language model

Here is what all layouts share, and how their folders are read. A layout is a subclass of `MLLM` in a file of its own,
listed in `LAYOUTS`: which ViTs and language models it joins, which output of the ViT is taken, the projector, the
prompt, the names of tensors, the preprocessing of frames.

A prompt is one turn with the frames of a video and an instruction: T + 1 texts, with the visual tokens of a frame
between any two of them. Control tokens such as <|im_start|> are one token each.

    <|im_start|>User:<fake_token_around_image><global-img> FRAME <fake_token_around_image>Describe it.<end_of_utterance>
    Assistant:

A config.json [1] has a vision_config and a text_config. They leave out what is the default of their class, which can be
a lot: LLaVA 1.5 states three fields of its Llama. Blocks of the ViT behind the one whose output is taken change
nothing: our model does not have them, and their tensors are ignored.

Shapes: B clips, T frames per clip, n images, P tokens of the ViT per image, D their width,
P' visual tokens per image, C width of the language model, L its positions, s the side of a square.

References
[1] transformers, models/*/configuration_*.py for defaults and tying, modeling_*.py for the order of operations and the
    names of tensors; conversion_mapping.py for their other spellings.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError, reading
from common.files import field, one_of, read_json
from common.preprocessing import preprocessor_file
from models import hub
from models.bpe import BPETokenizer
from models.lm import CausalLM, LMConfig, VisualPlaces
from models.lm_checkpoints import parse_lm_config
from models.names import VITS, find_prefix, lm_tensor_names, tensor_names
from models.tokenizer import Tokenizer
from models.vit import ViT, ViTConfig
from models.vit_checkpoints import adapt_tensors, check_frame_size, parse_vit_config
from models.weights import copy_strict, drop_tied_copy, read_tensors

LAYOUTS = {  # model_type in config.json: the file and the class. By name, because these files import this one
    "llava": ("models.llava", "LLaVA"),
    "llava_onevision": ("models.llava", "OneVision"),
    "idefics3": ("models.smolvlm", "Idefics3"),
    "smolvlm": ("models.smolvlm", "SmolVLM"),
    "internvl": ("models.internvl", "InternVL"),
    "qwen3_vl": ("models.qwen3_vl", "Qwen3VL"),
}
INSTRUCTION = "Describe the video."  # of every MLLM's prompt
CONTROL_TOKEN = re.compile(r"</?[\w|-]+>")


@dataclass(frozen=True)
class MLLMConfig:
    """Shape of an MLLM."""

    vit: ViTConfig  # up to the block whose output is taken
    lm: LMConfig
    lm_family: str  # model_type of text_config
    unused_blocks: int = 0  # of the published ViT, behind the last one of `vit`
    shuffle: int = 1  # s: squares of s x s neighbouring patches become one visual token
    deepstack: tuple[int, ...] = ()  # blocks of the ViT whose outputs the first blocks of the language model get too

    def __post_init__(self):
        if any(side % self.shuffle for side in self.vit.grid):
            raise InputError(f"patches are joined {self.shuffle} x {self.shuffle}, expected a divisor of "
                             f"{' and '.join(map(str, self.vit.grid))}, rows and columns of the grid")


def shuffle_pixels(x: Tensor, grid: tuple[int, int], s: int) -> Tensor:
    """Patches (n, P, D) of a grid, rows and columns -> squares of s x s neighbours side by side (n, P / s^2, s*s*D)."""
    rows, columns = grid
    x = x.unflatten(1, (rows // s, s, columns // s, s))  # (n, rows, s, columns, s, D)
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


def average_grid(tokens: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Tokens (n, any, C) of a grid, rows and columns -> averages of neighbours (n, side * side, C)."""
    x = tokens.transpose(1, 2).unflatten(2, grid)  # (n, C, rows, columns)
    return F.adaptive_avg_pool2d(x, side).flatten(2).transpose(1, 2)


class FrozenModels(nn.Module):
    """What an MLLM and a pair (`pair.py`) have in common: a ViT `vit`, a language model `lm`, visual tokens in a
    prompt."""

    def merge(self, texts: Sequence[Tensor], visual: Sequence[Tensor]) -> Tensor:
        """Ids of M + 1 texts, those of `prompt`, and M groups of visual tokens (B, any, C) -> the language model's
        input (B, L, C): text, group, text, ..., group, text. The ids are (any,) or (B or 1, any)."""
        x = self.lm.embed(torch.cat(list(texts), dim=-1)).expand(len(visual[0]), -1, -1)
        parts = x.split([ids.shape[-1] for ids in texts], dim=1)
        pairs = zip(parts, [*visual, x[:, :0]], strict=True)
        return torch.cat([part.to(x.dtype) for pair in pairs for part in pair], dim=1)

    def places(self, texts: Sequence[Tensor], visual: Sequence[Tensor]) -> VisualPlaces | None:
        """What the language model is told besides the result of `merge`."""
        return None


class MLLM(FrozenModels):
    """A frozen public MLLM, for images and videos of one size. Images are not split into parts.

    A layout overrides what differs, and has

        vision_types         {model_type of vision_config: family of the ViT in `vit_checkpoints.py`}
        text_types           what model_type of text_config may be
        make_projector       the class of its projector, which is made from an MLLMConfig
        projector_names      {our tensor in the projector: theirs}
        prompt_texts(frames: int, times: Sequence[float]) -> list[str]
                             the M + 1 texts before, between and after the M groups of visual tokens of `frames`
                             frames, in the format that the language model was trained with; times: see `prompt`
        read_preprocessing(path: Path, vit: dict) -> Preprocessing
                             what the folder's file `path` says about frames; `vit` is that of `read_config`
    """

    trained_together = True
    projects_vectors = False  # whether the projector maps single vectors, such as queries
    vit_names = VITS["clip"]  # {our tensor in the ViT: theirs}
    make_vit = ViT
    has_video_file = False  # whether the frames of videos have a file of their own, besides that about images
    states_times = False  # whether prompts say when the frames of a video are shown
    any_size = False  # whether frames may have other sides than those of the published model

    def __init__(self, config: MLLMConfig):
        super().__init__()
        self.config = config
        self.vit = self.make_vit(config.vit)
        self.lm = CausalLM(config.lm)
        self.projector = self.make_projector(config)
        self.newline = None  # a token after the last frame (C,)
        self.deepstack = config.deepstack
        self.visual_width = config.lm.width
        # Rows and columns of the P' visual tokens that a frame becomes, row by row.
        self.grid = tuple(side // config.shuffle for side in config.vit.grid)

    def frame_tokens(self, z: Tensor, grid: int) -> Tensor:
        """Outputs of the ViT's last block (n, P, D) -> visual tokens or averages of them (n, P' or grid^2, C)."""
        tokens = self.connect(self.vit.finish(z))
        return average_grid(tokens, self.grid, grid) if grid else tokens

    def num_frame_tokens(self, grid: int) -> int:
        """How many tokens the language model reads per frame."""
        return grid**2 or math.prod(self.grid)

    def num_images(self, frames: int) -> int:
        """M, the groups of visual tokens in a prompt: one per frame, or per pair of frames."""
        return self.vit.num_steps(frames)

    def connect(self, features: Tensor) -> Tensor:
        """Last hidden states of the ViT (n, P, D) -> visual tokens (n, P', C). A class token becomes none."""
        return self.projector(features[:, 1:] if self.config.vit.class_token else features)

    def prompt(self, tokenizer: Tokenizer, frames: int, times: Sequence[float] | None = None) -> list[list[int]]:
        """The ids of `prompt_texts`, M + 1 lists, with BOS where texts begin with one.

        times: of the T frames in seconds, and the duration of the video; by default one frame per second, from 0 on.
        Raises InputError if the tokenizer is of another kind or lacks a control token of the prompt.
        """
        times = range(frames + 1) if times is None else times
        texts, is_bpe = self.prompt_texts(frames, times), isinstance(tokenizer, BPETokenizer)
        needed = CONTROL_TOKEN.findall("".join(texts))
        added = tokenizer.added if is_bpe else {}
        if is_bpe and not needed:  # Llama's first prompt; Llama 3, which has a BPE, was trained with another one
            raise InputError("tokenizer: a byte-level BPE, the model's prompt needs a tokenizer.model")
        if missing := [token for token in needed if token not in added]:
            raise InputError(f"tokenizer: has no token {missing[0]}, which the model's prompt needs")
        if is_bpe:
            return [tokenizer.encode_with_added(text) for text in texts]
        ids = [tokenizer.processor.encode(text) for text in texts]  # each gets sentencepiece's own space before it
        return [tokenizer.start + ids[0], *ids[1:]]

    # ---------------------------------------------------------------------------------------- files

    @classmethod
    def read_config(cls, published: dict, path: Path) -> dict:
        """The fields of `MLLMConfig`, of which `vit` and `lm` are dicts too, from the content of the config.json
        `path`. Raises InputError for every field whose value would need other computations."""
        vision, where = field(published, "vision_config", dict, path), f"{path}: vision_config"
        family = cls.vision_types[one_of(vision, "model_type", cls.vision_types, where)]
        vit = parse_vit_config(vision, family, where)
        text, where = field(published, "text_config", dict, path), f"{path}: text_config"
        lm_family = one_of(text, "model_type", cls.text_types, where)
        # Outside of text_config, where the field has no meaning by itself.
        text = text | {"tie_word_embeddings": field(published, "tie_word_embeddings", bool, path, False)}
        lm = parse_lm_config(text, where, path)
        return {"vit": vit, "lm": lm, "lm_family": lm_family}

    def names_in(self, file: Iterable[str]) -> dict[str, str]:
        """Returns {our tensor: theirs}, with the prefixes that the names in a file have. Published files, those of
        transformers 4 and those of transformers 5 differ."""
        parts = {
            "vit": tensor_names(self.vit, self.vit_names, file),
            "projector": tensor_names(self.projector, self.projector_names, file),
            "lm": lm_tensor_names(self.lm, file),
        }
        return {f"{part}.{ours}": theirs for part, names in parts.items() for ours, theirs in names.items()}

    def adapt(self, tensors: dict[str, Tensor], names: dict[str, str]) -> None:
        """Replaces tensors of a file by what our model has in their place."""
        adapt_tensors(self, tensors, names)

    @staticmethod
    def from_config(folder: str | Path, image_size: Sequence[int] | None = None) -> "MLLM":
        """The model of a folder on the meta device, from its configs alone. image_size: height, and width if it is
        another one; None: the model's own. Raises InputError."""
        path = Path(folder) / "config.json"
        published = read_json(path)
        file, name = LAYOUTS[one_of(published, "model_type", LAYOUTS, path)]
        layout = getattr(import_module(file), name)
        fields = layout.read_config(published, path)
        if image_size:
            step = fields["vit"]["patch_size"] * fields.get("shuffle", 1)
            if not layout.any_size or any(side % step for side in image_size):
                expected = f"multiples of {step}" if layout.any_size else f"none; the size of {name} is fixed"
                raise InputError(f"--image-size {' '.join(map(str, image_size))}: expected {expected}")
            fields["vit"] |= zip(("image_size", "image_width"), image_size, strict=False)  # one side: a square
        frames = preprocessor_file(Path(folder), video=layout.has_video_file)
        preprocessing = layout.read_preprocessing(frames, fields["vit"])
        check_frame_size(preprocessing, fields["vit"], frames)
        with reading(path), torch.device("meta"):
            mllm = layout(MLLMConfig(**fields | {"vit": ViTConfig(**fields["vit"]), "lm": LMConfig(**fields["lm"])}))
        mllm.vit.preprocessing = preprocessing
        return mllm

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32,
                        image_size: Sequence[int] | None = None) -> "MLLM":
        """Loads a folder or hub id; image_size: see `from_config`. Missing, unexpected and misshapen tensors raise an
        InputError that names them. Those of unused blocks and of an unused pooling head are ignored."""
        folder = hub.resolve(folder, check=cls.from_config)
        mllm = cls.from_config(folder, image_size)
        config, (tensors, path) = mllm.config, read_tensors(folder)
        names = mllm.names_in(tensors)
        mllm.adapt(tensors, names)
        if config.lm.tied:
            drop_tied_copy(tensors, names["lm.embed.weight"])
        prefix = find_prefix(tensors, mllm.vit_names["patch.*"].replace("*", "weight"))
        blocks = range(config.vit.depth, config.vit.depth + config.unused_blocks)
        unused = (f"{prefix}head.", *(prefix + mllm.vit_names["N."].replace("N", str(i)) for i in blocks))
        copy_strict(mllm, {name: x for name, x in tensors.items() if not name.startswith(unused)}, names, path)
        tensors.clear()  # so that each tensor is freed as soon as it has been converted
        return mllm.to(dtype)
