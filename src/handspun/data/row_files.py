"""The rows of one file (csv, tsv, json, jsonl, parquet), each cell as it was written.

csv, tsv and json are read by the standard library: no cell is guessed to be a number, a date or missing,
and every error knows its line. Lines in messages are physical lines, the first is 1.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from handspun.data.naming import file_name, listed, shown, type_name
from handspun.data.nesting import MOST_LEVELS, is_nested_deeper
from handspun.data.parquet_files import read_parquet
from handspun.data.text_files import read_text
from handspun.errors import DataError

Values = dict[str, Any]

# An object with one of these is a row and no wrapper around a list of rows.
_OF_A_ROW = {"messages", "conversations", "instruction", "prompt"}


def read_file(path: Path) -> list[Values]:
    """The file's rows in order, at least one. Raises DataError, and OSError where the system refuses."""
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(
            f"the suffix {path.suffix or '(none)'} is none of {', '.join(SUFFIXES)}, so how to read the file is "
            "unknown. Convert it to one of these, or rename it if it already is one.",
            file=file_name(path),
        )
    rows = read(path)
    if not rows:
        raise DataError("there are no rows in it; at least one is expected.", file=file_name(path))
    for number, values in enumerate(rows, 1):
        if is_nested_deeper(values):
            raise DataError(
                f"lists and objects stand in each other more than {MOST_LEVELS} deep. Mend the row or remove it.",
                file=file_name(path),
                row=number,
            )
    return rows


def read_csv(path: Path, *, delimiter: str = ",") -> list[Values]:
    """Rows under a header of column names; blank lines are skipped. Cells are the strings in the file."""
    file, text = file_name(path), read_text(path)
    limit = csv.field_size_limit(min(len(text) + 1, 2**31 - 1))
    try:
        records = list(_csv_records(text, delimiter, file))
    finally:
        csv.field_size_limit(limit)
    (line, header), *body = records
    _check_header(header, line, delimiter, file)
    rows: list[Values] = []
    for line, cells in body:
        if len(cells) == 1 < len(header) and not cells[0].strip():
            continue
        if len(cells) != len(header):
            raise DataError(
                f"expected {len(header)} cells ({listed(header)}), found {len(cells)}. A text that holds "
                f"{'a tab' if delimiter == chr(9) else 'a comma'}, a quote or a line break stands in double "
                "quotes, with the quotes inside it doubled.",
                file=file,
                line=line,
                row=len(rows) + 1,
            )
        if cells[0].removeprefix("\ufeff") == header[0] and cells[1:] == header[1:]:
            raise DataError(
                "the header stands here again, as where two files were joined. Remove the line.",
                file=file,
                line=line,
                row=len(rows) + 1,
            )
        rows.append(dict(zip(header, cells, strict=True)))
    if not rows:
        raise DataError(
            f"it has a header ({listed(header)}) and no rows; at least one is expected. If that is a row, put "
            "a line with the column names above it.",
            file=file,
        )
    return rows


def read_tsv(path: Path) -> list[Values]:
    """As csv, with tabs between the cells; quotes mean what they mean in csv."""
    return read_csv(path, delimiter="\t")


def read_json(path: Path) -> list[Values]:
    """A list of objects; or an object with one list of objects in it; or one object, which is one row.

    JSON Lines under this suffix are read too. NaN and Infinity are read as numbers, as Python does.
    """
    file, text = file_name(path), read_text(path)
    first, _, rest = text.lstrip().partition("\n")
    if rest.strip() and _is_object(first):
        return _json_lines(text, file)
    value = _parse(text, file)
    if isinstance(value, dict):
        value = _list_within(value, file)
    if not isinstance(value, list):
        raise DataError(f"expected a list of objects, found {type_name(value)}.", file=file)
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            raise DataError(f"expected an object, found {type_name(item)}.", file=file, row=number)
    return value


def read_jsonl(path: Path) -> list[Values]:
    """An object a line; blank lines are skipped."""
    return _json_lines(read_text(path), file_name(path))


