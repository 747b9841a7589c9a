"""The memory of a training step, before it runs.

It is not computed with a formula for each layer. A step of the real model runs on PyTorch's meta device, whose tensors
have a shape and no numbers. That takes a few seconds. Every new tensor counts until it is freed. Not counted: Python
and PyTorch themselves (0.4 GB; on a GPU, its context), the loading of the weights, processes that decode, and what
torch.compile changes. Weights are not read: `load_meta_models` needs only the config.json of the models.

Letters: B clips, T frames, S side in pixels, K captions per clip, L tokens of a caption with its EOS, A adapted blocks,
P tokens per frame, D ViT width.
"""

import argparse
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from training.frozen_models import META

BYTES_PER_TRAINED = 16  # float32: the weight, its gradient, AdamW's two moments
# Free memory that malloc keeps between tensors, as a share of the activations; measured with steps of 1 to 6 GB.
FRAGMENTATION_ON_CPU = 0.15


def clip_bytes(captioner, frames: int, features: bool) -> int:
    """Bytes of a clip's frames, uint8 (T, 3, S, S), or of its features, bf16 (T, A, P, D)."""
    if not features:
        return frames * 3 * captioner.vit.config.image_size**2
    return 2 * math.prod(captioner.block_outputs_shape(frames))


# -------------------------------------------------------------------------------- the meta device


class PretendCPU(TorchFunctionMode):
    """Tensors on the meta device report that they are on the CPU: a model that chooses by the device chooses as there.

    A tensor that is created on, or moved to, the CPU goes to the meta device.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == Tensor.device.__get__:
            return torch.device("cpu")
        args, kwargs = tree_map_only(torch.device, lambda device: META, (args, kwargs or {}))
        return func(*args, **kwargs)


class FusedAttention(TorchFunctionMode):
    """On the meta device PyTorch never takes a fused kernel, so it keeps all attention weights. Here it keeps them only
    where fused kernels are disabled (`sdpa_kernel`), as on other devices."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not torch.backends.cuda.flash_sdp_enabled():
            return func(*args, **kwargs)
        q, k, v, *mask = args
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, kwargs.get("is_causal", False), attn_mask=mask[0] if mask else None,
            scale=kwargs.get("scale"),
        )[0]  # fmt: skip


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

    def next_phase(self) -> int:
        """-> the peak since the last call."""
        peak, self.peak = self.peak, self.bytes
        return peak


# ---------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step. It has two large moments: one in the encoder (ViT and adapter), the other in the
    language model, the loss or the backward pass."""

    vit: int  # frozen weights
    lm: int  # frozen weights; a tied head counts once
    projector: int  # frozen weights, of an MLLM
    trained: int  # weights, gradients and moments
    inputs: int  # batches of frames or features
    block_outputs: int  # of the frozen ViT, until they have been read
    encoder_kept: int  # activations for the backward pass
    lm_kept: int  # the same of the language model
    encoder_peak: int  # activations at the largest moment of the encoder: outputs, kept ones and temporary ones
    lm_peak: int  # the same after the encoder, with what the encoder has kept
    fragmentation: float  # free memory between the activations, as a share of them

    def total(self, activations: int) -> int:
        """All memory in use at a moment with so many bytes of activations."""
        weights = self.vit + self.lm + self.projector + self.trained
        return weights + self.inputs + activations + round(self.fragmentation * activations)

    @property
    def peak(self) -> int:
        return self.total(max(self.encoder_peak, self.lm_peak))


def frozen_bytes(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters() if not p.requires_grad)


@contextmanager
def call_before_and_after(captioner, callback: Callable[[], None]) -> Iterator[None]:
    """Runs `callback` before and after the hidden layers of the language model."""
    hidden = captioner.lm_hidden

    def lm_hidden(*args, **kwargs) -> Tensor:
        callback()
        out = hidden(*args, **kwargs)
        callback()
        return out

    captioner.lm_hidden = lm_hidden
    try:
        yield
    finally:
        captioner.lm_hidden = hidden


def step_memory(captioner, args: argparse.Namespace, device: torch.device, caption_tokens: int,
                processes: int = 1) -> StepMemory:  # fmt: skip
    """The memory of a step on `device` of a Captioner on the meta device, where all captions have L = `caption_tokens`.

    It is that of one of several processes, which share the batch.

    args: the flags batch_size, micro_batch_size, captions_per_clip, frames and cache_features. On a GPU, attention is
    taken to be fused, and only the GPU's memory is counted.
    """
    batch_size = math.ceil(args.batch_size / processes)
    clips = min(batch_size, args.micro_batch_size or batch_size)
    size = captioner.vit.config.image_size
    shape, dtype = (args.frames, 3, size, size), torch.uint8
    if args.cache_features:
        shape, dtype = captioner.block_outputs_shape(args.frames), torch.bfloat16
    frames = torch.empty(clips, *shape, dtype=dtype, device=META)
    labels = torch.zeros(clips, args.captions_per_clip, caption_tokens, dtype=torch.long)
    trained = captioner.trained().values()
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    gradients = [parameter.grad for parameter in trained]
    counter = MemoryCounter([frames, *captioner.parameters(), *captioner.buffers(), *gradients])
    is_cpu, phases = device.type == "cpu", []  # of each: its peak, and the bytes at its end

    def end_phase() -> None:
        phases.append((counter.next_phase(), counter.bytes))

    with FusedAttention(), counter, PretendCPU() if is_cpu else nullcontext():
        with call_before_and_after(captioner, end_phase):
            loss = captioner(frames, labels)
        loss.backward()
        end_phase()
    (encoder_peak, encoder_kept), (lm_peak, kept), (rest_peak, _) = phases
    # On a CPU the batch that trains, the next one and the copy from which that is made are in memory.
    inputs = 3 * batch_size if is_cpu else clips
    block_outputs = 0
    if captioner.config.vit_unchanged and not args.cache_features:
        block_outputs = clips * clip_bytes(captioner, args.frames, features=True) // 2 * captioner.dtype.itemsize
    return StepMemory(
        vit=frozen_bytes(captioner.vit), lm=frozen_bytes(captioner.lm),
        projector=0 if captioner.mllm is None else frozen_bytes(captioner.mllm.projector),
        trained=BYTES_PER_TRAINED * sum(parameter.numel() for parameter in trained),
        inputs=inputs * clip_bytes(captioner, args.frames, args.cache_features),
        block_outputs=block_outputs, encoder_kept=encoder_kept, lm_kept=kept - encoder_kept,
        encoder_peak=encoder_peak, lm_peak=max(lm_peak, rest_peak),
        fragmentation=FRAGMENTATION_ON_CPU if is_cpu else 0.0,
    )  # fmt: skip
