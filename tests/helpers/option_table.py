"""The table of docs/training.md: every option of `handspun train`, its default, and its own words for it.

PYTHONPATH=src python tests/helpers/option_table.py
"""

import ast
import dataclasses
import inspect
from typing import Any, Literal, get_args, get_origin, get_type_hints

from handspun.config import DataConfig, TrainConfig, option_name


def table() -> str:
    """Markdown, a line an option, in the order of the dataclasses."""
    words, types = {**_docstrings(DataConfig), **_docstrings(TrainConfig)}, get_type_hints(TrainConfig)
    lines = ["| option | default | |", "| --- | --- | --- |"]
    for field in dataclasses.fields(TrainConfig):
        text = " ".join(words[field.name].split()).replace("|", "\\|")
        lines.append(f"| `{option_name(field.name)}` | {_default(field.default, types[field.name])} | {text} |")
    return "\n".join(lines) + "\n"


def _default(value: Any, of: Any) -> str:
    if value is None:
        return ""
    if value == ():
        return "none of " + ", ".join(f"`{other}`" for other in get_args(get_args(of)[0]))
    if isinstance(value, bool):
        return "on" if value else "off"
    others = [f"`{other}`" for other in get_args(of) if other != value] if get_origin(of) is Literal else []
    return f"`{value}`" + (f" (or {', '.join(others)})" if others else "")


def _docstrings(config: type) -> dict[str, str]:
    """The texts that stand under the fields of a dataclass."""
    [body] = ast.parse(inspect.getsource(config)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = str(ast.literal_eval(text.value))
    return found


if __name__ == "__main__":
    print(table(), end="")
