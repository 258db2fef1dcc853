"""Render the findings of `handspun verify` as a table of 80 columns or as JSON, with a verdict in one line."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from handspun.display import json_line
from handspun.verification.reference import Divergence, Finding, Status

_STYLES: dict[Status, str] = {"pass": "green", "tie": "yellow", "info": "dim", "fail": "bold red"}


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return a table with one row per finding, and one line per divergence below it."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("check", no_wrap=True, style="bold")
    table.add_column("case", ratio=2)
    table.add_column("", no_wrap=True)
    table.add_column("found", ratio=3)
    before = None
    for finding in findings:
        status = "FAIL" if finding.status == "fail" else finding.status
        lines = [finding.found, *map(_divergence, finding.divergences)]
        table.add_row(
            Text("" if finding.check == before else finding.check),
            Text(finding.case),
            Text(status, style=_STYLES[finding.status]),
            Text("\n".join(lines)),
        )
        before = finding.check
    return table


def findings_json(findings: Sequence[Finding], model: str) -> str:
    """Return all findings as one JSON object."""
    record = {
        "model": model,
        "passed": not failed(findings),
        "verdict": verdict(findings),
        "findings": [_finding_record(finding) for finding in findings],
    }
    return json_line(record, allow_nan=False)


def failed(findings: Sequence[Finding]) -> list[Finding]:
    """Return the failed findings."""
    return [finding for finding in findings if finding.status == "fail"]


def verdict(findings: Sequence[Finding]) -> str:
    """Return the overall result as a sentence."""
    counts = Counter(finding.status for finding in findings)
    if counts["fail"]:
        names = ", ".join(dict.fromkeys(finding.check for finding in failed(findings)))
        return (
            f"{counts['fail']} of {len(findings)} checks failed ({names}): with this model, Handspun's results "
            "are wrong. Please report it, with the output of --json."
        )
    ties = f", {counts['tie']} with ties, where rounding decides between two tokens" if counts["tie"] else ""
    return (
        f"{counts['pass']} checks passed{ties}: with this model, Handspun computes the same as transformers, in "
        "any batch."
    )


def _finding_record(finding: Finding) -> dict[str, Any]:
    """Return a finding as a JSON object."""
    # JSON has no infinity, so the infinite margin to an excluded token is null.
    apart = [
        {**asdict(one), "margin": one.margin if math.isfinite(one.margin) else None, "is_tie": one.is_tie}
        for one in finding.divergences
    ]
    return {**asdict(finding), "divergences": apart}


def _divergence(divergence: Divergence) -> str:
    kind = "tie" if divergence.is_tie else "too far for a tie"
    return (
        f"prompt {divergence.prompt}, token {divergence.token}: {divergence.ours!r} instead of "
        f"{divergence.theirs!r}; margin {divergence.margin:.1e}, rounding up to {divergence.rounding:.1e}: {kind}"
    )
