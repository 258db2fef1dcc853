"""Turn a run's record into the texts and figures of its report."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import PurePath
from typing import Any

from handspun.config import TrainConfig, option_name
from handspun.data.examples import DataReport, RowIssue
from handspun.display import count_of, duration
from handspun.preflight.checks import Preflight, headline, rows_named
from handspun.report.pictures import SET_NAMES
from handspun.runs.metrics import RunFiles
from handspun.runs.outcome import epoch_losses, matches, perplexity
from handspun.runs.record import RowSet, command

Fact = tuple[str, str, list[str]]
"""(name, value, lines of small print)."""

_WRONG = 20
"""Maximum number of wrong answers that are shown."""

_LINKED = 50
"""Maximum number of rows named per reason. They are links if their text was kept."""

ENDS = {
    "finished": "The run finished.",
    "running": "The run was still running, or had been killed, when this was written.",
    "stopped": "The run was stopped before it finished.",
    "interrupted": "The run was interrupted before it finished.",
    "failed": "The run failed. See train.log for the reason.",
}


def title(run: RunFiles) -> str:
    """Return the report's title, such as `SmolLM2-135M on train.csv`."""
    config = run.record.config
    return f"{_last_part(config['model'])} on {_data_name(config['data'])}"


def figures(run: RunFiles) -> list[tuple[str, str, str]]:
    """Return the outcome in figures: (name, figure, explanation)."""
    return [_loss_figure(run), *_matches_figure(run), _time_figure(run), _memory_figure(run)]


def epochs(run: RunFiles) -> list[tuple[str, str, str]]:
    """Return (epoch, training loss, held-out loss at its end), the first row from before training."""
    training = epoch_losses(run.metrics.steps)
    held_out = {event["epoch"]: event["loss"] for event in run.metrics.evaluations}
    names = sorted({*training, *held_out})
    return [
        (
            "before" if epoch == 0 else str(epoch),
            f"{training[epoch]:.4f}" if epoch in training else "",
            f"{held_out[epoch]:.4f}" if epoch in held_out else "",
        )
        for epoch in names
    ]


def wrong_answers(run: RunFiles) -> list[dict[str, Any]]:
    """Return the held-out rows whose answers after training are not the expected ones, with `where`."""
    answers = run.kept.get("row_answers", {}).get("after", [])
    several_files = len({one["file"] for one in answers}) > 1
    wrong = [one for one in answers if not one["is_right"]]
    return [{**one, "where": where(one, several_files=several_files)} for one in wrong[:_WRONG]]


def where(row: dict[str, Any], *, several_files: bool) -> str:
    """Return where a row is: its number, and its file if there are several."""
    return f"{row['file']}, row {row['row']}" if several_files else f"row {row['row']}"


def about(run: RunFiles) -> list[Fact]:
    """Return the section "Model and data"."""
    record, config, plan = run.record, run.record.config, run.plan
    examples = count_of(plan.examples, "example")
    begun = math.ceil(plan.steps / math.ceil(plan.examples / config["batch_size"]))  # --max-steps may cut the last
    how = f"LoRA adapters of rank {config['lora_rank']}" if config["lora"] else "all weights"
    files = [f"{name}: {value}" for name, value in run.kept.get("model", {}).items()]
    kept = [*record.checkpoints, *filter(None, [record.best_checkpoint])]
    return [
        ("Model", f"{config['model']}, {parameters(plan.parameters)}", files),
        ("Trained", f"{how}, {parameters(plan.trainable)}", []),
        *(_about_rows(name, record.data.by_name.get(key)) for key, name in SET_NAMES.items()),
        (
            "Steps",
            f"{len(run.metrics.steps):,} of {plan.steps:,}: {count_of(begun, 'epoch')} of "
            f"{examples} in batches of {config['batch_size']}, {plan.batching}, matmuls in "
            f"{record.dtype or 'unknown'}",
            [],
        ),
        (
            "Learning rate",
            f"{config['learning_rate']:g}, {config['lr_schedule']} after {config['warmup_ratio']:.0%} warm-up",
            [],
        ),
        *_about_end_of_turn(record.preflight),
        ("Checkpoints", ", ".join(kept) or "none", []),
    ]


def parameters(number: int) -> str:
    """Return a number of parameters, such as `134.5M parameters`."""
    return f"{number / 1e6:.1f}M parameters" if number >= 1e5 else f"{number:,} parameters"


