"""A run's folder, read back: run.json, metrics.jsonl, and what a report needs besides."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handspun.errors import OutputError
from handspun.files import read_json_object
from handspun.report.html.series import Metrics, read_metrics

REPORT = "report.html"
KEPT = "report_data.json"
"""What a report needs besides: answers, lengths, texts and losses of rows, fingerprints of the model."""


@dataclass(frozen=True)
class RunFiles:
    """What a run left, as it stands in its files. kept: of report_data.json, {} where there is none."""

    folder: Path
    facts: dict[str, Any]
    metrics: Metrics
    kept: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name, for titles."""
        return self.folder.name or str(self.folder.absolute().name)


def is_report(file: Path) -> bool:
    """Return whether the page says that Handspun made it."""
    if file.is_symlink() or not file.is_file():
        return False
    with file.open("rb") as opened:
        return b'<meta name="generator" content="Handspun ' in opened.read(4096)


def read_run(folder: Path) -> RunFiles:
    """The files of a run's folder. Raises OutputError if it is none."""
    facts = _read(folder / "run.json")
    if facts is None:
        raise OutputError(
            f"{folder} holds no run.json: expected the --output-dir of a handspun train, after its first "
            "evaluation or epoch."
        )
    missing = [name for name in ("config", "data", "plan", "environment", "status") if name not in facts]
    if missing:
        raise OutputError(
            f"{folder / 'run.json'} lacks {', '.join(missing)}: another program wrote it, or changed it."
        )
    return RunFiles(folder, facts, read_metrics(folder / "metrics.jsonl"), _read(folder / KEPT) or {})


def read_kept(folder: Path) -> dict[str, Any]:
    """Return what has been kept for the report so far; {} where it is damaged, since it can be had again."""
    kept = read_json_object(folder / KEPT) or {}
    kinds = {"model": dict, "lengths": dict, "accounted": dict, "prompts": list, "before": dict}
    is_whole = all(isinstance(kept.get(name), kind) for name, kind in kinds.items())
    return kept if is_whole and all(isinstance(prompt, str) for prompt in kept["prompts"]) else {}


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{file} cannot be read: {error}. Was it changed by hand?") from error
    if not isinstance(content, dict):
        raise OutputError(f"{file} holds {type(content).__name__}, where an object was expected.")
    return content
