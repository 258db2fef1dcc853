"""Names of options: those that there are not, and what other tools call ours."""

import difflib
import functools
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar, dataclass_transform

from handspun.config.foreign_names import FOREIGN_NAMES
from handspun.config.ranges import option_name
from handspun.config.typed import short
from handspun.errors import ConfigError

Made = TypeVar("Made")


def unknown_option(name: str, known: Collection[str], typed: Callable[[str], str]) -> str:
    """Return what to say of an option that there is not: its name here, or why there is none.

    name: with underscores; known: the names that there are, with underscores; typed: how a name is written where
    the user is (`--batch-size` or `batch_size`).
    """
    note = foreign_note(name, known, typed)
    if note is None:
        near = difflib.get_close_matches(name, sorted(known), 1)
        note = f"Did you mean {typed(near[0])}?" if near else ""
    return f"there is no option {typed(name)}. {note}".rstrip()


def foreign_note(name: str, known: Collection[str], typed: Callable[[str], str]) -> str | None:
    """Return what another tool's option is here, if it is one. Of several notes, the first whose options are known
    where the user is."""
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
    """Make a frozen dataclass of options; names that it does not have are a ConfigError, and so is one that is
    missing."""
    made = dataclass(frozen=True, kw_only=True)(config)
    init = made.__init__

    @functools.wraps(init)
    def checked(self: Any, *values: Any, **given: Any) -> None:
        problems = wrong_names(made, given)
        if values:
            problems.append(f"{made.__name__} takes options by name, and {short(values[0])} has none.")
        if problems:
            raise ConfigError(problems)
        init(self, **given)

    made.__init__ = checked  # type: ignore[method-assign]
    return made


def wrong_names(config: type, given: Collection[str]) -> list[str]:
    """Return what is wrong with the names of these options, as they are given in Python."""
    known = {field.name: field for field in fields(config)}
    problems = [unknown_option(name, known, str) for name in given if name not in known]
    needed = [name for name, field in known.items() if field.default is field.default_factory is MISSING]
    return problems + [f"{option_name(name)} is missing." for name in needed if name not in given]
