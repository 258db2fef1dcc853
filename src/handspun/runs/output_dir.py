"""A run's output folder: its lock, what may be replaced in it, and the run's record."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from handspun.config import TrainConfig
from handspun.data.dataset import Dataset
from handspun.display import count_of, logger
from handspun.errors import ConfigError, OutputError, StoppedError, TrainingError
from handspun.files import exclusive, output_errors, readable_size
from handspun.models.load import ChatModel, load
from handspun.preflight.ways import Way
from handspun.runs.incidents import Incident, write_batch
from handspun.runs.log import RunLog
from handspun.runs.metrics import KEPT, METRICS, REPORT
from handspun.runs.record import RUN_FILE, RunRecord, is_finished, peak_memory, read_record
from handspun.runs.replacing import (
    LOG,
    WORK,
    check_no_foreign_files,
    commit,
    earlier_run,
    leave,
    move_aside,
    tidy,
    undo,
)
from handspun.runs.resume import (
    ResumePoint,
    check_options_apply,
    checkpoints_in,
    unfinished_run,
)
from handspun.training.batching import epochs_of_run
from handspun.training.distributed import Distributed
from handspun.training.guards import SkippedStep
from handspun.training.loop import Evaluation
from handspun.training.memory import Plan, disk_at_most


@dataclass(repr=False)
class TrainedRun:
    """The result of a run: its folder, checkpoints, held-out losses, incidents, and the model."""

    output_dir: Path
    plan: Plan
    """Steps, tokens, and predicted memory."""
    model_in_memory: ChatModel | None = None
    """None after a dry run, after a run that had finished earlier, and after a sharded run."""
    checkpoints: list[Path] = field(default_factory=list)
    """One per epoch."""
    step_checkpoints: list[Path] = field(default_factory=list)
    """Between epochs, to resume from."""
    best_checkpoint: Path | None = None
    """The one with the lowest held-out loss."""
    evaluations: list[Evaluation] = field(default_factory=list)
    """Losses on the held-out rows."""
    incidents: list[Incident] = field(default_factory=list)
    """Skipped steps, spikes of the loss, and micro-batches that did not fit into memory."""
    ways: list[Way] = field(default_factory=list)
    """The ways to train that are possible, with predicted time and memory. Only after a dry run."""

    @property
    def model(self) -> ChatModel:
        """The trained model, read from the last epoch's checkpoint if it is not in memory. Raises ConfigError."""
        if self.model_in_memory is None:
            if not self.checkpoints:
                raise ConfigError(
                    f"the run in {self.output_dir} has saved no model: it was a dry run, or has ended early."
                )
            self.model_in_memory = load(str(self.checkpoints[-1]))
        return self.model_in_memory

    def __repr__(self) -> str:
        """Return one line: the folder, the checkpoints, and the best held-out loss."""
        losses = [evaluation.loss for evaluation in self.evaluations]
        best = f", best held-out loss {min(losses):.4f}" if losses else ""
        return f"TrainedRun({str(self.output_dir)!r}, {count_of(len(self.checkpoints), 'checkpoint')}{best})"


@dataclass(frozen=True)
class Prepared:
    """What an output folder means for the run that is about to start in it.

    Attributes:
        earlier: the record of the unfinished run that resumes.
        point: the checkpoint that it resumes from.
        replaces: files of an earlier run that this one replaces.
        finished: the record of a run that has nothing left to do.
    """

    earlier: RunRecord | None = None
    point: ResumePoint | None = None
    replaces: list[Path] = field(default_factory=list)
    finished: RunRecord | None = None

    @property
    def resumed_at(self) -> int | None:
        """The step that the run resumes after; None for a new run."""
        return None if self.earlier is None else self.point.step if self.point else 0


