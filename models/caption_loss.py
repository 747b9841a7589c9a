"""The loss of captions that follow a shared prefix, and the cross-entropy behind a frozen head.

A clip's prefix, its visual tokens and the prompt, is read once for all of its K captions, which follow it in one row:

    prefix (B, P, C) | caption 1 | caption 2 | ... | caption K      each sees the prefix and itself

Captions follow each other without padding, and each row is padded at its end to the longest row. Padding every caption
to the longest one would make nearly half of all positions padding.

Shapes: B clips, K captions per clip, P positions of the prefix, L tokens of the longest caption with its EOS, s tokens
of a row's captions, S = P + s, n tokens of all captions, C width and V vocabulary of the language model.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.generation import TEMPERATURE
from models.lm import CausalLM, VisualPlaces

LOGITS_PER_CHUNK = 2**25  # of the loss: 128 MB in float32


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies without waiting for a GPU. That takes pinned memory: other memory is copied after all queued work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def cross_entropy(logits: Tensor, ids: Tensor, weights: Tensor | None) -> Tensor:
    """Logits (n, V) and ids (n,) -> their cross-entropy, summed. With weights (n,) the ids are of `sample`: each
    cross-entropy is at its temperature, and times its weight."""
    if weights is None:
        return F.cross_entropy(logits, ids, reduction="sum")
    return weights @ F.cross_entropy(logits / TEMPERATURE, ids, reduction="none")


class FrozenHeadCrossEntropy(torch.autograd.Function):
    """`cross_entropy` behind a frozen head: hidden states (n, C), ids and weights (n,) -> float32 ().

    The logits of all n tokens never exist at once: with 262,144 words they take 1 MB a token. They are computed in
    chunks, and the gradient with respect to the hidden states in the same pass, so that no chunk is computed twice.
    """

    @staticmethod
    def forward(ctx, x: Tensor, ids: Tensor, head: nn.Linear, weights: Tensor | None) -> Tensor:
        size, total, gradients = max(1, LOGITS_PER_CHUNK // head.out_features), x.new_zeros((), dtype=torch.float32), []
        for i in range(0, len(x), size):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                chunk = x[i : i + size].detach().requires_grad_(ctx.needs_input_grad[0])
                chunk_weights = None if weights is None else weights[i : i + size]
                loss = cross_entropy(head(chunk).float(), ids[i : i + size], chunk_weights)
            if ctx.needs_input_grad[0]:
                gradients += torch.autograd.grad(loss, chunk)
            total += loss.detach()
        ctx.gradient = torch.cat(gradients) if gradients else None  # (n, C)
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple:
        return ctx.gradient * grad_output, None, None, None


def pack_captions(labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Puts the tokens that the language model reads, all but each caption's last one, one caption behind the other.

    Ids (B, K, L), padded with -100 -> (B, s) each: the ids, those that come next, with -100 behind a row's last token;
    the number of the caption, and the place in it.
    """
    length = labels.shape[2] - 1
    following = labels[:, :, 1:].flatten(1)  # (B, K(L-1))
    is_padding = following < 0
    tokens = is_padding.sort(dim=1, stable=True).indices[:, : int((~is_padding).sum(1).max())]  # (B, s)
    ids = labels[:, :, :-1].flatten(1).gather(1, tokens).clamp(min=0)
    return ids, following.gather(1, tokens), tokens // length, tokens % length


def packed_attention_inputs(caption: Tensor, place: Tensor, prefix_length: int) -> dict[str, Tensor]:
    """Returns arguments of `CausalLM.hidden` for captions that are packed behind a prefix: see `pack_captions`.

    Each token has the position that it would have in a row of its own, and sees the prefix and its own caption:
    `positions` (B, S), `visible` (B, S, S).
    """
    prefix = torch.arange(prefix_length, device=place.device).expand(len(place), -1)  # (B, P)
    caption = torch.cat([torch.full_like(prefix, -1), caption], dim=1)  # (B, S)
    is_same = (caption[:, None] == caption[:, :, None]) | (caption[:, None] == -1)  # (B, S, S)
    return {"positions": torch.cat([prefix, prefix_length + place], dim=1), "visible": is_same.tril()}


def caption_loss(lm: CausalLM, prefix: Tensor, labels: Tensor, places: VisualPlaces | None = None,
                 weights: Tensor | None = None) -> Tensor:
    """Returns the cross-entropy, summed over all caption tokens and EOS, of K captions of each clip. With weights
    (B, K) the captions are of `sample`: see `cross_entropy`.

    Captions are ids (B, K, L), padded with -100, after the prefix (B, P, C); on the CPU, where their positions are
    found without waiting for a GPU. The language model's head runs on caption positions only; if it is frozen, the
    logits of the whole batch never exist at once. places: of the prefix.
    """
    k, prefix_length = labels.shape[1], prefix.shape[1]
    ids, following, caption, place = pack_captions(labels)
    targets = torch.cat([labels[:, :, 0], following], dim=1).flatten()  # (B(K + s),)
    predicts = (targets >= 0).nonzero().squeeze(1)  # (n,)
    if weights is not None:  # of each token
        number = torch.cat([torch.arange(k).expand(len(labels), -1), caption], dim=1)  # (B, K + s)
        weights = to_device(weights.gather(1, number).flatten()[predicts], prefix.device)  # (n,)
    ids, caption, place, predicts, targets = (to_device(tensor, prefix.device) for tensor in (
        ids, caption, place, predicts, targets[predicts]))
    x = torch.cat([prefix, lm.embed(ids)], dim=1)  # (B, S, C)
    # On a CPU the backward pass of fused attention can take 2.7 times as long in bf16 as that of plain attention.
    plain = x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled()
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        packed = packed_attention_inputs(caption, place, prefix_length) if k > 1 else {}
        x = lm.hidden(x, **packed, places=places)  # (B, S, C)
    # The last position of the prefix predicts the first token of each caption.
    first = x[:, prefix_length - 1 : prefix_length].expand(-1, k, -1)  # (B, K, C)
    x = torch.cat([first, x[:, prefix_length:]], dim=1).flatten(0, 1)[predicts]  # (n, C)
    if lm.head.weight.requires_grad:
        return cross_entropy(lm.head(x).float(), targets, weights)
    return FrozenHeadCrossEntropy.apply(x, targets, lm.head, weights)