def _csv_records(text: str, delimiter: str, file: str) -> Iterator[tuple[int, list[str]]]:
    """(line where the record starts, its cells); lines with nothing on them are none."""
    reader = csv.reader(_lines(text), delimiter=delimiter, strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        if "unexpected end" in str(error):
            problem = "a quote opens in this record and is not closed before the end of the file. Close it"
        else:
            problem = f"malformed at line {reader.line_num} ({error})"
        raise DataError(
            f"{problem}; inside of a quoted cell, a quote is written twice.", file=file, line=line
        ) from error


def _lines(text: str) -> Iterator[str]:
    """As io.StringIO gives them, which would hold the text a second time, at four bytes a character."""
    return (match[0] for match in re.finditer(r"[^\r\n]*+(?:\r\n?|\n)|[^\r\n]++", text))


def _check_header(header: list[str], line: int, delimiter: str, file: str) -> None:
    other = next((mark for mark in ";\t|," if mark != delimiter and mark in header[0]), None)
    if len(header) == 1 and other is not None:
        raise DataError(
            f"the header is the one name '{shown(header[0])}'; it looks separated by {other!r}, and {delimiter!r} "
            "is expected. Save it with that separator (or as .tsv, if it is tabs).",
            file=file,
            line=line,
        )
    for number, name in enumerate(header, 1):
        if not name.strip():
            raise DataError(
                f"column {number} of the header has no name. Name it, or leave it out (an index written by "
                "pandas is left out by to_csv(..., index=False)).",
                file=file,
                line=line,
            )
    _check_unique(header, file, line)


def _check_unique(names: list[str], file: str, line: int) -> None:
    places: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        first = places.setdefault(name, number)
        if first != number:
            raise DataError(
                f"columns {first} and {number} are both named '{shown(name)}'; each name is expected once. "
                "Rename or remove one.",
                file=file,
                line=line,
            )


def _json_lines(text: str, file: str) -> list[Values]:
    rows: list[Values] = []
    for line, record in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand in a JSON string
        if not record.strip():
            continue
        if line == 1 and record.lstrip().startswith("["):
            raise DataError(
                "expected an object on each line, found a list. If the file is one JSON list, name it .json.",
                file=file,
                line=1,
            )
        value = _parse(record, file, line)
        if not isinstance(value, dict):
            raise DataError(
                f"expected an object, found {type_name(value)}.", file=file, line=line, row=len(rows) + 1
            )
        rows.append(value)
    return rows


def _list_within(value: Values, file: str) -> Any:
    """The rows of {"data": [row, ...]}; an object that is itself a row comes back as the only one."""
    lists = [
        key for key, item in value.items() if isinstance(item, list) and all(isinstance(x, dict) for x in item)
    ]
    if not lists or _OF_A_ROW & value.keys():
        return [value]
    if len(lists) > 1:
        raise DataError(
            f"the object holds several lists ({listed(lists)}); one list of rows is expected. Save the one "
            "to be read as a file of its own.",
            file=file,
        )
    return value[lists[0]]


class _DuplicateKeyError(Exception):
    def __init__(self, key: str) -> None:
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> Values:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(next(name for i, name in enumerate(names) if name in names[:i]))
    return values


def _parse(text: str, file: str, first_line: int = 1) -> Any:
    """JSON text that begins on `first_line` of the file."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except _DuplicateKeyError as error:
        raise DataError(
            f"the key '{shown(error.key)}' stands twice in one object, so one value would be lost. Remove one.",
            file=file,
            line=first_line + _line_of_duplicate(text),
        ) from error
    except json.JSONDecodeError as error:
        near = text[max(error.pos - 20, 0) : error.pos + 20]
        raise DataError(
            f"malformed JSON at character {error.colno} of the line: {error.msg}, near {near!r}.",
            file=file,
            line=first_line + error.lineno - 1,
        ) from error
    except RecursionError as error:
        raise DataError("the JSON is nested too deeply to be read.", file=file, line=first_line) from error
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"the JSON cannot be read: {error}.", file=file, line=first_line) from error


def _line_of_duplicate(text: str) -> int:
    """Line breaks before the first key that its object already has."""
    objects: list[set[str]] = []
    for match in re.finditer(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}]', text):
        if match[0] == "{":
            objects.append(set())
        elif match[0] == "}":
            objects.pop()
        elif match[2]:
            key = json.loads(match[1])
            if key in objects[-1]:
                return text.count("\n", 0, match.start())
            objects[-1].add(key)
    return 0


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


_READERS: dict[str, Callable[[Path], list[Values]]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
}
SUFFIXES = tuple(_READERS)
"""Suffixes of the files that can be read."""
