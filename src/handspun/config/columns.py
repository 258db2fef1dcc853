"""Parse the map of columns: which of a file's columns holds what a format needs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = (
    *("instruction", "input", "output", "prompt", "completion"),
    *("messages", "conversations", "system", "history", "tools", "text"),
)
"""Columns that the formats of rows read."""
_EXPECTED = "COLUMN=NAME, as in --columns instruction=Frage,output=Antwort, and COLUMN one of " + ", ".join(
    COLUMNS
)


def parse_columns(given: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Return column -> its name in the file, from texts such as `instruction=Frage,output=Antwort`, or a mapping.

    A text may also be a JSON object, because a mapping in a YAML file arrives as one. Raises ValueError, which
    says what is wrong.
    """
    columns: dict[str, str] = {}
    for column, name in _pairs(given):
        if column not in COLUMNS:
            raise ValueError(f"{column!r} is no column of a format (expected {_EXPECTED}).")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{column} is {name!r} (expected the column's name in the file).")
        if columns.setdefault(column, name) != name:
            raise ValueError(f"{column} is read from {columns[column]!r} and from {name!r}. Use one of them.")
    if len(set(columns.values())) < len(columns):
        raise ValueError("one column of the file is read as two. Name a column for each.")
    return columns


def _pairs(given: Any) -> list[tuple[str, Any]]:
    if isinstance(given, Mapping):
        return [(str(column), name) for column, name in given.items()]
    pairs: list[tuple[str, Any]] = []
    for text in [given] if isinstance(given, str) else given:
        if not isinstance(text, str):
            raise ValueError(f"{text!r} is not text (expected {_EXPECTED}).")
        if text.lstrip().startswith("{"):
            try:
                pairs += _pairs(json.loads(text))
            except json.JSONDecodeError:
                raise ValueError(f"{text!r} is not a JSON object (expected {_EXPECTED}).") from None
            continue
        for pair in filter(str.strip, text.split(",")):
            column, equals, name = pair.partition("=")
            if not equals:
                raise ValueError(f"{pair.strip()!r} maps to nothing (expected {_EXPECTED}).")
            pairs.append((column.strip(), name.strip()))
    return pairs
