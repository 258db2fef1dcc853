"""Kills a real run again and again at random moments, resumes it each time, and compares the weights in the end.

    python tests/helpers/torture.py [--kills 100] [--replacing 100] [--seed 0] [--work FOLDER]

Each attempt is a process of its own, forked from one that has imported everything, and dies by SIGKILL: after a
random time, right before a random one of its operations on the disk (renaming, linking, deleting, syncing), or in
the middle of a file of weights. After each death every folder that is called a checkpoint must be one. A run that
comes to its end must have the weights, the losses and the record of one that nobody disturbed.

--replacing: so many more kills come while `train --overwrite` and `export --overwrite` are under way, right before
any of their operations on files, drawn from all of them. After each one the old is whole, or the new is.
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
from handspun.config import ExportConfig
from handspun.exports.export import export
from handspun.files import work_folder
from handspun.training import checkpoint as training_state
from handspun.training.checkpoint import TRAINING_STATE, is_checkpoint
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
OPTIONS: dict[str, Any] = {
    "num_epochs": 3,
    "batch_size": 4,
    "max_tokens": 96,
    "learning_rate": 1e-3,
    "eval_ratio": 0.1,
}
OPTIONS |= {"eval_steps": 2, "dtype": "float32", "threads": 1, "sample_answers": False, "report_rows": 0}
DISK = ["rename", "replace", "link", "unlink", "rmdir", "fsync", "mkdir"]
"""Functions of `os` that a death may come right before."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--replacing", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder to work in (default: a temporary one)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        rng = random.Random(arguments.seed)
        deaths = torture(work, arguments.kills, rng) + replacing(work, arguments.replacing, rng)
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
        each = min(rng.randrange(4, 9), -(-kills // len(KINDS)), left)  # few kills are shared by all kinds
        deaths += chain(work, kind, each, seconds[kind], rng)
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


def run(work: Path, kind: str, output: Path, **more: Any) -> None:
    """Three epochs of six steps."""
    config = TrainConfig(
        model=str(work / "model"),
        data=str(work / "train.csv"),
        output_dir=str(output),
        **{**OPTIONS, **KINDS[kind], **more},
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


def replacing(work: Path, kills: int, rng: random.Random) -> collections.Counter[str]:
    """Raises AssertionError at the first loss. Returns how many deaths came in which command."""
    deaths: collections.Counter[str] = collections.Counter()
    if not kills:
        return deaths
    first = work / "first"
    assert run_in_child(lambda: run(work, "full", first, learning_rate=3e-3, overwrite=False)) == 0
    deaths["--overwrite of a run"] = overwrite_runs(work, first, kills - kills * 2 // 5, rng)
    deaths["--overwrite of an export"] = overwrite_exports(work, first, kills * 2 // 5, rng)
    return deaths


def overwrite_runs(work: Path, first: Path, kills: int, rng: random.Random) -> int:
    """Kills runs that replace the run in `first`, or each other; each chain ends with one that is left alone."""
    output = work / "overwritten"
    operations = count_operations(work, output, lambda: start_over(first, output, work))
    before, deaths = contents(first), 0
    while deaths < kills:
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(first, output)
        strangers = put_strangers(output)
        for _ in range(min(rng.randrange(1, 5), kills - deaths)):
            nth = rng.randrange(1, operations + 1)
            code = run_in_child(functools.partial(die_while, output, nth, functools.partial(again, work, output)))
            assert code in (0, -signal.SIGKILL), f"--overwrite ended with {code}"
            deaths += code != 0
            assert is_kept(output, before), f"neither the old nor the new run after a death before operation {nth}"
            assert_strangers(strangers)
        assert run_in_child(functools.partial(again, work, output)) == 0
        assert outcome(output) == outcome(work / "whole" / "full"), "not as an undisturbed run"
        assert not (output / ".handspun").exists()
        assert not [path.name for path in output.glob(".*.handspun*")]
        assert_strangers(strangers)
    print(
        f"--overwrite of a run: nothing was lost in {deaths} kills before one of {operations} operations",
        flush=True,
    )
    return deaths


def again(work: Path, output: Path) -> None:
    """The command that replaces."""
    run(work, "full", output, overwrite=True)


def start_over(first: Path, output: Path, work: Path) -> None:
    shutil.copytree(first, output)
    again(work, output)


def is_kept(output: Path, before: dict[str, str]) -> bool:
    """Return whether the first run is whole, in place, aside, or on the way; or a later one has saved or ended."""
    aside = output / ".handspun"
    in_place = contents(output)
    on_the_way = contents(aside / "replacing") if (aside / "replacing").exists() else {}
    places = [{**in_place, **on_the_way}, *(contents(place) for place in aside.glob("replaced-*"))]
    if any(before.items() <= place.items() for place in places):
        return True
    folders = [folder for folder in output.rglob("checkpoint-*") if "deleted" not in folder.parts]
    has_saved = any(is_checkpoint(folder) and is_checkpoint(folder / TRAINING_STATE) for folder in folders)
    epochs = {
        folder.name for folder in folders if folder.name.startswith("checkpoint-epoch-") and is_checkpoint(folder)
    }
    records = [place for place in (output, aside / "replacing", *aside.glob("replaced-*")) if is_finished(place)]
    return has_saved or (bool(records) and len(epochs) == OPTIONS["num_epochs"])


def overwrite_exports(work: Path, first: Path, kills: int, rng: random.Random) -> int:
    """Kills exports that replace another model's: a folder with a GGUF file in it, or the file alone."""
    target, other = work / "exports" / "exported", work / "exports" / "other"
    both: list[dict[str, Any]] = [{"merge": True, "gguf": "f32"}, {"gguf": "f32"}]
    deaths, ways = 0, itertools.cycle(both)
    made = {}
    for name, model in (("old", work / "model"), ("new", first / "checkpoint-epoch-3")):
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(model, work / name / "model")
        assert (
            run_in_child(functools.partial(export_to, other, work / name / "model", merge=True, gguf="f32")) == 0
        )
        made[name] = other.rename(work / name / "exported")
    old, new = made["old"], made["new"]
    operations = {
        bool(way.get("merge")): count_operations(
            work, work / "exports", functools.partial(export_over, old, target, work / "new" / "model", way)
        )
        for way in itertools.islice(ways, 2)
    }
    while deaths < kills:
        way = next(ways)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(old, target)
        strangers = put_strangers(target.parent, "exported")
        for _ in range(min(rng.randrange(1, 5), kills - deaths)):
            nth = rng.randrange(1, operations[bool(way.get("merge"))] + 1)
            export_again = functools.partial(export_to, target, work / "new" / "model", overwrite=True, **way)
            code = run_in_child(functools.partial(die_while, work / "exports", nth, export_again))
            assert code in (0, -signal.SIGKILL), f"export --overwrite ended with {code}"
            deaths += code != 0
            aside = work_folder(target) / "old"
            found = contents(target if target.exists() else aside)
            assert is_old_or_new(found, contents(old), contents(new), way), f"{way}, before operation {nth}"
        assert run_in_child(export_again) == 0
        expected = contents(new) if way.get("merge") else {**contents(old), GGUF: contents(new)[GGUF]}
        assert contents(target) == expected
        names = {path.relative_to(target.parent).parts[0] for path in strangers}
        assert {path.name for path in target.parent.iterdir()} == {"exported", *names}
        assert_strangers(strangers)
    print(f"--overwrite of an export: nothing was lost in {deaths} kills before one of {operations}", flush=True)
    return deaths


GGUF = "model-f32.gguf"


def is_old_or_new(found: dict[str, str], old: dict[str, str], new: dict[str, str], way: dict[str, Any]) -> bool:
    """Whether the folder is one of the two; of a file alone, whether it is."""
    if way.get("merge"):
        return found in (old, new)
    return found[GGUF] in (old[GGUF], new[GGUF]) and {**found, GGUF: old[GGUF]}.items() >= old.items()


def export_over(old: Path, target: Path, model: Path, way: dict[str, Any]) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(old, target)
    export_to(target, model, overwrite=True, **way)


def export_to(target: Path, model: Path, **options: Any) -> None:
    export(ExportConfig(model=str(model), output_dir=str(target), **options))


def contents(folder: Path) -> dict[str, str]:
    """sha256 of each file by its path; what a run keeps to itself is left out."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path: path.relative_to(folder) for path in files}
    return {
        str(name): hashlib.sha256(path.read_bytes()).hexdigest()
        for path, name in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def put_strangers(folder: Path, name: str = "checkpoint-best") -> list[Path]:
    """Files of others, called much like ours."""
    names = [f".{name}.partial", f".{name}.old/a", f".{name}.deleted/a", f"{name}-old/a", ".run.json.partial"]
    for path in (paths := [folder / name for name in names]):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"mine: {path.name}", encoding="utf-8")
    return paths


def assert_strangers(paths: list[Path]) -> None:
    for path in paths:
        assert path.read_text(encoding="utf-8") == f"mine: {path.name}"


OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod", "os.truncate"}
"""Python's audit events of what changes files; opening counts where it is for writing."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def before_operations(folder: Path, act: Callable[[], None]) -> None:
    """Calls `act` right before whatever changes something in the folder, fsync included."""
    place, fsync = str(folder), os.fsync

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or (event == "open" and not (arguments[2] or 0) & WRITES):
            return
        is_inside = any(isinstance(one, str | os.PathLike) and place in os.fspath(one) for one in arguments)
        in_a_tree = event in ("os.remove", "os.rmdir") and arguments[-1] not in (None, -1)  # shutil.rmtree's way
        if is_inside or in_a_tree:
            act()

    def counted(descriptor: Any) -> None:
        act()
        fsync(descriptor)

    sys.addaudithook(hook)
    os.fsync = counted  # type: ignore[assignment]


def count_operations(work: Path, folder: Path, do: Callable[[], None]) -> int:
    """How many operations the work takes, left alone."""
    file = work / "count"

    def counting() -> None:
        count = itertools.count()
        before_operations(folder, functools.partial(next, count))
        do()
        file.write_text(str(next(count)), encoding="utf-8")

    assert run_in_child(counting) == 0
    return int(file.read_text(encoding="utf-8"))


def die_while(folder: Path, nth: int, do: Callable[[], None]) -> None:
    """SIGKILL right before the nth operation of the work."""
    left = [nth]

    def act() -> None:
        left[0] -= 1
        if not left[0]:
            die()

    before_operations(folder, act)
    do()


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
