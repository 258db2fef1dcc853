"""Findings: what should be looked at before a run, in which rows, and what to do about it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from handspun.data.examples import RowNote
from handspun.errors import ConfigError

_MOST_NAMED = 12


@dataclass(frozen=True)
class Finding:
    """A warning. `what` reads like `rows that are cut`; `count` of `of` rows have it, and `rows` are the first of
    these, each with what is to be said of it. Where no rows are meant, count and of are 0."""

    what: str
    remedy: str
    count: int = 0
    of: int = 0
    rows: list[RowNote] = field(default_factory=list)


def finding(what: str, remedy: str, notes: Sequence[RowNote], *, of: int) -> Iterator[Finding]:
    """The finding of these rows; nothing without any."""
    if notes:
        yield Finding(what, remedy, len(notes), of, list(notes[:_MOST_NAMED]))


def refuse_findings(found: Sequence[Finding]) -> None:
    """Raises ConfigError with all of them, if there are any: what --strict asks for."""
    if found:
        raise ConfigError(
            f"--strict refuses {len(found)} warning{'s' if len(found) > 1 else ''}:\n"
            + "\n".join(f"  {one.what}{counted(one)}: {one.remedy}" for one in found)
            + "\nMend what they name, or leave --strict out."
        )


def headline(one: Finding) -> str:
    """`rows that are cut: 3 of 100 (3%)`."""
    return f"{one.what}: {one.count} of {one.of} ({_percent(one.count / one.of)})" if one.of else one.what


def rows_named(one: Finding) -> str:
    """`rows 3 (as row 1), 17 (as row 2) and 4 more`, with the files where there are several; nothing without."""
    if not one.rows:
        return ""
    several = len({note.file for note in one.rows}) > 1
    named = [
        (f"{note.file} " if several else "") + str(note.row) + (f" ({note.text})" if note.text else "")
        for note in one.rows
    ]
    more = f" and {one.count - len(named)} more" if one.count > len(named) else ""
    return f"row{'s' if one.count > 1 else ''} {', '.join(named)}{more}"


def _percent(share: float) -> str:
    """Whole where that says something."""
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.1g}%"


def counted(one: Finding) -> str:
    """` (3 of 100)`, or nothing where no rows are counted."""
    return f" ({one.count} of {one.of})" if one.of else ""
