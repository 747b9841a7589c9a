"""Selection of device and precision, against files in the layout of /proc/cpuinfo; malloc; the compiler."""

import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import InputError
from training import devices

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
    """Files in the layout of Linux on x86 and on Arm, and no file."""
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    features = devices.cpu_features(tmp_path / "cpuinfo")
    monkeypatch.setattr(devices, "cpu_features", lambda: features)
    assert devices.select_precision("auto", CPU, frozen=True) == expected
    for name in ("fp32", "bf16"):
        assert devices.select_precision(name, CPU, frozen=True) == (name, "--precision")
        reason = "as in the run that is resumed"
        assert devices.select_precision(name, CPU, frozen=True, resumed=True) == (name, reason)
    assert devices.select_precision("auto", CPU, frozen=False)[0] == "fp32"
    with pytest.raises(InputError, match="--precision bf16"):
        devices.select_precision("bf16", CPU, frozen=False)


@pytest.mark.parametrize("resume, reason", [(None, "--precision"), (Path("run"), "as in the run that is resumed")])
def test_the_precision_of_a_resumed_run_is_not_said_to_be_a_flag(resume, reason, capsys):
    """A run stores the precision that was selected, so --resume finds one, whether or not the flag was given."""
    args = SimpleNamespace(device="cpu", precision="bf16", method="qadapter", resume=resume, compile=False,
                           plan=False)  # fmt: skip
    assert devices.setup(args) == CPU and args.precision == "bf16"
    assert f"frozen weights in bf16 ({reason}), trained ones in fp32" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_plan_may_be_for_an_absent_device(name, monkeypatch):
    """Its frozen weights are planned in bf16; --method full has none. Without --plan the device is refused."""
    monkeypatch.setattr(devices, "is_available", lambda _: False)
    flags = {"device": name, "precision": "auto", "resume": None, "compile": False, "plan": True}
    for method, precision in (("qadapter", "bf16"), ("full", "fp32")):
        args = SimpleNamespace(**flags, method=method)
        assert devices.setup(args).type == name and args.precision == precision
    with pytest.raises(InputError, match=f"--device {name}"):
        devices.setup(SimpleNamespace(**flags | {"plan": False}, method="qadapter"))


@pytest.mark.parametrize("cuda, mps, expected", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_is_cuda_else_mps_else_cpu(cuda, mps, expected, monkeypatch):
    """torch's answers are set. (A device that is missing is an InputError: tests/test_evaluate.py.)"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "empty", lambda _, device: SimpleNamespace(device=torch.device(device)))
    device, reason = devices.select_device()
    assert device.type == expected
    assert reason == {"cuda": "a GPU", "mps": "no CUDA", "cpu": "neither CUDA nor MPS"}[expected]
    assert devices.select_device("cpu") == (CPU, "--device")


@pytest.mark.parametrize("name", ["meta", "meta:0", "abacus", "hpu", "privateuseone", "cpu:x", ""])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(InputError, match=f"--device {name}: ."):
        devices.select_device(name)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_reused():
    """100 MB filled and freed eleven times: the system zeroes up to 25,600 pages each time, or none of them."""
    code = """
import resource, sys
import torch
from training import devices
if sys.argv[1] == "kept":
    devices.keep_freed_memory()
faults = []
for _ in range(11):
    torch.empty(100 * 2**20, dtype=torch.uint8).fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[0])
"""
    root = Path(__file__).parents[2]
    run = [sys.executable, "-c", code]
    faults = {mode: int(subprocess.check_output([*run, mode], cwd=root)) for mode in ("kept", "returned")}
    assert faults["kept"] < 1000 < faults["returned"]


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="--compile: .*no-such-compiler"):
        devices.check_compiler(CPU)
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--compile: .*triton"):
        devices.check_compiler(torch.device("cuda"))
