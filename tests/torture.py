"""Kills a real run again and again at random moments, resumes it each time, and compares the weights in the end.

    python tests/torture.py [--kills 100] [--seed 0] [--work FOLDER]

Each attempt is a process of its own, forked from one that has imported everything, and dies by SIGKILL: after a
random time, right before a random one of its operations on the disk (renaming, linking, deleting, syncing), or in
the middle of a file of weights. After each death every folder that is called a checkpoint must be one. A run that
comes to its end must have the weights, the losses and the record of one that nobody disturbed.
"""

import argparse
import collections
import functools
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers.modeling_utils
from rich.console import Console

from handspun import TrainConfig, train
from handspun.training import training_state
from handspun.training.checkpoint import is_checkpoint
from tiny import tiny_model, tiny_tokenizer

ROWS = "instruction,input,output\n" + "".join(
    f"Say {n} {'and more ' * (n % 5)}.,,It is {n}{' or so' * (n % 4)}.\n" for n in range(24)
)
KINDS: dict[str, dict[str, Any]] = {
    "full": {"save_steps": 2},
    "full, padded, saved in bfloat16": {"save_steps": 3, "batching": "padded", "save_dtype": "bfloat16"},
    "LoRA with dropout": {"save_steps": 1, "lora": True, "lora_dropout": 0.2, "keep_last": 1},
    "states in 8 bits": {"save_minutes": 0.001, "optimizer_states": "8bit", "keep_last": 3},
}
OPTIONS = {"num_epochs": 3, "batch_size": 4, "max_tokens": 96, "learning_rate": 1e-3, "eval_ratio": 0.1}
OPTIONS |= {"eval_steps": 2, "dtype": "float32", "threads": 1, "sample_answers": False, "report_rows": 0}
DISK = ["rename", "replace", "link", "unlink", "rmdir", "fsync", "mkdir"]
"""Functions of `os` that a death may come right before."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder to work in (default: a temporary one)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        deaths = torture(work, arguments.kills, random.Random(arguments.seed))
    print(
        f"{sum(deaths.values())} kills: "
        + ", ".join(f"{count} {where}" for where, count in sorted(deaths.items()))
    )
    return 0


def torture(work: Path, kills: int, rng: random.Random) -> collections.Counter[str]:
    """Raises AssertionError at the first difference. Returns how many deaths came where."""
    make_inputs(work)
    deaths: collections.Counter[str] = collections.Counter()
    seconds = {kind: undisturbed(work, kind) for kind in KINDS}
    for kind in itertools.cycle(KINDS):
        left = kills - deaths.total()
        if not left:
            return deaths
        deaths += chain(work, kind, min(rng.randrange(4, 9), left), seconds[kind], rng)
    raise AssertionError("a cycle does not end")


def undisturbed(work: Path, kind: str) -> float:
    """Makes the run that the others are compared with; the seconds that it takes."""
    began = time.monotonic()
    assert run_in_child(lambda: run(work, kind, work / "whole" / kind)) == 0
    return time.monotonic() - began


def make_inputs(work: Path) -> None:
    """A tiny model and some rows."""
    (work / "train.csv").write_text(ROWS, encoding="utf-8")
    tiny_model("qwen2", initializer_range=0.02, tie_word_embeddings=True).save_pretrained(work / "model")
    tiny_tokenizer().save_pretrained(work / "model")


def run(work: Path, kind: str, output: Path) -> None:
    """Three epochs of six steps."""
    config = TrainConfig(
        model=str(work / "model"),
        data=str(work / "train.csv"),
        output_dir=str(output),
        **{**OPTIONS, **KINDS[kind]},
    )
    train(config, console=Console(file=io.StringIO()))


def chain(work: Path, kind: str, kills: int, seconds: float, rng: random.Random) -> collections.Counter[str]:
    """One run, killed until it comes to its end, and compared with the undisturbed one."""
    output, whole = work / "output", work / "whole" / kind
    shutil.rmtree(output, ignore_errors=True)
    deaths: collections.Counter[str] = collections.Counter()
    while True:
        where = rng.choice(["by time", "by time", *DISK, "writing weights"]) if deaths.total() < kills else None
        code = run_in_child(
            functools.partial(attempt, work, kind, output, where, rng.randrange(2**32)),
            kill_after=rng.uniform(0, seconds) if where == "by time" else None,
        )
        assert code in (0, -signal.SIGKILL), f"{kind}: the run ended with {code} after {deaths.total()} kills"
        folders = list(output.glob("checkpoint-*"))
        assert all(map(is_checkpoint, folders)), f"{kind}: not whole after a death {where}: {folders}"
        deaths[str(where)] += code != 0
        if code == 0 or is_finished(output):
            break
    expected, found = outcome(whole), outcome(output)
    for name, value in expected.items():
        assert found[name] == value, f"{kind}: {name} is not that of the undisturbed run, after {dict(deaths)}"
    print(f"{kind}: the same after {deaths.total()} kills", flush=True)
    return deaths


def is_finished(output: Path) -> bool:
    """Killed while it cleared up what nobody needs any more."""
    record = output / "run.json"
    return record.exists() and json.loads(record.read_text(encoding="utf-8"))["status"] == "finished"


def attempt(work: Path, kind: str, output: Path, where: str | None, seed: int) -> None:
    """The run, or what is left of it, with a death prepared."""
    rng = random.Random(seed)
    if where in DISK:
        die_before(where, rng.randrange(1, 20))
    elif where == "writing weights":
        die_in_a_file(rng.randrange(1, 12))
    run(work, kind, output)


def die() -> None:
    """As `kill -9` does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(name: str, count: int) -> None:
    """Right before the function of `os` is called for the so many-th time."""
    function, left = getattr(os, name), [count]

    def counted(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            die()
        return function(*arguments, **options)

    setattr(os, name, counted)


def die_in_a_file(count: int) -> None:
    """With half of the so many-th file of tensors written."""
    save, left = safetensors.torch.save_file, [count]

    def half(tensors: Any, path: Any, *arguments: Any, **options: Any) -> None:
        save(tensors, path, *arguments, **options)
        left[0] -= 1
        if not left[0]:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    training_state.save_file = half  # type: ignore[assignment]
    transformers.modeling_utils.safe_save_file = half  # type: ignore[assignment]


def run_in_child(work: Callable[[], None], *, kill_after: float | None = None) -> int:
    """The exit code of a forked process that does the work; negative for a signal."""
    process = os.fork()
    if not process:
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            code = 3
        os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def outcome(output: Path) -> dict[str, Any]:
    """What must not depend on deaths: weights by their hashes, events without seconds and memory, evaluations."""
    epochs = [*output.glob("checkpoint-epoch-*"), output / "checkpoint-best"]
    files = sorted(file for folder in epochs for file in folder.glob("*.safetensors"))
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    return {
        **{f"{file.parent.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
        "events": [
            {key: event[key] for key in event if key not in ("seconds", "memory_bytes")} for event in events
        ],
        **{key: record[key] for key in ("status", "evaluations", "checkpoints", "best_checkpoint")},
    }


if __name__ == "__main__":
    sys.exit(main())
