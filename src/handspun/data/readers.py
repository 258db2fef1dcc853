"""Read the rows of one file: csv, tsv, json, jsonl or parquet."""

import csv
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from handspun.data.csv_headers import (
    Record,
    check_separator,
    find_separator,
    is_empty,
    named_columns,
    without_empty,
    wrong_count,
)
from handspun.data.formats import MOST_SEARCHED, common_pair, fits_a_format, known_spellings
from handspun.data.json_shapes import (
    MOST_LEVELS,
    Values,
    exceeds_depth,
    is_conversation,
    remedy,
    rows_of,
    rows_of_list,
)
from handspun.data.text_files import (
    BYTE_ORDER_MARK,
    check_kind,
    line_and_column,
    memory_limit,
    read_text,
    read_text_of_rows,
    split_lines,
)
from handspun.display import file_name, join_names, printable
from handspun.errors import DataError


class LostNulls(dict[str, Any]):
    """An object from which nulls were removed."""


def without_nulls(value: Any) -> Any:
    """Return a nested value without its null entries. Objects that lost any are LostNulls."""
    # Arrow gives every object all keys that any object has, so a missing key and a null look the same.
    if isinstance(value, dict):
        return _object({key: without_nulls(item) for key, item in value.items() if item is not None}, of=value)
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def has_lost_nulls(value: Any) -> bool:
    """Return whether nulls were removed anywhere in a value."""
    if isinstance(value, dict):
        return isinstance(value, LostNulls) or any(map(has_lost_nulls, value.values()))
    return isinstance(value, list) and any(map(has_lost_nulls, value))


def cell_reader(of: Any) -> Callable[[Any], Any]:
    """Return a function that turns the cells of an Arrow type back into the original values.

    It removes nulls, except inside Arrow's JSON type, where they were in the data. `datasets` writes that type for
    objects without a common struct, and its texts are parsed here.
    """
    return _reader(of) or without_nulls


def _reader(of: Any) -> Callable[[Any], Any] | None:
    """Return a reader, or None for a type without JSON in it."""
    from pyarrow import types

    if getattr(of, "extension_name", None) == "arrow.json":
        return lambda text: None if text is None else json.loads(text)
    if types.is_list(of) or types.is_large_list(of) or types.is_fixed_size_list(of):
        read = _reader(of.value_type)
        return read and (lambda items: None if items is None else [read(item) for item in items])
    if types.is_struct(of) and any(_reader(field.type) for field in of):
        readers = {field.name: cell_reader(field.type) for field in of}
        return lambda value: None if value is None else _read_object(value, readers)
    return None


def _read_object(value: dict[str, Any], readers: dict[str, Callable[[Any], Any]]) -> dict[str, Any]:
    return _object({key: readers[key](item) for key, item in value.items() if item is not None}, of=value)


def _object(kept: dict[str, Any], *, of: dict[str, Any]) -> dict[str, Any]:
    return kept if len(kept) == len(of) else LostNulls(kept)


_ROWS_AT_ONCE = 1024
_BYTES_OF_A_CELL = 100
"""Lower bound on the memory of a Python object, however few bytes it takes in a file."""


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Return the table's rows. Nulls inside nested values are removed; see `cell_reader`. Raises DataError."""
    import pyarrow
    import pyarrow.parquet

    file = file_name(path)
    with path.open("rb") as stream:
        check_kind(stream.read(32), file, but=b"PAR1")
    rows: list[dict[str, Any]] = []
    # A file of a few kilobytes can contain a billion rows, or a million copies of a long text. So memory is
    # counted while rows are unpacked.
    unpacked, most = 0, memory_limit()
    try:
        with pyarrow.parquet.ParquetFile(path) as parquet:
            _check_unique(parquet.schema_arrow.names, file)
            for batch in parquet.iter_batches(_ROWS_AT_ONCE):
                unpacked += batch.nbytes + batch.num_rows * batch.num_columns * _BYTES_OF_A_CELL
                if most is not None and unpacked > most:
                    raise DataError(
                        f"its {parquet.metadata.num_rows} rows unpack to more than this machine's "
                        f"{most / 1e9:.0f} GB of memory. Split it, or use a part of it.",
                        file=file,
                    )
                rows += _rows(batch, len(rows), file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"this is not a complete parquet file: {error}. It may be cut short; write or download it again.",
            file=file,
        ) from error
    return rows


