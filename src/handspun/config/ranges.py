"""Which values an option may have, and how an option is called."""

import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, get_type_hints

from handspun.config.typed import as_type, short

Ranges = dict[str, tuple[float, float, bool, bool]]
"""By name: lowest, highest, is the lowest itself allowed, is the highest itself allowed."""

PATHS = frozenset({"model", "data", "eval_data", "output_dir", "json_schema"})
"""Options that name a file or folder: a pathlib.Path is one too."""
_FILES_OF_ANY_NAME = frozenset({"data", "eval_data"})
"""Only read, so their names may hold bytes that are not UTF-8, which Python gives as lone surrogates."""
MOST = 10**9
"""Of a count: more is a mistake in typing, and would fill the memory with lists."""
_LONGEST_NAME = 255
"""Bytes of one name in a path, on all file systems in use."""
_REMEDIES = {
    "top_k": "0 turns it off.",
    "top_p": "1 turns it off; --temperature 0 takes the most probable token.",
    "typical_p": "1 turns it off.",
    "repetition_penalty": "1 turns it off.",
    "temperature": "0 takes the most probable token, and 1 leaves the distribution as it is.",
    "max_new_tokens": "Leave it out for 512; the model's context bounds it in any case.",
    "logit_bias": 'For example {"42": -100}.',
    "sequence_bias": 'For example {"42 7": -5}.',
    "data": "To train on several files, put them into a folder and name that.",
    "eval_data": "To hold out several files, put them into a folder and name that.",
}


def option_name(name: str) -> str:
    """`batch_size` as it is typed: `--batch-size`."""
    return "--" + name.replace("_", "-")


def wrong_values(config: Any, ranges: Ranges, read: Callable[[str, Any], Any] | None = None) -> list[str]:
    """Give each field of a frozen dataclass its declared type, and return what is wrong with the others.

    read: takes a field's name and value and returns the value, or raises ValueError with the whole message; if not
    given, `read_value` with these ranges.
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
    """Return an option's value as its hint has it; None is not given, and right. Raises ValueError with what is
    wrong and what was expected."""
    try:
        typed = _path(name, value, hint) if name in PATHS else as_type(value, hint)
    except ValueError as error:
        raise ValueError(problem_with(name, value, str(error))) from None
    for number in _numbers_in(typed) if name in ranges else ():
        if not _is_in(number, ranges[name]):
            raise ValueError(problem_with(name, value, _wanted(number, ranges[name])))
    return typed


def wrong_argument(name: str, value: Any, hint: Any, low: float | None = None) -> list[str]:
    """Return what is wrong with an argument of a function that takes options beside its dataclass."""
    try:
        value = as_type(value, hint)
    except ValueError as error:
        return [f"{name} is {short(value)}: expected {error}."]
    if low is not None and value < low:
        return [f"{name} is {short(value)}: expected at least {low:g}."]
    return []


def problem_with(name: str, value: Any, wanted: str) -> str:
    """Return the message for an option's value, with what was expected in its place."""
    remedy = f" {_REMEDIES[name]}" if name in _REMEDIES else ""
    return f"{option_name(name)} is {short(value)}: expected {wanted}.{remedy}"


def _is_in(number: float, limits: tuple[float, float, bool, bool]) -> bool:
    low, high, low_allowed, high_allowed = limits
    above = number >= low if low_allowed else number > low
    return above and (number <= high if high_allowed else number < high)


def _numbers_in(value: Any) -> Iterator[float]:
    """The numbers that a value is, or holds."""
    if isinstance(value, dict | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers_in(item)
    elif value is not None:
        yield value


def _wanted(number: float, limits: tuple[float, float, bool, bool]) -> str:
    """What the number should have been; a limit that is only a safeguard is named where it is what is crossed."""
    low, high, low_allowed, high_allowed = limits
    lowest = f"{'at least' if low_allowed else 'more than'} {_short_number(low)}"
    if high >= MOST and number <= high:
        return lowest
    return f"{lowest} and {'at most' if high_allowed else 'less than'} {_short_number(high)}"


def _short_number(number: float) -> str:
    return f"{number:g}" if abs(number) < 10_000 else f"{number:,.0f}"


def _path(name: str, value: Any, hint: Any) -> Any:
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not (isinstance(path, str) and name in _FILES_OF_ANY_NAME and _is_encodable(path)):
        path = as_type(path, hint)
    if isinstance(path, str):
        if not path:
            raise ValueError("a name, and this one is empty")
        if "\0" in path:
            raise ValueError("a name without the character NUL")
        is_json = name == "json_schema" and path.lstrip().startswith("{")
        if not is_json and any(len(part.encode(errors="replace")) > _LONGEST_NAME for part in path.split("/")):
            raise ValueError(f"names of at most {_LONGEST_NAME} bytes")
    return path


def _is_encodable(path: str) -> bool:
    """Whether a file can have this name: of lone surrogates, those that stand for a byte."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def type_hints(config: type) -> dict[str, Any]:
    """Return the type hints of a dataclass's fields, in their order."""
    if config not in _HINTS:
        hints = get_type_hints(config, include_extras=True)
        _HINTS[config] = {field.name: hints[field.name] for field in fields(config)}
    return _HINTS[config]


_HINTS: dict[type, dict[str, Any]] = {}
