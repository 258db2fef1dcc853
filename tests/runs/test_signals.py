"""Runs that are stopped and ranks that die: the step is finished, the rest is told, the checkpoints are whole."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from handspun.runs.signals import stop_requests
from handspun.training import dtype as threads_module
from handspun.training.checkpoint import is_checkpoint
from handspun.training.distributed import Watch, describe, exit_code
from handspun.training.dtype import physical_cores, use_threads

ROWS = "instruction,input,output\n" + "".join(f"Say {n}.,,It is {n}.\n" for n in range(20))
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture
def usual_interrupt() -> Iterator[None]:
    """Python's own, also where the tests are a shell's job in the background, for which SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_interrupt")
def test_the_first_signal_is_noted_and_the_second_leaves_at_once() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_requests() as request:
        assert not request.signal
        signal.raise_signal(signal.SIGINT)
        assert request.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with stop_requests() as request:
        signal.raise_signal(signal.SIGTERM)
        assert request.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@contextmanager
def hangups(handler: signal.Handlers) -> Iterator[None]:
    """SIGHUP is handled so before; afterwards it is as it was."""
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_end_of_a_terminal_is_noted_once() -> None:
    """Shell and system both send a SIGHUP; the second one must not end the process."""
    with hangups(signal.SIG_DFL):
        with stop_requests() as request:
            signal.raise_signal(signal.SIGHUP)
            assert request.signal == signal.SIGHUP
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)


def test_a_hangup_after_another_signal_does_not_end_the_process() -> None:
    with hangups(signal.SIG_DFL):
        with stop_requests() as request:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
            assert request.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_hangup_that_is_ignored_stays_so() -> None:
    """As under nohup."""
    with hangups(signal.SIG_IGN):
        with stop_requests() as request:
            signal.raise_signal(signal.SIGHUP)
            assert not request.signal
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@linux
def test_how_a_process_ended_is_known_until_its_parent_has_asked() -> None:
    killed = subprocess.Popen(["sleep", "100"])
    watch = Watch({3: killed.pid})
    killed.kill()
    lost = watch.lost(within=10)
    assert lost is not None
    assert lost.startswith(f"rank 3 (process {killed.pid}) was killed by SIGKILL, so this run stops.")
    assert "--shard" in lost
    watch.end()
    assert exit_code(killed.pid) == -signal.SIGKILL
    killed.wait()
    assert exit_code(killed.pid) is None


@linux
def test_a_process_that_ends_well_is_no_loss() -> None:
    ended = subprocess.Popen(["true"])
    watch = Watch({1: ended.pid})
    assert watch.lost(within=0.3) is None
    watch.end()
    ended.wait()


def test_what_is_said_of_other_ends() -> None:
    assert "rank 0 (process 7) exited with code 2" in describe(0, 7, 2)
    assert "rank 0 (process 7) exited, so" in describe(0, 7, None)
    assert "torchrun's report" in describe(0, 7, None)


def test_each_rank_takes_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(threads_module, "physical_cores", lambda: 8)
    try:
        for ranks, omp, asked, expected in [
            (3, "1", None, 2),
            (16, "1", None, 1),
            (2, "1", 3, 3),
            (2, "5", None, 3),
        ]:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
            monkeypatch.setenv("OMP_NUM_THREADS", omp)
            use_threads(asked)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
    assert physical_cores() >= 1


@contextmanager
def training(tiny_folder: Path, folder: Path, *options: str, processes: int) -> Iterator[subprocess.Popen[str]]:
    """A run of far too many epochs, once its second epoch is saved."""
    (folder / "train.csv").write_text(ROWS, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        *(sys.executable, *(launcher if processes > 1 else []), "-m", "handspun", "train"),
        *("--model", str(tiny_folder), "--data", str(folder / "train.csv"), "--dtype", "float32"),
        *("--output-dir", str(folder / "output"), "--num-epochs", "2000", "--threads", "1", *options),
    ]
    with hangups(signal.SIG_DFL):  # under nohup, the run would inherit that they are ignored
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (folder / "output" / "checkpoint-epoch-2").exists():
            assert run.poll() is None, run.communicate()
            time.sleep(0.05)
        yield run
    finally:
        run.kill()
        run.wait()


def process_of_rank(launcher: int, rank: int) -> int:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # ended, or another user's
            continue
        if int(parent) == launcher and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError("no such rank")


def left(folder: Path) -> tuple[str, list[Path]]:
    """(the status in run.json, checkpoints)."""
    status = json.loads((folder / "output" / "run.json").read_text())["status"]
    return status, list((folder / "output").glob("checkpoint-*"))


@pytest.mark.slow
@linux
@pytest.mark.parametrize("options", [(), ("--shard",)], ids=["replicated", "sharded"])
def test_a_rank_that_is_killed_ends_the_others_with_its_name(
    tiny_folder: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    with training(tiny_folder, tmp_path, *options, processes=2) as run:
        process = process_of_rank(run.pid, 1)
        os.kill(process, signal.SIGKILL)
        _, errors = run.communicate(timeout=60)
    assert run.returncode
    # torchrun may be first to ask the system how the rank ended; its report below then says it
    assert re.search(
        rf"error: rank 1 \(process {process}\) (was killed by SIGKILL|exited), so this run stops", errors
    )
    assert "Connection" not in errors
    status, checkpoints = left(tmp_path)
    assert status == "failed"
    assert len(checkpoints) >= 2
    assert all(map(is_checkpoint, checkpoints))


@pytest.mark.slow
@linux
@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGINT), (1, signal.SIGHUP), (2, signal.SIGTERM)])
def test_a_signal_stops_all_ranks_after_the_same_step(
    tiny_folder: Path, tmp_path: Path, processes: int, number: signal.Signals
) -> None:
    """Two ranks that stopped after different steps would wait for each other. Only one of them gets it."""
    with training(tiny_folder, tmp_path, processes=processes) as run:
        os.kill(run.pid if processes == 1 else process_of_rank(run.pid, 1), number)
        out, errors = run.communicate(timeout=60)
    if processes == 1:
        assert run.returncode == 128 + number
    else:
        assert re.search(rf"exitcode *: {128 + number}", errors)
    stopped = re.findall(rf"^stopped by {number.name} after step \d+ of 6000; .*$", out, re.MULTILINE)
    assert len(stopped) == 1
    assert "holds checkpoint-epoch-1, checkpoint-epoch-2" in stopped[0]
    assert not re.search("^error", errors, re.MULTILINE)
    status, checkpoints = left(tmp_path)
    assert status == "stopped"
    assert all(map(is_checkpoint, checkpoints))