def _rows(batch: Any, before: int, file: str) -> list[dict[str, Any]]:
    """Return the rows of an Arrow batch. before: number of the file's rows before it."""
    names = batch.schema.names
    columns = [_cells(batch.column(i), name, before, file) for i, name in enumerate(names)]
    return [dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _cells(column: Any, name: str, before: int, file: str) -> list[Any]:
    """Return a column's cells. Raises DataError for values that Python lacks, such as the year 300000."""
    read = cell_reader(column.type)
    try:
        return [read(cell) for cell in column.to_pylist(maps_as_pydicts="strict")]
    except Exception:  # Arrow raises different errors for its many types
        for number, cell in enumerate(column, before + 1):
            try:
                read(cell.as_py(maps_as_pydicts="strict"))
            except Exception as error:
                raise DataError(
                    f"the value cannot be read: {error}. Fix it, or write the file without the column.",
                    file=file,
                    row=number,
                    column=printable(name),
                ) from error
        raise


def _check_unique(names: list[str], file: str) -> None:
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(
            f"two columns are named '{printable(twice)}' (expected each name once). Rename or remove one.",
            file=file,
        )


def read_file(
    path: Path, notes: list[str] | None = None, columns: Mapping[str, str] | None = None
) -> list[Values]:
    """Return the file's rows in order, at least one. Raises DataError, and OSError if the system cannot read it.

    Args:
        path: the file.
        notes: filled with what was skipped, or changed when it was read.
        columns: columns that the user has named: column -> its name in the file.
    """
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(_about_the_suffix(path), file=file_name(path))
    notes = [] if notes is None else notes
    rows = with_known_names(read(path, notes), notes, columns or {}, file_name(path))
    if not rows:
        raise DataError("the file has no rows (expected at least one).", file=file_name(path))
    check_depth(rows, file_name(path))
    return rows


def check_depth(rows: Iterable[Values], file: str) -> None:
    """Raise DataError for a row that is nested too deeply to work on."""
    for number, values in enumerate(rows, 1):
        if exceeds_depth(values):
            raise DataError(
                f"the value is nested more than {MOST_LEVELS} levels deep. Fix or remove the row.",
                file=file,
                row=number,
            )


def read_csv(path: Path, notes: list[str], *, separator: str = ",") -> list[Values]:
    """Return the rows under a header of column names. Empty lines are skipped, and cells are not changed."""
    file, text = file_name(path), read_text_of_rows(path)
    limit = csv.field_size_limit(min(len(text) + 1, 2**31 - 1))
    try:
        separator, start = find_separator(text, separator, notes)
        records = without_empty(list(_csv_records(text, start, separator, file)), notes)
    finally:
        csv.field_size_limit(limit)
    if not records:
        raise DataError("the file contains only separators (expected a header and rows).", file=file)
    header, *body = records
    check_separator(header, separator, file)
    for number, record in enumerate(body, 1):
        if (
            record.cells[0].removeprefix(BYTE_ORDER_MARK) == header.cells[0]
            and record.cells[1:] == header.cells[1:]
        ):
            raise DataError(
                "the header is repeated here, as if two files were joined. Remove the line.",
                file=file,
                line=record.line,
                row=number,
            )
    columns = named_columns(header, body, file, notes)
    rows: list[Values] = []
    for line, cells in body:
        if len(cells) != columns.least and not (
            columns.least < len(cells) <= columns.most and is_empty(cells[columns.least :])
        ):
            message = wrong_count(columns, len(cells), separator)
            raise DataError(message, file=file, line=line, row=len(rows) + 1)
        rows.append(columns.row(cells))
    if not rows:
        raise DataError(
            f"the file has a header ({join_names(columns.names)}) but no rows (expected at least one). If that "
            "line is a row, put a line with the column names above it.",
            file=file,
        )
    return rows


def read_tsv(path: Path, notes: list[str]) -> list[Values]:
    """Return the rows, as for csv but with tabs between cells. Quotes work as in csv."""
    return read_csv(path, notes, separator="\t")


def read_json(path: Path, notes: list[str]) -> list[Values]:
    """Return the rows of a list of objects, of a shape that `json_shapes` knows, or of one object (one row).

    JSON Lines with this suffix are read too. NaN and Infinity are read as numbers, as Python does.
    """
    file, text = file_name(path), read_text_of_rows(path)
    value, end = _value_at(text, _SPACE.match(text).end(), file)  # type: ignore[union-attr]
    rest = _SPACE.match(text, end).end()  # type: ignore[union-attr]
    if rest == len(text):
        return rows_of(value, file, notes)
    if any(end_of_line in text[end:rest] for end_of_line in "\n\r"):
        notes.append("one object per line (JSON Lines) in a .json file")
    return _json_lines(text, file, notes)


def read_jsonl(path: Path, notes: list[str]) -> list[Values]:
    """Return one object per line; blank lines are skipped. One JSON list, and multi-line objects, are read too."""
    return _json_lines(read_text_of_rows(path), file_name(path), notes)


def _csv_records(text: str, start: int, separator: str, file: str) -> Iterator[Record]:
    """Yield the records from `start` on, with the lines where they begin. Blank lines are skipped."""
    before = line_and_column(text, start)[0]
    reader = csv.reader(split_lines(text, start), delimiter=separator, strict=True)
    line = before
    try:
        for cells in reader:
            if cells:
                yield Record(line, cells)
            line = before + reader.line_num
    except csv.Error as error:
        if "unexpected end" in str(error):
            problem = "a quote opens in this record and is not closed before the end of the file. Close it"
        else:
            problem = f"malformed at line {before - 1 + reader.line_num} ({error})"
        raise DataError(f"{problem}; inside a quoted cell, write a quote twice.", file=file, line=line) from error


def _json_lines(text: str, file: str, notes: list[str]) -> list[Values]:
    """Return the rows of JSON Lines. If single lines are not JSON, values may span lines or share one."""
    values: list[Any] = []
    lines: list[int] = []
    marks = list[int]()
    for line, record in enumerate(split_lines(text), 1):  # not splitlines: U+2028 may stand in a JSON string
        if record.startswith(BYTE_ORDER_MARK):
            record = record.lstrip(BYTE_ORDER_MARK)
            marks.append(line)
        if not record.strip():
            continue
        try:
            values.append(_parse(record.rstrip("\r\n"), file, line))
        except DataError as error:
            values = _values_over_lines(text, file, error, is_first=not values, is_open=_opens(record))
            notes.append("values span several lines, or share one (expected one object per line)")
            return rows_of(values[0], file, notes) if len(values) == 1 else rows_of_list(values, file, notes)
        lines.append(line)
    if marks:
        notes.append(
            f"byte order marks inside the file, removed: {len(marks)} (line{'s'[: len(marks) > 1]} "
            f"{join_names([str(line) for line in marks], most=12)})"
        )
    if len(values) == 1 and isinstance(values[0], list) and not is_conversation(values[0]):
        notes.append("one JSON list, not one object per line")
        return rows_of(values[0], file, notes)
    return rows_of_list(values, file, notes, lines)


def _values_over_lines(text: str, file: str, error: DataError, *, is_first: bool, is_open: bool) -> list[Any]:
    """Return all values of the text, regardless of line ends.

    If that fails too, raise `error`, the error of a single line, unless that line only begins a value.
    """
    values, end = [], 0
    try:
        while (start := _SPACE.match(text, end).end()) < len(text):  # type: ignore[union-attr]
            value, end = _value_at(text, start, file)
            values.append(value)
    except DataError as of_all:
        if is_first and is_open and not values:
            raise of_all from error
        raise error from None
    return values


def _opens(record: str) -> bool:
    """Return whether a line begins a value that spans many lines: a list, or an indented object."""
    return record.lstrip().startswith("[") or record.strip() == "{"


def with_known_names(rows: list[Values], notes: list[str], columns: Mapping[str, str], file: str) -> list[Values]:
    """Return the rows with the columns' names that the formats know.

    Names that differ only in case or white space are renamed, and so are common pairs such as question and answer.
    Raises DataError for a column that the user has named, and that does not exist.

    Args:
        rows: the rows of a file.
        notes: filled with what was renamed.
        columns: columns that the user has named: column -> its name in the file.
        file: the file's name, for the error.
    """
    names = dict.fromkeys(name for names in {tuple(values): None for values in rows} for name in names)
    renamed = _named_by_user(names, columns, file)
    renamed |= {old: new for old, new in known_spellings(names).items() if old not in renamed}
    if not columns and len(names) <= MOST_SEARCHED:
        spelled = {name: renamed.get(name, name) for name in names}
        pair = common_pair(spelled.values())
        renamed |= {name: pair[now] for name, now in spelled.items() if pair.get(now, now) != now}
    if not renamed:
        return rows
    notes.append(
        "columns read as " + ", ".join(f"{new} (written '{printable(old)}')" for old, new in renamed.items())
    )
    return [{renamed.get(name, name): value for name, value in values.items()} for values in rows]


def _named_by_user(names: Collection[str], columns: Mapping[str, str], file: str) -> dict[str, str]:
    """Return old name -> column. A file that has the column itself needs no renaming."""
    renamed = {}
    for column, name in columns.items():
        if name in names:
            if column in names and column != name and column not in columns.values():
                raise DataError(
                    f"--columns reads '{printable(name)}' as {column}, but there is a column {column} too. Rename "
                    "or remove one of them.",
                    file=file,
                )
            renamed[name] = column
        elif column not in names:
            raise DataError(
                f"--columns reads {column} from '{printable(name)}', which is no column (found: "
                f"{join_names(names)}). Correct its name.",
                file=file,
            )
    return renamed


class _DuplicateKeyError(Exception):
    def __init__(self, key: str) -> None:
        self.key = key


def _json_object(pairs: list[tuple[str, Any]]) -> Values:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(next(name for i, name in enumerate(names) if name in names[:i]))
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_json_object)
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")


