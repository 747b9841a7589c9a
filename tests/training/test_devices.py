"""What a run computes on and in, against files that say what a processor has."""

import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import devices
from weights import InputError

CPU = torch.device("cpu")
XEON = "processor\t: 0\nmodel name\t: some\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16 amx_tile\n\nprocessor\t: 1\n"


@pytest.mark.parametrize("text, expected", [
    (XEON, ("bf16", "the device has amx_bf16")),
    ("flags\t\t: fpu avx2 avx512_bf16\n", ("bf16", "the device has avx512_bf16")),
    ("Features\t: fp asimd bf16 i8mm\n", ("bf16", "the device has bf16")),
    ("flags\t\t: fpu avx2\n", ("fp32", "the device has no bf16 instructions")),
    ("model name\t: bf16\n", ("fp32", "the device has no bf16 instructions")),
    (None, ("fp32", "the device has no bf16 instructions")),
])  # fmt: skip
def test_bf16_where_the_processor_has_instructions(text, expected, tmp_path, monkeypatch):
    """Files as Linux on x86 and on Arm makes them, and none."""
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    found = devices.cpu_features(tmp_path / "cpuinfo")
    monkeypatch.setattr(devices, "cpu_features", lambda: found)
    assert devices.pick_precision("auto", CPU, frozen=True) == expected
    for name in ("fp32", "bf16"):
        assert devices.pick_precision(name, CPU, frozen=True) == (name, "--precision")
    assert devices.pick_precision("auto", CPU, frozen=False)[0] == "fp32"
    with pytest.raises(InputError, match="--precision bf16"):
        devices.pick_precision("bf16", CPU, frozen=False)


@pytest.mark.parametrize("cuda, mps, expected", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_first_device_that_is_there_is_taken(cuda, mps, expected, monkeypatch):
    """torch's answers are set. (A device that is not there is an InputError: tests/test_train.py.)"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "empty", lambda _, device: SimpleNamespace(device=torch.device(device)))
    device, why = devices.pick_device()
    assert device.type == expected
    assert why == {"cuda": "a GPU", "mps": "no CUDA", "cpu": "neither CUDA nor MPS"}[expected]
    assert devices.pick_device("cpu") == (CPU, "--device")


@pytest.mark.parametrize("name", ["meta", "meta:0", "abacus", "hpu", "privateuseone", "cpu:x", ""])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(InputError, match=f"--device {name}: ."):
        devices.pick_device(name)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="is for glibc")
def test_freed_memory_is_used_again():
    """100 MB filled and freed eleven times: pages that the system zeroes again, at most 25,600 each time, or none."""
    code = """
import resource, sys
import torch
import devices
if sys.argv[1] == "kept":
    devices.keep_freed_memory()
faults = []
for _ in range(11):
    torch.empty(100 * 2**20, dtype=torch.uint8).fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[0])
"""
    root = Path(__file__).parent.parent
    run = [sys.executable, "-c", code]
    found = {how: int(subprocess.check_output([*run, how], cwd=root)) for how in ("kept", "given back")}
    assert found["kept"] < 1000 < found["given back"]


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="--compile: .*no-such-compiler"):
        devices.compiler_for(CPU)
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--compile: .*triton"):
        devices.compiler_for(torch.device("cuda"))
