"""The table that compares several runs."""

from collections.abc import Sequence

from handspun.config import option_name
from handspun.report import words
from handspun.report.pictures import SET_NAMES
from handspun.runs.metrics import RunFiles


def side_by_side(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Return (name, value in each run): outcomes, inputs, and every option that any of the runs was given."""
    given = dict.fromkeys(name for run in runs for name in run.record.given)
    return [
        ("Status", [run.record.status or "unknown" for run in runs]),
        *_outcomes(runs),
        *_of_sets(runs),
        ("Model fingerprint", [_fingerprints(run) for run in runs]),
        ("Trained", [words.parameters(run.plan.trainable) for run in runs]),
        *((option_name(name), [words.shown(run.record.config.get(name)) for run in runs]) for name in given),
        ("Machine", [run.record.environment.machine for run in runs]),
        ("Versions", _versions(runs)),
    ]


def warnings(runs: Sequence[RunFiles]) -> list[str]:
    """Return warnings about figures that cannot be compared."""
    held_out = {_fingerprint(run, "held_out") for run in runs}
    if len(held_out) == 1:
        return []
    return ["The runs have different held-out rows, so their held-out losses cannot be compared."]


def distinct_names(runs: Sequence[RunFiles]) -> list[str]:
    """Return the folders' names, or their full paths if two have the same name."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _versions(runs: Sequence[RunFiles]) -> list[str]:
    """Return the versions that differ between the runs, of Python and its packages."""
    found = [{"Python": run.record.environment.python, **run.record.environment.versions} for run in runs]
    names = dict.fromkeys(name for versions in found for name in versions)
    differing = [name for name in names if len({versions.get(name) for versions in found}) > 1]
    if not differing:
        return ["all the same"] * len(runs)
    return [", ".join(f"{name} {versions.get(name, 'none')}" for name in differing) for versions in found]


def _outcomes(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    figures = [{name: f"{figure}, {text}" for name, figure, text in words.figures(run)} for run in runs]
    names = dict.fromkeys(name for some in figures for name in some)
    return [(name, [some.get(name, "unknown") for some in figures]) for name in names]


def _of_sets(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    found = []
    for key, name in SET_NAMES.items():
        sets = [run.record.data.by_name.get(key) for run in runs]
        if any(sets):
            found.append((f"Examples {name}", [f"{some.examples:,}" if some else "none" for some in sets]))
            found.append((f"Rows {name}, sha256", [_fingerprint(run, key)[:16] for run in runs]))
    return found


def _fingerprint(run: RunFiles, key: str) -> str:
    some = run.record.data.by_name.get(key)
    return some.sha256 if some else "none"


def _fingerprints(run: RunFiles) -> str:
    return ", ".join(value[:16] for value in run.kept.get("model", {}).values()) or "unknown"
