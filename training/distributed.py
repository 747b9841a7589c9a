"""Data parallel training: several processes that train as one. `torchrun` starts them [1]:

    torchrun --nproc-per-node 2 train.py ...

Each process, a rank, computes the gradient of its clips' share of the loss. The gradients of the trained parameters are
summed over all ranks, and every rank takes the same step; so the weights, equal at the start, stay equal without being
sent. Rank 0 writes and prints. A single process is a group of one rank, for which nothing here does anything.

[1] https://docs.pytorch.org/docs/stable/elastic/run.html
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import InputError


@contextmanager
def _collective() -> Iterator[None]:
    """A collective operation. Raises InputError if another rank is gone."""
    try:
        yield
    except RuntimeError as error:  # what the backends raise
        raise InputError("another process of this run has ended, or cannot be reached") from error


@dataclass(frozen=True)
class ProcessGroup:
    """This process among `world_size`: its rank, and its rank among the processes of its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @contextmanager
    def first_of_machine(self) -> Iterator[None]:
        """One process of each machine runs the block, then the rest: what the first writes to the disk is there."""
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        self.all_reduce(0)

    def shard(self, items: Sequence) -> Sequence:
        """This rank's items: every world_size-th."""
        return items[self.rank :: self.world_size]

    def gather(self, local: dict) -> dict:
        """The dicts of all ranks in one."""
        if self.world_size == 1:
            return local
        parts: list = [None] * self.world_size
        with _collective():
            dist.all_gather_object(parts, local)
        return {key: value for part in parts for key, value in part.items()}

    def all_reduce(self, number: float) -> float:
        """The sum of this number over the ranks. Returns when all have called it."""
        if self.world_size == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64)
        with _collective():
            dist.all_reduce(total)
        return total.item()

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces each gradient by its sum over the ranks, in one exchange."""
        if self.world_size > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            with _collective():
                dist.all_reduce(flat)
            for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Replaces the tensors of every rank by those of rank 0."""
        if self.world_size > 1:
            for tensor in tensors:
                with _collective():
                    dist.broadcast(tensor.detach(), 0)

    def destroy(self) -> int:
        """Leaves the group. Returns 0, the exit code."""
        if self.world_size > 1:
            dist.destroy_process_group()
        return 0


def init_process_group(device: str, batch_size: int) -> ProcessGroup:
    """Joins the other processes that torchrun started, as its environment says. The arguments are the flags.

    Raises InputError if there are more processes than GPUs, or than clips in a batch.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        return ProcessGroup()
    group = ProcessGroup(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        raise InputError(f"--device {device}: several processes need cpu, or cuda with one GPU each")
    if batch_size < group.world_size:
        raise InputError(f"--batch-size {batch_size}: expected at least {group.world_size}, one clip per process")
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if gpus:
        if int(os.environ["LOCAL_WORLD_SIZE"]) > gpus:
            raise InputError(f"torchrun: expected at most one process for each of this machine's {gpus} GPUs")
        torch.cuda.set_device(group.local_rank)
    if group.rank:
        sys.stdout = open(os.devnull, "w")
    with _collective():
        # A rank may wait for hours while another decodes a dataset; torchrun ends all ranks as soon as one has died.
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(days=2))
    return group
