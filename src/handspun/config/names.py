"""Check option names: report unknown ones, and translate the names of other tools."""

import difflib
import functools
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar, dataclass_transform

from handspun.config.docs import FieldDocs
from handspun.config.foreign_names import FOREIGN_NAMES
from handspun.config.ranges import option_name
from handspun.config.spelling import python_words
from handspun.config.typed import short
from handspun.errors import ConfigError

Made = TypeVar("Made")


def unknown_option(name: str, known: Collection[str], typed: Callable[[str], str]) -> str:
    """Return the error message for an unknown option: its name here, or why it does not exist.

    name, known: names with underscores. typed: formats a name as the user writes it (`--batch-size` or
    `batch_size`).
    """
    note = foreign_note(name, known, typed)
    if note is None:
        near = difflib.get_close_matches(name, sorted(known), 1)
        note = f"Did you mean {typed(near[0])}?" if near else ""
    return f"there is no option {typed(name)}. {note}".rstrip()


def foreign_note(name: str, known: Collection[str], typed: Callable[[str], str]) -> str | None:
    """Return a note on another tool's option, or None. The first note counts whose options are all known."""
    names = {option: typed(option) for option in known}
    for foreign, note in FOREIGN_NAMES:
        if name in foreign.split():
            try:
                return note.format_map(names) if " " in note else f"Here it is {names[note.strip('{}')]}."
            except KeyError:
                continue
    return None


@dataclass_transform(kw_only_default=True, frozen_default=True)
def options(config: type[Made]) -> type[Made]:
    """Make a frozen dataclass of options. An unknown or missing name raises ConfigError."""
    made = dataclass(frozen=True, kw_only=True)(config)
    init, known = made.__init__, {field.name for field in fields(made)}  # type: ignore[arg-type]  # a dataclass

    @functools.wraps(init)
    @python_words()
    def checked(self: Any, *values: Any, **given: Any) -> None:
        problems = wrong_names(made, given)
        if values:
            problems.append(f"{made.__name__} takes options by name, but {short(values[0])} has no name.")
        named = {name: given[name] for name in given if name in known}
        if needed_names(made) <= named.keys():
            try:
                init(self, **named)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)

    made.__init__ = checked  # type: ignore[method-assign]
    made.__doc__ = FieldDocs(config.__doc__ or "")  # type: ignore[assignment]
    return made


def wrong_names(config: type, given: Collection[str]) -> list[str]:
    """Return what is wrong with the names of these options, as written in Python."""
    known = {field.name for field in fields(config)}
    problems = [unknown_option(name, known, str) for name in given if name not in known]
    return problems + [f"{option_name(name)} is missing." for name in sorted(needed_names(config) - {*given})]


def needed_names(config: type) -> set[str]:
    """Return the names of the options that have no default."""
    return {field.name for field in fields(config) if field.default is field.default_factory is MISSING}
