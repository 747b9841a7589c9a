"""What a run computes on and in: the device, the precision of the frozen weights, compiled blocks.

Frozen weights may be stored in bfloat16, half the bytes of float32, where the device multiplies such numbers by
instructions of its own; then they are also what it multiplies fastest. Trained weights stay in float32: a step of AdamW
is often smaller than the distance to the next bfloat16, 1/256 of the number, and would be lost.
"""

import ctypes
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from weights import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU_BF16 = ("amx_bf16", "avx512_bf16", "bf16")  # as Linux names what x86 and Arm processors have, best first
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def pick_device(name: str = "auto") -> tuple[torch.device, str]:
    """-> the device and why this one; `auto` takes the first of cuda, mps and cpu that is there. Raises InputError."""
    why = "--device"
    if name == "auto" and torch.cuda.is_available():
        name, why = "cuda", torch.cuda.get_device_name()
    elif name == "auto":
        name, why = ("mps", "no CUDA") if torch.backends.mps.is_available() else ("cpu", "neither CUDA nor MPS")
    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("holds no numbers")
        return torch.empty(0, device=name).device, why
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error


def cpu_features(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What the processor says it can do; empty where the system is not Linux."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {word for line in lines if line.startswith(("flags", "Features")) for word in line.split(":")[1].split()}


def pick_precision(name: str, device: torch.device, frozen: bool) -> tuple[str, str]:
    """-> "fp32" or "bf16" for the frozen weights, and why. `frozen`: whether there are any. Raises InputError."""
    if not frozen:
        if name == "bf16":
            raise InputError("--precision bf16: is for frozen weights, and --method full has none")
        return "fp32", "all weights are trained"
    if name != "auto":
        return name, "--precision"
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        has = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        found = cpu_features()
        has = next((feature for feature in CPU_BF16 if feature in found), None)
    instructions = has if isinstance(has, str) else "bf16 instructions"
    return ("bf16", f"the device has {instructions}") if has else ("fp32", "the device has no bf16 instructions")


def compiler_for(device: torch.device) -> None:
    """Raises InputError if torch.compile would not find what it needs for this device."""
    if device.type == "cuda" and find_spec("triton") is None:
        raise InputError("--compile: expected the package triton, which torch's builds for CUDA bring along")
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise InputError(f"--compile: expected a C++ compiler, {os.environ.get('CXX', 'g++')}; CXX names another")


def keep_freed_memory() -> None:
    """Lets malloc keep what is freed, up to 1 GiB, for the next that asks.

    glibc gives large blocks back to the system and gets them anew, zeroed page by page: of the frozen ViT's activations
    that takes a quarter of its time.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
