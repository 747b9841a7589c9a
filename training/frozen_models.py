"""The frozen models of a run: an MLLM, or a ViT and a language model (`models/pair.py`).

    names     {"vit": name, "lm": name} or {"mllm": name}; a name is a folder, a hub id or, of a ViT, a .pth file
    folders   the same with paths on this machine
"""

from dataclasses import replace
from pathlib import Path

import torch

from common.config import Config
from common.files import fingerprint_of
from models import hub
from models.lm import CausalLM
from models.mllm import MLLM
from models.pair import Pair
from models.tokenizer import Tokenizer, load_tokenizer
from models.vit import ViT
from models.weights import weight_files
from training.devices import DTYPES

MODELS = {"vit": ViT, "lm": CausalLM, "mllm": MLLM}
TINY = "backbones/tiny-vit", "backbones/tiny-lm"
CLIP = "openai/clip-vit-base-patch16"
TINYLLAMA, LLAMA_160M = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "JackFram/llama-160m"
# The MLLMs of msvd and msrvtt, on a CPU and elsewhere. Both read videos and are under Apache-2.0. SmolVLM2 256M is the
# smallest: 1.0 GB to download, 214 GFLOP per frame in the ViT; InternVL3.5 1B has 2.1 GB and 724 (docs/models.md).
SMOLVLM2, INTERNVL = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct", "OpenGVLab/InternVL3_5-1B-HF"


def with_default_models(config: Config, device: torch.device) -> Config:
    """The config with an MLLM, or with what a pair lacks, where no flag names them."""
    if not config.is_pair:
        return replace(config, mllm=config.mllm or (SMOLVLM2 if device.type == "cpu" else INTERNVL))
    vit, lm = TINY if config.dataset == "shapes" else (CLIP, LLAMA_160M if device.type == "cpu" else TINYLLAMA)
    return replace(config, vit=config.vit or vit, lm=config.lm or lm)


def model_options(config: Config, part: str) -> tuple:
    """What `from_config` and `from_pretrained` of a model get of --image-size: a ViT its side."""
    size = config.image_size
    return {"vit": (size and size[0],), "lm": (), "mllm": (size,)}[part]


def resolve_models(config: Config) -> tuple[Config, dict[str, Path]]:
    """The folders of the models that the config names; downloads hub ids, each of which gets its commit in the config.

    What needs no weights is checked before they are downloaded. Raises InputError.
    """
    folders = {}
    for part in ["mllm"] if config.mllm else ["vit", "lm"]:

        def check(folder: Path, part: str = part, options: tuple = model_options(config, part)) -> None:
            MODELS[part].from_config(folder, *options)
            if part != "vit":
                load_tokenizer(folder)

        name = getattr(config, part)
        folders[part] = hub.resolve(name, check=check)
        config = replace(config, **{part: hub.pin_revision(name, folders[part])})
    return config, folders


def fingerprint_models(folders: dict[str, Path]) -> dict[str, str]:
    """A fingerprint of every file that the models are read from: {"vit/config.json": hex, ...}. A file that appears
    later is a difference, too."""
    hashes = {}
    for part, folder in folders.items():
        files = [folder / name for name in hub.CONFIG_FILES if (folder / name).exists()] + weight_files(folder)
        hashes |= {f"{part}/{file.relative_to(folder) if folder.is_dir() else file.name}": fingerprint_of(file)
                   for file in files}
    return hashes


def load_models(config: Config, folders: dict[str, Path]) -> tuple[MLLM | Pair, Tokenizer]:
    """The models of a config and their tokenizer. For --plan the models are on the meta device, and only the configs
    and the tokenizer are read. Raises InputError."""
    dtype = DTYPES[config.precision]

    def load(part: str):
        model, options = MODELS[part], model_options(config, part)
        if config.plan:
            return model.from_config(folders[part], *options).to(dtype)
        return model.from_pretrained(folders[part], dtype, *options)

    if "mllm" in folders:
        return load("mllm"), load_tokenizer(folders["mllm"])
    vit = load("vit")
    if config.vit_blocks is not None:
        vit.keep_blocks(config.vit_blocks)
    return Pair(vit, load("lm")), load_tokenizer(folders["lm"])
