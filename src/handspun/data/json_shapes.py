"""Read JSON files: syntax errors, nesting depth, and the shapes that rows come in."""

import json
import re
from collections.abc import Sequence
from typing import Any

from handspun.data.formats import NEEDED, fits_a_format
from handspun.display import describe_type, join_names, printable
from handspun.errors import DataError

MOST_LEVELS = 100
_CONTAINERS = (dict, list)
"""A tuple, since a union of types takes several times as long to ask for each of 100,000 items."""


def exceeds_depth(value: Any, most: int = MOST_LEVELS) -> bool:
    """Return whether lists and objects are nested more than `most` levels deep."""
    level = [value] if isinstance(value, _CONTAINERS) else []
    for _ in range(most + 1):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inner for item in items if isinstance(item, _CONTAINERS)]
        if not level:
            return False
    return True


_PYTHON = re.compile(r"(?:None|True|False)\b")
_BEYOND = {"undefined", "nan", "inf", "-inf", "-nan"}


def remedy(error: json.JSONDecodeError) -> str:
    """Return a sentence on how to fix the syntax error."""
    text, position = error.doc, error.pos
    at, before = text[position : position + 1], text[:position].rstrip()[-1:]
    rest = text[position : position + 20]
    if error.msg.startswith("Illegal trailing comma") or (at in ("]", "}") and before == ","):
        return "Remove the comma before the closing bracket."
    if not text[position:].strip() or error.msg.startswith("Unterminated string"):
        return "The text ends before the value does: it may be cut short. Write or download it again."
    if at == "'" or _PYTHON.match(rest):
        return "This is Python's notation (str() or repr()); write it with json.dumps."
    if at in ("#", "/"):
        return "JSON has no comments; remove it."
    if at in "“”„«»‘’":
        return "Write straight double quotes instead of typographic ones."
    if "control character" in error.msg:
        return r"Inside a string, write a line break as \n and a tab as \t."
    if "escape" in error.msg:
        return r"Inside a string, write a backslash as \\."
    return _remedy_for_structure(error, at, rest)


def _remedy_for_structure(error: json.JSONDecodeError, at: str, rest: str) -> str:
    if error.msg == "Extra data":
        if at == ",":
            return "Remove the comma after the value, or write all values as one list: [ ..., ... ]."
        return "Remove what follows the value, or write all values as one list: [ ..., ... ]."
    if "delimiter" in error.msg:
        sign = "colon" if "':'" in error.msg else "comma"
        return f'Add the missing {sign} before it. Inside a string, write a quote as \\".'
    if "property name" in error.msg:
        return "Put the names of an object in double quotes."
    if re.split(r"[\s,\]}]", rest.lower())[0] in _BEYOND:
        return "Write null, or the intended value."
    return "Fix the syntax, or write the file with a JSON library (json.dumps)."


Values = dict[str, Any]

# An object with one of these keys is a row, not a wrapper around a list of rows.
_OF_A_ROW = {"messages", "conversations", "instruction", "prompt"}
_NEEDED = {column for columns in NEEDED.values() for column in columns}
_BY_ROWS = 'with pandas: df.to_json("train.jsonl", orient="records", lines=True)'


def rows_of(value: Any, file: str, notes: list[str]) -> list[Any]:
    """Return the rows of a JSON value; each is an object. Raises DataError for a value without rows."""
    if isinstance(value, dict):
        value = _rows_of_object(value, file, notes)
    if not isinstance(value, list):
        raise DataError(f"expected a list of objects, found {describe_type(value)}.", file=file)
    return rows_of_list(value, file, notes)


def rows_of_list(
    values: list[Any], file: str, notes: list[str], lines: Sequence[int] | None = None
) -> list[Values]:
    """Return the objects of a list. If all items are bare lists of turns, they become conversations.

    Args:
        values: the items to read rows from.
        file: the file's name in messages.
        notes: filled with what was changed when reading.
        lines: the line of each item in the file, if known.
    """
    if values and all(is_conversation(value) for value in values):
        notes.append("each row is a bare list of turns, read as a conversation")
        column = "messages" if "role" in values[0][0] else "conversations"
        return [{column: value} for value in values]
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            line = lines[number - 1] if lines else None
            raise DataError(
                f"expected an object, found {describe_type(value)}.{_remedy_of_list(value)}",
                file=file,
                line=line,
                row=number,
            )
    return values


def is_conversation(value: Any) -> bool:
    """Return whether a value is a list of turns, judging by their keys."""
    return isinstance(value, list) and bool(value) and all(_is_turn(turn) for turn in value)


def _is_turn(value: Any) -> bool:
    if not isinstance(value, dict) or _NEEDED & value.keys():
        return False
    role = value.get("role", value.get("from"))
    return isinstance(role, str) and bool({"content", "value", "tool_calls", "function_call"} & value.keys())


def _remedy_of_list(value: Any) -> str:
    if not isinstance(value, list):
        return ""
    if value and all(isinstance(item, dict) for item in value):
        return ' Write a conversation as {"messages": [{"role": ..., "content": ...}, ...]}.'
    return f' Name the values, as in {{"prompt": "...", "completion": "..."}}; {_BY_ROWS}.'


