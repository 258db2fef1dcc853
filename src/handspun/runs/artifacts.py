"""What a report needs besides run.json and metrics.jsonl, collected while it is at hand and time allows."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handspun.config import TrainConfig
from handspun.config.rows_in_memory import RowsInMemory
from handspun.data.dataset import Dataset
from handspun.data.examples import lengths_of
from handspun.data.preview import spread
from handspun.display import captured_log, count_of, duration, logger
from handspun.errors import HandspunError
from handspun.evaluation.answers import Question, question_of
from handspun.files import output_errors, write_json, write_text
from handspun.models.fingerprints import weight_checksums
from handspun.models.load import ChatModel, model_source
from handspun.report.page import write_report
from handspun.runs.log import RunLog
from handspun.runs.metrics import HARDEST, HELD_OUT, KEPT, METRICS, read_kept, read_metrics
from handspun.runs.row_losses import hardest_of, loss_facts, losses_by_row, rows_csv, texts_of
from handspun.runs.sample_answers import (
    RowAnswer,
    SamplePrompt,
    row_answers,
    rows_to_ask,
    sample_answers,
    short_questions,
)
from handspun.training.runner import select_runner

Kept = dict[str, Any]
"""The content of report_data.json."""

SHARE = 0.1
"""Most of the steps' time that answers and row losses may take together."""
LEAST_SECONDS = 30.0
"""Allowed all the same: three answers before and after take that long on a slow laptop, and with less a run of
minutes would show half sentences."""
MOST_SECONDS = 600.0
"""However long the run: the other ranks wait meanwhile, and give up after half an hour."""
_SHARE_BEFORE = 0.4
"""Of the time allowed. The answers after training take as long, and the row losses get the rest. Before training
the time of the steps is only predicted; if it turns out to be half of that, there is still time for the rest."""
_IN_SHARES = {"missing": "the model is in shares on several processes (--shard), and whole in none"}


def allowed_seconds(seconds_of_steps: float) -> float:
    """Return how long answers and row losses may take."""
    return min(max(SHARE * seconds_of_steps, LEAST_SECONDS), MOST_SECONDS)


@dataclass(frozen=True)
class Material:
    """What the report is collected from."""

    chat: ChatModel
    config: TrainConfig
    training: Dataset
    held_out: Dataset | None
    prompts: list[SamplePrompt]
    log: RunLog
    predicted_seconds: float | None = None
    files: dict[str, str] = field(default_factory=dict)
    """Files of rows to write, by name."""
    clock: Callable[[], float] = time.perf_counter

    @property
    def sets(self) -> dict[str, Dataset]:
        """The sets that there are, by their names in the files."""
        return {"train": self.training} | ({"held_out": self.held_out} if self.held_out else {})

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir)


def rows_for_report(dataset: Dataset, config: TrainConfig, *, is_held_out: bool) -> set[tuple[str, int]]:
    """Return the rows that the report may ask or show, as (file, row number), and all held-out rows."""
    if is_held_out and not _has_own_file(config):
        dropped = {(note.file, note.row) for note in dataset.account.dropped}
        return {(row.file, row.number) for row in dataset.rows} - dropped
    return rows_to_ask(dataset) | {(one.file, one.row) for one in spread(dataset.examples, config.report_rows)}


def _has_own_file(config: TrainConfig) -> bool:
    """Return whether the held-out rows are in a file of their own."""
    return bool(config.eval_data) and not any(isinstance(one, RowsInMemory) for one in config.eval_sources)


@contextmanager
def report_around(material: Material) -> Iterator[None]:
    """Collect what the report needs around the loop, and write report.html however the run ends.

    That is answers before and after it, and the losses of rows. A resumed run keeps the answers from its
    beginning. What cannot be collected is left out, and the report says why. A failed report never ends a run: it
    is a line in the log.
    """
    folder = material.folder
    kept = read_kept(folder) or _at_the_start(material)
    with _never_the_end():
        _write_kept(material, kept)
    try:
        yield
        _at_the_end(material, kept)
    finally:  # the run's own error is the one to be told
        with _never_the_end():
            _write_kept(material, kept)
            write_report(folder)


@contextmanager
def _never_the_end() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a page cannot be made of: the weights are saved
        logger.info(f"no report: {error or type(error).__name__}")


