"""A run's output folder: what it may replace, what is kept in it, and how the run is recorded."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from handspun.config import TrainConfig
from handspun.errors import OutputError, StoppedError
from handspun.models.load import ChatModel
from handspun.report.environment import peak_memory
from handspun.report.log import RunLog, duration
from handspun.report.record import write_run
from handspun.training.checkpoint import errors_for_people, link_checkpoint, save_checkpoint
from handspun.training.loop import EpochEnd, Evaluation
from handspun.training.preflight import Plan
from handspun.training.processes import Processes

_OUR_FILES = ["checkpoint-*", ".checkpoint-*", "train.log", "metrics.jsonl", "run.json"]


@dataclass
class TrainedRun:
    """What a run left: its folder, its checkpoints in order, the best one, held-out losses, and the model
    (None after a dry run, and after a sharded one, whose model is in no process)."""

    output_dir: Path
    plan: Plan
    model: ChatModel | None = None
    checkpoints: list[Path] = field(default_factory=list)
    best_checkpoint: Path | None = None
    evaluations: list[Evaluation] = field(default_factory=list)


def prepare_output(folder: Path, *, overwrite: bool) -> Path:
    """The output folder, without an earlier run. Raises OutputError if there is one and it may not go."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: choose another --output-dir.")
    earlier = [path for pattern in _OUR_FILES for path in folder.glob(pattern)]
    # The log alone is left by a run that never began: its data or its model could not be used.
    kept = sorted(path.name for path in earlier if path.suffix not in (".log", ".jsonl"))
    if kept and not overwrite:
        raise OutputError(
            f"{folder} holds an earlier run ({', '.join(kept[:3])}): choose another --output-dir, or replace it "
            "with --overwrite."
        )
    with errors_for_people(folder):
        for path in earlier:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def refuse_without_room(plan: Plan, config: TrainConfig) -> None:
    """Raises OutputError before the first step rather than after the first epoch."""
    needed = plan.checkpoint_size * (config.num_epochs + 1)
    free = shutil.disk_usage(config.output_dir).free
    if free < needed:
        raise OutputError(
            f"{config.output_dir} has {free / 1e9:.1f} GB free, and {config.num_epochs} checkpoints with the best "
            f"one take {needed / 1e9:.1f} GB. Free some, choose another --output-dir, give fewer --num-epochs, or "
            "halve the files with --save-dtype bfloat16."
        )


@contextmanager
def recorded(run: TrainedRun, facts: dict[str, Any], log: RunLog) -> Iterator[None]:
    """run.json says how the run ended, whatever ended it; the log, what came of it."""
    began = time.perf_counter()
    status = "failed"
    try:
        yield
        status = "finished"
    except StoppedError as stopped:
        status = "stopped"
        log.line(f"{stopped}; {_left(run)}")
        raise
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        facts |= {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory()}
        record(run, facts, status)
    _log_outcome(log, run, facts["seconds"])


def record(run: TrainedRun, facts: dict[str, Any], status: str) -> None:
    """Writes run.json as things stand."""
    outcome = {
        "status": status,
        "evaluations": [asdict(evaluation) for evaluation in run.evaluations],
        "checkpoints": [path.name for path in run.checkpoints],
        "best_checkpoint": run.best_checkpoint.name if run.best_checkpoint else None,
    }
    write_run(run.output_dir, {**facts, **outcome})


def keep(
    run: TrainedRun, event: Evaluation | EpochEnd, config: TrainConfig, processes: Processes, log: RunLog
) -> None:
    """checkpoint-best after an evaluation that is the best so far, checkpoint-epoch-N after each epoch. The first
    rank writes; all must call it."""
    best = run.output_dir / "checkpoint-best"
    if isinstance(event, Evaluation):
        run.evaluations.append(event)
        if event.best and event.step:
            _save(run, best, config, processes, asdict(event))
            run.best_checkpoint = best
        return
    folder = run.output_dir / f"checkpoint-epoch-{event.epoch}"
    latest = run.evaluations[-1] if run.evaluations else None
    if latest is not None and latest.best:  # the evaluation at the end of this epoch
        if processes.is_first:
            link_checkpoint(best, folder)
    else:
        _save(run, folder, config, processes, {**asdict(event), "loss": latest.loss if latest else None})
    run.checkpoints.append(folder)
    log.line(f"saved {folder}")


def _save(
    run: TrainedRun, folder: Path, config: TrainConfig, processes: Processes, facts: dict[str, object]
) -> None:
    assert run.model is not None
    model, tokenizer = run.model.model, run.model.tokenizer
    state = processes.state_to_save(model)
    dtype = torch.bfloat16 if config.save_dtype == "bfloat16" else torch.float32
    if processes.is_first:
        save_checkpoint(model, tokenizer, folder, dtype=dtype, facts=facts, state=state)


def _left(run: TrainedRun) -> str:
    names = [path.name for path in (*run.checkpoints, run.best_checkpoint) if path is not None]
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
