"""Several processes, started by torchrun: each takes a share of every batch's rows, and gradients are summed.

The result is that of one process. Losses are divided by the learned tokens of the whole batch on all ranks, so the
sum of the ranks' gradients is the gradient of the batch, whatever each of them got. Replicated, each rank holds
the whole model; sharded, its share (`sharded.py`).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from handspun.data.examples import Example
from handspun.errors import ConfigError
from handspun.training.forward import Run, directly
from handspun.training.peers import Board, Watch, local_processes
from handspun.training.sharded import shard, whole_state

_BUCKET = 2**24
"""Gradient values that travel together."""

NOTHING = Example([0], [False], "", 0)
"""What a rank computes on that has no rows left: a token, of which nothing is learned."""

_Value = TypeVar("_Value")

Cut = Callable[[Sequence[Example]], Iterable[list[Example]]]
"""A rank's rows to its micro-batches."""


@dataclass(frozen=True)
class Processes:
    """This process's rank among `count`; one process alone needs no group."""

    rank: int = 0
    count: int = 1
    sharded: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    watch: Watch | None = None

    @property
    def is_first(self) -> bool:
        """The one that logs and saves."""
        return self.rank == 0

    def parts(self, rows: Sequence[Example], cut: Cut) -> list[list[Example]]:
        """This rank's micro-batches of the rows; the same deal is made on every rank.

        Sharded, all ranks have the same number of them, since each takes part in putting the layers together:
        those with fewer get empty ones, whose loss and gradient are zeros.
        """
        if self.count == 1:
            return list(cut(rows))
        hands = [list(cut(hand)) for hand in deal(rows, self.count)]
        most = max(map(len, hands)) if self.sharded else 0
        own = hands[self.rank]
        return own + [[NOTHING]] * (most - len(own))

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks, the same on all of them."""
        return self._agreed(value, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        """The largest of the ranks' numbers, the same on all of them."""
        return self._agreed(value, dist.ReduceOp.MAX)

    def run_on(self, model: PreTrainedModel) -> Run:
        """How computations on the model are made; cuts it over the ranks, if it is to be sharded."""
        return shard(model, self.device) if self.sharded else directly

    def state_to_save(self, model: PreTrainedModel) -> dict[str, Tensor] | None:
        """A sharded model's state, put together on the first rank; all ranks must ask for it. None: the model has
        its own."""
        return whole_state(model, keep=self.is_first) if self.sharded else None

    def sum_gradients(self, model: PreTrainedModel) -> None:
        """Every rank gets the sum of all ranks' gradients; a rank that had no row adds zeros. Sharded, that has
        been done on the way."""
        if self.count == 1 or self.sharded:
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

    def losses_explained(self) -> AbstractContextManager[None]:
        """Inside of the block, the death of another rank is a TrainingError that names it."""
        return self.watch.explained() if self.watch else nullcontext()

    def of_first(self, value: float) -> float:
        """The first rank's number."""
        return self.sum(value if self.is_first else 0.0)

    def shared(self, value: _Value) -> _Value:
        """The first rank's value, on all ranks."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gathered(self, value: _Value) -> list[_Value]:
        """Return the values of all ranks in their order; all of them must ask together."""
        if self.count == 1:
            return [value]
        values = [value] * self.count
        dist.all_gather_object(values, value)
        return values

    def _agreed(self, value: float, operation: dist.ReduceOp.RedOpType) -> float:
        if self.count == 1:
            return value
        agreed = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(agreed, operation)
        return float(agreed)


@contextmanager
def processes_of_this_run(device: torch.device, *, sharded: bool = False) -> Iterator[Processes]:
    """The group that torchrun started this process in, or a process alone. One that is there is used, and left.

    Raises ConfigError if a process alone is to be sharded.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        if sharded:
            raise ConfigError(
                "--shard cuts the model over several processes, and this is one alone. Start it as `torchrun "
                "--standalone --nproc-per-node 2 -m handspun train ... --shard`, or leave --shard out."
            )
        yield Processes(device=device)
        return
    if device.type == "cuda":
        device = _gpu_of_this_process()
    is_ours = not dist.is_initialized()
    if is_ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    rank = int(os.environ["RANK"])
    watch = Watch(local_processes(rank), Board(rank))
    try:
        with watch.termination_explained(), watch.explained(), watch.errors_told():
            yield Processes(rank, count, sharded, device, watch)
    finally:
        if is_ours:
            dist.destroy_process_group()
        watch.end()


def _gpu_of_this_process() -> torch.device:
    """Raises ConfigError where there are more processes than GPUs."""
    place, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if place >= there:
        raise ConfigError(
            f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes here, and there are {there} GPUs: "
            f"each needs one of its own. Start it with --nproc-per-node {there}, or add --device cpu."
        )
    device = torch.device("cuda", place)
    torch.cuda.set_device(device)
    return device


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
