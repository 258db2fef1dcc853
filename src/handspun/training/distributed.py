"""Several processes (ranks) that train one model: sharing rows, collectives, FSDP2, failed ranks."""

import itertools
import json
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from handspun.data.examples import Example
from handspun.display import print_error_line
from handspun.errors import ConfigError, HandspunError, StoppedError, TrainingError
from handspun.training.batching import Batching
from handspun.training.objectives import CallInForward, call_directly

_Result = TypeVar("_Result")


class _Root(nn.Module):
    """A module whose forward is any computation on the model in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    # FSDP2's hooks run around a module's forward, but the packed runner calls body and head separately. So both
    # run inside of this one, and the runners do not know about it.
    def forward(self, compute: Callable[..., _Result], *arguments: object) -> _Result:
        return compute(*arguments)


def shard(model: PreTrainedModel, device: torch.device) -> nn.Module:
    """Shard the model over all ranks, in place, and move it to the device. Return the root module.

    Each decoder layer is a unit, and the rest of the model another. `root(compute, *arguments)` runs
    `compute(*arguments)` with whole weights.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    root = _Root(model)
    units = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    for unit in [*units, root]:
        fully_shard(unit, mesh=mesh)
        assert isinstance(unit, FSDPModule)
        # Summed, not averaged: each rank has divided by the target tokens of the whole batch.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    return root


def whole_state(model: PreTrainedModel, *, keep: bool) -> dict[str, Tensor]:
    """Return the whole state of a sharded model on the CPU; {} without `keep`. All ranks must call it together."""
    state: dict[str, Tensor] = {}
    whole: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if hasattr(model, "peft_config") and not tensor.requires_grad:
            continue  # an adapter is saved without its base
        # Tied weights are gathered once, and stay one tensor.
        if id(tensor) not in whole:
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            whole[id(tensor)] = full.detach().cpu() if keep else torch.empty(0)
        state[name] = whole[id(tensor)]
    return state if keep else {}


_GRACE_SECONDS = 20.0
"""Seconds that a rank has to notice another's death and exit cleanly; it may be saving."""

_CONNECTION_LOST = (
    "the connection to another rank was lost, so this run stops. See torchrun's report for the failed rank and "
    "its exit status. Saved checkpoints are intact."
)


_RUNS = itertools.count()
"""Numbers the runs of this process; all ranks count the same."""


class Board:
    """The first error of any rank, kept in the process group's store."""

    def __init__(self, rank: int) -> None:
        self._store = dist.distributed_c10d._get_default_store()
        self._rank, self._key = rank, f"handspun/{next(_RUNS)}/error"

    def write(self, message: str) -> None:
        """Store an error for the other ranks, unless there is one already."""
        with suppress(RuntimeError):  # the store's process has ended
            if self._store.add(f"{self._key}s", 1) == 1:
                self._store.set(self._key, json.dumps([self._rank, message]))

    def read(self) -> str | None:
        """Return a message about another rank's error, or None."""
        with suppress(RuntimeError):
            if self._store.check([self._key]):
                rank, message = json.loads(self._store.get(self._key))
                if rank != self._rank:
                    return f"rank {rank} failed, so this run stops: {message}"
        return None


