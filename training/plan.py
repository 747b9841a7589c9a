"""What a run will take, before it starts: steps, passes over the captions, the ViT's work, disk space, memory.

The memory is not computed with a formula for each layer. A step of the real model runs on PyTorch's meta device, whose
tensors have a shape and no numbers. That takes a few seconds. Every new tensor counts until it is freed. Not counted:
Python and PyTorch themselves (0.4 GB; on a GPU, its context), the loading of the weights, and processes that decode.
Weights are not read: only the config.json of the models.

Shapes: B clips, T frames, S side in pixels, K captions per clip, L tokens of a caption with its EOS, J adapted blocks,
P tokens per frame, D ViT width.
"""

import math
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from common.config import Config
from common.errors import InputError
from common.files import format_bytes
from models.baselines import set_frames
from training.cider import SAMPLES
from training.inputs import plan_caches
from video_data.datasets import VideoDataset

META = torch.device("meta")
BYTES_PER_TRAINED = 16  # float32: the weight, its gradient, AdamW's two moments
# Free memory that malloc keeps between tensors, as a share of the activations; measured with steps of 1 to 6 GB.
FRAGMENTATION_ON_CPU = 0.15
CAPTION_TOKENS = 15  # of a usual English caption with its EOS

# ----------------------------------------------------------------------------------------- steps


