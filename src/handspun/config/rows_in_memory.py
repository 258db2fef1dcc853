"""Rows that a Python caller has in memory, instead of a file's name: a list, a DataFrame, a Dataset."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any

from handspun.errors import DataError

IN_MEMORY = re.compile(r"\w+ of \d+ rows? \(sha256 [0-9a-f]{12}\)")
"""The text of rows in memory, as run.json has it."""


class RowsInMemory(str):
    """Rows, and as text what they are: `list of 200 rows (sha256 3f2a61c09d1e)`.

    It is text because this stands for the rows wherever a file's name would: in log lines, errors, and run.json.
    The hash covers all values, so equal text means equal rows.
    """

    rows: list[dict[str, Any]]
    is_from_arrow: bool

    def __new__(cls, text: str, rows: list[dict[str, Any]], is_from_arrow: bool) -> "RowsInMemory":
        """Return the text with its rows."""
        made = super().__new__(cls, text)
        made.rows, made.is_from_arrow = rows, is_from_arrow
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what pickle makes another process's copy from."""
        return RowsInMemory, (str.__str__(self), self.rows, self.is_from_arrow)

    def __deepcopy__(self, memo: Any) -> "RowsInMemory":
        """Return the rows themselves: nothing changes them, and `asdict` would copy them for each record."""
        return self


def rows_in_memory(value: Any) -> RowsInMemory | None:
    """Return a caller's rows; None for a value that is none, such as a file's name.

    Raises ValueError, which says what was expected, and DataError for a value that no column can hold.
    """
    if isinstance(value, RowsInMemory):
        return value
    kind, records = type(value).__name__, _records(value)
    if records is None:
        return None
    name = f"{kind} of {len(records)} row{'s'[: len(records) != 1]}"
    if not records:
        raise ValueError(f"at least one row ({name})")
    rows = [_row(record, name, number) for number, record in enumerate(records, 1)]
    digest = hashlib.sha256()
    for row in rows:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return RowsInMemory(f"{name} (sha256 {digest.hexdigest()[:12]})", rows, kind != "list")


def _records(value: Any) -> list[Any] | None:
    """Return the rows of a list, or of a table of pandas, polars, Arrow or datasets, none of which is imported."""
    if isinstance(value, Mapping):
        inner = ", ".join(map(repr, list(value)[:3]))
        raise ValueError(f"text, or a list of rows; of a mapping, take one value, as in data[{inner or '...'}]")
    if isinstance(value, list | tuple):
        return list(value) if not value or any(isinstance(row, Mapping) for row in value) else None
    for method in ("to_dicts", "to_pylist"):  # polars, Arrow
        if hasattr(value, method):
            return list(getattr(value, method)())
    if hasattr(value, "to_dict") and hasattr(value, "columns"):  # pandas
        names = [str(name) for name in value.columns]
        if len({*names}) < len(names):
            raise ValueError("a DataFrame whose columns have different names")
        return [dict(zip(names, cells, strict=True)) for cells in value.itertuples(index=False, name=None)]
    if hasattr(value, "column_names"):  # datasets
        if not hasattr(value, "__len__"):
            raise ValueError("rows in memory; of a stream, take some, as in list(data.take(1000))")
        return list(value)
    return None


def _row(record: Any, name: str, number: int) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        raise DataError(
            f"expected a dict of column -> value, found {type(record).__name__}.", file=name, row=number
        )
    row = {}
    for column, value in record.items():
        if not isinstance(column, str):
            raise DataError(f"the column {column!r} is not text. Name columns by text.", file=name, row=number)
        try:
            row[column] = _plain(value)
        except TypeError:
            raise DataError(
                f"a {type(value).__name__} cannot be read (expected text, a number, or lists and dicts of them). "
                "Convert it.",
                file=name, row=number, column=column,
            ) from None  # fmt: skip
    return row


def _plain(value: Any) -> Any:
    """Return a copy in JSON's types. What a table holds for a missing cell becomes None.

    Dates and decimals stay: they may be in columns that nothing reads. Raises TypeError for other types.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # of NumPy
        return _plain(value.tolist())
    if type(value).__name__ == "NAType" or value != value:  # pandas.NA, NaN, NaT
        return None
    if isinstance(value, float | date | time | Decimal):
        return value
    raise TypeError
