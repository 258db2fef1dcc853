"""Where an unfinished run resumes, and whether it is the same run."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from handspun.config import TrainConfig, option_name
from handspun.display import logger
from handspun.errors import ConfigError, OutputError
from handspun.files import read_json_object
from handspun.models.fingerprints import BASE_WEIGHTS
from handspun.runs.incidents import incident_from
from handspun.runs.record import RUN_FILE
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
_PATH_OPTIONS = {"data", "eval_data"}
"""Where rows are; their content shows whether they are the same."""

_DEFAULTS = {field.name: field.default for field in fields(TrainConfig)}

BEST = "checkpoint-best"


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from, and the facts that were saved with it. Only the first rank has the folder."""

    facts: dict[str, Any]
    folder: Path | None = None

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return int(self.facts["step"])


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
            facts = read_facts(folder / TRAINING_STATE)
            problem = _state_problem(facts)
            if problem is None:
                return ResumePoint(facts, folder), problems
            problem = f"{folder / TRAINING_STATE} {problem}"
        problems.append(f"{problem}: {folder.name} is not used, but the checkpoint before it")
    return None, problems


def finished_run(output_dir: Path) -> dict[str, Any] | None:
    """Return run.json of a run that came to its end; None if there is none."""
    facts = read_json_object(output_dir / RUN_FILE)
    return facts if facts is not None and facts.get("status") == "finished" else None


def unfinished_run(output_dir: Path) -> tuple[dict[str, Any], ResumePoint | None] | None:
    """Return the record of an unfinished run, and where it resumes, if it has saved.

    If run.json is missing or damaged, the checkpoint's copy is used. None if there is no run, if it has finished,
    or if it left neither facts nor checkpoints. Raises OutputError if none of its checkpoints can be used.
    """
    if finished_run(output_dir) is not None:
        return None
    file = output_dir / RUN_FILE
    facts = read_json_object(file)
    reason = record_problem(facts) if file.exists() else "is missing"
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
        return None if facts is None or reason else (facts, None)
    for problem in problems:
        logger.warning(problem)
    if facts is not None and not reason:
        return facts, point
    assert point.folder is not None
    logger.warning(f"{file} {reason}: its content is taken from {point.folder.name}")
    return dict(point.facts["run"]), point


def make_way(output_dir: Path, point: ResumePoint) -> None:
    """Handle the checkpoints that the run has besides the one that it resumes from.

    Checkpoints of later steps are deleted: their steps are computed again. A checkpoint that is damaged, or that
    this run did not save, is renamed. Raises OutputError if a damaged one could not be made again.
    """
    assert point.folder is not None
    _check_undamaged(output_dir, point)
    kept = {point.folder.name, *point.facts["checkpoints"], BEST}
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
    names = [*point.facts["checkpoints"], *([BEST] if point.facts["best_checkpoint"] else [])]
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
    facts = read_json_object(output_dir / RUN_FILE) or {}
    later = facts.get("evaluations")
    return isinstance(later, list) and any(
        isinstance(one, dict) and one.get("best") is True and isinstance(step := one.get("step"), int)
        and step > point.step for one in later
    )  # fmt: skip


def check_same_run(
    earlier: dict[str, Any],
    facts: dict[str, Any],
    output_dir: str,
    *,
    has_saved: bool = True,
) -> None:
    """Raise ConfigError with all differences if these are not the facts of the same run.

    has_saved: whether there is a checkpoint. A checkpoint of full fine-tuning holds all weights, so the base
    model's no longer matter.
    """
    different = [
        f"  {what}: {before} then, {now} now"
        for what, before, now in _differences(earlier, facts)
        if what not in map(option_name, _AFFECTS_ROUNDING)
        and not (what == BASE_WEIGHTS and has_saved and not facts["config"]["lora"])
    ]
    if different:
        raise ConfigError(
            f"{output_dir} holds an unfinished run, but this run differs:\n" + "\n".join(different) + "\n"
            "To resume it, give the options from then; to start over, choose another --output-dir, or give "
            "--overwrite."
        )
    if "fingerprints" not in earlier:
        logger.warning(
            "run.json has no fingerprints of model, tokenizer and chat template, since an earlier version "
            "wrote it: "
            "that they are the same is taken on trust"
        )


