"""Read JSON schemas for constrained decoding, and reject keywords that would not be enforced.

llguidance rejects most of the keywords that it does not enforce (`not`, `if`, `uniqueItems`, `contains`...). But
it silently ignores keywords that it does not know, so a misspelled `minimun` would have no effect.
"""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from handspun.config.typed import load_json, short
from handspun.data.text_files import read_text
from handspun.errors import ConfigError, DataError

_ANNOTATIONS = {
    *("$schema", "$id", "id", "$anchor", "$comment", "title", "description", "default", "examples", "example"),
    *("deprecated", "readOnly", "writeOnly", "discriminator"),
}
"""Keywords without constraints, by the standard or OpenAPI."""
_ENFORCED = {
    *("$ref", "$defs", "definitions", "const", "enum", "type", "allOf", "anyOf", "oneOf", "properties"),
    *("patternProperties", "additionalProperties", "required", "minProperties", "maxProperties", "items"),
    *("prefixItems", "additionalItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_UNENFORCED = {
    *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "propertyNames"),
    *("uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems", "unevaluatedProperties"),
    *("$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "$vocabulary"),
    *("contentEncoding", "contentMediaType", "contentSchema", "nullable", "x-guidance"),
}
_MAPS = {"properties", "patternProperties", "$defs", "definitions"}
_SUBSCHEMAS = _MAPS | {
    "allOf",
    "anyOf",
    "oneOf",
    "prefixItems",
    "items",
    "additionalItems",
    "additionalProperties",
}
"""Keywords that contain schemas: by name, in a list, or a single one."""
_DRAFTS = {"draft-04": 4, "draft-06": 6, "draft-07": 7, "2019-09": 8, "2020-12": 9}
_MOST_NAMED = 8
_MAX_DEPTH = 200
"""Nesting levels that are checked; llguidance's own limit is lower."""


def read_schema(value: str | dict[str, Any]) -> str:
    """Return the JSON text of a schema, given as a dict, as JSON text, or as a file name.

    Raises ConfigError for anything that is not a JSON object, or that has a keyword that would not be enforced.
    """
    where, schema = "--json-schema", value
    if isinstance(value, str):
        where = where if value.lstrip().startswith("{") else f"--json-schema {value}"
        schema = _parsed(value if where == "--json-schema" else _content(value, where), where)
    if not isinstance(schema, dict):
        raise ConfigError(f'{where} is {short(schema)} (expected an object, such as {{"type": "object"}}).')
    try:
        text = json.dumps(schema, allow_nan=False, ensure_ascii=False)
        text.encode("utf-8")
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply. Make it flatter, or use $ref.") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} contains a value that JSON cannot represent: {error}.") from None
    if problems := list(_problems(json.loads(text))):
        more = f" ({len(problems) - _MOST_NAMED} more)" if len(problems) > _MOST_NAMED else ""
        raise ConfigError([f"{where} cannot be enforced: {text}{more}" for text in problems[:_MOST_NAMED]])
    return text


def _content(file: str, where: str) -> str:
    try:
        return read_text(Path(file))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where} cannot be read: {error}. Give a JSON schema ({{...}}) or a file that contains one."
        ) from error
    except DataError as error:  # the message names the file
        raise ConfigError(f"--json-schema {error}") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return load_json(text)
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply. Make it flatter, or use $ref.") from None
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}.") from error


def _problems(root: dict[str, Any]) -> Iterator[str]:
    """Yield what would not be enforced, with its path in the schema."""
    draft = _DRAFTS.get(next((name for name in _DRAFTS if name in str(root.get("$schema"))), ""), 0)
    if "$schema" in root and not draft:
        yield f"$schema {short(root['$schema'])} is not a known draft. Use one of {', '.join(_DRAFTS)}."
    if "schema" in root and isinstance(root["schema"], dict) and not _ENFORCED & root.keys():
        yield 'the schema is wrapped in an object. Give the value of its "schema" key.'
        return
    for path, schema in _schemas(root):
        for keyword in schema.keys() - _ENFORCED - _ANNOTATIONS:
            if problem := _keyword_problem(keyword):
                yield f"{path} has {problem}"
        yield from (f"{path} {problem}" for problem in _misused_keywords(schema, draft))


def _keyword_problem(keyword: str) -> str:
    if keyword in _UNENFORCED:
        return f"{short(keyword)}, which is not enforced here. Remove it, and check the answers afterwards."
    if keyword.startswith("x-"):
        return ""
    near = difflib.get_close_matches(keyword, _ENFORCED, 1)
    hint = f"Did you mean {near[0]}?" if near else "Remove it."
    return f"the keyword {short(keyword)}, which JSON Schema does not have. {hint}"


def _misused_keywords(schema: dict[str, Any], draft: int) -> Iterator[str]:
    """Yield problems with keywords that are enforced in general, but not as used here."""
    types = schema.get("type", "string")
    if "format" in schema and "string" not in (types if isinstance(types, list) else [types]):
        yield f"has the format {short(schema['format'])} on a type that is not a string. Use minimum and maximum."
    if "const" in schema and draft == 4:
        yield "has const, which draft 4 does not have. Use enum, or another $schema."
    if "prefixItems" in schema and draft in (4, 6, 7, 8):
        yield "has prefixItems, which its $schema does not have. Use a list of items, or 2020-12."
    if "additionalItems" in schema and not isinstance(schema.get("items"), list):
        yield "has additionalItems without a list of items, where it has no effect. Use prefixItems and items."
    required, fewest = schema.get("required", []), schema.get("minProperties", 0)
    if isinstance(required, list) and isinstance(fewest, int) and fewest > len(set(map(str, required))) + 1:
        yield (
            f"has minProperties {fewest}, which one property repeated several times would meet. List the "
            "properties under required."
        )
    for text in _texts(schema.get("const"), schema.get("enum"), list(schema.get("properties") or ())):
        if any(character < " " and character not in "\b\f\n\r\t" for character in text):
            yield f"has the text {short(text)} with a control character, which answers cannot contain. Remove it."


def _texts(*values: Any) -> Iterator[str]:
    """Yield all texts in some values, object keys included."""
    left = list(values)
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            left += value


def _schemas(root: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the schema and all schemas in it, each with its path (`#/properties/a`)."""
    left: list[tuple[str, Any, int]] = [("#", root, 0)]
    while left:
        path, schema, depth = left.pop()
        if not isinstance(schema, dict) or depth > _MAX_DEPTH:  # true and false are schemas, and are enforced
            continue
        yield path, schema
        for name in _SUBSCHEMAS & schema.keys():
            inner = schema[name]
            if isinstance(inner, dict) and name in _MAPS:
                left += [(f"{path}/{name}/{key}", one, depth + 1) for key, one in inner.items()]
            elif isinstance(inner, list):
                left += [(f"{path}/{name}/{number}", one, depth + 1) for number, one in enumerate(inner)]
            else:
                left.append((f"{path}/{name}", inner, depth + 1))
