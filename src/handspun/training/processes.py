"""Several processes, started by torchrun: each takes a share of every batch's rows, and gradients are summed.

The result is that of one process. Losses are divided by the learned tokens of the whole batch on all ranks, so the
sum of the ranks' gradients is the gradient of the batch, whatever each of them got.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from handspun.data.examples import Example

_BUCKET = 2**24
"""Gradient values that travel together."""


@dataclass(frozen=True)
class Processes:
    """This process's rank among `count`; one process alone needs no group."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """The one that logs and saves."""
        return self.rank == 0

    def deal(self, rows: Sequence[Example]) -> list[Example]:
        """This rank's share of the rows; the same deal is made on every rank."""
        return deal(rows, self.count)[self.rank] if self.count > 1 else list(rows)

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks, the same on all of them."""
        if self.count == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=_device())
        dist.all_reduce(total)
        return float(total)

    def sum_gradients(self, model: PreTrainedModel) -> None:
        """Every rank gets the sum of all ranks' gradients; a rank that had no row adds zeros."""
        if self.count == 1:
            return
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trainable:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in trainable if parameter.grad is not None]):
            together = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(together)
            start = 0
            for gradient in bucket:
                gradient.copy_(together[start : start + gradient.numel()].view_as(gradient))
                start += gradient.numel()

    def share_weights(self, model: PreTrainedModel) -> None:
        """Rank 0's weights on all ranks."""
        if self.count > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, src=0)

    def of_first(self, value: float) -> float:
        """The first rank's number."""
        return self.sum(value if self.is_first else 0.0)


@contextmanager
def processes_of_this_run() -> Iterator[Processes]:
    """The group that torchrun started this process in, or a process alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Processes(int(os.environ["RANK"]), count)
    finally:
        dist.destroy_process_group()


def deal(rows: Sequence[Example], count: int) -> list[list[Example]]:
    """The rows in `count` hands of nearly equal tokens: the longest first, each to the hand with the fewest."""
    hands: list[list[Example]] = [[] for _ in range(count)]
    tokens = [0] * count
    for row in sorted(rows, key=len, reverse=True):
        least = tokens.index(min(tokens))
        hands[least].append(row)
        tokens[least] += len(row)
    return hands


def _buckets(gradients: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    buckets: list[list[torch.Tensor]] = [[]]
    for gradient in gradients:
        if buckets[-1] and sum(g.numel() for g in buckets[-1]) + gradient.numel() > _BUCKET:
            buckets.append([])
        buckets[-1].append(gradient)
    return buckets


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
