"""Lets every call of a save fail that writes, syncs, renames or makes a folder, one at a time, in each way.

    LD_PRELOAD=failing_disk.so python tests/helpers/failing_disk.py failing_disk.so FOLDER

A save replaces checkpoint-best, and adds checkpoint-epoch-2 with its training state beside checkpoint-epoch-1.
When a call fails, the save must say so in an OutputError, or be whole; every folder that is called a checkpoint
must be one; and the last one to resume from is that of epoch 2 if it was saved, and of epoch 1 if not.
"""

import ctypes
import errno
import functools
import os
import shutil
import sys
from pathlib import Path

import torch

from handspun import TrainConfig
from handspun.errors import OutputError
from handspun.files import recover_all
from handspun.models.load import ChatModel
from handspun.runs import checkpoints
from handspun.runs.checkpoints import CheckpointManager
from handspun.runs.output_dir import TrainedRun
from handspun.runs.resume import find_resume_point
from handspun.training.checkpoint import is_checkpoint, is_checkpoint_name
from handspun.training.distributed import Distributed
from handspun.training.loop import EpochEnd, Evaluation, TrainingState, start
from handspun.training.memory import make_plan
from records import record_of
from tiny import tiny_model, tiny_tokenizer
from torture import run_in_child

FAILURES = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "a short write": 0}


def main(library: str, work: Path) -> None:
    torch.set_num_threads(1)
    disk = ctypes.CDLL(library)
    before = work / "before"
    manager, state = manager_of(before)
    save(manager, state, epoch=1)
    calls = count(disk, manager, state, work)
    for name, code in FAILURES.items():
        for nth in range(1, calls + 1):
            ended = run_in_child(functools.partial(one, disk, work, nth, code))
            assert not ended, f"{name} at call {nth} of {calls}: see above"
    print(f"{calls} calls, each of them failed in {len(FAILURES)} ways")


def manager_of(output: Path) -> tuple[CheckpointManager, TrainingState]:
    """Of a run that has not begun."""
    output.mkdir(exist_ok=True)
    config = TrainConfig(output_dir=str(output))
    chat = ChatModel(tiny_model("qwen2", tie_word_embeddings=True), tiny_tokenizer(), "tiny")
    run = TrainedRun(output, make_plan(chat.model, [], config), chat)
    checkpoints.model_card = lambda *_, **__: "what it says is tried elsewhere"
    return CheckpointManager(run, config, Distributed(), record_of()), start(chat.model, config)


def save(manager: CheckpointManager, state: TrainingState, *, epoch: int) -> None:
    """The end of an epoch whose evaluation is the best so far."""
    state.step = epoch
    manager.on_event(Evaluation(state.step, epoch, 1 / epoch, 10, best=True), state)
    manager.on_event(EpochEnd(state.step, epoch), state)


def count(disk: ctypes.CDLL, manager: CheckpointManager, state: TrainingState, work: Path) -> int:
    """Calls of a save that succeeds, in a copy."""
    shutil.copytree(work / "before", work / "output")
    manager, state = manager_of(work / "output")
    disk.disk_fails(str(work / "output").encode(), ctypes.c_long(0), 0)
    save(manager, state, epoch=2)
    disk.disk_is_mended()
    return int(disk.disk_calls())


def one(disk: ctypes.CDLL, work: Path, nth: int, code: int) -> None:
    """AssertionError if the nth call's failure leaves anything that is not what it seems."""
    output = work / "output"
    shutil.rmtree(output)
    shutil.copytree(work / "before", output)
    manager, state = manager_of(output)
    disk.disk_fails(str(output).encode(), ctypes.c_long(nth), code)
    try:
        save(manager, state, epoch=2)
        saved = True
    except OutputError:
        saved = False
    finally:
        disk.disk_is_mended()
    assert saved or code, "a short write is no failure: the rest is to be written"
    recover_all(output, is_ours=is_checkpoint_name)
    folders = {path.name: path for path in output.glob("checkpoint-*")}
    assert all(map(is_checkpoint, folders.values())), folders
    assert folders.keys() >= {"checkpoint-best", "checkpoint-epoch-1"}
    last, problems = find_resume_point(output)
    assert not problems
    assert last is not None
    assert last.step == 2 if saved else last.step in (1, 2)  # 2: renamed, and the folder around it not synced
    assert not list(output.glob(".checkpoint-*"))


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]), Path(sys.argv[2]).absolute())
