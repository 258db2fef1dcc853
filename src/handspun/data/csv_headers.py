"""What stands around the cells of a csv file: a hint for Excel, the separator, columns and rows that hold nothing.

What is left out here has no name and no text, or says what it is; each is told of in `notes`, for the account.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from handspun.data.formats import fits_a_format
from handspun.data.text_files import split_lines
from handspun.display import join_names, printable
from handspun.errors import DataError

_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
# Excel's, as it is written by others: in quotes, or filled up with separators to the width of the table.
_EXCEL_HINT = re.compile(r'\s*"?sep=([^\w\s"]|\t)"?[,;\t|]*(?:\r\n?|\n|\Z)', re.IGNORECASE)


class Record(NamedTuple):
    """A line of cells, which may go over several lines of the file."""

    line: int
    cells: list[str]


@dataclass(frozen=True)
class Columns:
    """The columns with a name.

    places: where their cells stand in a record.
    least, most: how many cells a record may have; those beyond the last name are empty.
    """

    names: list[str]
    places: list[int]
    least: int
    most: int

    def row(self, cells: Sequence[str]) -> dict[str, str]:
        """Return the cells under their names."""
        if len(self.places) == self.least:  # no column is left out before the last one
            return dict(zip(self.names, cells, strict=False))
        return {name: cells[place] for name, place in zip(self.names, self.places, strict=True)}


def find_separator(text: str, usual: str, notes: list[str]) -> tuple[str, int]:
    """Return the separator, and where in the text the header begins.

    The separator is the one that the suffix promises (`usual`), unless Excel's first line names another one, or
    the header has the columns of a format by exactly one other and by this one has not.
    """
    hint = _EXCEL_HINT.match(text)
    if hint:
        notes.append(f"the first line, sep={_name(hint[1])}, is Excel's hint for the separator and no row")
        return hint[1], hint.end()
    if not fits_a_format(_first_cells(text, usual)):
        others = [other for other in _SEPARATORS if other != usual and fits_a_format(_first_cells(text, other))]
        if len(others) == 1:
            notes.append(f"separated by {_name(others[0])}, not by {_name(usual)}")
            return others[0], 0
    return usual, 0


def check_separator(header: Record, separator: str, file: str) -> None:
    """Raise DataError for a header of one name that another separator would cut."""
    only = header.cells[0]
    other = next((mark for mark in _SEPARATORS if mark != separator and mark in only), None)
    if len(header.cells) == 1 and other is not None:
        raise DataError(
            f"the header is the one name '{printable(only)}'; it looks separated by {other!r}, and {separator!r} "
            f"is expected. Put the line sep={_name(other)} above it, or save the file with {separator!r}.",
            file=file,
            line=header.line,
        )


def wrong_count(columns: Columns, found: int, separator: str) -> str:
    """Return what to say of a record with another number of cells than the header has."""
    return (
        f"expected {columns.least} cells ({join_names(columns.names)}), found {found}. A text that holds "
        f"{_SEPARATORS.get(separator, repr(separator))}, a quote or a line break stands in double quotes, with "
        "the quotes inside it doubled."
    )


def is_empty(cells: Sequence[str]) -> bool:
    """Return whether there is nothing but white space in the cells."""
    return not any(cell and not cell.isspace() for cell in cells)


def without_empty(records: list[Record], notes: list[str]) -> list[Record]:
    """Return the records that hold something; lines of nothing but separators are noted.

    Under a header of one column an empty cell (written `""`) is a row.
    """
    width = len(records[0].cells) if records else 0
    kept: list[Record] = []
    empty: list[int] = []
    for record in records:
        if not is_empty(record.cells) or (width == 1 == len(record.cells) and kept):
            kept.append(record)
        elif len(record.cells) > 1:
            empty.append(record.line)
    if empty:
        lines = join_names([str(line) for line in empty], most=12)
        notes.append(
            f"lines with nothing but separators, skipped: {len(empty)} (line{'s'[: len(empty) > 1]} {lines})"
        )
    return kept


def named_columns(header: Record, body: list[Record], file: str, notes: list[str]) -> Columns:
    """Return the columns with a name; others are left out and noted if they hold nothing, or a count of the rows.

    Raise DataError for a column that has no name and holds something, and for a name that stands twice.
    """
    unnamed = [place for place, name in enumerate(header.cells) if not name.strip()]
    places = [place for place, name in enumerate(header.cells) if name.strip()]
    _check_unique([header.cells[place] for place in places], places, header.line, file)
    least, most = places[-1] + 1, len(header.cells)
    for place in unnamed:
        if place < least:
            notes.append(_note_of_unnamed(place, header, body, file))
    trailing = most - least
    surplus = min((len(record.cells) for record in body), default=0) - most
    if trailing or surplus > 0:
        used = next((r for r in body if len(r.cells) <= most + surplus and not is_empty(r.cells[least:])), None)
        if used is not None and trailing:
            place = next(i for i, cell in enumerate(used.cells) if i >= least and cell.strip())
            raise _unnamed(place, used, file, header.line)
        if used is None:
            more = "" if trailing + max(surplus, 0) == 1 else "s"
            where = "at the end of the header" if trailing else "at the end of each line"
            notes.append(f"separator{more} {where} with nothing behind, not read")
    return Columns([header.cells[place] for place in places], places, least, most + max(surplus, 0))


def _note_of_unnamed(place: int, header: Record, body: list[Record], file: str) -> str:
    """A column without a name before the last one that has a name."""
    cells = [record.cells[place] for record in body if place < len(record.cells)]
    if is_empty(cells):
        return f"column {place + 1} has no name and holds nothing, not read"
    if place == 0 and all(cell.isascii() and cell.isdecimal() for cell in cells):
        return "column 1 has no name and numbers the rows (as pandas does), not read"
    used = next(record for record in body if place < len(record.cells) and record.cells[place].strip())
    raise _unnamed(place, used, file, header.line)


def _unnamed(place: int, used: Record, file: str, line: int) -> DataError:
    return DataError(
        f"column {place + 1} of the header has no name, and line {used.line} has '{printable(used.cells[place])}' "
        "in it. Name it, or leave it out (an index written by pandas is left out by to_csv(..., index=False)). If "
        "it is the rest of a text that holds a separator, that text has to stand in double quotes.",
        file=file,
        line=line,
    )


def _check_unique(names: list[str], places: list[int], line: int, file: str) -> None:
    first: dict[str, int] = {}
    for name, place in zip(names, places, strict=True):
        earlier = first.setdefault(name, place)
        if earlier != place:
            raise DataError(
                f"columns {earlier + 1} and {place + 1} are both named '{printable(name)}'; each name is expected "
                "once. Rename or remove one.",
                file=file,
                line=line,
            )


def _first_cells(text: str, separator: str) -> list[str]:
    """Of the first line with something on it; none where it is malformed by this separator."""
    try:
        records = csv.reader(split_lines(text), delimiter=separator, strict=True)
        return next((cells for cells in records if not is_empty(cells)), [])
    except csv.Error:
        return []


def _name(separator: str) -> str:
    return {"\t": "(a tab)"}.get(separator, separator)