def _write_kept(material: Material, kept: Kept) -> None:
    """Write what was collected, and then the files of rows: what is in KEPT shows whose they are."""
    with output_errors(material.folder / KEPT):
        write_json(material.folder / KEPT, kept)
    for name, text in material.files.items():
        with output_errors(material.folder / name):
            write_text(material.folder / name, text)
    material.files.clear()


def _at_the_start(material: Material) -> Kept:
    kept: Kept = {
        "model": model_fingerprints(material.config.model, material.chat),
        "lengths": {name: length_histogram(some) for name, some in material.sets.items()},
        "accounted": {name: texts_of(some.accounted) for name, some in material.sets.items()},
        "prompts": [asdict(prompt) for prompt in material.prompts],
    }
    if material.held_out is not None and not _has_own_file(material.config):
        keys = ((row.file, row.number) for row in material.held_out.rows)
        _add_file(HELD_OUT, keys, material.held_out, material, kept)
    seconds = _SHARE_BEFORE * allowed_seconds(material.predicted_seconds or 0.0)
    began, questions = material.clock(), _short_questions(material)
    each = seconds / 2 if questions else seconds
    kept["before"] = _answers(material, material.prompts, "before", each)
    kept["row_answers"] = {"before": _row_answers(material, questions, "before", each)} if questions else {}
    kept["seconds"] = min(material.clock() - began, seconds)  # else a slow start would leave nothing for the end
    return kept


def _at_the_end(material: Material, kept: Kept) -> None:
    """Add the answers after training and the losses of rows, as far as the time of the steps allows."""
    steps = read_metrics(material.folder / METRICS).steps
    seconds = allowed_seconds(sum(step["seconds"] for step in steps)) - kept.get("seconds", 0.0)
    until = material.clock() + seconds
    asked = {(one["file"], one["row"]) for one in kept["row_answers"].get("before", [])}
    questions = [one for one in _short_questions(material) if (one.file, one.row) in asked]
    parts = 1 + bool(questions) + bool(material.config.report_rows)
    prompts = [SamplePrompt(**prompt) for prompt in kept["prompts"]]
    kept["after"] = _answers(material, prompts, "after", seconds / parts)
    if questions:
        kept["row_answers"]["after"] = _row_answers(material, questions, "after", seconds / parts)
    kept["row_losses"] = _row_losses(material, kept, max(until - material.clock(), seconds / parts))


def model_fingerprints(name: str, chat: ChatModel) -> dict[str, str]:
    """Return fingerprints of the model's weights: the sha256 of its files, or its commit on the hub."""
    with captured_log():  # it was logged when the model was loaded
        source = model_source(name)
    if not Path(source.location).is_dir():
        commit = getattr(chat.model.config, "_commit_hash", None)
        return {"commit on the hub": commit} if commit else {}
    return {f"sha256 of {name}": checksum for name, checksum in weight_checksums(source).items()}


_BARS = 30
"""Most bars of the histogram of lengths."""


