"""Rows as a reader wants to see them: which the model finds hardest and easiest, and what the account left out."""

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from handspun.data.examples import Example
from handspun.data.rows import Row
from handspun.report.preview import learned_runs, spread
from handspun.training.execution import Execution

SHOWN = 10
"""Worst and best rows that are shown with their text."""

MOST_CHARACTERS = 4000
"""Of one text."""


def losses_by_row(
    execution: Execution, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, most: int
) -> dict[str, Any]:
    """The mean loss a learned token of each row, of at most `most` rows that lie at even distances, and the ten
    worst and the ten best with their text: runs of [text, is it learned]. No row is among both. "mean" is that of
    all their learned tokens, "of" the number of rows that there are."""
    rows = spread(examples, most)
    sums = [execution.loss([row]) for row in rows]
    losses = [total / row.learned_tokens for total, row in zip(sums, rows, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: -losses[i])

    def shown(i: int) -> dict[str, Any]:
        runs = [[cut(text), learned] for text, learned in learned_runs(rows[i], tokenizer)]
        return {"file": rows[i].file, "row": rows[i].row, "loss": losses[i], "runs": runs}

    return {
        "of": len(examples),
        "mean": sum(sums) / sum(row.learned_tokens for row in rows),
        "losses": losses,
        "worst": [shown(i) for i in order[:SHOWN]],
        "best": [shown(i) for i in reversed(order[SHOWN:][-SHOWN:])],
    }


def texts_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as they stand in their files: {"file", "row", "values": column -> text}."""
    return [
        {"file": row.file, "row": row.number, "values": {name: cut(_text(v)) for name, v in row.values.items()}}
        for row in rows
    ]


def cut(text: str) -> str:
    """The text, or its beginning and how much more there is."""
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]} … ({len(text) - MOST_CHARACTERS} more characters)"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
