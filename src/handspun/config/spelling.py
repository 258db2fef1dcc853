"""Spell options as the caller does: `--max-length 512` on the command line, `max_length=512` in Python.

Messages are written in the words of the command line. Those that reach a Python caller are respelled here, in one
place.
"""

import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from handspun.errors import ConfigError, HandspunError

_ON_COMMAND_LINE = ContextVar("_ON_COMMAND_LINE", default=False)

_OF_FUNCTIONS: dict[str, Any] = {
    **dict.fromkeys(("chat", "explain", "show_tree", "logprobs", "generate"), bool),
    **dict.fromkeys(("device", "system_prompt"), str),
    **dict.fromkeys(("max_batch_tokens", "threads"), int),
    "weights": Literal["auto", "float32", "bfloat16", "float16", "int8"],
}
"""Arguments of functions that are no field of a dataclass of options."""

_COMMAND = r"handspun [a-z-]+(?: (?:--?[a-z][^\s)`,;]*|[^-\s)`,;][^\s)`,;]*))*"
_VALUE = r"8bit|-?\d+(?:\.\d+)?(?:e-?\d+)?|'\{[^']*\}'|\"[^\"]*\"|[A-Z]+\b|[\w-]+=[\w=,.-]*\w|[a-z][\w-]*"
_OPTION = re.compile(
    rf"(?P<command>{_COMMAND})|(?<![\w-])--(?P<no>no-)?(?P<name>[a-z][a-z0-9]*(?:-[a-z0-9]+)*)"
    rf"(?:\.(?P<key>\w+)=(?P<item>-?\d+)|[ =](?P<value>{_VALUE}))?"
)


@contextmanager
def command_line() -> Iterator[None]:
    """Leave messages in the words of the command line inside of the block."""
    token = _ON_COMMAND_LINE.set(True)
    try:
        yield
    finally:
        _ON_COMMAND_LINE.reset(token)


@contextmanager
def python_words() -> Iterator[None]:
    """Respell the options in errors of the block in Python's words, unless the command line runs."""
    try:
        yield
    except HandspunError as error:
        if not _ON_COMMAND_LINE.get():
            error.args = tuple(in_python(str(text)) for text in error.args)
            if isinstance(error, ConfigError):
                error.problems = [in_python(problem) for problem in error.problems]
        raise


def in_python(text: str) -> str:
    """Return a message with its options as Python's arguments. Whole commands and unknown options stay."""
    return _OPTION.sub(_respelled, text)


def _respelled(match: re.Match[str]) -> str:
    found, hints = match[0], _hints()
    plain = match["name"].replace("-", "_") if match["name"] else ""
    name, is_off = (plain, bool(match["no"])) if plain in hints else (f"no_{plain}", False)
    if match["command"] or name not in hints:
        return found
    if match["key"]:
        return f'{name}={{"{match["key"]}": {match["item"]}}}'
    members = _members(hints[name])
    value = _value(match["value"] or "", members)
    rest = "" if value or not match["value"] else found[match.start("value") - match.start() - 1 :]
    if is_off:
        return f"{name}={'False' if bool in members else '()'}{rest}"
    if value:
        return f"{name}={value}"
    is_subject = match["value"] == "is"  # "--lora is 1: expected true or false"
    return f"{name}=True{rest}" if bool in members and not is_subject else f"{name}{rest}"


def _value(text: str, members: list[Any]) -> str:
    """Return the value in Python's spelling; "" if the word after the option is prose."""
    if text.startswith("'{"):
        return text.strip("'")
    if "=" in text or text in members:
        return f'"{text}"'
    return text if re.match(r'-?\d|"|[A-Z]+$', text) else ""


def _members(hint: Any) -> list[Any]:
    """Return the types and the words that an option takes."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return [member for one in get_args(hint) for member in _members(one)]
    if get_origin(hint) is tuple:
        return _members(get_args(hint)[0])
    return [hint]


@cache
def _hints() -> dict[str, Any]:
    """Return the types of all options by name."""
    # Here, because these modules raise the errors that are respelled.
    from handspun.config.export import ExportConfig
    from handspun.config.generation import GenerationOptions
    from handspun.config.ranges import type_hints
    from handspun.config.training import TrainConfig

    configs = (ExportConfig, GenerationOptions, TrainConfig)
    return {**_OF_FUNCTIONS, **{name: hint for config in configs for name, hint in type_hints(config).items()}}
