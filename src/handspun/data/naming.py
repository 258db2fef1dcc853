"""How messages call what stands in the data: short, on one line, and harmless to a terminal."""

import json
from pathlib import Path
from typing import Any

from handspun.display import join_names, printable

shown = printable
"""A name from the data, on one line and harmless to a terminal."""

listed = join_names


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
