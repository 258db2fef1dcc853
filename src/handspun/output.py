"""A run's output folder: whose it is, what may be replaced in it, and how the run is recorded."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from handspun.config import TrainConfig
from handspun.data.prepare import ExampleSet
from handspun.errors import OutputError, StoppedError, TrainingError
from handspun.files import output_errors
from handspun.models.load import ChatModel
from handspun.report.duration import duration
from handspun.report.environment import peak_memory
from handspun.report.incidents import Incident, incident_facts, write_batch
from handspun.report.log import RunLog
from handspun.report.record import write_run
from handspun.report.trackers import TRACKERS
from handspun.resume import ResumePoint, last_checkpoint, unfinished_run
from handspun.training.checkpoint import clear_leftovers
from handspun.training.loop import Evaluation
from handspun.training.nonfinite import Skipped
from handspun.training.plan import Plan, disk_at_most
from handspun.training.processes import Processes

_OUR_FILES = [
    "checkpoint-*",
    ".checkpoint-*",
    "train.log",
    "metrics.jsonl",
    "run.json",
    "report.html",
    "report_data.json",
    "nonfinite-step-*.jsonl",
    TRACKERS,
]
_LEFT_BY_NONE = {"train.log", "metrics.jsonl", "report_data.json"}


@dataclass
class TrainedRun:
    """What a run left: its folder, its checkpoints in order, the best one, held-out losses, what went wrong on the
    way, and the model (None after a dry run, and after a sharded one, whose model is in no process)."""

    output_dir: Path
    plan: Plan
    model: ChatModel | None = None
    checkpoints: list[Path] = field(default_factory=list)
    """One an epoch."""
    step_checkpoints: list[Path] = field(default_factory=list)
    """Between them, to resume from."""
    best_checkpoint: Path | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The output folder is this process's inside of the block; the lock goes with the process, however it ends.

    Raises OutputError if another run has it.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: choose another --output-dir.")
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise OutputError(
                f"another run is writing into {folder}{_owner(folder)}: wait for its end, or choose another "
                "--output-dir."
            ) from None
        (folder / ".owner").write_text(f"{os.getpid()}\n", encoding="utf-8")
    try:
        yield
    finally:
        (folder / ".owner").unlink(missing_ok=True)
        lock.release()


def prepare_output(
    folder: Path, config: TrainConfig, notice: Callable[[str], None]
) -> tuple[dict[str, Any] | None, ResumePoint | None]:
    """Makes room for the run, or for the rest of it: facts of the unfinished run that it goes on with, and from
    which checkpoint; Nones for a run of its own. Raises OutputError if an earlier run may not go.
    """
    clear_leftovers(folder)
    earlier = None if config.overwrite or config.resume is False else unfinished_run(folder)
    if earlier is not None:
        point = last_checkpoint(folder, notice)
        if point is None:
            notice(f"the run in {folder} was ended before its first checkpoint: it begins again")
        return earlier, point
    if config.resume:
        raise OutputError(
            f"{folder} holds no unfinished run to go on with. Leave --resume out to begin one, or name the run's "
            "--output-dir."
        )
    _make_room(folder, overwrite=config.overwrite)
    return None, None


def _make_room(folder: Path, *, overwrite: bool) -> None:
    earlier = [path for pattern in _OUR_FILES for path in folder.glob(pattern)]
    # Log and answers alone are left by a run that never began: its data or its model could not be used.
    kept = sorted(path.name for path in earlier if path.name not in _LEFT_BY_NONE)
    if kept and not overwrite:
        raise OutputError(
            f"{folder} holds an earlier run ({', '.join(kept[:3])}): choose another --output-dir, or replace it "
            "with --overwrite."
        )
    with output_errors(folder):
        for path in earlier:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def refuse_without_room(plan: Plan, config: TrainConfig) -> None:
    """Raises OutputError before the first step rather than after the first epoch."""
    needed = disk_at_most(plan, config)
    free = shutil.disk_usage(config.output_dir).free
    if free < needed:
        raise OutputError(
            f"{config.output_dir} has {free / 1e9:.1f} GB free, and {config.num_epochs} checkpoints with the best "
            f"one, {config.keep_last} of them with what resuming needs, take {needed / 1e9:.1f} GB. Free some, "
            "choose another --output-dir, give fewer --num-epochs or --keep-last 1, or halve the files with "
            "--save-dtype bfloat16."
        )


@contextmanager
def recorded(run: TrainedRun, facts: dict[str, Any], log: RunLog) -> Iterator[None]:
    """run.json says how the run ended, whatever ended it; the log, what came of it."""
    began = time.perf_counter()
    record(run, facts, "running")
    status = "failed"
    try:
        yield
        status = "finished"
    except StoppedError as stopped:
        status = "stopped"
        log.line(f"{stopped}; {_left(run)}. The same command goes on from there.")
        raise
    except TrainingError as error:
        log.only_in_file(str(error))
        log.line(_left(run))
        raise
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        seconds = facts.get("seconds", 0.0) + time.perf_counter() - began
        facts |= {"seconds": seconds, "peak_memory_bytes": peak_memory()}
        record(run, facts, status)
    _log_outcome(log, run, facts["seconds"])


def record(run: TrainedRun, facts: dict[str, Any], status: str) -> None:
    """Writes run.json as things stand."""
    outcome = {
        "status": status,
        "evaluations": [asdict(evaluation) for evaluation in run.evaluations],
        "incidents": [incident_facts(incident) for incident in run.incidents],
        "checkpoints": [path.name for path in run.checkpoints],
        "best_checkpoint": run.best_checkpoint.name if run.best_checkpoint else None,
    }
    write_run(run.output_dir, {**facts, **outcome})


def note(
    run: TrainedRun,
    incident: Incident,
    config: TrainConfig,
    training: ExampleSet,
    processes: Processes,
    log: RunLog,
) -> None:
    """Keeps what went wrong for the record; the rows that no step could be made of, in a file."""
    run.incidents.append(incident)
    if isinstance(incident, Skipped) and processes.is_first:
        log.line(write_batch(incident, config, training))


def _left(run: TrainedRun) -> str:
    kept = (*run.checkpoints, *run.step_checkpoints, run.best_checkpoint)
    names = [path.name for path in kept if path is not None]
    return f"{run.output_dir} holds {', '.join(names)}" if names else "no checkpoint was saved yet"


def _log_outcome(log: RunLog, run: TrainedRun, seconds: float) -> None:
    if run.evaluations:
        first, last = run.evaluations[0], run.evaluations[-1]
        best = min(run.evaluations, key=lambda evaluation: evaluation.loss)
        log.line(
            f"held-out loss {first.loss:.4f} before, {last.loss:.4f} after; "
            f"best {best.loss:.4f} at step {best.step}"
        )
    memory = peak_memory()
    used = f", peak memory {memory / 1e9:.1f} GB (predicted {run.plan.peak_memory / 1e9:.1f})" if memory else ""
    log.line(f"finished in {duration(seconds)}{used}")


def _owner(folder: Path) -> str:
    try:
        return f" (process {(folder / '.owner').read_text(encoding='utf-8').strip()})"
    except OSError:
        return ""