def length_histogram(some: Dataset) -> dict[str, Any]:
    """Return examples by length: edges of bars of one width (the last one exclusive), counts, and the median."""
    lengths = lengths_of(some.examples)
    least, most = int(lengths.min()), int(lengths.max())
    width = -(-(most - least + 1) // _BARS)  # whole, so that each bar covers as many lengths
    edges = np.arange(least, most + width + 1, width)
    counts, _ = np.histogram(lengths, edges)
    return {
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "median": int(np.median(lengths)),
        "most": most,
    }


def _short_questions(material: Material) -> list[Question]:
    if not material.config.sample_answers or material.config.shard:
        return []
    return short_questions(material.chat, material.config, material.held_out)


def _answers(material: Material, prompts: list[SamplePrompt], when: str, seconds: float) -> dict[str, Any]:
    """Return {"answers", "notes"}, or {"missing": why}."""
    if not material.config.sample_answers or not prompts:
        return {"missing": "they were not asked for (--no-sample-answers)"}
    if material.config.shard:
        return _IN_SHARES
    if seconds <= 0:
        return _no_time(f"no sample answers {when} training")
    state = "untrained" if when == "before" else "trained"
    try:
        with material.log.phase(f"answering {count_of(len(prompts), 'prompt')} with the {state} model"):
            material.chat.model.eval()
            return asdict(
                sample_answers(
                    material.chat, prompts, system_prompt=material.config.system_prompt, seconds=seconds
                )
            )
    except HandspunError as error:
        logger.info(f"no sample answers {when} training: {error}")
        return {"missing": str(error)}


def _row_answers(material: Material, questions: list[Question], when: str, seconds: float) -> list[dict[str, Any]]:
    """Return the answers to held-out rows with short answers that are complete in time."""
    what = count_of(len(questions), "short held-out answer")
    if seconds <= 0:
        _no_time(f"exact matches on {what} {when} training are not counted")
        return []
    state = "untrained" if when == "before" else "trained"
    answers: list[RowAnswer] = []
    try:
        with material.log.phase(f"counting the {state} model's exact matches on {what}"):
            material.chat.model.eval()
            answers = row_answers(
                material.chat, questions, system_prompt=material.config.system_prompt, seconds=seconds
            )
    except HandspunError as error:
        logger.info(f"exact matches {when} training are not counted: {error}")
        return []
    if len(answers) < len(questions):
        logger.info(f"  {len(answers)} of {len(questions)} answered: {_LIMIT}")
    return [asdict(answer) for answer in answers]


_LIMIT = f"answers and row losses may take {SHARE:.0%} of the steps' time, or {duration(LEAST_SECONDS)}"


def _no_time(what: str) -> dict[str, str]:
    logger.info(f"{what}: {_LIMIT}")
    return {"missing": _LIMIT}


def _row_losses(material: Material, kept: Kept, seconds: float) -> dict[str, Any]:
    """Return the `loss_facts` of each set, or {"missing": why}. Add the file of the hardest training rows."""
    config = material.config
    if not config.report_rows:
        return {"missing": "they were not asked for (--report-rows 0)"}
    if config.shard:
        return _IN_SHARES
    if seconds <= 0:
        return _no_time("no losses of rows")
    until = material.clock() + seconds
    wanted = sum(min(config.report_rows, len(some.examples)) for some in material.sets.values())
    pad_token_id = material.chat.tokenizer.pad_token_id
    runner_of = select_runner(
        material.chat.model,
        config,
        material.training.examples,
        dtype=torch.float32,
        pad_token_id=pad_token_id if pad_token_id is not None else 0,
    )
    facts: dict[str, Any] = {}
    with (
        material.log.phase(f"computing the losses of {count_of(wanted, 'row')}"),
        captured_log(),
        runner_of as runner,
    ):
        for place, (name, some) in enumerate(material.sets.items()):
            found = losses_by_row(
                runner,
                some.examples,
                most=config.report_rows,
                max_tokens=config.max_tokens,
                seconds=max((until - material.clock()) / (len(material.sets) - place), 0.0),
            )
            if found:
                some_facts = loss_facts(found, len(some.examples), material.chat.tokenizer)
                facts[name] = _with_prompts(some_facts, material, some)
                if name == "train":
                    hardest = hardest_of([row for row, _ in found])
                    _add_file(HARDEST, ((row.file, row.row) for row in hardest), some, material, kept)
    if (done := sum(len(some["losses"]) for some in facts.values())) < wanted:
        logger.info(f"  {done} of {wanted} computed: {_LIMIT}")
    return facts or {"missing": _LIMIT}


def _with_prompts(facts: dict[str, Any], material: Material, some: Dataset) -> dict[str, Any]:
    """Add to the hardest rows what their prompts are: the last user messages."""
    rows = {(row.file, row.number): row for row in some.rows}
    config = material.config
    for one in facts["worst"]:
        row = rows[one["file"], one["row"]]
        question = question_of(
            row, some.account.formats, system_prompt=config.system_prompt, role_map=config.roles
        )
        one["prompt"] = question.prompt
    return facts


def _add_file(name: str, keys: Iterable[tuple[str, int]], some: Dataset, material: Material, kept: Kept) -> None:
    """Add a file of rows to those to write, and keep its checksum: once edited, it is the user's."""
    text, count = rows_csv(keys, some)
    material.files[name] = text
    kept[name] = {"rows": count, "sha256": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()}