def _rows_of_object(value: Values, file: str, notes: list[str]) -> Any:
    """Return the rows inside the top-level object of a file. An object that is itself a row is the only one."""
    if _is_split(value):
        notes.append('names and values are separate (pandas\' orient="split"), read row by row')
        return [_named(value["columns"], cells, number, file) for number, cells in enumerate(value["data"], 1)]
    if _is_of_the_hub(value):
        return _rows_of_the_hub(value, file, notes)
    if _is_columns_of_lists(value):
        notes.append("written column by column, read row by row")
        _check_lengths(value, file)
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if value and all(isinstance(item, dict) and item for item in value.values()):
        return _rows_of_objects(value, file, notes)
    return _list_within(value, file)


def _is_split(value: Values) -> bool:
    """Return whether it is pandas' orient="split": {"columns": [...], "index": [...], "data": [[...], ...]}."""
    columns, data = value.get("columns"), value.get("data")
    if not (isinstance(columns, list) and isinstance(data, list) and value.keys() <= _SPLIT):
        return False
    return all(isinstance(name, str) for name in columns) and all(isinstance(cells, list) for cells in data)


_SPLIT = {"columns", "data", "index", "index_names", "column_names"}


def _named(columns: list[str], cells: list[Any], number: int, file: str) -> Values:
    if len(cells) != len(columns) or len(set(columns)) != len(columns):
        raise DataError(
            f"expected {len(columns)} values, one per column ({join_names(columns)}) with unique names; found "
            f"{len(cells)}. Write the file row by row: {_BY_ROWS}.",
            file=file,
            row=number,
        )
    return dict(zip(columns, cells, strict=True))


def _is_of_the_hub(value: Values) -> bool:
    """Return whether it is the hub's API: {"rows": [{"row_idx": 0, "row": {...}, "truncated_cells": []}, ...]}."""
    rows = value.get("rows")
    return isinstance(rows, list) and bool(rows) and all(_is_hub_row(row) for row in rows)


def _is_hub_row(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("row"), dict) and "row_idx" in row


def _rows_of_the_hub(value: Values, file: str, notes: list[str]) -> list[Values]:
    for number, row in enumerate(value["rows"], 1):
        if row.get("truncated_cells"):
            raise DataError(
                "the hub's API truncated this row's text (truncated_cells). Download the data set's own file, or "
                "use the data set directly (--data org/name).",
                file=file,
                row=number,
            )
    total, found = value.get("num_rows_total"), len(value["rows"])
    part = f", {found} of the data set's {total}" if isinstance(total, int) and total > found else ""
    notes.append(f"rows of the hub's API{part}")
    return [row["row"] for row in value["rows"]]


def _is_columns_of_lists(value: Values) -> bool:
    """Return whether it is columns of lists, such as {"prompt": ["a", "b"], "completion": ["c", "d"]}."""
    if not value or not all(isinstance(item, list) for item in value.values()):
        return False
    # A list of objects may be the turns of one row, so it does not count as a column.
    needed = [name for name in value if name.strip().lower() in _NEEDED]
    return all(not any(isinstance(item, dict) for item in value[name]) for name in needed or value)


def _check_lengths(columns: Values, file: str) -> None:
    lengths = {name: len(items) for name, items in columns.items()}
    if len(set(lengths.values())) > 1:
        counted = ", ".join(f"{printable(name)} {length}" for name, length in list(lengths.items())[:20])
        raise DataError(
            f"written column by column, but the columns differ in length ({counted}). Write it row by row, so "
            f"that no row loses a value: {_BY_ROWS}.",
            file=file,
        )


def _rows_of_objects(value: Values, file: str, notes: list[str]) -> Any:
    """Return the rows of an object of objects: pandas' orient="columns" (its default) or orient="index"."""
    inner = [item.keys() for item in value.values()]
    is_index = all(fits_a_format(names) for names in inner)
    are_alike = all(names == inner[0] for names in inner)
    if not is_index and not fits_a_format(value):
        is_index = _are_numbers(value) and not _are_numbers(inner[0])
        if not is_index and not (are_alike and _are_numbers(inner[0])):
            return _list_within(value, file)
    if is_index:
        notes.append("rows are keyed by names or numbers, which are ignored")
        return list(value.values())
    if _is_turn(dict.fromkeys(inner[0], "")):  # messages that are one message
        return [value]
    if not are_alike:
        raise DataError(
            "it looks written column by column, but the columns do not have the same rows. Write it row by row, "
            f"{_BY_ROWS}.",
            file=file,
        )
    notes.append("written column by column (pandas' to_json), read row by row")
    return [{name: column[key] for name, column in value.items()} for key in inner[0]]


def _are_numbers(names: Any) -> bool:
    return all(name.isdecimal() for name in names)


def _list_within(value: Values, file: str) -> Any:
    """Return the rows of {"data": [row, ...]}. An object that is itself a row is the only one."""
    lists = [
        key for key, item in value.items() if isinstance(item, list) and all(isinstance(x, dict) for x in item)
    ]
    if not lists or _OF_A_ROW & value.keys():
        return [value]
    if len(lists) > 1:
        raise DataError(
            f"the object contains several lists ({join_names(lists)}), but one list of rows is expected. Save the "
            "list to read as its own file.",
            file=file,
        )
    return value[lists[0]]