def _parse(text: str, file: str, first_line: int = 1) -> Any:
    """Return the one JSON value of a text. first_line: the line of the file where the text begins."""
    value, end = _value_at(text, _SPACE.match(text).end(), file, first_line)  # type: ignore[union-attr]
    rest = _SPACE.match(text, end).end()  # type: ignore[union-attr]
    if rest != len(text):
        raise _malformed(json.JSONDecodeError("Extra data", text, rest), file, first_line)
    return value


def _value_at(text: str, start: int, file: str, first_line: int = 1) -> tuple[Any, int]:
    """Return the JSON value that begins at position `start` of the text, and where it ends."""
    try:
        return _DECODER.raw_decode(text, start)
    except _DuplicateKeyError as error:
        raise DataError(
            f"the key '{printable(error.key)}' is in one object twice, so one value would be lost. Remove one.",
            file=file,
            line=first_line + _line_of_duplicate(text[start:]) + line_and_column(text, start)[0] - 1,
        ) from error
    except json.JSONDecodeError as error:
        raise _malformed(error, file, first_line) from error
    except RecursionError as error:
        raise DataError("the JSON is nested too deeply to be read.", file=file, line=first_line) from error
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"the JSON cannot be read: {error}.", file=file, line=first_line) from error


def _malformed(error: json.JSONDecodeError, file: str, first_line: int) -> DataError:
    line, column = line_and_column(error.doc, error.pos)
    near = error.doc[max(error.pos - 20, 0) : error.pos + 20]
    return DataError(
        f"malformed JSON at character {column} of the line: {error.msg}, near {near!r}. {remedy(error)}",
        file=file,
        line=first_line + line - 1,
    )


