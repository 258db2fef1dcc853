"""Tool calls in an answer, in the form that Qwen and Hermes models write them:

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
    """An answer's (content, tool calls), as an assistant message holds them.

    Each call is {"type": "function", "function": {"name": str, "arguments": dict}}. A block that is not
    JSON, has no name or no object of arguments, or is not closed, stays in the content as it was written.
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
    """The JSON value that begins there, and where it ends; None if there is none."""
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
