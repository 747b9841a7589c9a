"""The device, and the precision of the frozen weights.

Frozen weights are stored in bfloat16, half the size of float32, where the device has instructions for it; there bf16
products are also the fastest. Trained weights stay in float32: a step of AdamW is often smaller than the distance to
the next bfloat16, 1/256 of the number, and would be lost.
"""

import ctypes
import sys
from pathlib import Path

import torch

from common.config import Config
from common.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU_BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}  # Linux's names of the features of x86 and Arm CPUs
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def is_available(name: str) -> bool:
    """Whether this machine has the device "cuda", "mps" or "cpu"."""
    return name == "cpu" or (torch.cuda.is_available() if name == "cuda" else torch.backends.mps.is_available())


def select_device(name: str, plan: bool = False) -> torch.device:
    """The device of --device; `auto` is CUDA, else MPS, else CPU. A --plan may be for a device that this machine does
    not have. Raises InputError."""
    if name == "auto":
        name = next(filter(is_available, ("cuda", "mps", "cpu")))
    if not (plan or is_available(name)):
        raise InputError(f"--device {name}: this machine has none that torch can use")
    return torch.device(name)


def cpu_features(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The features that the CPU reports; empty where the system is not Linux."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {word for line in lines if line.startswith(("flags", "Features")) for word in line.split(":")[1].split()}


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16; a device that this machine does not have is assumed to."""
    if device.type == "cpu":
        return bool(CPU_BF16_FLAGS & cpu_features())
    if not is_available(device.type):
        return True
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mps.is_macos_or_newer(14, 0)


def select_precision(config: Config, device: torch.device) -> str:
    """The precision of the frozen weights: "fp32" or "bf16"."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if config.method != "full" and has_bf16(device) else "fp32"


def keep_freed_memory() -> None:
    """Lets malloc keep up to 1 GiB of freed memory for the next allocation.

    glibc returns large blocks to the system and gets them again zeroed page by page, which takes a quarter of the
    frozen ViT's time.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has no mallopt
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
