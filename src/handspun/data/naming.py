"""How messages call what stands in the data: short, on one line, and harmless to a terminal."""

import json
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any


def shown(text: str, *, most: int = 60) -> str:
    """A name from the data, cut behind `most` characters; where a terminal would not print it, escaped."""
    name = text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"
    return name if name.isprintable() else repr(name)[1:-1]


def listed(names: Collection[str], *, most: int = 20) -> str:
    """`a, b, c and 4 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in islice(names, most)) + more


def file_name(path: Path) -> str:
    """The path as a person would type it, whatever bytes are in it."""
    return shown(str(path), most=4096)


def type_name(value: Any) -> str:
    """What a value is, in JSON's words."""
    if isinstance(value, float) and value != value:
        return "NaN (pandas writes it for a missing cell, and for the words N/A and None)"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {shown(str(value))}"
    names: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
