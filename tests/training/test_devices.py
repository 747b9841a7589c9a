"""Selection of device and precision, against files in the layout of /proc/cpuinfo; malloc."""

import ctypes
import subprocess
import sys

import pytest
import torch

from common.config import Config
from common.errors import InputError
from tests.scripts import ROOT
from training import devices

CPU = torch.device("cpu")
XEON = "processor\t: 0\nmodel name\t: some\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16 amx_tile\n\nprocessor\t: 1\n"


@pytest.mark.parametrize("text, expected", [
    (XEON, "bf16"), ("flags\t\t: fpu avx2 avx512_bf16\n", "bf16"), ("Features\t: fp asimd bf16 i8mm\n", "bf16"),
    ("flags\t\t: fpu avx2\n", "fp32"), ("model name\t: bf16\n", "fp32"), (None, "fp32"),
])
def test_bf16_where_the_processor_has_instructions(text, expected, tmp_path, monkeypatch):
    """Files in the layout of Linux on x86 and on Arm, and no file. --method full has no frozen weights."""
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    features = devices.cpu_features(tmp_path / "cpuinfo")
    monkeypatch.setattr(devices, "cpu_features", lambda: features)
    assert devices.select_precision(Config(), CPU) == expected
    assert devices.select_precision(Config(method="full"), CPU) == "fp32"
    assert [devices.select_precision(Config(precision=name), CPU) for name in devices.DTYPES] == list(devices.DTYPES)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_plan_may_be_for_an_absent_device(name, monkeypatch):
    """Its frozen weights are planned in bf16. Without --plan the device is refused."""
    monkeypatch.setattr(devices, "is_available", lambda found: found == "cpu")
    device = devices.select_device(name, plan=True)
    assert device.type == name and devices.select_precision(Config(), device) == "bf16"
    with pytest.raises(InputError, match=f"--device {name}"):
        devices.select_device(name)


@pytest.mark.parametrize("cuda, mps, expected", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_is_cuda_else_mps_else_cpu(cuda, mps, expected, monkeypatch):
    """torch's answers are set."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert devices.select_device("auto").type == expected


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_reused():
    """100 MB filled and freed four times: the system zeroes no page again, where it did 25,600 each time."""
    code = """
import resource, torch
from training import devices
devices.keep_freed_memory()
faults = []
for _ in range(4):
    torch.empty(100 * 2**20, dtype=torch.uint8).fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[0])
"""
    assert int(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)) < 1000
