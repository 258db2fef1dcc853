"""Incidents that a run survived, as lines, and the rows of a batch that no update could be made from."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from handspun.config import TrainConfig
from handspun.data.conversations import to_conversation
from handspun.data.dataset import Dataset, fingerprint, read_split
from handspun.data.formats import TEXT
from handspun.display import json_line
from handspun.errors import DataError
from handspun.files import output_errors
from handspun.training.guards import OutOfMemory, SkippedStep, Spike

Incident = SkippedStep | Spike | OutOfMemory
_EVENTS: dict[type[Incident], str] = {SkippedStep: "skipped", Spike: "spike", OutOfMemory: "outofmemory"}
"""Names of the incidents in metrics.jsonl and run.json."""


def incident_facts(incident: Incident) -> dict[str, Any]:
    """Return an incident as JSON holds it: NaN and infinities are texts, since JSON has no numbers for them."""
    facts = {"event": _EVENTS[type(incident)], **asdict(incident)}
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in facts.items()
    }


def incidents_from(value: Any) -> list[Incident]:
    """Return the incidents that `incident_facts` wrote. Raises ValueError if they are damaged."""
    try:
        return [incident_from(facts) for facts in value]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"has incidents of another kind ({error})") from error


def incident_from(facts: dict[str, Any]) -> Incident:
    """Return the incident that `incident_facts` wrote."""
    values = {name: value for name, value in facts.items() if name != "event"}
    if facts["event"] == "outofmemory":
        return OutOfMemory(**values)
    values["batch"] = [(file, row) for file, row in values["batch"]]
    if facts["event"] == "spike":
        return Spike(**values)
    return SkippedStep(**{**values, "loss": float(values["loss"]), "grad_norm": float(values["grad_norm"])})


def incident_line(incident: Incident) -> str:
    """Return what happened, with the rows that it happened on."""
    if isinstance(incident, OutOfMemory):
        return (
            f"step {incident.step}: out of memory for a micro-batch of {incident.tokens} tokens; from "
            f"here on they have at most {incident.max_tokens} (--max-tokens), which does not change the result"
        )
    if isinstance(incident, Spike):
        return (
            f"step {incident.step}: loss {incident.loss:.4f} is a spike (usual {incident.usual:.4f}, limit "
            f"{incident.limit:.4f}): {named(incident.batch)}"
        )
    return (
        f"step {incident.step} was skipped: loss is {incident.loss:.4g}, gradient norm is "
        f"{incident.grad_norm:.4g}: {named(incident.batch)}"
    )


def named(batch: Sequence[tuple[str, int]]) -> str:
    """Return rows by file: `train.csv rows 3, 17; other.csv row 2`."""
    of_file = groupby(sorted(batch), key=lambda row: row[0])
    return "; ".join(_rows(file, [number for _, number in rows]) for file, rows in of_file)


def write_batch(skipped: SkippedStep, config: TrainConfig, training: Dataset) -> str:
    """Write the batch's rows to the output folder, and return a line for the log.

    The rows are read again by file and number, and written as messages: what the chat template got, whatever the
    row's format. Each one carries its file and number. Rows that have changed since the run began are not written.
    """
    path = Path(config.output_dir) / f"nonfinite-step-{skipped.step}.jsonl"
    try:
        rows, _ = read_split(
            config,
            eval_data=(),
            eval_ratio=0.0 if config.eval_sources else config.eval_ratio,
            seed=config.seed,
        )
    except DataError as error:
        return f"its rows are not in {path}, since the data cannot be read any more: {error}"
    if fingerprint(rows) != training.fingerprint:
        return f"its rows are not in {path}, since {', '.join(config.sources)} has changed while the run went on"
    wanted = set(skipped.batch)
    with output_errors(path), path.open("w", encoding="utf-8") as file:
        for row in rows:
            if (row.file, row.number) in wanted:
                data_format = training.account.formats[row.file]
                said = to_conversation(row, data_format, system_prompt=config.system_prompt, role_map=config.roles)
                written: dict[str, Any] = {"messages": said.messages, "tools": said.tools}
                if data_format == TEXT:
                    written = {TEXT: said.messages[0]["content"]}
                file.write(json_line({**written, "file": row.file, "row": row.number}) + "\n")
    return f"its rows are in {path}: handspun preview --data {path} --model {config.model} shows them"


def _rows(file: str, numbers: Sequence[int]) -> str:
    return f"{file} row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