class Watch:
    """A thread that waits for other processes to exit. processes: rank to process id."""

    def __init__(self, processes: dict[int, int], board: Board | None = None) -> None:
        self._board = board
        self._files = {}
        for rank, process in processes.items():
            with suppress(AttributeError, OSError):  # not Linux; an old kernel; already gone
                self._files[os.pidfd_open(process)] = (rank, process)
        self._lost: str | None = None
        self._died, self._over = threading.Event(), threading.Event()
        self._wakes, self._wake = os.pipe()
        # Without it, nothing says which rank died: gloo fails with a trace that names none, and NCCL hangs.
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn a failure within the block into a TrainingError, if a dead process caused it. Names the process."""
        try:
            yield
        except RuntimeError as error:
            lost = self.lost(within=1.0) or (_CONNECTION_LOST if _is_connection_error(error) else None)
            if lost is None:
                raise
            with suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's would cut the error message short
            raise TrainingError(lost) from error

    @contextmanager
    def errors_told(self) -> Iterator[None]:
        """Report an error within the block to the other ranks."""
        try:
            yield
        except StoppedError:  # all ranks stop
            raise
        except Exception as error:
            if self._board is not None and not _is_connection_error(error):
                name = "" if isinstance(error, HandspunError) else f"{type(error).__name__}: "
                self._board.write(f"{name}{error}")
            raise

    @contextmanager
    def termination_explained(self) -> Iterator[None]:
        """Turn a SIGTERM within the block into a TrainingError, if a dead process caused it. Names the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGTERM)

        def explain(number: int, _frame: FrameType | None) -> None:
            lost = self.lost(within=0.3)
            signal.signal(number, signal.SIG_IGN if lost else before)
            if lost:
                raise TrainingError(lost)
            signal.raise_signal(number)

        # torchrun stops the other ranks with SIGTERM. The loop replaces this handler with its own.
        signal.signal(signal.SIGTERM, explain)
        try:
            yield
        finally:
            if signal.getsignal(signal.SIGTERM) is explain:
                signal.signal(signal.SIGTERM, before)

    def lost(self, *, within: float) -> str | None:
        """Return a message about the first rank that failed or died within this many seconds, or None."""
        told = self._board.read() if self._board else None
        if told is None:
            self._died.wait(within)
            told = self._board.read() if self._board else None
        return told or self._lost

    def end(self) -> None:
        """Stop watching: processes that exit from now on are not failures."""
        self._over.set()
        os.write(self._wake, b".")
        self._thread.join()
        for file in (*self._files, self._wakes, self._wake):
            os.close(file)

    def _wait(self) -> None:
        poll = select.poll()
        for file in (*self._files, self._wakes):
            poll.register(file, select.POLLIN)
        while not self._over.is_set():
            for file, _ in poll.poll():
                poll.unregister(file)
                if file in self._files:
                    self._note(*self._files[file])

    def _note(self, rank: int, process: int) -> None:
        code = exit_code(process)
        if code == 0 or self._died.is_set():
            return
        self._lost = describe(rank, process, code)
        self._died.set()
        # The main thread may hang in a collective with the dead rank, which no exception can end.
        if code is not None and not self._over.wait(_GRACE_SECONDS):
            print_error_line(f"error on rank {os.environ['RANK']}: {self._lost}")
            os._exit(TrainingError.exit_code)


def _is_connection_error(error: Exception) -> bool:
    """Return whether another rank's end has caused the error."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def exit_code(process: int) -> int | None:
    """Return a dead process's exit code, or minus its signal number; None if its parent has already reaped it."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return os.waitstatus_to_exitcode(int(fields[49]))  # the 52nd, proc(5); the first two are before the ")"


def describe(rank: int, process: int, code: int | None) -> str:
    """Return what happened to a rank, and what to do. code: as `exit_code` returns it."""
    if code is None:
        how, hint = "exited", "See torchrun's report for its exit status."
    elif code > 0:
        how, hint = f"exited with code {code}", "See its own error above or below."
    else:
        how = f"was killed by {signal.Signals(-code).name}"
        hint = "Run the command again to resume."
        if -code == signal.SIGKILL:
            hint = (
                "The kernel kills processes when memory runs out (check `dmesg`). If it did, lower --max-tokens, "
                "add --activation-checkpointing or --shard, or start fewer processes per machine."
            )
    return f"rank {rank} (process {process}) {how}, so this run stops. Saved checkpoints are intact. {hint}"


def local_processes(rank: int) -> dict[int, int]:
    """Return rank to process id of the other ranks on this machine. All ranks must call it together."""
    own = (os.environ.get("GROUP_RANK"), os.getpid())
    found = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    here = {other: process for other, (machine, process) in enumerate(found) if machine and machine == own[0]}
    return {other: process for other, process in here.items() if other != rank}


_BUCKET_VALUES = 2**24
"""Most gradient values per all-reduce."""

