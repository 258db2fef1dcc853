"""What a report needs besides run.json and metrics.jsonl, collected while it is at hand."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from handspun.config import TrainConfig
from handspun.data.dataset import Dataset
from handspun.data.examples import Example, lengths_of
from handspun.data.preview import spread, target_runs
from handspun.data.rows import Row
from handspun.display import captured_log, duration, logger
from handspun.errors import HandspunError
from handspun.files import output_errors, write_json
from handspun.models.fingerprints import weight_checksums
from handspun.models.load import ChatModel, model_source
from handspun.report.page import write_report
from handspun.runs.metrics import KEPT, read_kept
from handspun.runs.sample_answers import prompts_of, sample_answers
from handspun.training.runner import BatchRunner, select_runner

SHOWN = 10
"""How many of the worst and of the best rows are shown with their text."""

MOST_CHARACTERS = 4000
"""Longest text that is kept of one cell."""


def losses_by_row(
    runner: BatchRunner,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    most: int,
    max_tokens: int,
) -> dict[str, Any]:
    """Return the mean loss per target token of each row, and the ten worst and the ten best rows with their text.

    No row is among both. "mean" is over all their target tokens, "of" the number of rows that there are; a row's
    "runs" are [text, is it a target].

    Args:
        runner: computes the losses.
        examples: the rows.
        tokenizer: decodes the rows that are shown.
        most: at most so many rows are computed, at even distances.
        max_tokens: of a micro-batch.
    """
    rows = spread(examples, most)
    by_row: dict[int, float] = {}
    for micro_batch in runner.batching.split(rows, max_tokens):
        by_row.update(zip(map(id, micro_batch), runner.row_losses(micro_batch), strict=True))
    sums = [by_row[id(row)] for row in rows]
    losses = [total / row.learned_tokens for total, row in zip(sums, rows, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: -losses[i])

    def shown(i: int) -> dict[str, Any]:
        runs = [[cut(text), is_target] for text, is_target in target_runs(rows[i], tokenizer)]
        return {"file": rows[i].file, "row": rows[i].row, "loss": losses[i], "runs": runs}

    return {
        "of": len(examples),
        "mean": sum(sums) / sum(row.learned_tokens for row in rows),
        "losses": losses,
        "worst": [shown(i) for i in order[:SHOWN]],
        "best": [shown(i) for i in reversed(order[SHOWN:][-SHOWN:])],
    }


def texts_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows as they are in their files: {"file", "row", "values": column -> text}."""
    return [
        {"file": row.file, "row": row.number, "values": {name: cut(_text(v)) for name, v in row.values.items()}}
        for row in rows
    ]


def cut(text: str) -> str:
    """Return the text, or its beginning and how much more there is."""
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]} … ({len(text) - MOST_CHARACTERS} more characters)"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


_BARS = 30
"""Most bars of the histogram of lengths."""


@contextmanager
def report_around(
    chat: ChatModel, config: TrainConfig, training: Dataset, held_out: Dataset | None
) -> Iterator[None]:
    """Collect what the report needs around the loop, and write report.html however the run ends.

    That is answers before and after it, and the losses of rows. A resumed run keeps the answers from its
    beginning. What cannot be collected is left out, and the report says why. A failed report never ends a run: it
    is a line in the log.
    """
    folder = Path(config.output_dir)
    kept = read_kept(folder) or _at_the_start(chat, config, training, held_out)
    with _never_the_end():
        _write_kept(folder, kept)
    try:
        yield
        kept["after"] = _answers(chat, config, kept["prompts"], "after")
        kept["row_losses"] = _row_losses(chat, config, training, held_out)
    finally:  # the run's own error is the one to be told
        with _never_the_end():
            _write_kept(folder, kept)
            logger.info(f"report: {write_report(folder)}")


@contextmanager
def _never_the_end() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a page cannot be made of: the weights are saved
        logger.info(f"no report: {error or type(error).__name__}")


def _write_kept(folder: Path, kept: dict[str, Any]) -> None:
    with output_errors(folder / KEPT):
        write_json(folder / KEPT, kept)


def _at_the_start(
    chat: ChatModel, config: TrainConfig, training: Dataset, held_out: Dataset | None
) -> dict[str, Any]:
    prompts = prompts_of(config)
    sets = {"train": training, "held_out": held_out}
    return {
        "model": model_fingerprints(config.model, chat),
        "lengths": {name: length_histogram(some) for name, some in sets.items() if some},
        "accounted": {name: texts_of(some.accounted) for name, some in sets.items() if some},
        "prompts": list(prompts),
        "before": _answers(chat, config, prompts, "before"),
    }


def model_fingerprints(name: str, chat: ChatModel) -> dict[str, str]:
    """Return fingerprints of the model's weights: the sha256 of its files, or its commit on the hub."""
    with captured_log():  # it was logged when the model was loaded
        source = model_source(name)
    if not Path(source.location).is_dir():
        commit = getattr(chat.model.config, "_commit_hash", None)
        return {"commit on the hub": commit} if commit else {}
    return {f"sha256 of {name}": checksum for name, checksum in weight_checksums(source).items()}


def length_histogram(some: Dataset) -> dict[str, Any]:
    """Return examples by length: edges of bars (growing, the last one exclusive), counts, and the median."""
    lengths = lengths_of(some.examples)
    edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, _BARS + 1).round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    return {"edges": edges.tolist(), "counts": counts.tolist(), "median": int(np.median(lengths))}


def _answers(chat: ChatModel, config: TrainConfig, prompts: Any, when: str) -> dict[str, Any]:
    """Return {"answers", "notes"}, or {"missing": why}."""
    if not config.sample_answers or not prompts:
        return {"missing": "they were not asked for (--no-sample-answers)"}
    if config.shard:
        return {"missing": "the model is in shares on several processes (--shard), and whole in none"}
    began = time.perf_counter()
    chat.model.eval()
    try:
        made = asdict(sample_answers(chat, prompts, system_prompt=config.system_prompt))
    except HandspunError as error:
        logger.info(f"no sample answers {when} training: {error}")
        return {"missing": str(error)}
    logger.info(
        f"{len(made['answers'])} sample answers {when} training in {duration(time.perf_counter() - began)}"
    )
    return made


def _row_losses(
    chat: ChatModel, config: TrainConfig, training: Dataset, held_out: Dataset | None
) -> dict[str, Any]:
    """Return what `losses_by_row` gives for each set, or {"missing": why}."""
    if not config.report_rows:
        return {"missing": "they were not asked for (--report-rows 0)"}
    if config.shard:
        return {"missing": "the model is in shares on several processes (--shard), and whole in none"}
    began = time.perf_counter()
    pad_token_id = chat.tokenizer.pad_token_id
    runner_of = select_runner(
        chat.model,
        config,
        training.examples,
        dtype=torch.float32,
        pad_token_id=pad_token_id if pad_token_id is not None else 0,
    )
    with captured_log(), runner_of as runner:
        found = {
            name: losses_by_row(
                runner, some.examples, chat.tokenizer, most=config.report_rows, max_tokens=config.max_tokens
            )
            for name, some in (("train", training), ("held_out", held_out))
            if some is not None
        }
    rows = sum(len(some["losses"]) for some in found.values())
    logger.info(f"losses of {rows} rows by the final weights in {duration(time.perf_counter() - began)}")
    return found