def check_options_apply(finished: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise ConfigError if the finished run had other options, as far as options tell without data and model."""
    before = finished.get("config")
    now = {**asdict(config), "learning_rate": config.peak_learning_rate}
    if config.max_length is None:
        del now["max_length"]
    if different := [
        (what, then, is_now)
        for what, then, is_now in _option_differences(before if isinstance(before, dict) else {}, now)
        if what not in map(option_name, _AFFECTS_ROUNDING)
    ]:
        raise ConfigError(
            f"{config.output_dir} holds a finished run, but this run differs:\n"
            + "\n".join(f"  {what}: {then} then, {is_now} now" for what, then, is_now in different)
            + "\nA finished run cannot be resumed. Choose another --output-dir; to train its model further, begin "
            "a new run "
            "with one of its checkpoints as --model."
        )


def execution_changes(earlier: dict[str, Any], facts: dict[str, Any]) -> dict[str, list[Any]]:
    """Return what may change the rounding, by name: before and now. Without any, weights are bit-identical."""
    changes: dict[str, list[Any]] = {
        what: [before, now]
        for what, before, now in _differences(earlier, facts)
        if what in map(option_name, _AFFECTS_ROUNDING)
    }
    for name in ("machine", "cores", "system", "python"):
        _note(changes, name, earlier["environment"].get(name), facts["environment"].get(name))
    for name, version in facts["environment"]["versions"].items():
        _note(changes, name, earlier["environment"]["versions"].get(name), version)
    for name in ("processes", "threads"):
        if name in earlier and name in facts:
            _note(changes, name, earlier[name], facts[name])
    return changes


def record_problem(facts: Mapping[str, Any] | None) -> str | None:
    """Return what is wrong with a run.json, in words; None if a run can resume with it."""
    if facts is None:
        return "holds no JSON object"
    for name, kind in (("config", dict), ("data", dict), ("environment", dict), ("started", str)):
        if not isinstance(facts.get(name), kind):
            return f"lacks {name!r}, or has something else there"
    if not isinstance(facts["environment"].get("versions"), dict):
        return "lacks the versions, or has something else there"
    for name in ("train", "held_out"):
        some = facts["data"].get(name)
        if name == "held_out" and some is None:
            continue
        if not isinstance(some, dict) or not isinstance(some.get("sha256"), str):
            return f"lacks the fingerprint of the {name.replace('_', '-')} rows, or has something else there"
    if not isinstance(facts.get("resumed", []), list) or not isinstance(facts.get("fingerprints", {}), dict):
        return "has something else where 'resumed' or 'fingerprints' belong"
    return None


def _state_problem(facts: Mapping[str, Any]) -> str | None:
    """Return what is wrong with what a training state holds, in words."""
    kinds = {
        "step": int,
        "skipped": int,
        "losses": list,
        "max_tokens": int,
        "evaluations": list,
        "incidents": list,
    }
    for name, kind in {**kinds, "checkpoints": list, "best_checkpoint": bool, "run": dict}.items():
        if not isinstance(facts.get(name), kind):
            return f"lacks {name!r}, or has something else there"
    if reason := record_problem(facts["run"]):
        return reason
    if not isinstance(facts["run"].get("seconds"), int | float) or not isinstance(facts["run"].get("dtype"), str):
        return "lacks 'seconds' or 'dtype', or has something else there"
    names = {field.name for field in fields(Evaluation)}
    if not all(isinstance(one, dict) and set(one) == names for one in facts["evaluations"]):
        return "holds evaluations of another kind"
    try:
        list(map(incident_from, facts["incidents"]))
    except (TypeError, KeyError, ValueError):
        return "holds incidents of another kind"
    if not all(isinstance(name, str) and is_checkpoint_name(name) for name in facts["checkpoints"]):
        return "names checkpoints that are none"
    return None


def _note(changes: dict[str, list[Any]], name: str, before: object, now: object) -> None:
    if before != now:
        changes[name] = [before, now]


def _differences(earlier: dict[str, Any], facts: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    yield from _option_differences(earlier["config"], facts["config"])
    for name in ("train", "held_out"):
        sets = [which["data"][name] or {} for which in (earlier, facts)]
        rows = [some.get("sha256", "none") for some in sets]
        if rows[0] != rows[1]:
            yield f"{name.replace('_', '-')} rows (sha256)", rows[0][:16], rows[1][:16]
    before, now = earlier.get("fingerprints", {}), facts.get("fingerprints", {})
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            yield name, str(before[name])[:16], str(now[name])[:16]


def _option_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the options that differ and matter. One that an earlier version did not have had its default then."""
    for name, value in now.items():
        then = before.get(name, _DEFAULTS.get(name))
        if (
            _plain(then) != _plain(value)
            and name not in _IGNORED_ON_RESUME | _PATH_OPTIONS | _CHANGEABLE_ON_RESUME
        ):
            yield option_name(name), then, value


def _plain(value: Any) -> Any:
    """Return the value as JSON gives it back, which has no tuples."""
    return list(value) if isinstance(value, tuple) else value