def _line_of_duplicate(text: str) -> int:
    """Return the number of line breaks before the first repeated key."""
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


# How to convert other kinds of files, by suffix.
_OTHER_SUFFIXES = {
    ".gz": "it is packed. Unpack it: gunzip -k {name}",
    ".zip": "it is packed. Unpack it: unzip {name}",
    ".zst": "it is packed. Unpack it: unzstd {name}",
    ".xz": "it is packed. Unpack it: unxz -k {name}",
    ".bz2": "it is packed. Unpack it: bunzip2 -k {name}",
    ".tar": "it is packed. Unpack it: tar -xf {name}",
    ".tgz": "it is packed. Unpack it: tar -xzf {name}",
    **dict.fromkeys(
        (".xlsx", ".xlsm", ".xls", ".ods", ".numbers"),
        "it is a workbook. Save its sheet as CSV UTF-8 (File, Save as or Export) and name that file.",
    ),
    **dict.fromkeys(
        (".arrow", ".feather"),
        "it is an Arrow file. Write its rows as parquet: datasets.Dataset.from_file({name!r})"
        ".to_parquet('train.parquet')",
    ),
    **dict.fromkeys(
        (".pkl", ".pickle", ".pt", ".npy", ".npz"),
        "it is a Python format, and reading it could run code. Write its rows as JSON Lines where it was made.",
    ),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3"), "it is a database. Export its table as CSV."),
}


def _about_the_suffix(path: Path) -> str:
    """Return the error message for a file that cannot be read, judging by its suffix or its text."""
    suffix, name = path.suffix.lower(), file_name(path)
    problem = f"the suffix {path.suffix or '(none)'} is not one of {', '.join(SUFFIXES)}"
    if suffix in _OTHER_SUFFIXES:
        return f"{problem}: {_OTHER_SUFFIXES[suffix].format(name=name)}"
    text = read_text(path).lstrip()
    first = next(split_lines(text), "")
    if text.startswith(("{", "[")):
        better = path.with_suffix(".jsonl" if first.rstrip().endswith(("}", "]")) else ".json")
        return f"{problem}; it looks like JSON. Rename it to {file_name(better)}."
    for separator, better_suffix in ((",", ".csv"), ("\t", ".tsv"), (";", ".csv"), ("|", ".csv")):
        if fits_a_format(first.strip().replace('"', "").split(separator)):
            return f"{problem}; it looks like a table. Rename it to {file_name(path.with_suffix(better_suffix))}."
    return f"{problem}, so the format is unknown. Convert it to one of these, or rename it if it already is one."


_READERS: dict[str, Callable[[Path, list[str]], list[Values]]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": lambda path, _: read_parquet(path),
}
SUFFIXES = tuple(_READERS)
"""Suffixes of the files that can be read."""
