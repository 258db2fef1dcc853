"""run.json: what was trained on what, with what, and what came of it."""

import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from handspun.config import TrainConfig
from handspun.data.example_arrays import learned_tokens_of
from handspun.data.prepare import ExampleSet
from handspun.report.environment import environment
from handspun.report.html.command import options_given
from handspun.training.checkpoint import errors_for_people


def run_facts(
    config: TrainConfig, training: ExampleSet, held_out: ExampleSet | None, max_length: int
) -> dict[str, Any]:
    """What is known before the model is."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": {
            **asdict(config),
            "learning_rate": config.peak_learning_rate,
            "max_length": max_length,
        },
        "given": options_given(config),
        "data": {
            "train": _set_facts(training),
            "held_out": _set_facts(held_out) if held_out else None,
        },
        "environment": environment(),
    }


def write_run(folder: Path, facts: dict[str, Any]) -> None:
    """Replaces run.json."""
    write_json(folder / "run.json", facts)


def write_json(file: Path, facts: dict[str, Any]) -> None:
    """Replaces the file in one move, so that a reader never sees half of it. Raises OutputError."""
    partial = file.with_name(f".{file.name}.partial")
    with errors_for_people(file):
        partial.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8", "replace")
        os.replace(partial, file)


def _set_facts(examples: ExampleSet) -> dict[str, Any]:
    return {
        "sha256": examples.fingerprint,
        "examples": len(examples.examples),
        "tokens": len(examples.examples.input_ids),
        "learned_tokens": learned_tokens_of(examples.examples),
        "rows": asdict(examples.account),
    }
