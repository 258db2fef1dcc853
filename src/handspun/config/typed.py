"""Convert values of options to the type hints of the dataclasses.

`as_type` reads a Python value, `read_texts` the text of a command line or a YAML file. Both are strict: 1.5 is not
a whole number, "8" is not a number in Python, but a list may stand for a tuple.
"""

import json
import math
import operator
import types
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

_TRUE, _FALSE = {"true", "yes", "on", "y", "t", "1"}, {"false", "no", "off", "n", "f", "0"}
_MOST_DIGITS = 30
"""Most digits of whole numbers such as 1e3: 1e999999999 would fill the memory."""


def as_type(value: Any, hint: Any) -> Any:
    """Return the value converted to the hint: a list becomes a tuple, a NumPy scalar a number.

    Raises ValueError for any other value, which says what was expected.
    """
    value, origin, members = _scalar(value), get_origin(hint), get_args(hint)
    if origin is Annotated:
        return as_type(value, members[0])
    if origin in (Union, types.UnionType):
        return _as_one_of(value, members)
    if origin is Literal:
        return _as_choice(value, members)
    if origin is tuple:
        return tuple(_within(hint, item, members[0]) for item in _items(value, hint))
    if origin is dict:
        return _as_mapping(value, hint)
    reader = _LEAVES.get(hint)
    return value if reader is None else reader(value)


def expected(hint: Any) -> str:
    """Return in words what a hint expects."""
    origin, members = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return expected(members[0])
    if origin in (Union, types.UnionType):
        return " or ".join(expected(member) for member in members if member is not type(None))
    if origin is Literal:
        return ("one of " if len(members) > 1 else "") + ", ".join(json.dumps(member) for member in members)
    if origin is tuple:
        choices = ", ".join(json.dumps(choice) for choice in get_args(members[0]) if isinstance(choice, str))
        return f"a list of {choices or _PLURALS.get(members[0], 'lists of whole numbers')}"
    if origin is dict:
        return f"a mapping of {_PLURALS.get(members[1], 'values')} by name"
    return _SINGULARS.get(hint, "a value")


def short(value: Any, most: int = 80) -> str:
    """Return a value's repr on one line, shortened if it is long."""
    try:
        text = " ".join(repr(value).split(" "))
    except ValueError:  # an int with more digits than Python prints
        text = "a number of thousands of digits"
    text = text.replace("\n", " ")
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def read_texts(hint: Any, texts: Sequence[str]) -> Any:
    """Return the value that the texts spell, or else the texts unchanged, for `as_type` to reject."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    item = next((get_args(member)[0] for member in members if get_origin(member) is tuple), None)
    if item is not None and (len(texts) != 1 or len([m for m in members if m is not type(None)]) == 1):
        if get_origin(item) is tuple:
            return tuple(run for text in texts for run in _read_runs(text))
        return tuple(_read_text(item, text) for text in texts)
    return _read_text(hint, texts[0]) if len(texts) == 1 else list(texts)


def load_json(text: str) -> Any:
    """Return the value of JSON text.

    Raises ValueError if it is not JSON, if an object repeats a name, or for a number that is too large.
    """
    hooks: dict[str, Any] = {"parse_constant": _no_constant, "parse_float": _finite}
    return json.loads(text, object_pairs_hook=_without_repetition, **hooks)


def _scalar(value: Any) -> Any:
    """Return a NumPy scalar or zero-dimensional tensor as a Python number, and any other value unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)) else value


def _as_one_of(value: Any, members: tuple[Any, ...]) -> Any:
    if value is None and type(None) in members:
        return None
    reasons = []
    for member in members:
        if member is not type(None):
            try:
                return as_type(value, member)
            except ValueError as error:
                reasons.append(str(error))
    raise ValueError(" or ".join(reasons))


def _as_choice(value: Any, choices: tuple[Any, ...]) -> Any:
    plain = str.__str__(value) if isinstance(value, str) else value
    for choice in choices:
        if type(plain) is type(choice) and plain == choice:
            return choice
    raise ValueError(expected(Literal[choices]))


def _within(hint: Any, value: Any, of: Any) -> Any:
    """Return an item of a list or a mapping, converted to its type."""
    try:
        return as_type(value, of)
    except ValueError as error:
        raise ValueError(f"{expected(hint)} (found {short(value)}, expected {error})") from None


def _items(value: Any, hint: Any) -> Iterable[Any]:
    """Return the items of a tuple. A string is one item, never its characters."""
    if isinstance(value, Mapping | bytes | bytearray) or value is None:
        raise ValueError(expected(hint))
    return value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


def _as_mapping(value: Any, hint: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(expected(hint))
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = _within(hint, str(_whole(_scalar(key))) if isinstance(_scalar(key), int) else key, str)
        if name in found:
            raise ValueError(f"{short(name)} only once")
        found[name] = _within(hint, item, get_args(hint)[1])
    return found


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(_SINGULARS[bool])


def _whole(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, bool | float):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise ValueError(_SINGULARS[int])


def _number(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
        raise ValueError("a finite number")
    raise ValueError(_SINGULARS[float])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(_SINGULARS[str])
    text = str.__str__(value)  # turns an enum member into its value
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("text that UTF-8 can encode, without lone surrogates") from None
    return text


_LEAVES = {bool: _flag, int: _whole, float: _number, str: _text}
_SINGULARS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}
_PLURALS: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts"}


def _read_text(hint: Any, text: str) -> Any:
    """Return the value that one text spells, or else the text."""
    origin, members = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _read_text(members[0], text)
    if origin in (Union, types.UnionType):
        return _read_union(members, text)
    if origin is Literal:
        return next((choice for choice in members if str(choice) == text), text)
    if origin is tuple:
        return read_texts(hint, [text])
    if origin is dict:
        return _read_json(text)
    if hint is bool:
        return text.lower() in _TRUE if text.lower() in _TRUE | _FALSE else text
    if hint in (int, float):
        return _read_number(hint, text)
    return Path(text) if hint is Path else text


def _read_union(members: tuple[Any, ...], text: str) -> Any:
    others = [member for member in members if member is not type(None)]
    for member in others:
        read = _read_text(member, text)
        try:
            return as_type(read, member)
        except ValueError:
            continue
    is_none = len(others) < len(members) and text.lower() in ("none", "null")
    return None if is_none else _read_text(others[0], text)


def _read_number(hint: Any, text: str) -> Any:
    try:
        return float(text) if hint is float else int(text, 0 if text.lower().lstrip("+-")[:2] in _PREFIXES else 10)
    except ValueError:
        pass
    try:  # 1e3 and 8.0 are whole numbers too, and a Decimal does not round
        number = Decimal(text.strip())
        if number == number.to_integral_value() and number.adjusted() < _MOST_DIGITS:
            return int(number)
    except (InvalidOperation, ValueError, OverflowError):
        pass
    return text


_PREFIXES = ("0x", "0o", "0b")


def _read_json(text: str) -> Any:
    try:
        return load_json(text)
    except (ValueError, RecursionError):
        return text


def _read_runs(text: str) -> Sequence[Any]:
    """Return sequences of token ids, from JSON ([[42, 7], [5]] or [42, 7]) or from one sequence as "42 7"."""
    if text.lstrip().startswith("["):
        read = _read_json(text)
        return read if isinstance(read, list) and any(isinstance(item, list) for item in read) else (read,)
    return (tuple(_read_number(int, part) for part in text.replace(",", " ").split()) or text,)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"an object has {short(max(counts, key=counts.__getitem__))} twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:30]} is too large for a number")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
