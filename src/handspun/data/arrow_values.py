"""Values of Arrow as those of Python, with what Arrow's types do to nulls and to JSON undone."""

import json
from collections.abc import Callable
from typing import Any


class LostNulls(dict[str, Any]):
    """An object that nulls were left out of."""


def without_nulls(value: Any) -> Any:
    """Return a nested value without its null entries. Arrow gives every object all keys that any object has, so a
    key that was not there and a null look the same. Objects that lost any are LostNulls."""
    if isinstance(value, dict):
        return _object({key: without_nulls(item) for key, item in value.items() if item is not None}, of=value)
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def has_lost_nulls(value: Any) -> bool:
    """Return whether nulls were left out anywhere in a value."""
    if isinstance(value, dict):
        return isinstance(value, LostNulls) or any(map(has_lost_nulls, value.values()))
    return isinstance(value, list) and any(map(has_lost_nulls, value))


def cell_reader(of: Any) -> Callable[[Any], Any]:
    """Return what makes the cells of an Arrow type what they were before they were put into it.

    Nulls are left out, but for those inside of Arrow's JSON type, which were in the data: `datasets` writes it
    where objects have no common struct, and its texts are parsed here.
    """
    return _reader(of) or without_nulls


def _reader(of: Any) -> Callable[[Any], Any] | None:
    """None for a type that has no JSON in it."""
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


__all__ = ["LostNulls", "cell_reader", "has_lost_nulls", "without_nulls"]