def count_steps(config: Config, clips: int) -> int:
    """The steps of a run on so many training clips. An epoch drops its incomplete batch.

    Raises InputError if the clips do not fill a batch, or are too few for CIDEr.
    """
    if config.method == "none":
        return 0
    if config.phase_epochs[2] and clips < 2:  # every idf would be zero
        raise InputError("--epochs: CIDEr: expected two training clips or more, found one")
    if clips < config.batch_size:
        raise InputError(f"--batch-size {config.batch_size}: the dataset has only {clips} training clips")
    return sum(config.phase_epochs) * (clips // config.batch_size)


def format_steps(config: Config, steps: int, captions: int) -> str:
    """The line about its steps that a run with so many training captions prints."""
    epochs = dict(zip(("words", "captions", "CIDEr"), config.phase_epochs, strict=True))
    clips = steps // sum(epochs.values()) * config.batch_size  # of an epoch
    passes = epochs["captions"] * clips * config.captions_per_clip / captions
    phases = ", ".join(f"{count} of {what}" for what, count in epochs.items() if count)
    return (f"training: {steps:,} steps of {config.batch_size} clips; epochs: {phases}; {passes:.2f} passes over "
            f"captions ({config.captions_per_clip} per clip and epoch)")


# -------------------------------------------------------------------------------- the meta device


class PretendDevice(TorchFunctionMode):
    """Makes operations on meta tensors choose as they would on a CPU or on a GPU.

    For a CPU, tensors report that device, since a model chooses by it, and what is created on it or moved to it goes to
    the meta device. PyTorch never takes a fused kernel of attention there, so it would keep all attention weights; here
    it keeps them only where fused kernels are disabled (`sdpa_kernel`), as elsewhere.
    """

    def __init__(self, is_cpu: bool):
        super().__init__()
        self.is_cpu = is_cpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.is_cpu:
            if func == Tensor.device.__get__:
                return torch.device("cpu")
            args, kwargs = tree_map_only(torch.device, lambda device: META, (args, kwargs))
        if func is not F.scaled_dot_product_attention or not torch.backends.cuda.flash_sdp_enabled():
            return func(*args, **kwargs)
        q, k, v, *mask = args
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, kwargs.get("is_causal", False), attn_mask=mask[0] if mask else None,
            scale=kwargs.get("scale"))[0]


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, from then until they are freed.

    Tensors that share memory count once. `excluded` tensors do not count, nor do views of them.
    """

    def __init__(self, excluded: list[Tensor]):
        super().__init__()
        self.bytes = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in excluded}  # addresses of storages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes()).atexit = False

    def remove(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.bytes -= size


# ---------------------------------------------------------------------------------------- memory


def step_memory(captioner, config: Config, device: torch.device, caption_tokens: int,
                processes: int = 1) -> dict[str, int]:
    """The bytes of a step at its largest moment, by what they hold, for captions of L = `caption_tokens`.

    The Captioner is on the meta device. The step is that of one of several processes, which share the batch, on
    `device`. On a GPU, attention is taken to be fused, and only the GPU's memory is counted.
    """
    batch_size = math.ceil(config.batch_size / processes)
    clips = min(batch_size, config.micro_batch_size or batch_size)
    shape, is_cpu = captioner.vit.preprocessing.shape, device.type == "cpu"
    frames = torch.empty(clips, config.frames, 3, *shape, dtype=torch.uint8, device=META)
    if config.cache_features:
        frames = torch.empty(clips, *captioner.block_outputs_shape(config.frames), dtype=torch.bfloat16, device=META)
    captions = max(config.captions_per_clip, SAMPLES if config.phase_epochs[2] else 0)
    labels = torch.zeros(clips, captions, caption_tokens, dtype=torch.long)
    trained = captioner.trained().values()
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    gradients = [parameter.grad for parameter in trained]
    counter = MemoryCounter([frames, *captioner.parameters(), *captioner.buffers(), *gradients])
    with counter, PretendDevice(is_cpu):
        captioner(frames, labels).backward()
    return {
        "frozen weights": sum(p.nbytes for p in captioner.parameters() if not p.requires_grad),  # a tied head: once
        "trained weights, gradients, moments": BYTES_PER_TRAINED * sum(parameter.numel() for parameter in trained),
        # On a CPU the batch that trains, the next one and the copy from which that is made are in memory.
        "batches": (3 * batch_size if is_cpu else clips) * frames[0].nbytes,
        "activations": counter.peak,  # outputs, what is kept for the backward pass, temporary tensors
        "fragmentation": round(FRAGMENTATION_ON_CPU * counter.peak) if is_cpu else 0,
    }


def format_vit(config: Config, captioner, clips: int) -> str:
    """The line about the ViT, which takes most of the time of training, on so many training clips. Hours depend on the
    device, of which nothing is measured here."""
    shape, step = captioner.vit.preprocessing.shape, captioner.vit.frames_per_step  # frames that are one image
    set_frames(captioner.vit, 1)
    with FlopCounterMode(display=False) as counter:  # a multiplication and an addition are 2 FLOP
        captioner.vit.run_blocks(torch.empty(1, 3 * step, *shape, dtype=captioner.dtype, device=META))
    flop = counter.get_total_flops() / step
    line = f"ViT: {flop / 1e9:,.3g} GFLOP per frame, {clips * config.frames * flop / 1e15:.3g} PFLOP per epoch"
    if not config.can_cache_vit:
        return f"{line} without its gradients"
    features = 2 * math.prod(captioner.block_outputs_shape(config.frames))  # bf16
    return f"{line}, or once with --cache-features, which stores {format_bytes(features)} per clip"


def format_plan(config: Config, dataset: VideoDataset, captioner, device: torch.device, max_caption_tokens: int,
                processes: int = 1) -> str:
    """The ViT's work, caches and memory of a run as aligned lines, of a Captioner on the meta device and of one of so
    many processes.

    max_caption_tokens: the longest L that training allows, whose memory is given too.
    """
    caches = {f"{split} {what}": len(cache) * cache.clip_bytes
              for what, group in plan_caches(config, dataset, captioner, {}).items() for split, cache in group.items()}
    memory = step_memory(captioner, config, device, CAPTION_TOKENS, processes)
    longest = step_memory(captioner, config, device, max_caption_tokens, processes)
    tables = {
        "caches on the disk": caches | {"sum": sum(caches.values())},
        f"memory of a step on {device.type}, per process, at its largest moment": memory | {
            f"sum, with {CAPTION_TOKENS} tokens per caption": sum(memory.values()),
            f"sum, with {max_caption_tokens} tokens, the longest": sum(longest.values())},
    }
    lines = [format_vit(config, captioner, len(dataset.splits["train"]))]
    for title, rows in tables.items():
        lines += [f"{title}:", *(f"  {name:40}{format_bytes(size):>10}" for name, size in rows.items() if size)]
    return "\n".join(lines)
