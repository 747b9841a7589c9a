"""The loss of captions that follow a shared prefix, and the cross-entropy behind a frozen head.

A clip's prefix, its visual tokens and the prompt, is read once for all of its K captions, which follow it in one row:

    prefix (B, P, C) | caption 1 | caption 2 | ... | caption K      each sees the prefix and itself

Shapes: B clips, K captions per clip, P positions of the prefix, L tokens of the longest caption with its EOS, s
positions of a row, n tokens of all captions, C width of the language model.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.lm import CausalLM

LOGITS_PER_CHUNK = 2**25  # of the loss: 128 MB in float32


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies without waiting for a GPU. That takes pinned memory: other memory is copied after all queued work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class FrozenHeadCrossEntropy(torch.autograd.Function):
    """Cross-entropy behind a frozen head, summed: hidden states (n, C) and ids (n,) -> float32 ().

    The logits of all n tokens never exist at once: with 262,144 words they take 1 MB a token. They are computed in
    chunks, and the gradient with respect to the hidden states in the same pass, so that no chunk is computed twice.
    """

    @staticmethod
    def forward(ctx, x: Tensor, ids: Tensor, head: nn.Module, vocab: int) -> Tensor:
        chunk_size, total, gradients = max(1, LOGITS_PER_CHUNK // vocab), x.new_zeros((), dtype=torch.float32), []
        for chunk, chunk_ids in zip(x.split(chunk_size), ids.split(chunk_size), strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                chunk = chunk.detach().requires_grad_(ctx.needs_input_grad[0])
                loss = F.cross_entropy(head(chunk).float(), chunk_ids, reduction="sum")
            if ctx.needs_input_grad[0]:
                gradients += torch.autograd.grad(loss, chunk)
            total += loss.detach()
        ctx.gradient = torch.cat(gradients) if gradients else None  # (n, C)
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple:
        return ctx.gradient * grad_output, None, None, None


def packed_attention_inputs(prefix_length: int, k: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """Returns arguments of `CausalLM.hidden` for k texts of `length` tokens, packed in one row after a shared prefix.

    Each token has the position that it would have in a row of its own, and sees the prefix and its own text:
    `positions` (s,), `visible` (1, s, s). A single text needs neither.
    """
    if k == 1:
        return {}
    prefix_ids = torch.full((prefix_length,), -1, device=device)
    segment_ids = torch.cat([prefix_ids, torch.arange(k * length, device=device) // length])  # (s,)
    position_ids = torch.arange(prefix_length + length, device=device)
    positions = torch.cat([position_ids[:prefix_length], position_ids[prefix_length:].repeat(k)])  # (s,)
    same_segment = (segment_ids == segment_ids[:, None]) | (segment_ids == -1)  # (s, s)
    return {"positions": positions, "visible": (same_segment & (positions <= positions[:, None]))[None]}


def caption_loss(lm: CausalLM, prefix: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy, summed over all caption tokens and EOS, of K captions of each clip.

    They are ids (B, K, L), padded with -100, after the prefix (B, P, C); on the CPU, where their positions are found
    without waiting for a GPU. The language model's head runs on caption positions only; if it is frozen, the logits of
    the whole batch never exist at once.
    """
    (k, length), prefix_length = labels.shape[1:], prefix.shape[1]
    positions = (labels >= 0).flatten().nonzero().squeeze(1)  # (n,)
    positions, ids = to_device(positions, prefix.device), to_device(labels, prefix.device)
    captions = lm.embed(ids[:, :, :-1].clamp(min=0))  # (B, K, L-1, C)
    x = torch.cat([prefix, captions.flatten(1, 2)], dim=1)  # (B, P + K(L-1), C)
    # On a CPU the backward pass of fused attention can take 2.7 times as long in bf16 as that of plain attention.
    plain = x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled()
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        x = lm.hidden(x, **packed_attention_inputs(prefix_length, k, length - 1, x.device))
    # The last position of the prefix predicts the first token of each caption.
    first = x[:, None, prefix_length - 1 : prefix_length].expand(-1, k, -1, -1)  # (B, K, 1, C)
    x = torch.cat([first, x[:, prefix_length:].unflatten(1, (k, length - 1))], dim=2)  # (B, K, L, C)
    x, ids = x.flatten(0, 2)[positions], ids.flatten()[positions]  # (n, C), (n,)
    if lm.head.weight.requires_grad:
        return F.cross_entropy(lm.head(x).float(), ids, reduction="sum")
    return FrozenHeadCrossEntropy.apply(x, ids, lm.head, lm.head.out_features)
