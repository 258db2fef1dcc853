"""Build report.html from a run's files, and comparison.html from those of several runs.

Everything comes from run.json, metrics.jsonl and report_data.json. So the page written at the end of a run is the
one that `handspun report` writes, and a run that was killed has a report too.
"""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from handspun import __version__
from handspun.display import count_of, visible
from handspun.errors import OutputError
from handspun.evaluation.answers import is_exact_match
from handspun.files import output_errors, write_text
from handspun.report import pictures, sides, words
from handspun.report.pictures import SET_NAMES
from handspun.runs import outcome
from handspun.runs.metrics import HARDEST, REPORT, RunFiles, is_report, read_run
from handspun.runs.sample_answers import MAX_NEW_TOKENS


def write_report(folder: Path) -> Path:
    """Write the report of a run into its folder and return its path.

    Raises OutputError if the folder is not a run's, if the file cannot be written, or if report.html is not ours.
    """
    page = report_page(read_run(folder))
    if os.path.lexists(folder / REPORT) and not is_report(folder / REPORT):
        raise OutputError(f"{folder / REPORT} was not written by Handspun, so it is not replaced. Move it away.")
    return write_page(page, folder / REPORT)


def write_page(page: str, file: Path) -> Path:
    """Replace the file atomically."""
    with output_errors(file):
        write_text(file, page)
    return file


def report_page(run: RunFiles) -> str:
    """Return the report of one run as HTML."""
    return render(
        "report.html.j2",
        title=words.title(run),
        run=run,
        begun=words.when(run),
        end=words.ENDS.get(run.record.status or "", run.record.status),
        verdict=outcome.verdict(run),
        figures=words.figures(run),
        checkpoint=outcome.checkpoint(run),
        next=outcome.next_commands(run),
        loss=pictures.loss_curve(run),
        epochs=words.epochs(run),
        curves=pictures.curves(run),
        max_new_tokens=MAX_NEW_TOKENS,
        before=run.kept.get("before", {}),
        after=run.kept.get("after", {}),
        answers=answers([run]),
        account=words.account(run),
        warnings=words.warnings(run),
        lengths=pictures.lengths(run),
        wrong=words.wrong_answers(run),
        row_losses=_row_losses(run),
        unknown_losses=_missing_losses_reason(run),
        hardest=run.kept.get(HARDEST),
        hardest_file=str(run.folder / HARDEST),
        spreads=pictures.losses(run),
        about=words.about(run),
        options=words.options(run),
        command=words.how_again(run),
        environment=words.environment(run),
        requirements=words.requirements(run),
        appendix=words.accounted_rows(run),
    )


def comparison_page(runs: Sequence[RunFiles]) -> str:
    """Return a page that compares several runs: differences, curves, answers."""
    names = sides.distinct_names(runs)
    return render(
        "comparison.html.j2",
        title=" and ".join(names) if len(names) == 2 else f"{len(names)} runs side by side",
        names=names,
        runs=runs,
        rows=sides.side_by_side(runs),
        warnings=sides.warnings(runs),
        verdicts=[outcome.verdict(run) for run in runs],
        curves=pictures.curves_side_by_side(runs, names),
        answers=answers(runs),
        max_new_tokens=MAX_NEW_TOKENS,
        commands=[words.how_again(run) for run in runs],
    )


def answers(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Return the greedy answers prompt by prompt: {"prompt", "expected", "cells"}.

    With one run, the two cells are the answers before and after training. With several, there is one cell per run,
    after training. A cell is an answer, with `is_right` if the expected one is known, or None.
    """
    columns = [runs[0].kept.get("before"), runs[0].kept.get("after")] if len(runs) == 1 else []
    columns = columns or [run.kept.get("after") for run in runs]
    by_prompt = [
        {one["prompt"]: one for one in (column or {}).get("answers", []) if one["decoding"] == "greedy"}
        for column in columns
    ]
    found = []
    for prompt in dict.fromkeys(prompt for column in by_prompt for prompt in column):
        cells = [column.get(prompt) for column in by_prompt]
        expected = next((one["expected"] for one in cells if one and one.get("expected") is not None), None)
        found.append({
            "prompt": prompt,
            "expected": expected,
            "cells": [one and {**one, "is_right": _is_right(one["text"], expected)} for one in cells],
        })  # fmt: skip
    return found


def _is_right(text: str, expected: str | None) -> bool:
    return expected is not None and is_exact_match(text, expected)


def _row_losses(run: RunFiles) -> list[dict[str, Any]]:
    found = run.kept.get("row_losses") or {}
    if "missing" in found:
        return []
    sets = []
    for name, some in found.items():
        several_files = len(run.record.data.by_name[name].rows.formats) > 1
        worst = [{**row, "where": words.where(row, several_files=several_files)} for row in some["worst"]]
        sets.append({**some, "name": SET_NAMES[name], "worst": worst})
    return sets


def _missing_losses_reason(run: RunFiles) -> str:
    return str((run.kept.get("row_losses") or {}).get("missing", "the run did not finish"))


def render(template: str, **context: Any) -> str:
    """Return the rendered template: everything escaped, and invisible or unencodable characters made visible."""
    page = _environment().get_template(template).render(version=__version__, **context)
    return visible(page)


@cache  # it keeps the compiled templates
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"color": pictures.css_color, "count": count_of}
    return environment
