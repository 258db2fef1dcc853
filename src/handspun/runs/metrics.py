"""metrics.jsonl as series, and a finished run's folder read back."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handspun.errors import OutputError
from handspun.files import read_json_object
from handspun.runs.record import RUN_FILE, RunRecord, read_record
from handspun.training.memory import Plan

MOST_POINTS = 400
"""Most points of a line: more cannot be told apart on a page."""

_NUMBERS = {
    "step": (
        *("total_steps", "epoch", "loss", "learning_rate", "grad_norm"),
        *("rows", "tokens", "learned_tokens", "computed_tokens", "seconds"),
    ),
    "evaluation": ("epoch", "loss", "learned_tokens", "best"),
    "samples": ("seconds",),
}

_SMOOTHED_FROM = 20
"""Fewest steps for which a smoothed line is drawn."""


@dataclass(frozen=True)
class Metrics:
    """Events in the order of their steps, each step once."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """A plotted line: (x, y) pairs under a name."""

    name: str
    x: list[float]
    y: list[float]


def read_metrics(file: Path) -> Metrics:
    """Return the events of a run's metrics.jsonl; none if there is no such file.

    A run that was killed and resumed may have logged a step twice; the later line belongs to the weights. Damaged
    lines, as a kill or a power cut leaves them, are skipped.
    """
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    samples: dict[int, dict[str, Any]] = {}
    for event in read_events(file):
        if event["event"] == "step":
            steps[event["step"]] = event
        elif event["event"] == "evaluation":
            evaluations[event["step"]] = event
        elif event["event"] == "samples":
            samples[event["step"]] = event
    return Metrics(*([found[step] for step in sorted(found)] for found in (steps, evaluations, samples)))


def read_events(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a metrics.jsonl, as far as a run writes such lines."""
    text = file.read_bytes().decode("utf-8", "replace") if file.is_file() else ""
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get("step"), int) and _is_whole(event):
            yield event


def _is_whole(event: dict[str, Any]) -> bool:
    """Return whether the event has the numbers that plots need."""
    names = _NUMBERS.get(str(event.get("event")), ())
    return isinstance(event.get("event"), str) and all(isinstance(event.get(name), int | float) for name in names)


def thinned(steps: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the steps in at most 400 groups of neighbors; each group becomes one point of a line."""
    size = max(-(-len(steps) // MOST_POINTS), 1)
    return [list(steps[start : start + size]) for start in range(0, len(steps), size)]


def loss_line(metrics: Metrics) -> Line:
    """Return the training loss: per group, the mean over its target tokens."""
    return _line("training", metrics, lambda group: _ratio(group, _loss_sum, _learned))


def held_out_line(metrics: Metrics) -> Line:
    """Return the held-out loss of each evaluation."""
    found = metrics.evaluations
    return Line("held out", [event["step"] for event in found], [event["loss"] for event in found])


def value_line(metrics: Metrics, key: str, name: str, *, scale: float = 1.0) -> Line:
    """Return a value of the steps times `scale`: per group, the largest. No points where it was not recorded."""
    known = Metrics([step for step in metrics.steps if step.get(key) is not None])
    return _line(name, known, lambda group: max(step[key] for step in group) * scale)


def rate_line(metrics: Metrics, key: str, name: str) -> Line:
    """Return a count per second: per group, its sum divided by the group's seconds."""
    return _line(name, metrics, lambda group: _ratio(group, lambda step: step[key], lambda step: step["seconds"]))


def smoothed(line: Line) -> Line | None:
    """Return the mean over a window of a twentieth of the line around each point; None for a short line."""
    if len(line.y) < _SMOOTHED_FROM:
        return None
    reach = max(len(line.y) // 40, 1)
    windows = [line.y[max(i - reach, 0) : i + reach + 1] for i in range(len(line.y))]
    return Line(f"{line.name}, smoothed", line.x, [sum(window) / len(window) for window in windows])


def epoch_ends(metrics: Metrics) -> list[int]:
    """Return the last step of each epoch but the last one."""
    pairs = zip(metrics.steps, metrics.steps[1:], strict=False)
    return [step["step"] for step, following in pairs if step["epoch"] != following["epoch"]]


def _line(name: str, metrics: Metrics, value: Any) -> Line:
    groups = thinned(metrics.steps)
    return Line(name, [group[-1]["step"] for group in groups], [value(group) for group in groups])


def _ratio(group: list[dict[str, Any]], above: Any, below: Any) -> float:
    return float(sum(map(above, group)) / sum(map(below, group)))


def _loss_sum(step: dict[str, Any]) -> float:
    return float(step["loss"] * step["learned_tokens"])


def _learned(step: dict[str, Any]) -> float:
    return float(step["learned_tokens"])


METRICS = "metrics.jsonl"
REPORT = "report.html"
KEPT = "report_data.json"
"""What else a report needs: answers, lengths, texts and losses of rows, fingerprints of the model."""
HARDEST = "hardest_rows.csv"
"""The training rows with the highest losses, to fix and train again."""
HELD_OUT = "held_out_rows.csv"
"""The rows that were held out of the training data, to evaluate on."""


@dataclass(frozen=True)
class RunFiles:
    """A run's files, read back. plan: the record's. kept: the content of report_data.json; {} if there is none."""

    folder: Path
    record: RunRecord
    plan: Plan
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
    """Return the files of a run's folder. Raises OutputError if it is not one."""
    file = folder / RUN_FILE
    if not file.exists():
        raise OutputError(
            f"{folder} holds no run.json: expected the --output-dir of a handspun train, after its first "
            "evaluation or epoch."
        )
    record = read_record(folder)
    if isinstance(record, str) or record.plan is None:
        problem = record if isinstance(record, str) else "lacks plan"
        raise OutputError(f"{file} {problem}. Did another program write or change it?")
    metrics, kept = read_metrics(folder / METRICS), _read(folder / KEPT) or {}
    return RunFiles(folder, record, record.plan, metrics, kept)


def read_kept(folder: Path) -> dict[str, Any]:
    """Return what was collected for the report so far; {} if it is damaged, since it can be collected again."""
    kept = read_json_object(folder / KEPT) or {}
    kinds = {
        "model": dict,
        "lengths": dict,
        "accounted": dict,
        "prompts": list,
        "before": dict,
        "row_answers": dict,
    }
    is_whole = all(isinstance(kept.get(name), kind) for name, kind in kinds.items())
    return kept if is_whole and all(_is_prompt(prompt) for prompt in kept["prompts"]) else {}


def _is_prompt(value: Any) -> bool:
    names = {"text": str, "messages": list, "expected": str | None, "source": str | None}
    return (
        isinstance(value, dict)
        and value.keys() == names.keys()
        and all(isinstance(value[name], kind) for name, kind in names.items())
    )


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
