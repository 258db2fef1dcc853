"""Convert values from the command line and --config files."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from cyclopts import UNSET, Token

from handspun.config.typed import as_type, read_texts, short

Tokens = Sequence[Token] | Mapping[str, Any]
"""The tokens given for an option: a sequence, or by name (`--logit-bias.42=-100`)."""


def convert(hint: Any, tokens: Tokens) -> Any:
    """Return the typed value. Invalid text is returned unchanged, for the options' dataclass to reject.

    Cyclopts' own conversion would round 1.5 to 2.
    """
    if isinstance(tokens, Mapping):
        return {name: convert(_value_type(hint), several) for name, several in tokens.items()}
    if len(tokens) == 1 and tokens[0].implicit_value is not UNSET:
        return tokens[0].implicit_value  # an empty list in a config file
    return read_texts(hint, [token.value for token in tokens])


def convert_or_refuse(hint: Any, tokens: Tokens) -> Any:
    """Return the typed value. Raises ValueError for invalid text."""
    value = convert(hint, tokens)
    try:
        return as_type(value, hint)
    except ValueError as error:
        raise ValueError(f"{short(value)} is invalid (expected {error}).") from None


def check_at_least_1(hint: Any, value: int | None) -> None:  # noqa: ARG001  (cyclopts gives both)
    """Raise ValueError for a count below 1."""
    if value is not None and value < 1:
        raise ValueError("expected at least 1.")


def _value_type(hint: Any) -> Any:
    """Return the type of a mapping's values; for a union, of its first mapping."""
    for member in (hint, *get_args(hint)):
        if len(get_args(member)) == 2 and isinstance(get_args(member)[0], type):
            return get_args(member)[1]
    return str
