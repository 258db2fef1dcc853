"""Parse the role map: the role that each speaker name in the data stands for."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
"""The roles of a chat."""

_EXPECTED = "NAME=ROLE, as in --role-map agent=assistant, and ROLE one of " + ", ".join(ROLES)


@lru_cache(maxsize=4096)
def normalize_role(name: str) -> str:
    """Return a role name in normal form: lower case, trimmed, with `_` for spaces and hyphens."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def parse_role_map(given: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Return name -> role from texts such as `agent=assistant,customer=user`, or from a mapping.

    A text may also be a JSON object, because a mapping in a YAML file arrives as one. Raises ValueError, which
    says what is wrong.
    """
    role_map: dict[str, str] = {}
    for name, role in _pairs(given):
        if not isinstance(role, str) or normalize_role(role) not in ROLES:
            raise ValueError(f"{name!r} is mapped to {role!r}, which is not a role (expected {_EXPECTED}).")
        key = normalize_role(name)
        if not key:
            raise ValueError(f"a name is empty (expected {_EXPECTED}).")
        if role_map.setdefault(key, normalize_role(role)) != normalize_role(role):
            raise ValueError(f"{name!r} is mapped to two roles, {role_map[key]} and {role}. Use one of them.")
    return role_map


def _pairs(given: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(given, Mapping):
        yield from ((str(name), role) for name, role in given.items())
        return
    if not isinstance(given, str | list | tuple):
        raise ValueError(f"{given!r} is not a role map (expected {_EXPECTED}).")
    for text in [given] if isinstance(given, str) else given:
        if not isinstance(text, str):
            raise ValueError(f"{text!r} is not text (expected {_EXPECTED}).")
        if text.lstrip().startswith("{"):
            try:
                yield from _pairs(json.loads(text))
            except json.JSONDecodeError:
                raise ValueError(f"{text!r} is not a JSON object (expected {_EXPECTED}).") from None
            continue
        for pair in filter(str.strip, text.split(",")):
            name, equals, role = pair.rpartition("=")
            if not equals:
                raise ValueError(f"{pair.strip()!r} maps to nothing (expected {_EXPECTED}).")
            yield name, role
