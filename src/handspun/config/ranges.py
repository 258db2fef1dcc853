"""Check the values of options against types and ranges."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from handspun.config.rows_in_memory import rows_in_memory
from handspun.config.typed import as_type, short

Ranges = dict[str, tuple[float, float, bool, bool]]
"""By name: lowest, highest, whether the lowest is allowed, whether the highest is allowed."""

PATHS = frozenset({"model", "data", "eval_data", "output_dir", "json_schema"})
"""Options that name a file or folder. They also accept a pathlib.Path."""
_FILES_OF_ANY_NAME = frozenset({"data", "eval_data"})
"""Files that are only read, so their names may contain bytes that are not UTF-8 (lone surrogates in Python). Each
option may name several."""
MOST = 10**9
"""Limit of counts. More is a typo, and would fill the memory with lists."""
_LONGEST_NAME = 255
"""Most bytes of one name in a path, on all common file systems."""
_REMEDIES = {
    "top_k": "0 turns it off.",
    "top_p": "1 turns it off; --temperature 0 takes the most probable token.",
    "typical_p": "1 turns it off.",
    "repetition_penalty": "1 turns it off.",
    "temperature": "0 takes the most probable token, and 1 leaves the distribution unchanged.",
    "max_new_tokens": "Remove it for 512; the model's context limits it in any case.",
    "logit_bias": 'For example {"42": -100}.',
    "sequence_bias": 'For example {"42 7": -5}.',
}


def option_name(name: str) -> str:
    """Return an option as it is typed: `--batch-size` for `batch_size`."""
    return "--" + name.replace("_", "-")


def wrong_values(config: Any, ranges: Ranges, read: Callable[[str, Any], Any] | None = None) -> list[str]:
    """Convert each field of a frozen dataclass to its declared type, and return the problems.

    read: takes a field's name and value, and returns the value or raises ValueError with the whole message.
    Default: `read_value` with these ranges.
    """
    problems = []
    for name, hint in type_hints(type(config)).items():
        value = getattr(config, name)
        try:
            typed = read(name, value) if read else read_value(name, value, hint, ranges)
            object.__setattr__(config, name, typed)
        except ValueError as error:
            problems.append(str(error))
    return problems


def read_value(name: str, value: Any, hint: Any, ranges: Ranges) -> Any:
    """Return an option's value, converted to its type hint. None means "not given" and is valid.

    Raises ValueError, which says what is wrong and what was expected.

    Args:
        name: the option's name.
        value: the value to convert.
        hint: the type hint.
        ranges: the ranges of number options.
    """
    try:
        typed = _paths(name, value, hint) if name in PATHS else as_type(value, hint)
    except ValueError as error:
        raise ValueError(problem_with(name, value, str(error))) from None
    for number in _numbers_in(typed) if name in ranges else ():
        if not _is_in(number, ranges[name]):
            raise ValueError(problem_with(name, value, _wanted(number, ranges[name])))
    return typed


def wrong_argument(name: str, value: Any, hint: Any, low: float | None = None) -> list[str]:
    """Return what is wrong with an argument of a function that takes options besides its dataclass.

    Args:
        name: the argument's name.
        value: its value.
        hint: its type hint.
        low: the lowest value allowed.
    """
    try:
        value = as_type(value, hint)
    except ValueError as error:
        return [f"{name} is {short(value)}: expected {error}."]
    if low is not None and value < low:
        return [f"{name} is {short(value)}: expected at least {low:g}."]
    return []


def problem_with(name: str, value: Any, wanted: str) -> str:
    """Return the error message for an option's value. wanted: what was expected."""
    if name in PATHS and isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    remedy = f" {_REMEDIES[name]}" if name in _REMEDIES else ""
    return f"{option_name(name)} is {short(value)}: expected {wanted}.{remedy}"


def _is_in(number: float, limits: tuple[float, float, bool, bool]) -> bool:
    low, high, low_allowed, high_allowed = limits
    above = number >= low if low_allowed else number > low
    return above and (number <= high if high_allowed else number < high)


def _numbers_in(value: Any) -> Iterator[float]:
    """Yield the numbers in a value, or the value itself if it is a number."""
    if isinstance(value, dict | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers_in(item)
    elif value is not None:
        yield value


def _wanted(number: float, limits: tuple[float, float, bool, bool]) -> str:
    """Return the range in words. A safeguard limit is named only if the number exceeds it."""
    low, high, low_allowed, high_allowed = limits
    lowest = f"{'at least' if low_allowed else 'more than'} {_short_number(low)}"
    if high >= MOST and number <= high:
        return lowest
    return f"{lowest} and {'at most' if high_allowed else 'less than'} {_short_number(high)}"


def _short_number(number: float) -> str:
    return f"{number:g}" if abs(number) < 10_000 else f"{number:,.0f}"


def _paths(name: str, value: Any, hint: Any) -> Any:
    """Return one path, or a tuple of several if the option allows that."""
    several = name in _FILES_OF_ANY_NAME and isinstance(value, list | tuple) and value
    if not several or any(isinstance(one, Mapping) for one in value):
        return _path(name, value, hint)
    paths = tuple(_path(name, path, str) for path in value)
    if len(set(paths)) < len(paths):
        raise ValueError("each file once")
    return paths[0] if len(paths) == 1 else paths


def _path(name: str, value: Any, hint: Any) -> Any:
    if name in _FILES_OF_ANY_NAME and (rows := rows_in_memory(value)) is not None:
        return rows
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not (isinstance(path, str) and name in _FILES_OF_ANY_NAME and _is_encodable(path)):
        path = as_type(path, str if name in _FILES_OF_ANY_NAME and path is not None else hint)
    if isinstance(path, str):
        if not path:
            raise ValueError("a name that is not empty")
        if "\0" in path:
            raise ValueError("a name without NUL characters")
        is_json = name == "json_schema" and path.lstrip().startswith("{")
        if not is_json and any(len(part.encode(errors="replace")) > _LONGEST_NAME for part in path.split("/")):
            raise ValueError(f"names of at most {_LONGEST_NAME} bytes")
    return path


def _is_encodable(path: str) -> bool:
    """Return whether a file can have this name. Of lone surrogates, only those that stand for a byte are valid."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def type_hints(config: type) -> dict[str, Any]:
    """Return the type hints of a dataclass's fields, in order."""
    if config not in _HINTS:
        hints = get_type_hints(config, include_extras=True)
        _HINTS[config] = {field.name: hints[field.name] for field in fields(config)}
    return _HINTS[config]


_HINTS: dict[type, dict[str, Any]] = {}
