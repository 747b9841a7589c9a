"""Benchmarks of a training step for `bench.py`: CLIP ViT-B/16 and Llama-160m, random weights, 2 clips of 8 frames with
4 captions each, in bf16, where the trained weights are fp32.

The peer is transformers' CLIPVisionModel and LlamaForCausalLM with peft's LoRA, each caption with a forward pass of its
own, as a row of the batch: in the ViT's attention, of which `--method lora` is the same model, so that loss and
gradients are compared first; or, with less work than that, in the language model's, while the ViT runs without
gradients. The peers' frames are normalised beforehand; all have a connector and AdamW on what is trained.

Letters: B clips, T frames, K captions a clip, L tokens of a caption, S side in pixels, R = B*K rows, C width of the
language model.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench_models import clip_b16, llama_160m
from devices import keep_freed_memory
from model import IGNORED, AdapterConfig, Captioner, CausalLM, ViT

B, T, K, S, RANK = 2, 8, 4, 224, 32


class Numbers:
    """As much of a tokenizer as a captioner needs: the prompt is three tokens."""

    def bos_id(self) -> int:
        return 1

    def encode(self, text: str) -> list[int]:
        return [10, 11, 12]


def batch(clips: int = B, frames: int = T, captions: int = K) -> tuple[Tensor, Tensor]:
    """-> frames uint8 (B, T, 3, S, S) and targets (B, K, L): captions of 6 to 14 tokens and EOS; seed 0."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (clips, frames, 3, S, S), generator=rng, dtype=torch.uint8)
    targets = torch.randint(3, 32000, (clips, captions, 15), generator=rng)
    ends = torch.randint(6, 15, (clips, captions, 1), generator=rng)
    place = torch.arange(15)
    targets = torch.where(place < ends, targets, torch.where(place == ends, 2, IGNORED))
    return pixels, targets


def backbones(dtype: str) -> tuple[ViT, CausalLM]:
    return clip_b16(dtype)[1], llama_160m(dtype)[1]


def ours(vit: ViT, lm: CausalLM, method: str = "qadapter", **shape) -> Captioner:
    torch.manual_seed(0)
    captioner = Captioner(vit, lm, Numbers(), AdapterConfig(method, rank=RANK, frames=T, **shape))
    with torch.no_grad():
        for name, parameter in captioner.trained().items():
            if name.endswith("lora_b"):
                parameter.normal_(0, 0.02)
    return captioner


