"""Read what surrounds the cells of a csv file: Excel's hint, the separator, and empty columns and rows.

Only columns and rows without any name or text are skipped, and lines whose meaning is certain. Each is added to
`notes`, for the data report.
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
# Excel's hint, and as other programs write it: in quotes, or padded with separators to the width of the table.
_EXCEL_HINT = re.compile(r'\s*"?sep=([^\w\s"]|\t)"?[,;\t|]*(?:\r\n?|\n|\Z)', re.IGNORECASE)


class Record(NamedTuple):
    """One csv record, which may span several lines of the file."""

    line: int
    cells: list[str]


@dataclass(frozen=True)
class Columns:
    """The columns that have a name.

    indices: the indices of their cells in a record.
    least, most: how many cells a record may have. Cells beyond the last name are empty.
    """

    names: list[str]
    indices: list[int]
    least: int
    most: int

    def row(self, cells: Sequence[str]) -> dict[str, str]:
        """Return the cells by column name."""
        if len(self.indices) == self.least:  # no column is skipped before the last one
            return dict(zip(self.names, cells, strict=False))
        return {name: cells[index] for name, index in zip(self.names, self.indices, strict=True)}


def find_separator(text: str, usual: str, notes: list[str]) -> tuple[str, int]:
    """Return the separator, and the position in the text where the header begins.

    The suffix's separator (`usual`) is used, with three exceptions. Excel's first line may name another one. The
    header may fit a format only with another separator, and with exactly one. Or it is a single name that exactly
    one other separator splits: columns that --columns may name.
    """
    hint = _EXCEL_HINT.match(text)
    if hint:
        notes.append(f"the first line, sep={_name(hint[1])}, is Excel's hint for the separator, not a row")
        return hint[1], hint.end()
    header = _first_cells(text, usual)
    if not fits_a_format(header):
        cells = {other: _first_cells(text, other) for other in _SEPARATORS if other != usual}
        others = [other for other in cells if fits_a_format(cells[other])]
        if not others and len(header) < 2:
            others = [other for other in cells if len(cells[other]) > 1]
        if len(others) == 1:
            notes.append(f"separated by {_name(others[0])}, not by {_name(usual)}")
            return others[0], 0
    return usual, 0


def check_separator(header: Record, separator: str, file: str) -> None:
    """Raise DataError if the header is one name that several other separators would split."""
    only = header.cells[0]
    other = next((mark for mark in _SEPARATORS if mark != separator and mark in only), None)
    if len(header.cells) == 1 and other is not None:
        raise DataError(
            f"the header is a single name, '{printable(only)}'. It looks separated by {other!r} (expected "
            f"{separator!r}). Put the line sep={_name(other)} above it, or save the file with {separator!r}.",
            file=file,
            line=header.line,
        )


def wrong_count(columns: Columns, found: int, separator: str) -> str:
    """Return the error message for a record whose number of cells differs from the header's."""
    return (
        f"expected {columns.least} cells ({join_names(columns.names)}), found {found}. Put a text that contains "
        f"{_SEPARATORS.get(separator, repr(separator))}, a quote or a line break in double quotes, and double the "
        "quotes inside it."
    )


def is_empty(cells: Sequence[str]) -> bool:
    """Return whether all cells are blank."""
    return not any(cell and not cell.isspace() for cell in cells)


def without_empty(records: list[Record], notes: list[str]) -> list[Record]:
    """Return the records that are not empty, and note lines that contain only separators.

    If the header has one column, an empty cell (written `""`) is a row.
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
        notes.append(f"lines with only separators, skipped: {len(empty)} (line{'s'[: len(empty) > 1]} {lines})")
    return kept


def named_columns(header: Record, body: list[Record], file: str, notes: list[str]) -> Columns:
    """Return the columns that have a name. Note and skip nameless columns that are empty or number the rows.

    Raises DataError for a column that has values but no name, and for a repeated name.

    Args:
        header: the header's record.
        body: the records after it.
        file: the file's name in messages.
        notes: filled with what was skipped.
    """
    unnamed = [index for index, name in enumerate(header.cells) if not name.strip()]
    indices = [index for index, name in enumerate(header.cells) if name.strip()]
    _check_unique([header.cells[index] for index in indices], indices, header.line, file)
    least, most = indices[-1] + 1, len(header.cells)
    for index in unnamed:
        if index < least:
            notes.append(_note_of_unnamed(index, header, body, file))
    trailing = most - least
    surplus = min((len(record.cells) for record in body), default=0) - most
    if trailing or surplus > 0:
        used = next((r for r in body if len(r.cells) <= most + surplus and not is_empty(r.cells[least:])), None)
        if used is not None and trailing:
            index = next(i for i, cell in enumerate(used.cells) if i >= least and cell.strip())
            raise _unnamed(index, used, file, header.line)
        if used is None:
            more = "" if trailing + max(surplus, 0) == 1 else "s"
            where = "at the end of the header" if trailing else "at the end of each line"
            notes.append(f"separator{more} {where} with nothing after, ignored")
    return Columns([header.cells[index] for index in indices], indices, least, most + max(surplus, 0))


def _note_of_unnamed(index: int, header: Record, body: list[Record], file: str) -> str:
    """Return a note on a nameless column that comes before a named one. Raises DataError if it has values."""
    cells = [record.cells[index] for record in body if index < len(record.cells)]
    if is_empty(cells):
        return f"column {index + 1} has no name and is empty, ignored"
    if index == 0 and all(cell.isascii() and cell.isdecimal() for cell in cells):
        return "column 1 has no name and numbers the rows (as pandas does), ignored"
    used = next(record for record in body if index < len(record.cells) and record.cells[index].strip())
    raise _unnamed(index, used, file, header.line)


def _unnamed(index: int, used: Record, file: str, line: int) -> DataError:
    return DataError(
        f"column {index + 1} of the header has no name, but line {used.line} has '{printable(used.cells[index])}' "
        "in it. Name the column or remove it (for pandas' index: to_csv(..., index=False)). If the value is the "
        "rest of a text that contains a separator, put that text in double quotes.",
        file=file,
        line=line,
    )


def _check_unique(names: list[str], indices: list[int], line: int, file: str) -> None:
    first: dict[str, int] = {}
    for name, index in zip(names, indices, strict=True):
        earlier = first.setdefault(name, index)
        if earlier != index:
            raise DataError(
                f"columns {earlier + 1} and {index + 1} are both named '{printable(name)}' (expected each name "
                "once). Rename or remove one.",
                file=file,
                line=line,
            )


def _first_cells(text: str, separator: str) -> list[str]:
    """Return the cells of the first line that is not empty; none if it is malformed with this separator."""
    try:
        records = csv.reader(split_lines(text), delimiter=separator, strict=True)
        return next((cells for cells in records if not is_empty(cells)), [])
    except csv.Error:
        return []


def _name(separator: str) -> str:
    return {"\t": "(a tab)"}.get(separator, separator)
