"""Parse tool calls from an answer, in the format of Qwen and Hermes models.

<tool_call>
{"name": "weather", "arguments": {"city": "Shanghai"}}
</tool_call>
"""

import json
import re
from typing import Any

_OPEN = re.compile(r"<tool_call>\s*")
_CLOSE = re.compile(r"\s*</tool_call>")


def parse_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Return an answer's (content, tool calls), as an assistant message has them.

    Each call is {"type": "function", "function": {"name": str, "arguments": dict}}. A block stays in the content
    as it is if it is not JSON, has no name, has arguments that are not an object, or is not closed.
    """
    content, calls, position = "", [], 0
    for opening in _OPEN.finditer(text):
        if opening.start() < position:  # inside a call's own strings
            continue
        value, end = _json_at(text, opening.end())
        closing, call = _CLOSE.match(text, end), _call(value)
        if closing is None or call is None:
            continue
        content += text[position : opening.start()]
        calls.append(call)
        position = closing.end()
    content += text[position:]
    return (content.strip() if calls else text), calls


def _json_at(text: str, start: int) -> tuple[Any, int]:
    """Return the JSON value at `start` and the index after it, or (None, start) if there is none."""
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start


def _call(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):  # some models write them as JSON in a string
        arguments, _ = _json_at(arguments, 0)
    if not isinstance(arguments, dict):
        return None
    return {"type": "function", "function": {"name": value["name"], "arguments": arguments}}