EMPTY_EXAMPLE = Example([0], [False], "", 0)
"""Dummy example for ranks without rows left; contributes no loss."""

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Distributed:
    """This process's rank among `count` ranks, and the collectives. With one process, there is no group."""

    rank: int = 0
    count: int = 1
    sharded: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    watch: Watch | None = None

    @property
    def is_first(self) -> bool:
        """True for rank 0, which logs and saves."""
        return self.rank == 0

    def local_micro_batches(
        self, rows: Sequence[Example], batching: Batching, max_tokens: int
    ) -> list[list[Example]]:
        """Return this rank's micro-batches of the rows. Sharded, all ranks get the same number."""
        if self.count == 1:
            return list(batching.split(rows, max_tokens))
        shares = [list(batching.split(share, max_tokens)) for share in partition_by_tokens(rows, self.count)]
        # Sharded, each rank takes part in gathering every layer, for every micro-batch of any rank. Those with
        # fewer compute a dummy token, whose loss and gradient are zero.
        most = max(map(len, shares)) if self.sharded else 0
        own = shares[self.rank]
        return own + [[EMPTY_EXAMPLE]] * (most - len(own))

    def sum(self, value: float) -> float:
        """Return the sum of a number over all ranks."""
        return self._agreed(value, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        """Return the largest of the ranks' numbers."""
        return self._agreed(value, dist.ReduceOp.MAX)

    def run_on(self, model: PreTrainedModel) -> CallInForward:
        """Return what calls computations on the model. Shards the model first if the run is sharded."""
        return shard(model, self.device) if self.sharded else call_directly

    def state_to_save(self, model: PreTrainedModel) -> dict[str, Tensor] | None:
        """Return the whole state of a sharded model on rank 0; None if the model is not sharded.

        All ranks must call it together.
        """
        return whole_state(model, keep=self.is_first) if self.sharded else None

    def sum_gradients(self, model: PreTrainedModel) -> None:
        """All-reduce the gradients."""
        if self.count == 1 or self.sharded:  # FSDP2 reduces them during backward
            return
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # A rank without rows has no gradients, and must add zeros: the others wait for it.
        for parameter in trainable:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        # In buckets: few calls for the many small gradients of adapters, and copies of a limited size.
        for bucket in _buckets([parameter.grad for parameter in trainable if parameter.grad is not None]):
            together = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(together)
            start = 0
            for gradient in bucket:
                gradient.copy_(together[start : start + gradient.numel()].view_as(gradient))
                start += gradient.numel()

    def broadcast_weights(self, model: PreTrainedModel) -> None:
        """Broadcast rank 0's weights to all ranks."""
        if self.count > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, src=0)

    def losses_explained(self) -> AbstractContextManager[None]:
        """Turn the death of another rank within the block into a TrainingError that names it."""
        return self.watch.explained() if self.watch else nullcontext()

    def broadcast_scalar(self, value: float) -> float:
        """Return rank 0's number on all ranks."""
        return self.sum(value if self.is_first else 0.0)

    def broadcast_object(self, value: _Value) -> _Value:
        """Return rank 0's value on all ranks."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gathered(self, value: _Value) -> list[_Value]:
        """Return the values of all ranks in rank order. All ranks must call it together."""
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
def processes_of_this_run(device: torch.device, *, sharded: bool = False) -> Iterator[Distributed]:
    """Join the process group that torchrun started this process in; without torchrun, yield a single rank.

    An existing group is used and left open. Raises ConfigError if a single process is to be sharded.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        if sharded:
            raise ConfigError(
                "--shard splits the model over several processes, but this is a single process. Start it as "
                "`torchrun --standalone --nproc-per-node 2 -m handspun train ... --shard`, or remove --shard."
            )
        yield Distributed(device=device)
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
            yield Distributed(rank, count, sharded, device, watch)
    finally:
        if is_ours:
            dist.destroy_process_group()
        watch.end()


def _gpu_of_this_process() -> torch.device:
    """Return this process's own GPU. Raises ConfigError if there are more processes than GPUs."""
    index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if index >= count:
        raise ConfigError(
            f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes, but this machine has {count} GPUs "
            f"(expected one per process). Start it with --nproc-per-node {count}, or add --device cpu."
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def partition_by_tokens(rows: Sequence[Example], count: int) -> list[list[Example]]:
    """Split the rows into `count` shares of nearly equal tokens: longest first, each to the smallest share."""
    shares: list[list[Example]] = [[] for _ in range(count)]
    tokens = [0] * count
    for row in sorted(rows, key=len, reverse=True):
        least = tokens.index(min(tokens))
        shares[least].append(row)
        tokens[least] += len(row)
    return shares


def _buckets(gradients: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    buckets: list[list[torch.Tensor]] = [[]]
    for gradient in gradients:
        if buckets[-1] and sum(g.numel() for g in buckets[-1]) + gradient.numel() > _BUCKET_VALUES:
            buckets.append([])
        buckets[-1].append(gradient)
    return buckets
