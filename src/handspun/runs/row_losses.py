"""The losses of rows after training, and the hardest rows: in the report, and in a file to fix and train again."""

import csv
import io
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from handspun.data.dataset import Dataset
from handspun.data.examples import Example
from handspun.data.preview import spread, spread_order, target_runs
from handspun.data.rows import Row
from handspun.training.runner import BatchRunner

SHOWN = 10
"""Hardest rows of each set that the report shows."""
IN_FILE = 50
"""Most of the hardest training rows in the file, and no more than a fifth of those whose losses are known."""
MOST_CHARACTERS = 4000
"""Longest text that is kept of one cell."""

_AT_ONCE = 16
"""Rows between two looks at the clock."""


def losses_by_row(
    runner: BatchRunner,
    examples: Sequence[Example],
    *,
    most: int,
    max_tokens: int,
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> list[tuple[Example, float]]:
    """Return (example, loss summed over its target tokens), the hardest (by the mean per token) first.

    Args:
        runner: computes the losses.
        examples: the rows.
        most: at most so many rows are computed, at even distances.
        max_tokens: of a micro-batch.
        seconds: about so long at most, but at least 16 rows; the rows computed by then are evenly spaced too.
        clock: the time in seconds.
    """
    rows = spread(examples, most)
    rows = [rows[i] for i in spread_order(len(rows))]
    found: list[tuple[Example, float]] = []
    began, longest = clock(), 0.0
    for start in range(0, len(rows), _AT_ONCE):
        before = clock()
        if start and before - began + longest > seconds:
            break
        for micro_batch in runner.batching.split(rows[start : start + _AT_ONCE], max_tokens):
            found += zip(micro_batch, runner.row_losses(micro_batch), strict=True)
        longest = max(longest, clock() - before)
    return sorted(found, key=lambda one: -one[1] / one[0].learned_tokens)


def loss_facts(
    found: Sequence[tuple[Example, float]], of: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return what the report shows of a set: all mean losses, and the ten hardest rows with their text.

    "mean" is over all their target tokens, "of" the number of examples that there are; a row's "runs" are
    [text, is it a target], without special tokens.
    """
    return {
        "of": of,
        "mean": sum(loss for _, loss in found) / sum(row.learned_tokens for row, _ in found),
        "losses": [loss / row.learned_tokens for row, loss in found],
        "worst": [
            {
                "file": row.file,
                "row": row.row,
                "loss": loss / row.learned_tokens,
                "runs": [[cut(text), is_target] for text, is_target in target_runs(row, tokenizer)],
                "answer": cut(_answer(row, tokenizer)),
            }
            for row, loss in found[:SHOWN]
        ],
    }


def _answer(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the target text without special tokens."""
    ids = [id for id, is_target in zip(example.input_ids, example.loss_mask, strict=True) if is_target]
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


def rows_csv(keys: Iterable[tuple[str, int]], dataset: Dataset) -> tuple[str, int]:
    """Return rows, by (file, row number), as a csv file that training reads, and their number.

    The columns `file` and `row` say where each row came from. Rows of another format than the first one's are left
    out, since a file has one format.
    """
    rows = {(row.file, row.number): row for row in dataset.rows}
    found = [row for key in dict.fromkeys(keys) if (row := rows.get(key))]
    formats = dataset.account.formats
    found = [row for row in found if formats[row.file] == formats[found[0].file]]
    places = [name for name in ("file", "row") if all(name not in row.values for row in found)]
    columns = list(dict.fromkeys(name for row in found for name in row.values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *places])
    for row in found:
        place = {"file": row.file, "row": row.number}
        cells = [text_of(row.values[name]) if row.values.get(name) is not None else "" for name in columns]
        writer.writerow([*cells, *(place[name] for name in places)])
    return text.getvalue(), len(found)


def texts_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows as they are in their files: {"file", "row", "values": column -> text}."""
    return [
        {
            "file": row.file,
            "row": row.number,
            "values": {name: cut(text_of(value)) for name, value in row.values.items()},
        }
        for row in rows
    ]


def hardest_of(rows: Sequence[Example]) -> Sequence[Example]:
    """Return those of the rows, the hardest first, that are worth a look."""
    return rows[: min(IN_FILE, max(SHOWN, len(rows) // 5))]


def text_of(value: Any) -> str:
    """Return a cell as text: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def cut(text: str) -> str:
    """Return the text, or its beginning and how much more there is."""
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]} … ({len(text) - MOST_CHARACTERS} more characters)"