class Peer(nn.Module):
    """The captioner of transformers' and peft's parts, with the captioner's own trained weights; LoRA in `where`."""

    def __init__(self, captioner: Captioner, dtype: str, where: str = "vit"):
        from peft import LoraConfig, get_peft_model

        super().__init__()
        self.vit, self.lm = clip_b16(dtype)[0], llama_160m(dtype)[0]
        self.vit.requires_grad_(False)
        self.lm.requires_grad_(False)
        lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"])
        self.adapted = where
        setattr(self, where, get_peft_model(getattr(self, where), lora))
        self.connector, self.frames = nn.Linear(768, 768), nn.Parameter(captioner.frames.detach().clone())
        self.connector.load_state_dict(captioner.connector.state_dict())
        self.scale, self.before = captioner.prefix_scale, torch.tensor([1, *captioner.prompt_ids])
        with torch.no_grad():
            for name, value in captioner.trained().items() if where == "vit" else []:
                if ".lora_" in name:  # vit.blocks.0.attn.q.lora_a
                    _, _, block, _, layer, half = name.split(".")
                    attention = self.vit.base_model.model.encoder.layers[int(block)].self_attn
                    projection = getattr(attention, f"{layer}_proj")
                    (projection.lora_A if half == "lora_a" else projection.lora_B).default.weight.copy_(value)

    def forward(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """Pixels (R, T, 3, S, S), targets (R, L) -> the mean loss of a token."""
        with torch.set_grad_enabled(self.adapted == "vit"):
            pooled = self.vit(pixel_values=pixels.flatten(0, 1)).pooler_output.unflatten(0, pixels.shape[:2])
        visual = self.connector(pooled.float() + self.frames) * self.scale  # (R, T, C)
        embed = self.lm.get_input_embeddings()
        text = embed(self.before).expand(len(pixels), -1, -1)
        said = embed(targets.clamp(min=0))
        x = torch.cat([text[:, :1], visual.to(text.dtype), text[:, 1:], said], dim=1)
        labels = F.pad(targets, (x.shape[1] - targets.shape[1], 0), value=IGNORED)
        return self.lm(inputs_embeds=x, labels=labels, use_cache=False).loss


def optimizer_of(model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=fused)


def our_step(captioner: Captioner, optimizer, frames: Tensor, targets: Tensor) -> float:
    """As in train.py."""
    total, count = captioner(frames, targets)
    loss = total / count
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(captioner.trained().values(), 1.0)
    optimizer.step()
    return loss.item()


def their_step(peer: Peer, optimizer, pixels: Tensor, targets: Tensor) -> float:
    loss = peer(pixels, targets)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    return loss.item()


def rows_of(captioner: Captioner, frames: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The batch with a row for each caption: the peer's input (R, T, 3, S, S), (R, L)."""
    pixels = captioner.vit.normalise(frames).to(captioner.dtype)
    return pixels.repeat_interleave(targets.shape[1], 0), targets.flatten(0, 1)


def assert_the_same_model() -> None:
    """In fp32, a clip with 2 captions: the loss within a relative 1e-5, gradients within 1e-3 of the largest."""
    captioner = ours(*backbones("fp32"), "lora")
    peer = Peer(captioner, "fp32")
    frames, targets = batch(1, T, 2)
    total, count = captioner(frames, targets)
    (total / count).backward()
    loss = peer(*rows_of(captioner, frames, targets))
    loss.backward()
    assert abs(total.item() / count - loss.item()) < 1e-5 * loss.item(), "the peer computes another loss"
    attention = peer.vit.base_model.model.encoder.layers[5].self_attn
    pairs = [(captioner.connector.weight, peer.connector.weight), (captioner.frames, peer.frames),
             (captioner.vit.blocks[5].attn.q.lora_a, attention.q_proj.lora_A.default.weight)]  # fmt: skip
    for mine, other in pairs:
        far = (mine.grad - other.grad).abs().max() / other.grad.abs().max()
        assert far < 1e-3, f"the peer computes other gradients, by {far:.2g}"


def job(kind: str):
    """-> a function that takes one training step of this kind in bf16."""
    whose, what, *compiled = kind.split()
    if whose == "ours":
        keep_freed_memory()
        captioner = ours(*backbones("bf16"), what)
        if compiled:
            captioner.compile_blocks()
        return partial(our_step, captioner, optimizer_of(captioner, True), *batch())
    shape = ours(*backbones("bf16"), "lora")
    peer = Peer(shape, "bf16", what)
    return partial(their_step, peer, optimizer_of(peer, False), *rows_of(shape, *batch()))


def serve(kind: str) -> None:
    """What a process of its own does: a step whenever a line comes in, and a line with its loss."""
    step = job(kind)
    for _ in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that of this step, without what came before
        print("loss", step(), flush=True)


class Apart:
    """A process that takes steps of one kind, one whenever this is called."""

    def __init__(self, kind: str):
        self.errors = tempfile.TemporaryFile()
        command = [sys.executable, "-c", f"import bench_train; bench_train.serve({kind!r})"]
        self.process = subprocess.Popen(command, cwd=Path(__file__).parent, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.errors)  # fmt: skip

    def __call__(self) -> None:
        print(file=self.process.stdin, flush=True)
        if not self.process.stdout.readline().startswith("loss"):
            self.errors.seek(0)
            sys.exit(f"error: the measured process failed:\n{self.errors.read().decode(errors='replace')[-2000:]}")

    def end(self) -> float:
        """Ends it; -> its largest resident memory since the last step began, in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        self.process.kill()
        self.process.communicate()
        self.errors.close()
        return int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) / 1024


def seconds(function, runs: int = 5) -> float:
    function()
    times = []
    for _ in range(runs):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def matrix_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of the quickest of three square products."""
    rates = []
    for n in (1024, 2048, 4096):
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        rates.append(2 * n**3 / seconds(lambda a=a, b=b: a @ b, 7))
    return max(rates)


def operations(function) -> int:
    """Additions and multiplications in all matrix products of a call, those of attention among them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # other kernels are not looked into
        function()
    return counter.get_total_flops()


def share_rows(repeats: int) -> list[dict]:
    """What of the machine's own rate of bf16 products the frozen ViT, the whole step and one on kept features reach."""
    captioner = ours(*backbones("bf16"))
    frames, targets = batch()
    optimizer = optimizer_of(captioner, True)
    pixels = captioner.vit.normalise(frames).to(captioner.dtype)
    kept = captioner.block_outputs(frames)
    parts = {
        "the frozen ViT": lambda: captioner.adapter.outputs(captioner.vit, pixels),
        "the whole step": lambda: our_step(captioner, optimizer, frames, targets),
        "the step on kept features": lambda: our_step(captioner, optimizer, kept, targets),
    }
    counts = {name: operations(function) for name, function in parts.items()}
    rows, shares = [], {name: [] for name in parts}
    times = {name: [] for name in parts}
    for _ in range(repeats):
        rate = matrix_rate()
        for name, function in parts.items():
            times[name].append(seconds(function, 3))
            shares[name].append(counts[name] / times[name][-1] / rate)
    for name in parts:
        share = sorted(shares[name])
        rows.append({"what": f"{name}, {B} clips, bf16", "wall s": statistics.median(times[name]),
                     "TFLOP": counts[name] / 1e12, "of the machine's rate": statistics.median(share),
                     "from": share[0], "to": share[-1], "rate, TFLOP/s": rate / 1e12})  # fmt: skip
    return rows


KINDS = ("peft vit", "peft lm", "ours qadapter", "ours lora", "ours qadapter compiled")
PAIRS = (("ours qadapter", "peft vit"), ("ours lora", "peft vit"), ("ours qadapter", "peft lm"),
         ("ours qadapter compiled", "ours qadapter"))  # fmt: skip


def compare_training(repeats: int) -> list[dict]:
    """A step of each kind by turns, each in a process of its own; then shares of the machine's matrix rate."""
    assert_the_same_model()
    processes, times = {kind: Apart(kind) for kind in KINDS}, {kind: [] for kind in KINDS}
    for turn in range(repeats + 1):
        for kind, step in processes.items():
            begun = time.perf_counter()
            step()
            if turn:  # the first of each does not count
                times[kind].append(time.perf_counter() - begun)
    peaks = {kind: process.end() for kind, process in processes.items()}
    rows = []
    for mine, other in PAIRS:
        ratios = sorted(b / a for a, b in zip(times[mine], times[other], strict=True))
        took, theirs = statistics.median(times[mine]), statistics.median(times[other])
        rows.append({
            "what": f"a step, {mine} / {other}", "wall s": took, "theirs, wall s": theirs,
            "ratio": statistics.median(ratios), "ratios from": ratios[0], "to": ratios[-1],
            "captions/s": B * K / took, "theirs": B * K / theirs,
            "MB": peaks[mine], "theirs, MB": peaks[other], "of theirs": peaks[mine] / peaks[other],
        })  # fmt: skip
    keep_freed_memory()
    return rows + share_rows(repeats)


def compare_cost(repeats: int) -> list[dict]:
    """The time of a step with one clip when one of T, queries and K grows, and what each of the added ones costs."""
    keep_freed_memory()
    models = backbones("bf16")
    rows, base = [], {"frame": T, "query": 16, "caption": K}
    for name, values in (("frame", (1, 2, 4, 8, 16, 32, 64)), ("query", (1, 4, 16, 64)), ("caption", (1, 4, 16))):
        before = None
        for value in values:
            asked = base | {name: value}
            captioner, given = ours(*models, queries=asked["query"]), batch(1, asked["frame"], asked["caption"])
            step = partial(our_step, captioner, optimizer_of(captioner, True), *given)
            row = {"what": f"a step, {value} {name}", "ms": 1e3 * seconds(step, max(3, repeats))}
            if before:
                row[f"ms a {name} more"] = (row["ms"] - before[1]) / (value - before[0])
            before = value, row["ms"]
            rows.append(row)
    return rows
