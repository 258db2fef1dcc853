"""Where an unfinished run resumes, and whether it is the same run."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from handspun.config import TrainConfig, option_name
from handspun.display import logger
from handspun.errors import ConfigError, OutputError
from handspun.files import from_json
from handspun.models.fingerprints import BASE_WEIGHTS
from handspun.runs.incidents import Incident
from handspun.runs.record import INCIDENTS, RUN_FILE, RunRecord, is_finished, read_record
from handspun.training.checkpoint import (
    TRAINING_STATE,
    find_corruption,
    is_checkpoint_name,
    keep_aside,
    read_facts,
    remove_checkpoint,
    step_of,
    unknown_files,
)
from handspun.training.loop import Evaluation

_IGNORED_ON_RESUME = {
    *("output_dir", "overwrite", "resume", "dry_run", "save_steps", "save_minutes", "keep_last"),
    *("sample_answers", "sample_prompts", "sample_every", "report_rows", "strict", "log_to"),
}
"""Options that do not affect the weights."""
_CHANGEABLE_ON_RESUME = {"on_nonfinite", "max_skipped_steps"}
"""Options that may change on resume: they did not affect the steps that are done."""
_AFFECTS_ROUNDING = {"threads", "max_tokens", "device", "batching", "activation_checkpointing", "shard"}
"""Options that affect only the rounding: a change is logged and recorded."""
_ROW_OPTIONS = {"data", "eval_data", "limit"}
"""Which rows to read; their content shows whether they are the same."""

_DEFAULTS = {field.name: field.default for field in fields(TrainConfig)}

BEST = "checkpoint-best"


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """What a checkpoint's state.json holds: where the run was, and its record then."""

    step: int
    skipped: int
    losses: list[float]
    max_tokens: int
    evaluations: list[Evaluation]
    incidents: list[Incident] = field(metadata=INCIDENTS)
    checkpoints: list[str]
    best_checkpoint: bool
    run: RunRecord


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from, and what was saved with it. Only the first rank has the folder."""

    state: SavedState
    folder: Path | None = None

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self.state.step


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Return whatever has the name that a run gives to a checkpoint."""
    return sorted(path for path in output_dir.glob("checkpoint-*") if is_checkpoint_name(path.name))


def resumable(output_dir: Path) -> list[Path]:
    """Return the folder's checkpoints that have a training state and manifests, the newest first."""
    steps: dict[Path, int] = {}
    for folder in checkpoints_in(output_dir):
        step = step_of(folder / TRAINING_STATE)
        if step is not None and step_of(folder) is not None and not folder.is_symlink():
            steps[folder] = step
    return sorted(steps, key=lambda folder: steps[folder], reverse=True)


def find_resume_point(output_dir: Path) -> tuple[ResumePoint | None, list[str]]:
    """Return the newest one whose files are as they were saved, and what is wrong with newer ones.

    Raises OutputError if another version of Handspun saved it.
    """
    problems = list[str]()
    for folder in resumable(output_dir):
        problem = find_corruption(folder) or find_corruption(folder / TRAINING_STATE)
        if problem is None:
            try:
                return ResumePoint(_saved_state(folder / TRAINING_STATE), folder), problems
            except ValueError as error:
                problem = f"{folder / TRAINING_STATE} {error}"
        problems.append(f"{problem}: {folder.name} is not used, but the checkpoint before it")
    return None, problems


def _saved_state(folder: Path) -> SavedState:
    """Return a training state's record. Raises ValueError if it is damaged, OutputError for another version."""
    state = from_json(SavedState, read_facts(folder))
    if state.run.seconds is None or state.run.dtype is None:
        raise ValueError("lacks run.seconds or run.dtype")
    if not all(map(is_checkpoint_name, state.checkpoints)):
        raise ValueError("names checkpoints that are none")
    return state


def unfinished_run(output_dir: Path) -> tuple[RunRecord, ResumePoint | None] | None:
    """Return the record of an unfinished run, and where it resumes, if it has saved.

    If run.json is missing or damaged, the checkpoint's copy is used. None if there is no run, if it has finished,
    or if it left neither record nor checkpoints. Raises OutputError if none of its checkpoints can be used.
    """
    if is_finished(output_dir):
        return None
    record = read_record(output_dir)
    point, problems = find_resume_point(output_dir)
    if point is None:
        if problems:
            raise OutputError(
                f"{output_dir} holds an unfinished run, but none of its checkpoints is intact:\n  "
                + "\n  ".join(problems)
                + f"\nMove its {'checkpoint' if len(problems) == 1 else 'checkpoints'} away to begin again, "
                "or choose "
                "another --output-dir."
            )
        return None if isinstance(record, str) else (record, None)
    for problem in problems:
        logger.warning(problem)
    if not isinstance(record, str):
        return record, point
    assert point.folder is not None
    logger.warning(f"{output_dir / RUN_FILE} {record}: its content is taken from {point.folder.name}")
    return point.state.run, point


def make_way(output_dir: Path, point: ResumePoint) -> None:
    """Handle the checkpoints that the run has besides the one that it resumes from.

    Checkpoints of later steps are deleted: their steps are computed again. A checkpoint that is damaged, or that
    this run did not save, is renamed. Raises OutputError if a damaged one could not be made again.
    """
    assert point.folder is not None
    _check_undamaged(output_dir, point)
    kept = {point.folder.name, *point.state.checkpoints, BEST}
    for folder in checkpoints_in(output_dir):
        step = step_of(folder)
        if folder.name in kept or (step is not None and step <= point.step and find_corruption(folder) is None):
            continue
        states = [folder, folder / TRAINING_STATE] if (folder / TRAINING_STATE).exists() else [folder]
        if unknown_files(folder) or any(map(find_corruption, states)):
            place = keep_aside(folder, "damaged")
            logger.warning(f"{folder} is damaged or from another run: it is now {place.name}")
        else:
            remove_checkpoint(folder)


