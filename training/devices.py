"""The device, the precision of the frozen weights, and what torch.compile and malloc need.

Frozen weights are stored in bfloat16, half the size of float32, where the device has instructions for it; there bf16
products are also the fastest. Trained weights stay in float32: a step of AdamW is often smaller than the distance to
the next bfloat16, 1/256 of the number, and would be lost.
"""

import argparse
import ctypes
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from common.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")  # Linux's names of the features of x86 and Arm CPUs, best first
PLANNABLE_DEVICES = ("cuda", "mps", "cpu")  # with --plan, whether this machine has them or not
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def is_available(name: str) -> bool:
    """Whether this machine has the device "cuda", "mps" or "cpu"."""
    return name == "cpu" or (torch.cuda.is_available() if name == "cuda" else torch.backends.mps.is_available())


def select_device(name: str = "auto") -> tuple[torch.device, str]:
    """-> the device and the reason; `auto` is CUDA, else MPS, else CPU. Raises InputError."""
    reason = "--device"
    if name == "auto" and torch.cuda.is_available():
        name, reason = "cuda", torch.cuda.get_device_name()
    elif name == "auto":
        name, reason = ("mps", "no CUDA") if torch.backends.mps.is_available() else ("cpu", "neither CUDA nor MPS")
    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("stores no numbers")
        return torch.empty(0, device=name).device, reason
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error


def cpu_features(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The features that the CPU reports; empty where the system is not Linux."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {word for line in lines if line.startswith(("flags", "Features")) for word in line.split(":")[1].split()}


def select_precision(name: str, device: torch.device, frozen: bool, resumed: bool = False) -> tuple[str, str]:
    """-> "fp32" or "bf16" for the frozen weights, if there are any (`frozen`), and the reason. Raises InputError.

    `resumed`: the name is the one that was selected when the run began.
    """
    if not frozen:
        if name == "bf16":
            raise InputError("--precision bf16: applies to frozen weights, and --method full has none")
        return "fp32", "all weights are trained"
    if name != "auto":
        return name, "as in the run that is resumed" if resumed else "--precision"
    if device.type == "cuda":
        feature = torch.cuda.is_bf16_supported(including_emulation=False) and "bf16 instructions"
    elif device.type == "mps":
        feature = torch.backends.mps.is_macos_or_newer(14, 0) and "bf16 instructions"
    else:
        features = cpu_features()
        feature = next((flag for flag in CPU_BF16_FLAGS if flag in features), None)
    return ("bf16", f"the device has {feature}") if feature else ("fp32", "the device has no bf16 instructions")


def check_compiler(device: torch.device) -> None:
    """Raises InputError if torch.compile would not find the compiler that it needs for this device."""
    if device.type == "cuda" and find_spec("triton") is None:
        raise InputError("--compile: expected the package triton, which the CUDA builds of torch include")
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise InputError(f"--compile: expected a C++ compiler, {os.environ.get('CXX', 'g++')}; CXX names another")


def keep_freed_memory() -> None:
    """Lets malloc keep up to 1 GiB of freed memory for the next allocation.

    glibc returns large blocks to the system and gets them again zeroed page by page, which takes a quarter of the
    frozen ViT's time.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has no mallopt
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def setup(args: argparse.Namespace) -> torch.device:
    """Selects the device and the precision that the flags ask for, and prints both; sets args.precision.

    A --plan may be for a device that this machine does not have.
    """
    is_absent = args.plan and args.device in PLANNABLE_DEVICES and not is_available(args.device)
    device, device_reason = (torch.device(args.device), "--plan") if is_absent else select_device(args.device)
    frozen, resumed = args.method != "full", args.resume is not None
    if is_absent and args.precision == "auto" and frozen:
        args.precision, precision_reason = "bf16", "assumed of a device that this machine does not have"
    else:
        args.precision, precision_reason = select_precision(args.precision, device, frozen, resumed)
    print(f"device: {device} ({device_reason}), {torch.get_num_threads()} threads; "
          f"frozen weights in {args.precision} ({precision_reason}), trained ones in fp32")  # fmt: skip
    if args.compile:
        check_compiler(device)
    keep_freed_memory()
    return device
