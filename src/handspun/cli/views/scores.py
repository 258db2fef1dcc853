"""Render a model's scores: a short table, a JSON object, and one JSON line per row."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table

from handspun.display import json_line
from handspun.evaluation.score import RowScore, Scores

_MAX_TEXT = 80
"""Number of characters of a text in a row's line."""


def scores_table(scores: Scores) -> Table:
    """Return a table of the scores, with the number of tokens or answers behind each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(no_wrap=True, justify="right", style="bold")
    table.add_column(overflow="fold")
    for name, value, note in _lines(scores):
        table.add_row(name, value, note)
    return table


def _lines(scores: Scores) -> Iterator[tuple[str, str, str]]:
    if scores.loss is not None:
        assert scores.perplexity is not None
        rows = sum(row.loss_sum is not None for row in scores.rows)
        yield "loss", f"{scores.loss:.4f}", f"mean over {scores.tokens} target tokens in {rows} rows"
        yield "perplexity", f"{scores.perplexity:.3f}", ""
    compared = [row for row in scores.rows if row.exact_match is not None]
    if compared:
        matches = sum(bool(row.exact_match) for row in compared)
        yield (
            "exact match",
            f"{matches / len(compared):.1%}",
            f"{matches} of {len(compared)} answers, ignoring white space around them",
        )
    if any(row.answer for row in scores.rows):
        if cut := _count_cut_off(scores):
            yield "cut off", str(cut), "answers that reached --max-new-tokens"
        if tools := sum(row.question.needs_tools for row in scores.rows):
            yield "not asked", str(tools), "rows with tools, whose answers are not evaluated"


def scores_record(scores: Scores) -> dict[str, Any]:
    """Return the scores for --json. Shares are given as counts."""
    compared = [row for row in scores.rows if row.exact_match is not None]
    return {
        "model": scores.model,
        "data": {"source": scores.data, "sha256": scores.fingerprint, "max_length": scores.max_length},
        "rows": asdict(scores.account),
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "learned_tokens": scores.tokens,
        "exact_match": {"matches": sum(bool(row.exact_match) for row in compared), "compared": len(compared)},
        "answers": sum(row.answer is not None for row in scores.rows),
        "cut_off": _count_cut_off(scores),
    }


def row_lines(rows: Iterable[RowScore]) -> Iterator[str]:
    """Yield one JSON object per row, in row order."""
    for row in rows:
        question = row.question
        record: dict[str, Any] = {
            "file": question.file,
            "row": question.row,
            "loss": row.loss,
            "tokens": row.tokens,
            "prompt": question.prompt[:_MAX_TEXT],
            "expected": question.expected[:_MAX_TEXT],
        }
        if row.answer is not None:
            record |= {
                "answer": row.answer.text,
                "finish_reason": row.answer.finish_reason,
                "exact_match": row.exact_match,
            }
        yield json_line(record)


def _count_cut_off(scores: Scores) -> int:
    return sum(row.answer is not None and row.answer.finish_reason == "length" for row in scores.rows)
