"""The texts under the fields of options, for `help()` and for the pages that are made from them."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from handspun.config.spelling import in_python

Function = TypeVar("Function", bound=Callable[..., Any])


def field_texts(config: type) -> dict[str, str]:
    """Return the text under each field of a dataclass, on one line, in the order of the fields."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__[:-1]):
        try:
            source = inspect.getsource(base)
        except OSError:  # installed without its source: help is shorter then
            continue
        [body] = ast.parse(source).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
            ):
                found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return {field.name: found.get(field.name, "") for field in fields(config)}


def python_text(name: str, config: type, text: str) -> str:
    """Return an option's text in Python's words, with its default unless that is None or in the text."""
    default = next(field.default for field in fields(config) if field.name == name)
    for words, instead in _IN_PYTHON:
        text = text.replace(words, instead)
    told = default in (None, "", (), MISSING) or f"default {default}" in text
    return in_python(text) if told else f"{in_python(text)} Default: {default!r}."


_IN_PYTHON = (
    ("Repeatable, or a mapping in a --config file.", "Also a list of such texts, or a dict."),
    ("Repeatable.", "Also a list."),
    ("May be given more than once.", "Also a list."),
    (" or --logit-bias '{\"42\": -100}'", ""),
    ("or a hub dataset id", "a hub dataset id, or rows in memory (a list of dicts, a DataFrame, a Dataset)"),
)
"""What the command line's help says, and what Python's does."""


def listed(texts: Mapping[str, str], *, indent: str = "    ", width: int = 100) -> str:
    """Return `name: text` for each, wrapped, one below the other."""
    lines = [f"{name}: {text}" for name, text in texts.items()]
    return "\n".join(
        textwrap.fill(
            line, width, initial_indent=indent, subsequent_indent=indent + "    ", break_long_words=False,
            break_on_hyphens=False,
        )
        for line in lines
    )  # fmt: skip


def with_options(*configs: type) -> Callable[[Function], Function]:
    """Return a decorator for a function whose `**arguments` are fields of these dataclasses.

    An editor, a notebook and `help()` then see each field as an argument of its own, with its type and its text.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        names, more, texts = {one.name for one in own}, list[inspect.Parameter](), dict[str, str]()
        for config in configs:
            all_texts = field_texts(config)
            for field in fields(config):
                if field.name in names:
                    continue
                default = None if field.default is MISSING else field.default
                more.append(inspect.Parameter(field.name, _BY_NAME, default=default, annotation=field.type))
                texts[field.name] = python_text(field.name, config, all_texts[field.name])
        function.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        function.__doc__ = f"{inspect.getdoc(function)}\n\nOptions:\n{listed(texts)}\n"
        return function

    return decorate


_BY_NAME = inspect.Parameter.KEYWORD_ONLY


class FieldDocs:
    """A class's docstring, with the texts under its fields.

    It reads the class's source when someone asks for help, so that no command line waits for that.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    def __get__(self, instance: Any, owner: type) -> str:
        """Return the docstring."""
        texts = {name: python_text(name, owner, text) for name, text in field_texts(owner).items()}
        # Not "Attributes:", which the command line's parser would read in place of the texts under the fields.
        return f"{inspect.cleandoc(self._text)}\n\nFields:\n{listed(texts)}\n"
