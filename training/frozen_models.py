"""The frozen models of a run: a ViT and a language model (`--vit`, `--lm`), or an MLLM, which has both (`--mllm`).

    names     {"vit": name, "lm": name} or {"mllm": name}; a name is a folder, a hub id or, of a ViT, a .pth file
    folders   the same with paths on this machine
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import explain_out_of_memory
from common.files import sha256_of
from models import hub
from models.lm import CausalLM
from models.mllm import MLLM
from models.tokenizer import load_tokenizer
from models.vit import ViT
from models.weights import weight_files

GENERATION_CONFIG = "generation_config.json"
CONFIG_FILES = {"vit": ViT.CONFIG_FILES, "lm": CausalLM.CONFIG_FILES, "mllm": MLLM.CONFIG_FILES}
META = torch.device("meta")


@dataclass(frozen=True)
class FrozenModels:
    """The arguments of a `model.Captioner`."""

    vit: ViT
    lm: CausalLM
    tokenizer: object
    mllm: MLLM | None


def check_mllm(folder: Path) -> None:
    """Raises InputError unless the folder's configs and tokenizer, without its weights, are of a supported MLLM."""
    MLLM.from_config(folder)
    load_tokenizer(folder)


CHECKS = {"vit": ViT.from_config, "lm": load_tokenizer, "mllm": check_mllm}


def resolve_models(args: Namespace) -> dict[str, Path]:
    """The folders of the models that the flags name; downloads hub ids. In args, an id gets its commit.

    What needs no weights is checked before they are downloaded. Raises InputError.
    """
    folders = {}
    for part in ["mllm"] if args.mllm else ["vit", "lm"]:
        name = getattr(args, part)
        folders[part] = hub.resolve(name, check=CHECKS[part])
        setattr(args, part, hub.pin_revision(name, folders[part]))
    return folders


def backbone_hashes(folders: dict[str, Path]) -> dict[str, str]:
    """SHA-256 of every file that the models are read from: {"vit/config.json": hex, ...}."""
    hashes = {}
    for part, folder in folders.items():
        files = [folder / name for name in CONFIG_FILES[part]]
        if part != "vit":
            has_model = (folder / "tokenizer.model").exists()
            tokenizer = ["tokenizer.model"] if has_model else ["tokenizer.json", "tokenizer_config.json"]
            files += [folder / name for name in tokenizer]
        files = [file for file in (*files, *weight_files(folder)) if file.exists()]
        hashes |= {f"{part}/{file.relative_to(folder) if folder.is_dir() else file.name}": sha256_of(file)
                   for file in files}  # fmt: skip
    return hashes


def load_models(folders: dict[str, Path], dtype: torch.dtype, image_size: int | None) -> FrozenModels:
    """Reads the weights. image_size: side of the input of --vit in pixels; None: its own. Raises InputError."""
    with explain_out_of_memory(f"reading {' and '.join(map(str, folders.values()))}"):
        if "mllm" in folders:
            mllm = MLLM.from_pretrained(folders["mllm"], dtype)
            return FrozenModels(mllm.vit, mllm.lm, load_tokenizer(folders["mllm"]), mllm)
        vit = ViT.from_pretrained(folders["vit"], dtype, image_size)
        lm = CausalLM.from_pretrained(folders["lm"], dtype)
        return FrozenModels(vit, lm, load_tokenizer(folders["lm"]), None)


def meta_pair(vit_folder: Path, lm_folder: Path, dtype: torch.dtype,
              image_size: int | None = None) -> tuple[ViT, CausalLM]:  # fmt: skip
    """A ViT and a language model on the meta device; image_size as in `ViT.from_pretrained`. Raises InputError."""
    return ViT.from_config(vit_folder, image_size).to(dtype), CausalLM.from_config(lm_folder).to(dtype)


def load_meta_models(folders: dict[str, Path], dtype: torch.dtype, image_size: int | None) -> FrozenModels:
    """Like `load_models`, but on the meta device: only the configs and the tokenizer are read."""
    if "mllm" in folders:
        mllm = MLLM.from_config(folders["mllm"]).to(dtype)
        return FrozenModels(mllm.vit, mllm.lm, load_tokenizer(folders["mllm"]), mllm)
    vit, lm = meta_pair(folders["vit"], folders["lm"], dtype, image_size)
    return FrozenModels(vit, lm, load_tokenizer(folders["lm"]), None)