def _about_rows(name: str, some: RowSet | None) -> Fact:
    if some is None:
        return f"Rows {name}", "none, so only the training loss is known (--eval-ratio, --eval-data)", []
    files = ", ".join(f"{file} ({form})" for file, form in some.rows.formats.items())
    share = some.learned_tokens / max(some.tokens, 1)
    return (
        f"Rows {name}",
        f"{files}: {some.rows.rows:,} read, {some.rows.kept:,} kept; {some.tokens:,} tokens, "
        f"{some.learned_tokens:,} of them target tokens ({share:.0%})",
        [f"sha256 of the rows: {some.sha256}"],
    )


def _about_end_of_turn(preflight: Preflight | None) -> list[Fact]:
    if preflight is None or preflight.end_of_turn is None:
        return []
    found = preflight.end_of_turn
    known = "an eos of the base model" if found.is_eos else "not an eos of the base model"
    targets = f"the last target token of {found.learned:,} of {found.examples:,} examples"
    return [("End of turn", f"{found.token}, {known}; {targets}", [])]


def options(run: RunFiles) -> list[tuple[str, str, str]]:
    """Return the options that the user gave: (name, value, default)."""
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    return [
        (option_name(name), shown(value), shown(defaults.get(name))) for name, value in run.record.given.items()
    ]


def how_again(run: RunFiles) -> str:
    """Return the command that reproduces the run, with seed, dtype and threads made explicit."""
    record = run.record
    always = {name: record.config[name] for name in ("model", "data", "output_dir", "seed")}
    measured = {"dtype": record.dtype, "threads": record.threads}
    known = {name: value for name, value in measured.items() if value is not None}
    return command({**always, **record.given, **known}, processes=record.processes or 1)


def environment(run: RunFiles) -> list[Fact]:
    """Return facts about the machine and the processes."""
    found, record = run.record.environment, run.record
    memory = found.memory_bytes
    return [
        (
            "Machine",
            f"{found.machine}, {found.cores} cores" + (f", {memory / 1e9:.1f} GB" if memory else ""),
            [],
        ),
        ("System", found.system, []),
        ("Processes, threads", f"{record.processes or 1}, with {record.threads or 'unknown'} each", []),
        ("Started", when(run), []),
        ("Command", shlex.join(found.command), []),
    ]


def when(run: RunFiles) -> str:
    """Return when the run started."""
    return run.record.started.replace("T", " ").replace("+00:00", " UTC")


def requirements(run: RunFiles) -> str:
    """Return package versions in pip's requirements format."""
    found = run.record.environment
    lines = [f"{name}=={version}" for name, version in found.versions.items()]
    return "\n".join([f"# Python {found.python}", *lines])


def account(run: RunFiles) -> list[dict[str, Any]]:
    """Return the data report of each set: {"name", "read", "kept", "reasons": [{"text", "count", "rows"}]}."""
    return [
        {
            "name": SET_NAMES[name],
            "read": some.rows.rows,
            "kept": some.rows.kept,
            "dropped": len(some.rows.dropped),
            "reasons": _reasons(run, name, some.rows),
            "unused": some.rows.unused_columns,
        }
        for name, some in run.record.data.by_name.items()
    ]


def warnings(run: RunFiles) -> list[Fact]:
    """Return the preflight warnings: what and how often, the remedy, and the rows in small print."""
    found = run.record.preflight.warnings if run.record.preflight else []
    return [(headline(one), one.remedy, list(filter(None, [rows_named(one)]))) for one in found]


def accounted_rows(run: RunFiles) -> list[dict[str, Any]]:
    """Return the rows whose text was kept, for the appendix: {"id", "set", "file", "row", "why", "values"}."""
    found = []
    for name, rows in run.kept.get("accounted", {}).items():
        why: dict[tuple[str, int], list[str]] = {}
        for kind, notes in _notes(run.record.data.by_name[name].rows):
            for note in notes:
                why.setdefault((note.file, note.row), []).append(_reason(kind, note, run))
        for row in rows:
            found.append({
                **row,
                "id": _anchor(name, row["file"], row["row"], run),
                "set": SET_NAMES[name],
                "why": "; ".join(why.get((row["file"], row["row"]), [])),
            })  # fmt: skip
    return found


