"""Benchmarks of a training step: 2 clips of 8 frames, 4 captions each, frozen weights in bf16, trained weights in fp32.

`python -m bench.training_step KIND` is a process that takes steps of one kind (`make_step`), one for each line on its
standard input.

Letters: B clips, T frames, K captions a clip.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.peft_captioner import (
    B,
    K,
    PeftCaptioner,
    T,
    assert_same_model,
    make_backbones,
    make_batch,
    make_captioner,
    peft_batch,
)
from bench.processes import ROOT, peak_memory
from bench.timing import elapsed, median_seconds, summarize_ratios
from model import Captioner
from training.devices import keep_freed_memory

KINDS = ("peft vit", "peft lm", "ours qadapter", "ours lora", "ours qadapter compiled")
PAIRS = (("ours qadapter", "peft vit"), ("ours lora", "peft vit"), ("ours qadapter", "peft lm"),
         ("ours qadapter compiled", "ours qadapter"))  # fmt: skip


def make_optimizer(model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=fused)


def our_step(captioner: Captioner, optimizer: torch.optim.Optimizer, frames: Tensor, labels: Tensor) -> float:
    """As in train.py."""
    loss_sum, tokens = captioner(frames, labels)
    loss = loss_sum / tokens
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(captioner.trained().values(), 1.0)
    optimizer.step()
    return loss.item()


def peft_step(peer: PeftCaptioner, optimizer: torch.optim.Optimizer, pixels: Tensor, labels: Tensor) -> float:
    loss = peer(pixels, labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    return loss.item()


# ------------------------------------------------------------------- steps in processes of their own


def make_step(kind: str) -> Callable[[], float]:
    """-> a function that takes one training step, in bf16. kind: "ours METHOD [compiled]" or "peft vit|lm"."""
    whose, method, *compiled = kind.split()
    if whose == "ours":
        keep_freed_memory()
        captioner = make_captioner(*make_backbones("bf16"), method)
        if compiled:
            captioner.compile_blocks()
        return partial(our_step, captioner, make_optimizer(captioner, fused=True), *make_batch())
    captioner = make_captioner(*make_backbones("bf16"), "lora")
    peer = PeftCaptioner(captioner, "bf16", method)
    return partial(peft_step, peer, make_optimizer(peer, fused=False), *peft_batch(captioner, *make_batch()))


def serve_steps(kind: str) -> None:
    step = make_step(kind)
    for _ in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak memory to the current memory
        print("loss", step(), flush=True)


class StepProcess:
    """A process that takes a training step of one kind whenever it is called."""

    def __init__(self, kind: str):
        command = [sys.executable, "-m", "bench.training_step", kind]
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self) -> None:
        print(file=self.process.stdin, flush=True)
        if not self.process.stdout.readline().startswith("loss"):
            sys.exit("error: the measured process failed; its message is above")

    def stop(self) -> float:
        """Ends the process; -> its peak memory since the start of the last step, in MiB."""
        peak = peak_memory(self.process.pid)
        self.process.kill()
        self.process.communicate()
        return peak


def compare_training(repeats: int) -> list[dict]:
    """Steps of each kind in alternation, each kind in its own process; then the fractions of the machine's rate."""
    assert_same_model()
    processes = {kind: StepProcess(kind) for kind in KINDS}
    turns = [{kind: elapsed(step) for kind, step in processes.items()} for _ in range(repeats + 1)]
    times = {kind: [turn[kind] for turn in turns[1:]] for kind in KINDS}  # the first turn warms up
    peaks = {kind: process.stop() for kind, process in processes.items()}
    rows = []
    for ours, theirs in PAIRS:
        row = {"what": f"a step, {ours} / {theirs}"} | summarize_ratios(times[ours], times[theirs])
        rows.append(row | {
            "captions/s": B * K / row["wall s"], "theirs, captions/s": B * K / row["theirs, wall s"],
            "MB": peaks[ours], "theirs, MB": peaks[theirs], "MB / theirs": peaks[ours] / peaks[theirs],
        })  # fmt: skip
    keep_freed_memory()
    return rows + utilization_rows(repeats)


# ---------------------------------------------------------------------------- utilization and cost


def matmul_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """Floating-point operations per second of the fastest of three square matrix products."""
    rates = []
    for n in (1024, 2048, 4096):
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        rates.append(2 * n**3 / median_seconds(lambda a=a, b=b: a @ b, 7))
    return max(rates)


def count_operations(function) -> int:
    """Additions and multiplications in all matrix products of a call, including those of attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # other kernels are not counted
        function()
    return counter.get_total_flops()


def utilization_rows(repeats: int) -> list[dict]:
    """The fraction of the machine's rate of bf16 products that the frozen ViT, a step, and a step on cached block
    outputs reach. Rate and times are measured in alternation."""
    captioner = make_captioner(*make_backbones("bf16"))
    frames, labels = make_batch()
    optimizer = make_optimizer(captioner, fused=True)
    pixels = captioner.vit.normalize(frames).to(captioner.dtype)
    outputs = captioner.block_outputs(frames)
    parts = {
        "the frozen ViT": lambda: captioner.adapter.block_outputs(captioner.vit, pixels),
        "a step": lambda: our_step(captioner, optimizer, frames, labels),
        "a step on cached block outputs": lambda: our_step(captioner, optimizer, outputs, labels),
    }
    operations = {name: count_operations(function) for name, function in parts.items()}
    rates, times = [], {name: [] for name in parts}
    for _ in range(repeats):
        rates.append(matmul_rate())
        for name, function in parts.items():
            times[name].append(median_seconds(function, 3))
    rows = []
    for name in parts:
        fractions = sorted(operations[name] / seconds / rate for seconds, rate in zip(times[name], rates, strict=True))
        rows.append({"what": f"{name}, {B} clips, bf16", "wall s": statistics.median(times[name]),
                     "TFLOP": operations[name] / 1e12, "fraction of the rate": statistics.median(fractions),
                     "min fraction": fractions[0], "max fraction": fractions[-1],
                     "rate, TFLOP/s": rates[-1] / 1e12})  # fmt: skip
    return rows


def measure_cost(repeats: int) -> list[dict]:
    """The time of a step with one clip as frames, queries or captions grow, and the cost of each additional one."""
    keep_freed_memory()
    backbones, rows = make_backbones("bf16"), []
    for name, values in (("frame", (1, 2, 4, 8, 16, 32, 64)), ("query", (1, 4, 16, 64)), ("caption", (1, 4, 16))):
        previous = None
        for value in values:
            counts = {"frame": T, "query": 16, "caption": K} | {name: value}
            captioner = make_captioner(*backbones, queries=counts["query"])
            batch = make_batch(1, counts["frame"], counts["caption"])
            step = partial(our_step, captioner, make_optimizer(captioner, fused=True), *batch)
            row = {"what": f"a step, {value} {name}", "ms": 1e3 * median_seconds(step, max(3, repeats))}
            if previous:
                row[f"ms per additional {name}"] = (row["ms"] - previous[1]) / (value - previous[0])
            previous = value, row["ms"]
            rows.append(row)
    return rows


if __name__ == "__main__":
    serve_steps(sys.argv[1])
