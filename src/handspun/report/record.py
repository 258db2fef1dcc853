"""run.json: what was trained on what, with what, and what came of it."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from handspun.config import TrainConfig
from handspun.data.example_arrays import learned_tokens_of
from handspun.data.prepare import ExampleSet
from handspun.files import output_errors, write_json
from handspun.report.environment import environment
from handspun.report.html.command import options_given

RUN_FILE = "run.json"


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
    """Replace run.json. Raises OutputError."""
    with output_errors(folder / RUN_FILE):
        write_json(folder / RUN_FILE, facts)


def _set_facts(examples: ExampleSet) -> dict[str, Any]:
    return {
        "sha256": examples.fingerprint,
        "examples": len(examples.examples),
        "tokens": len(examples.examples.input_ids),
        "learned_tokens": learned_tokens_of(examples.examples),
        "rows": asdict(examples.account),
    }