def _reasons(run: RunFiles, name: str, rows: DataReport) -> list[dict[str, Any]]:
    with_text = {(row["file"], row["row"]) for row in run.kept.get("accounted", {}).get(name, [])}
    several_files = len(rows.formats) > 1
    reasons: dict[str, list[dict[str, Any]]] = {}
    for kind, notes in _notes(rows):
        for note in notes:
            place = note.file, note.row
            link = {
                "text": f"{note.file} {note.row}" if several_files else str(note.row),
                "href": f"#{_anchor(name, *place, run)}" if place in with_text else None,
            }
            reasons.setdefault(_reason(kind, note, run), []).append(link)
    return [
        {"text": text, "count": len(links), "rows": links[:_LINKED], "more": max(len(links) - _LINKED, 0)}
        for text, links in reasons.items()
    ]


def _notes(rows: DataReport) -> list[tuple[str, list[RowIssue]]]:
    dropped = [note for notes in rows.dropped_by_reason().values() for note in notes]
    return [("dropped", dropped), ("truncated", rows.truncated), ("noted", rows.notes)]


def _reason(kind: str, note: RowIssue, run: RunFiles) -> str:
    if kind == "truncated":
        return f"truncated to {run.record.config['max_length']} tokens"
    return f"dropped, {note.text}" if kind == "dropped" else note.text


def _anchor(name: str, file: str, row: int, run: RunFiles) -> str:
    """Return an HTML id for a row."""
    # The file's index instead of its name, which may contain anything.
    files = list(run.record.data.by_name[name].rows.formats)
    place = files.index(file) if file in files else len(files)
    return f"row-{name}-{place}-{row}"


def _loss_figure(run: RunFiles) -> tuple[str, str, str]:
    found = run.metrics.evaluations
    if found:
        first, last = found[0]["loss"], found[-1]["loss"]
        if len(found) == 1:
            return "Held-out loss", f"{first:.4f}", f"at step {found[0]['step']}; perplexity {perplexity(first)}"
        best = min(found, key=lambda event: event["loss"])
        return (
            "Held-out loss",
            f"{first:.4f} → {last:.4f}",
            f"{(last - first) / first:+.0%}".replace("-", "−")
            + ("" if best is found[-1] else f"; best {best['loss']:.4f} at step {best['step']}")
            + f"; perplexity {perplexity(first)} → {perplexity(last)}",
        )
    steps = run.metrics.steps
    if not steps:
        return "Training loss", "none", "no steps"
    return (
        "Training loss",
        f"{steps[0]['loss']:.4f} → {steps[-1]['loss']:.4f}",
        "first and last step; no rows held out",
    )


def _matches_figure(run: RunFiles) -> list[tuple[str, str, str]]:
    if (found := matches(run)) is None:
        return []
    of = "" if found.asked == found.of else f" (of {found.of:,})"
    text = f"of {count_of(found.asked, 'held-out row')}{of}, before and after"
    return [("Exact matches", f"{found.before:,} → {found.after:,}", text)]


def _time_figure(run: RunFiles) -> tuple[str, str, str]:
    steps, seconds = run.metrics.steps, run.record.seconds
    in_steps = sum(step["seconds"] for step in steps)
    if not in_steps:
        return "Time", duration(seconds or 0.0), "no steps"
    rates = [sum(step[key] for step in steps) / in_steps for key in ("tokens", "learned_tokens")]
    text = f"{count_of(len(steps), 'step')}, {rates[0]:,.0f} tokens/s ({rates[1]:,.0f} target)"
    return "Training time", duration(seconds if seconds is not None else in_steps), text


def _memory_figure(run: RunFiles) -> tuple[str, str, str]:
    peak, predicted = run.record.peak_memory_bytes, run.plan.peak_memory
    return (
        "Peak memory",
        f"{peak / 1e9:.1f} GB" if peak else "unknown",
        f"{predicted / 1e9:.1f} GB predicted; without this report",
    )


def _data_name(data: str | Sequence[str]) -> str:
    first, *others = [data] if isinstance(data, str) else data
    return _last_part(first) + (f" and {len(others)} more" if others else "")


def _last_part(name: str) -> str:
    return PurePath(name).name or name


def shown(value: Any) -> str:
    """Return an option's value as text."""
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return "; ".join(map(str, value))
    if isinstance(value, dict):
        return "; ".join(f"{name}={item}" for name, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
