"""Data parallel: processes with clips of their own that train as one. `torchrun` starts them [1]:

    torchrun --nproc-per-node 2 train.py ...

Each process, a rank, computes the gradient of its clips' share of the loss; the shares of all ranks are added up, those
of the trained parameters only, and every rank takes the same step. So the weights, which begin equal, stay equal
without being sent. Rank 0 writes and prints. A process alone is a single rank, for which nothing here does anything.

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

from weights import InputError


@dataclass(frozen=True)
class Ranks:
    """This process among `count`: its rank, and the `local` one among those of its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Rank 0 runs the block, then a process of each other machine, then the rest: they find on the disk, be it one
        for all machines or not, what was made before."""
        turn = 0 if self.rank == 0 else 1 if self.local == 0 else 2
        for _ in range(turn):
            self.wait()
        yield
        for _ in range(turn, 2):
            self.wait()

    def wait(self) -> None:
        """Returns when all ranks have come here."""
        self.add(0)

    def share(self, items: Sequence) -> Sequence:
        """Every count-th of the items; `gather` puts what was made of them in order again."""
        return items[self.rank :: self.count]

    def all(self, mine: list) -> list[list]:
        """The lists of all ranks."""
        if self.count == 1:
            return [mine]
        lists: list = [None] * self.count
        with _together():
            dist.all_gather_object(lists, mine)
        return lists

    def gather(self, share: list) -> list:
        """The shares of all ranks as one list, in the order in which `share` dealt."""
        parts = self.all(share)
        whole: list = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            whole[rank :: self.count] = part
        return whole

    def add(self, number: float) -> float:
        """The sum of this number over the ranks. Returns only when all have called it."""
        if self.count == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64)
        with _together():
            dist.all_reduce(total)
        return total.item()

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Each gradient becomes the sum of the ranks' own, in one exchange."""
        if self.count > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            with _together():
                dist.all_reduce(flat)
            for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Every rank's tensors become those of rank 0."""
        if self.count > 1:
            for tensor in tensors:
                with _together():
                    dist.broadcast(tensor.detach(), 0)

    def leave(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()


_store: dist.Store | None = None  # which all ranks see, and torchrun keeps when one has died


@contextmanager
def _together() -> Iterator[None]:
    """An exchange between ranks; InputError if one of them is gone."""
    try:
        yield
    except RuntimeError as error:  # what the backends raise
        raise InputError("another process of this run has ended, or cannot be reached") from error


def may_speak() -> bool:
    """Whether this process is to tell of an error: of all that run together, only the first that asks."""
    if _store is None:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    return _store.add("spoken", 1) == 1


def join(device: str) -> Ranks:
    """This process's place, of which torchrun's environment tells; joins the others. `device` is the flag. Raises
    InputError if torchrun started more processes than there are GPUs for."""
    global _store
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        return Ranks()
    ranks = Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if device not in ("auto", "cuda", "cpu"):
        raise InputError(f"--device {device}: several processes are for cpu, or for cuda, a GPU each")
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if gpus:
        if int(os.environ["LOCAL_WORLD_SIZE"]) > gpus:
            raise InputError(f"torchrun: expected at most a process for each of this machine's {gpus} GPUs")
        torch.cuda.set_device(ranks.local)
    if ranks.rank:
        sys.stdout = open(os.devnull, "w")
    with _together():
        _store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
        # A rank may wait for hours while another decodes a dataset; torchrun ends all as soon as one has died.
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(days=2), store=_store,
                                rank=ranks.rank, world_size=ranks.count)  # fmt: skip
    return ranks
