"""Parse tool calls from an answer, in the format of Qwen and Hermes models.

<tool_call>
{"name": "weather", "arguments": {"city": "Shanghai"}}
</tool_call>
"""

import json
import re
from typing import Any, Literal, NamedTuple, NoReturn

OPENING_TAG, CLOSING_TAG = "<tool_call>", "</tool_call>"
OPENING = re.compile(rf"{OPENING_TAG}\s*")
_CLOSING = re.compile(rf"\s*{CLOSING_TAG}")


def parse_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Return an answer's (content, tool calls), as an assistant message has them.

    Each call is {"type": "function", "function": {"name": str, "arguments": dict}}. A block stays in the content
    as it is if it is not JSON, has no name, has arguments that are not an object, or is not closed. White space at
    the end of the content is removed if there are calls.
    """
    content, calls, position = "", [], 0
    for opening in OPENING.finditer(text):
        if opening.start() < position:  # inside a call's own strings
            continue
        block = read_block(text, opening.start())
        if not isinstance(block, Block):
            continue
        content += text[position : opening.start()]
        calls.append(block.call)
        position = block.end
    content += text[position:]
    # Not at the beginning: a stream has shown that already when it comes to the first call.
    return (content.rstrip() if calls else text), calls


class Block(NamedTuple):
    """A call in a text, and the index after its closing tag."""

    call: dict[str, Any]
    end: int


def read_block(text: str, start: int) -> Block | Literal["text", "unfinished"]:
    """Return the call whose opening tag is at `start`.

    "text": there is no call, whatever follows. "unfinished": there may be one if the text goes on.
    """
    opening = OPENING.match(text, start)
    assert opening is not None
    try:
        value, end = _DECODER.raw_decode(text, opening.end())
    except json.JSONDecodeError as error:
        is_cut = error.msg.startswith("Unterminated string") or error.pos > len(text) - _LONGEST_WORD
        return "unfinished" if is_cut else "text"
    except (ValueError, RecursionError):
        return "text"
    call, closing = _call(value), _CLOSING.match(text, end)
    if call is None:
        return "text"
    if closing is not None:
        return Block(call, closing.end())
    return "unfinished" if CLOSING_TAG.startswith(text[end:].lstrip()) else "text"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
_LONGEST_WORD = 16
"""More than the characters of an unfinished escape, number or word at the end of JSON text."""


def _json_at(text: str, start: int) -> tuple[Any, int]:
    """Return the JSON value at `start` and the index after it, or (None, start) if there is none."""
    try:
        return _DECODER.raw_decode(text, start)
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
