"""Read option files for --config: YAML whose plain scalars are kept as text.

A value is text, as on the command line. So `no` in a list of choices is a word, 1e-4 a number, and 2026-01-31 not
a date. Only inside a mapping (a JSON schema, say) are there numbers and booleans, by the rules of YAML 1.2: only
`true` and `false` are booleans.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from handspun.config import option_name
from handspun.config.typed import short
from handspun.data.text_files import read_text
from handspun.errors import ConfigError, DataError

_NULL = "tag:yaml.org,2002:null"
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "bool", "int", "float", "null", "seq", "map")}
_MOST_NODES = 100_000
"""Maximum size of a value with its aliases expanded: a few lines of aliases can expand to billions of nodes."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the plain scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (yaml's own form)


for _tag, _regex, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_regex})$"), list(_first))
_Loader.add_constructor(
    "tag:yaml.org,2002:int", lambda _, node: int(node.value, 0 if node.value[:2] in ("0x", "0o") else 10)
)
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(node.value))


def read_config_file(file: str) -> dict[str, Any]:
    """Return the file's options by their hyphenated names, as texts and lists of texts.

    An option that is null counts as not given. Raises ConfigError.
    """
    where = f"--config {file}"
    try:
        text = read_text(Path(file))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read: {error}. Give a YAML file of options.") from error
    except DataError as error:  # the message names the file
        raise ConfigError(f"--config {error}") from error
    try:
        return _options(_Loader(text), where)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error


def _options(loader: _Loader, where: str) -> dict[str, Any]:
    node = loader.get_single_node()
    if not isinstance(node, yaml.MappingNode):
        kind = "nothing" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise ConfigError(f"{where} contains {kind} (expected one option per line, such as `batch_size: 8`).")
    problems, found, names = [], dict[str, Any](), [_option(key) for key, _ in node.value]
    for name, count in Counter(names).items():
        if count > 1:
            lines = [str(key.start_mark.line + 1) for key, _ in node.value if _option(key) == name]
            problems.append(
                f"{where}, lines {' and '.join(lines)}: {option_name(name)} is given {count} times. Keep one."
            )
    loader.flatten_mapping(node)
    for key, value in node.value:
        if value.tag != _NULL:
            try:
                found[_option(key)] = _as_typed(loader, value)
            except ValueError as error:
                line = key.start_mark.line + 1
                problems.append(f"{where}, line {line}: {option_name(_option(key))} {error}.")
    if problems:
        raise ConfigError(problems)
    return found


def _option(key: yaml.Node) -> str:
    """Return the option that a line of the file names."""
    return str(key.value).replace("_", "-")


def _as_typed(loader: _Loader, node: yaml.Node) -> Any:
    """Return a value as it would be typed on the command line; a mapping or a nested list as JSON."""
    items = node.value if isinstance(node, yaml.SequenceNode) else None
    for one in (node, *(items or ())):
        if one.tag not in _TAGS:
            raise ValueError(f"has the tag {short(one.tag)}, but tags are not supported. Remove it")
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if items is not None and all(isinstance(item, yaml.ScalarNode) for item in items):
        if any(item.tag == _NULL for item in items):
            raise ValueError("has an item that is null. Put the word in quotes, or remove it")
        return [item.value for item in items]
    _check_size(node)
    value = loader.construct_document(node)
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"contains a value that JSON cannot represent: {error}") from error


def _check_size(node: yaml.Node) -> None:
    """Raise ValueError for a value that is huge with its aliases expanded, or that repeats a key of an object."""
    left, nodes = [node], 0
    while left:
        one = left.pop()
        nodes += 1
        if nodes > _MOST_NODES:
            raise ValueError(f"has more than {_MOST_NODES:,} values")
        if isinstance(one, yaml.MappingNode):
            names = Counter(key.value for key, _ in one.value if isinstance(key, yaml.ScalarNode))
            if twice := [name for name, count in names.items() if count > 1]:
                raise ValueError(f"has {short(twice[0])} twice")
            left += [value for _, value in one.value]
        elif isinstance(one, yaml.SequenceNode):
            left += one.value
