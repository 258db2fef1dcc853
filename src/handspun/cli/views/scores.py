"""A model's scores: a short table for people, an object for machines, a line for each row."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table

from handspun.display import json_line
from handspun.evaluation.instructions import Verdict
from handspun.evaluation.score import RowScore, Scores

_BEGINNING = 80
"""Characters of a text that a row's line shows."""


def scores_table(scores: Scores) -> Table:
    """What was scored, and the scores; each with what it is a share of."""
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
        yield "loss", f"{scores.loss:.4f}", f"a learned token's mean, over {scores.tokens} in {rows} rows"
        yield "perplexity", f"{scores.perplexity:.3f}", ""
    compared = [row for row in scores.rows if row.exact_match is not None]
    if compared:
        matches = sum(bool(row.exact_match) for row in compared)
        yield (
            "exact match",
            f"{matches / len(compared):.1%}",
            f"{matches} of {len(compared)} answers, white space aside",
        )
    instructed = [row.verdicts for row in scores.rows if row.verdicts]
    if instructed:
        yield from _instruction_lines(instructed)
    if any(row.answer for row in scores.rows):
        if cut := _cut(scores):
            yield "cut off", str(cut), "answers that --max-new-tokens ended"
        if tools := sum(row.question.needs_tools for row in scores.rows):
            yield "not asked", str(tools), "rows with tools, whose answers are not evaluated"


def _instruction_lines(instructed: list[list[Verdict]]) -> Iterator[tuple[str, str, str]]:
    checked = [v for verdicts in instructed for v in verdicts if v.strict is not None]
    whole = [verdicts for verdicts in instructed if all(v.strict is not None for v in verdicts)]
    unchecked = [v.id for verdicts in instructed for v in verdicts if v.strict is None]
    forms: list[tuple[str, Callable[[Verdict], bool | None]]] = [
        ("strict", lambda verdict: verdict.strict),
        ("loose", lambda verdict: verdict.loose),
    ]
    for form, follows in forms:
        if checked:
            followed = sum(bool(follows(v)) for v in checked)
            share = f"{followed / len(checked):.1%}"
            yield f"instructions, {form}", share, f"{followed} of the {len(checked)} that are checked"
        if whole:
            prompts = sum(all(follows(v) for v in verdicts) for verdicts in whole)
            share = f"{prompts / len(whole):.1%}"
            yield f"prompts, {form}", share, f"all followed in {prompts} of {len(whole)} with all checked"
    if unchecked:
        names = ", ".join(dict.fromkeys(unchecked))
        yield "not checked", str(len(unchecked)), f"of kinds that are not checked here: {names}"


def scores_record(scores: Scores) -> dict[str, Any]:
    """The scores for machines. Shares are given as counts."""
    compared = [row for row in scores.rows if row.exact_match is not None]
    all_verdicts = [verdict for row in scores.rows for verdict in row.verdicts]
    return {
        "model": scores.model,
        "data": {"source": scores.data, "sha256": scores.fingerprint, "max_length": scores.max_length},
        "rows": asdict(scores.account) if scores.account else {"rows": len(scores.rows)},
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "learned_tokens": scores.tokens,
        "exact_match": {"matches": sum(bool(row.exact_match) for row in compared), "compared": len(compared)},
        "instructions": {
            "checked": sum(v.strict is not None for v in all_verdicts),
            "followed_strict": sum(bool(v.strict) for v in all_verdicts),
            "followed_loose": sum(bool(v.loose) for v in all_verdicts),
            "not_checked": sum(v.strict is None for v in all_verdicts),
        },
        "answers": sum(row.answer is not None for row in scores.rows),
        "cut_off": _cut(scores),
    }


def row_lines(rows: Iterable[RowScore]) -> Iterator[str]:
    """One JSON object a row, in the rows' order."""
    for row in rows:
        question = row.question
        record: dict[str, Any] = {
            "file": question.file,
            "row": question.row,
            "loss": row.loss,
            "tokens": row.tokens,
            "prompt": question.prompt[:_BEGINNING],
            "expected": question.expected[:_BEGINNING] if question.expected is not None else None,
        }
        if row.answer is not None:
            record |= {
                "answer": row.answer.text,
                "finish_reason": row.answer.finish_reason,
                "exact_match": row.exact_match,
                "instructions": [asdict(verdict) for verdict in row.verdicts],
            }
        yield json_line(record)


def _cut(scores: Scores) -> int:
    return sum(row.answer is not None and row.answer.finish_reason == "length" for row in scores.rows)
