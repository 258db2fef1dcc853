"""What became of the other ranks: when one dies, the others end at once and say which it was, and how it died.

gloo fails with a trace that names no rank, NCCL waits for minutes, and torchrun's own report comes after both. So
every rank watches the others of its machine: a pidfd (Linux) becomes readable when its process ends, and /proc
holds the exit status until torchrun has fetched it. A rank that ends with an error leaves its message in the store
of the group, where ranks on other machines find it too.
"""

import itertools
import json
import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from handspun.display import say
from handspun.errors import HandspunError, StoppedError, TrainingError

_GRACE = 20.0
"""Seconds for a rank to notice in its own way that another has died, and to end in order; it may be saving."""

_ELSEWHERE = (
    "the connection to another rank was lost, and the run ends here; torchrun's report names the rank and its "
    "end. The checkpoints that were saved are whole."
)


_RUNS = itertools.count()
"""Of this process; all ranks count alike."""


class Board:
    """The first error of any rank, in the store that the group was made by."""

    def __init__(self, rank: int) -> None:
        self._store = dist.distributed_c10d._get_default_store()
        self._rank, self._key = rank, f"handspun/{next(_RUNS)}/error"

    def write(self, message: str) -> None:
        """Leave an error for the others, unless there is one already."""
        with suppress(RuntimeError):  # the store's process has ended
            if self._store.add(f"{self._key}s", 1) == 1:
                self._store.set(self._key, json.dumps([self._rank, message]))

    def read(self) -> str | None:
        """Return what to say of another rank's error, if there is one."""
        with suppress(RuntimeError):
            if self._store.check([self._key]):
                rank, message = json.loads(self._store.get(self._key))
                if rank != self._rank:
                    return f"rank {rank} stopped with an error, and the run ends here: {message}"
        return None


class Watch:
    """A thread that waits for the end of other processes, given as rank to process id."""

    def __init__(self, processes: dict[int, int], board: Board | None = None) -> None:
        self._board = board
        self._files = {}
        for rank, process in processes.items():
            with suppress(AttributeError, OSError):  # not Linux; an old kernel; already gone
                self._files[os.pidfd_open(process)] = (rank, process)
        self._lost: str | None = None
        self._died, self._over = threading.Event(), threading.Event()
        self._wakes, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Inside of the block, a failure because a process died is a TrainingError that names it."""
        try:
            yield
        except RuntimeError as error:
            lost = self.lost(within=1.0) or (_ELSEWHERE if _is_of_the_connection(error) else None)
            if lost is None:
                raise
            with suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, before all is said
            raise TrainingError(lost) from error

    @contextmanager
    def errors_told(self) -> Iterator[None]:
        """Within the block, tell the other ranks of an error of this one."""
        try:
            yield
        except StoppedError:  # all ranks stop
            raise
        except Exception as error:
            if self._board is not None and not _is_of_the_connection(error):
                name = "" if isinstance(error, HandspunError) else f"{type(error).__name__}: "
                self._board.write(f"{name}{error}")
            raise

    @contextmanager
    def termination_explained(self) -> Iterator[None]:
        """Within the block, a SIGTERM because a process died is a TrainingError that names it.

        torchrun ends the other ranks so. The loop has a handler of its own.
        """
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

        signal.signal(signal.SIGTERM, explain)
        try:
            yield
        finally:
            if signal.getsignal(signal.SIGTERM) is explain:
                signal.signal(signal.SIGTERM, before)

    def lost(self, *, within: float) -> str | None:
        """What to say of the first rank that failed or died, if one did within so many seconds."""
        told = self._board.read() if self._board else None
        if told is None:
            self._died.wait(within)
            told = self._board.read() if self._board else None
        return told or self._lost

    def end(self) -> None:
        """What ends from now on is no loss."""
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
        if code is not None and not self._over.wait(_GRACE):
            say(f"error on rank {os.environ['RANK']}: {self._lost}")
            os._exit(TrainingError.exit_code)  # the main thread waits in a collective for the dead


def _is_of_the_connection(error: Exception) -> bool:
    """Return whether another rank's end has caused the error."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def exit_code(process: int) -> int | None:
    """How an ended process ended: its exit code, or minus the signal's number; None if its parent knows alone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return os.waitstatus_to_exitcode(int(fields[49]))  # the 52nd, proc(5); the first two are before the ")"


def describe(rank: int, process: int, code: int | None) -> str:
    """What happened, and what to do."""
    if code is None:
        how, hint = "has ended", "torchrun's report says how."
    elif code > 0:
        how, hint = f"ended with exit code {code}", "What it said itself is above or below."
    else:
        how = f"was killed by {signal.Signals(-code).name}"
        hint = "Start the run again."
        if -code == signal.SIGKILL:
            hint = (
                "The system does that when memory runs out (`dmesg` says so): then give a smaller --max-tokens, "
                "--activation-checkpointing or --shard, or fewer processes a machine."
            )
    return (
        f"rank {rank} (process {process}) {how}, and the run ends here. The checkpoints that were saved are "
        f"whole. {hint}"
    )


def local_processes(rank: int) -> dict[int, int]:
    """Rank to process id of the others on this machine, by what torchrun calls it; all ranks must ask together."""
    own = (os.environ.get("GROUP_RANK"), os.getpid())
    found = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    here = {other: process for other, (machine, process) in enumerate(found) if machine and machine == own[0]}
    return {other: process for other, process in here.items() if other != rank}