@contextmanager
def lock_output_dir(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on the output folder. The OS releases it if the process dies.

    Raises OutputError if another run has it, or if there can be no such folder.
    """
    with ExitStack() as stack:
        with output_errors(folder):
            _check_name(folder)
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            stack.callback(_leave, folder, made)
            stack.enter_context(exclusive(folder / WORK, busy=lambda owner: (
                f"another run is writing into {folder}{owner}: wait for its end, or choose another --output-dir."
            )))  # fmt: skip
        yield


def _check_name(folder: Path) -> None:
    name = str(folder.absolute())
    if "\0" in name or any("\ud800" <= character <= "\udfff" for character in name):
        raise OutputError(
            f"--output-dir {name!r} is not valid UTF-8, which the libraries that write models need (expected "
            "a name "
            "that can be printed). Choose another --output-dir."
        )
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: choose another --output-dir.")


def _leave(folder: Path, made: Sequence[Path]) -> None:
    """Remove the work folder, and the folders that were made for a run that wrote nothing."""
    with suppress(OSError):
        leave(folder)
        for path in made:
            path.rmdir()


def prepare_output(folder: Path, config: TrainConfig) -> Prepared:
    """Return what the output folder means for this run. Nothing is removed yet but leftovers.

    Raises OutputError if an earlier run may not be replaced, or if something else is in the way.
    """
    tidy(folder)
    begins_again = f"the run in {folder} was ended before its first checkpoint: it starts over"
    if not config.overwrite and config.resume is not False:
        found = unfinished_run(folder)
        if found is not None:
            check_no_foreign_files(folder, names=[REPORT])
            if found[1] is None:
                logger.info(begins_again)
            return Prepared(*found)
    record, has_finished = read_record(folder), is_finished(folder)
    if config.resume and has_finished:
        if isinstance(record, str):
            raise OutputError(f"{folder / RUN_FILE} {record}. Choose another --output-dir.")
        check_options_apply(record, config)
        return Prepared(finished=record)
    check_no_foreign_files(folder)
    earlier = earlier_run(folder)
    has_begun = bool(earlier) and not has_finished and not checkpoints_in(folder)
    if config.resume and not has_begun:
        raise OutputError(
            f"{folder} holds no unfinished run to resume. Leave --resume out to begin one (the same "
            "command then "
            "resumes it by itself), or name the run's --output-dir."
        )
    # Log and answers alone are left by a run that never began: its data or its model could not be used.
    kept = sorted(path.name for path in earlier if path.name not in (LOG, METRICS, KEPT))
    record_is_lost = has_begun and isinstance(record, str)
    if kept and not config.overwrite and not record_is_lost:
        raise OutputError(
            f"{folder} holds an earlier run ({', '.join(kept[:3])}): choose another --output-dir, or replace it "
            "with --overwrite."
        )
    if config.resume or (kept and not config.overwrite):
        logger.info(begins_again)
    return Prepared(replaces=[] if {path.name for path in earlier} <= {LOG, METRICS} else earlier)


def finished_earlier(folder: Path, record: RunRecord) -> TrainedRun:
    """Return the result of a run that finished before, without its model. Raises OutputError."""
    if record.plan is None:
        raise OutputError(f"{folder / RUN_FILE} lacks plan. Choose another --output-dir.")
    return TrainedRun(
        folder,
        record.plan,
        checkpoints=[folder / name for name in record.checkpoints],
        best_checkpoint=folder / record.best_checkpoint if record.best_checkpoint else None,
        evaluations=record.evaluations,
        incidents=record.incidents,
    )


@contextmanager
def in_place_of(replaces: list[Path], run: TrainedRun, record: RunRecord, log: RunLog) -> Iterator[None]:
    """Move an earlier run aside for this one, and this one's log into the folder.

    `drop_replaced` removes the earlier run once this one has saved. It comes back if this run ends before its
    first step, whatever the error.
    """
    folder = run.output_dir
    if not replaces:
        log.move_to(folder)
        yield
        return
    move_aside(folder, replaces)
    try:
        log.move_to(folder)
        write_record(run, record, "running")
        place = commit(folder)
        logger.info(f"the earlier run is in {place} until this one has saved a checkpoint to resume from")
        yield
    except BaseException:
        if not log.steps and not run.incidents:
            undo(folder)
        raise


def check_disk_space(plan: Plan, config: TrainConfig, replaces: Sequence[Path] = ()) -> None:
    """Raise OutputError before the first step rather than after the first epoch.

    replaces: files that are removed once a first checkpoint is saved.
    """
    needed = disk_at_most(plan, config)
    free = shutil.disk_usage(config.output_dir).free
    first = min(needed, plan.checkpoint_size * 2 + plan.training_state_size)
    if free >= needed or first <= free >= needed - _size_of(replaces):
        return
    epochs = epochs_of_run(plan.examples, config)
    meanwhile = " The earlier run stays until the first one is saved." if replaces else ""
    raise OutputError(
        f"{config.output_dir} has {readable_size(free)} free, and {epochs} checkpoints with the best one, "
        f"{config.keep_last} of them with what resuming needs, take {readable_size(needed)}.{meanwhile} Free "
        "some, choose another --output-dir, give fewer --num-epochs or --keep-last 1, or halve the files with "
        "--save-dtype bfloat16."
    )


def _size_of(paths: Sequence[Path]) -> int:
    """Return bytes on the disk; a file with several names counts once."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    return sum({(status.st_dev, status.st_ino): status.st_size for status in map(os.stat, files)}.values())


@contextmanager
def track_status(run: TrainedRun, record: RunRecord) -> Iterator[None]:
    """Record in run.json how the run ended, whatever ended it."""
    began, before = time.perf_counter(), record.seconds or 0.0
    write_record(run, record, "running")
    status = "failed"
    try:
        yield
        status = "finished"
    except StoppedError as stopped:
        status = "stopped"
        logger.info(f"{stopped}; {_left(run)}. The same command resumes from there.")
        raise
    except TrainingError as error:
        logger.error(str(error), extra={"only_in_file": True})  # the caller shows it
        logger.info(_left(run))
        raise
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        record.seconds = before + time.perf_counter() - began
        record.peak_memory_bytes = peak_memory()
        write_record(run, record, status)


def write_record(run: TrainedRun, record: RunRecord, status: str) -> None:
    """Write run.json as things stand."""
    record.status, record.evaluations, record.incidents = status, run.evaluations, run.incidents
    record.checkpoints = [path.name for path in run.checkpoints]
    record.best_checkpoint = run.best_checkpoint.name if run.best_checkpoint else None
    record.write(run.output_dir)


def record_incident(
    run: TrainedRun,
    incident: Incident,
    config: TrainConfig,
    training: Dataset,
    processes: Distributed,
) -> None:
    """Record an incident. Write the rows of a step that was skipped to a file."""
    run.incidents.append(incident)
    if isinstance(incident, SkippedStep) and processes.is_first:
        logger.info(write_batch(incident, config, training))


def _left(run: TrainedRun) -> str:
    kept = (*run.checkpoints, *run.step_checkpoints, run.best_checkpoint)
    names = [path.name for path in kept if path is not None]
    return f"{run.output_dir} holds {', '.join(names)}" if names else "no checkpoint was saved yet"
