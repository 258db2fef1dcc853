"""Where an unfinished run goes on, and whether it is the same run."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handspun.config import option_name
from handspun.errors import ConfigError
from handspun.training.checkpoint import TRAINING_STATE, damage, read_manifest, remove_checkpoint
from handspun.training.training_state import read_facts

_OF_THE_RUNNER = {
    *("output_dir", "overwrite", "resume", "dry_run", "save_steps", "save_minutes", "keep_last"),
    *("sample_answers", "sample_prompts", "sample_every", "report_rows", "strict", "log_to"),
}
"""Options that no weight depends on."""
_OF_STEPS_TO_COME = {"on_nonfinite", "max_skipped_steps"}
"""Options that the steps which are done did not meet: a run that stopped may go on with others."""
_OF_THE_EXECUTION = {"threads", "max_tokens", "device", "batching", "activation_checkpointing", "shard"}
"""Options that change nothing but the rounding: a change of one is said and recorded."""
_OF_THE_PLACE = {"data", "eval_data"}
"""Where rows lie; that they are the same is known from their content."""


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from, and what was known when it was saved. Only the first of several ranks has the
    folder."""

    facts: dict[str, Any]
    folder: Path | None = None

    @property
    def step(self) -> int:
        """Optimiser steps that are done."""
        return int(self.facts["step"])


def resumable(output_dir: Path) -> list[Path]:
    """The folder's checkpoints with a training state, the newest first."""
    steps: dict[Path, int] = {}
    for state in output_dir.glob(f"checkpoint-*/{TRAINING_STATE}"):
        manifest = read_manifest(state)
        if manifest is not None and read_manifest(state.parent) is not None:
            steps[state.parent] = int(manifest["step"])
    return sorted(steps, key=lambda folder: steps[folder], reverse=True)


def last_checkpoint(output_dir: Path, notice: Callable[[str], None]) -> ResumePoint | None:
    """The newest one whose files are as they were saved; `notice` is told of each that is not."""
    for folder in resumable(output_dir):
        problem = damage(folder) or damage(folder / TRAINING_STATE)
        if problem is None:
            return ResumePoint(read_facts(folder / TRAINING_STATE), folder)
        notice(f"{problem}: {folder.name} is not used, but the checkpoint before it")
    return None


def forget(output_dir: Path, *, after: Path | None) -> None:
    """Removes the checkpoints that were not good enough to go on from; their steps are made again."""
    folders = resumable(output_dir)
    for later in folders[: folders.index(after)] if after else folders:
        remove_checkpoint(later)


def unfinished_run(output_dir: Path) -> dict[str, Any] | None:
    """run.json of a run that did not come to its end; None if there is no run, or a finished one."""
    try:
        facts = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dict(facts) if facts.get("status") != "finished" else None


def refuse_another_run(earlier: dict[str, Any], facts: dict[str, Any], output_dir: str) -> None:
    """Raises ConfigError with all that is different, if these are not the facts of the same run."""
    different = [
        f"  {what}: {before} then, {now} now"
        for what, before, now in _differences(earlier, facts)
        if what not in map(option_name, _OF_THE_EXECUTION)
    ]
    if different:
        raise ConfigError(
            f"{output_dir} holds an unfinished run, and this is another one:\n" + "\n".join(different) + "\n"
            "To go on with it, give what was given then; to begin anew, choose another --output-dir, or give "
            "--overwrite."
        )


def execution_changes(earlier: dict[str, Any], facts: dict[str, Any]) -> dict[str, list[Any]]:
    """What can change the rounding, by name: before and now. Without any, the weights will be the same bits."""
    changes: dict[str, list[Any]] = {
        what: [before, now]
        for what, before, now in _differences(earlier, facts)
        if what in map(option_name, _OF_THE_EXECUTION)
    }
    for name in ("machine", "cores", "system", "python"):
        _note(changes, name, earlier["environment"].get(name), facts["environment"].get(name))
    for name, version in facts["environment"]["versions"].items():
        _note(changes, name, earlier["environment"]["versions"].get(name), version)
    for name in ("processes", "threads"):
        if name in earlier and name in facts:
            _note(changes, name, earlier[name], facts[name])
    return changes


def _note(changes: dict[str, list[Any]], name: str, before: object, now: object) -> None:
    if before != now:
        changes[name] = [before, now]


def _differences(earlier: dict[str, Any], facts: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name, now in facts["config"].items():
        before = earlier["config"].get(name)
        if before != now and name not in _OF_THE_RUNNER | _OF_THE_PLACE | _OF_STEPS_TO_COME:
            yield option_name(name), before, now
    for name in ("train", "held_out"):
        rows = [(which["data"][name] or {}).get("sha256", "none") for which in (earlier, facts)]
        if rows[0] != rows[1]:
            yield f"{name.replace('_', '-')} rows (sha256)", rows[0][:16], rows[1][:16]