def _check_undamaged(output_dir: Path, point: ResumePoint) -> None:
    names = [*point.state.checkpoints, *([BEST] if point.state.best_checkpoint else [])]
    for folder in (output_dir / name for name in names):
        problem = find_corruption(folder)
        if not folder.exists():
            logger.warning(f"{folder} no longer exists: the run continues without it")
        elif problem and folder.name == BEST and _is_made_again(output_dir, point):
            logger.warning(f"{problem}: it is {keep_aside(folder, 'damaged').name} now, and is made again")
        elif problem:
            raise OutputError(
                f"{problem}. It was saved before step {point.step}, where the run goes on, so it is not made "
                "again. "
                f"Move {folder} away to continue without it."
            )


def _is_made_again(output_dir: Path, point: ResumePoint) -> bool:
    """Return whether the run had a better evaluation after the point, which will come again."""
    record = read_record(output_dir)
    return isinstance(record, RunRecord) and any(one.best and one.step > point.step for one in record.evaluations)


def check_same_run(
    earlier: RunRecord,
    record: RunRecord,
    output_dir: str,
    *,
    has_saved: bool = True,
) -> None:
    """Raise ConfigError with all differences if these are not records of the same run.

    has_saved: whether there is a checkpoint. A checkpoint of full fine-tuning holds all weights, so the base
    model's no longer matter.
    """
    different = [
        f"  {what}: {before} then, {now} now"
        for what, before, now in _differences(earlier, record)
        if what not in map(option_name, _AFFECTS_ROUNDING)
        and not (what == BASE_WEIGHTS and has_saved and not record.config["lora"])
    ]
    if different:
        raise ConfigError(
            f"{output_dir} holds an unfinished run, but this run differs:\n" + "\n".join(different) + "\n"
            "To resume it, give the options from then; to start over, choose another --output-dir, or give "
            "--overwrite."
        )
    if earlier.fingerprints is None:
        logger.warning(
            "run.json has no fingerprints of model, tokenizer and chat template, since an earlier version "
            "wrote it: "
            "that they are the same is taken on trust"
        )


def check_options_apply(finished: RunRecord, config: TrainConfig) -> None:
    """Raise ConfigError if the finished run had other options, as far as options tell without data and model."""
    now = {**asdict(config), "learning_rate": config.peak_learning_rate}
    if config.max_length is None:
        del now["max_length"]
    if different := [
        (what, then, is_now)
        for what, then, is_now in _option_differences(finished.config, now)
        if what not in map(option_name, _AFFECTS_ROUNDING)
    ]:
        raise ConfigError(
            f"{config.output_dir} holds a finished run, but this run differs:\n"
            + "\n".join(f"  {what}: {then} then, {is_now} now" for what, then, is_now in different)
            + "\nA finished run cannot be resumed. Choose another --output-dir; to train its model further, begin "
            "a new run "
            "with one of its checkpoints as --model."
        )


def execution_changes(earlier: RunRecord, record: RunRecord) -> dict[str, list[Any]]:
    """Return what may change the rounding, by name: before and now. Without any, weights are bit-identical."""
    changes: dict[str, list[Any]] = {
        what: [before, now]
        for what, before, now in _differences(earlier, record)
        if what in map(option_name, _AFFECTS_ROUNDING)
    }
    for name in ("machine", "cores", "system", "python"):
        _note(changes, name, getattr(earlier.environment, name), getattr(record.environment, name))
    for name, version in record.environment.versions.items():
        _note(changes, name, earlier.environment.versions.get(name), version)
    for name in ("processes", "threads"):
        before, now = getattr(earlier, name), getattr(record, name)
        if before is not None and now is not None:
            _note(changes, name, before, now)
    return changes


def _note(changes: dict[str, list[Any]], name: str, before: object, now: object) -> None:
    if before != now:
        changes[name] = [before, now]


def _differences(earlier: RunRecord, record: RunRecord) -> Iterator[tuple[str, Any, Any]]:
    yield from _option_differences(earlier.config, record.config)
    for name in ("train", "held_out"):
        before, now = (getattr(one.data, name) for one in (earlier, record))
        rows = [some.sha256 if some else "none" for some in (before, now)]
        if rows[0] != rows[1]:
            yield f"{name.replace('_', '-')} rows (sha256)", rows[0][:16], rows[1][:16]
    before, now = earlier.fingerprints or {}, record.fingerprints or {}
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            yield name, before[name][:16], now[name][:16]


def _option_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the options that differ and matter. One that an earlier version did not have had its default then."""
    for name, value in now.items():
        then = before.get(name, _DEFAULTS.get(name))
        if _plain(then) != _plain(value) and name not in _IGNORED_ON_RESUME | _ROW_OPTIONS | _CHANGEABLE_ON_RESUME:
            yield option_name(name), then, value


def _plain(value: Any) -> Any:
    """Return the value as JSON gives it back, which has no tuples."""
    return list(value) if isinstance(value, tuple) else value
