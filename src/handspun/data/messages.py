"""One message, in any of the spellings that data sets have for it, and the tools that it may call.

Texts are never changed. What cannot be learned from raises DroppedRow, which is counted; what is not the
structure that the file claims to have raises DataError.
"""

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from handspun.data.naming import shown, type_name
from handspun.data.nesting import is_nested_deeper
from handspun.errors import DataError

Message = dict[str, Any]
"""role ("system", "user", "assistant" or "tool"), content (str); an assistant's may have tool_calls
([{"type": "function", "function": {"name": str, "arguments": dict}}]) and reasoning_content (str)."""

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
# OpenAI's, Anthropic's and LLaMA-Factory's words for the parts of a content.
_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "reasoning": "reasoning",
    "thinking": "reasoning",
    "tool_call": "call",
    "function_call": "call",
}
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


class DroppedRow(Exception):  # noqa: N818
    """A row that teaches nothing, or not what it seems to; str() is the reason, short and for people."""


@dataclass(frozen=True)
class Cell:
    """Where a value stands: in a file, or in a prompt, which has no rows."""

    file: str
    row: int | None = None
    column: str | None = None

    def expected(self, what: str, found: Any, *, at: str = "") -> DataError:
        """The error for a value that is not `what`; `at` says where inside of the cell it stands."""
        place = f"{at}: " if at else ""
        remedy = "" if self.row is None else " Mend the row or remove it."
        return self.error(f"{place}expected {what}, found {type_name(found)}.{remedy}")

    def error(self, message: str) -> DataError:
        return DataError(message, file=self.file, row=self.row, column=self.column)


def read_messages(value: Any, cell: Cell) -> list[Message]:
    """A list of messages, or the same as JSON text (in a csv cell)."""
    turns = read_json_list(value, cell)
    return [_message(turn, f"message {number}", cell) for number, turn in enumerate(turns, 1)]


def read_json_list(value: Any, cell: Cell) -> list[Any]:
    """A list, or one written as JSON text."""
    if isinstance(value, str):
        try:
            value = _load(value)
        except ValueError:
            raise cell.error("expected a list or the JSON text of one, found a text that is not JSON.") from None
    if not isinstance(value, list):
        raise cell.expected("a list", value)
    return value


def read_tools(value: Any, cell: Cell) -> list[dict[str, Any]] | None:
    """The tools as OpenAI writes them, {"type": "function", "function": {"name", ...}}; bare ones are wrapped.

    `value` is a list, one tool, or JSON text of either. None if there are none.
    """
    if isinstance(value, str):
        value = None if is_blank(value) else _load_or_drop(value, "tools that are not JSON")
    if not value:
        return None
    tools = [value] if isinstance(value, dict) else value
    if not isinstance(tools, list):
        raise cell.expected("a list of tools", value)
    return [_tool(tool) for tool in tools]


def is_blank(text: str) -> bool:
    """Whether there is nothing but white space."""
    return not text.strip()


def _tool(tool: Any) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = _load_or_drop(tool, "tools that are not JSON")
    if not isinstance(tool, dict):
        _drop("a tool that is not an object")
    function = tool.get("function")
    if not isinstance(function, dict):
        function = {key: item for key, item in tool.items() if key != "type"}
        tool = {}
    if not isinstance(function.get("name"), str) or not function["name"]:
        _drop("a tool without a name")
    return {**tool, "type": "function", "function": function}


def _message(turn: Any, at: str, cell: Cell) -> Message:
    if not isinstance(turn, dict):
        raise cell.expected("an object with role and content (or from and value)", turn, at=at)
    name = turn.get("role", turn.get("from"))
    if not isinstance(name, str):
        raise cell.expected("a role", name, at=at)
    role = _ROLES.get(name.strip().lower()) or _drop(f"the unknown role '{shown(name)}'")
    content = turn["content"] if "content" in turn else turn.get("value")
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls_in(content, at, cell)}
    text, reasoning, calls = _content(content, at, cell)
    message: Message = {"role": role, "content": text}
    if role == "assistant":
        _add_to_assistant(message, turn, reasoning, calls)
    elif reasoning or calls:
        _drop(f"{'reasoning' if reasoning else 'a tool call'} in a {role} message")
    if role == "tool":
        message |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    return message


def _add_to_assistant(message: Message, turn: Message, reasoning: str, calls: list[Any]) -> None:
    if turn.get("weight") == 0:  # OpenAI's mark for a turn that is read and not learned
        _drop("an assistant message of weight 0")
    given = turn.get("tool_calls") or turn.get("function_call") or []
    calls = calls + [_tool_call(call) for call in (given if isinstance(given, list) else [given])]
    written = next((turn[key] for key in _REASONING_KEYS if turn.get(key)), "")
    if not isinstance(written, str):
        _drop("reasoning that is not a text")
    if calls:
        message["tool_calls"] = calls
    if reasoning + written:
        message["reasoning_content"] = reasoning + written


def _content(content: Any, at: str, cell: Cell) -> tuple[str, str, list[Any]]:
    """(text, reasoning, tool calls) of a text or a list of parts; nothing is an empty text."""
    if content is None or isinstance(content, str):
        return content or "", "", []
    if not isinstance(content, list):
        raise cell.expected("a text or a list of parts as content", content, at=at)
    text = reasoning = ""
    calls: list[Any] = []
    for part in content:
        kind, value = _part(part, at, cell)
        if kind == "call":
            calls += _calls_in(value, at, cell)
        elif not isinstance(value, str):
            raise cell.expected(f"a text in a part of type {kind!r}", value, at=at)
        elif kind == "reasoning":
            reasoning += value
        elif calls and not is_blank(value):
            _drop("text behind a tool call in one message")
        else:
            text += value
    return text, reasoning, calls


def _part(part: Any, at: str, cell: Cell) -> tuple[str, Any]:
    """(text, reasoning or call; its value) of one part of a content."""
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict):
        raise cell.expected("parts that are objects", part, at=at)
    name = part.get("type", "text")
    kind = _PARTS.get(name) if isinstance(name, str) else None
    if kind is None:
        _drop(f"{shown(str(name)).removeprefix('input_').removesuffix('_url')} content")
    values = (part[key] for key in ("value", name, "text", "content") if part.get(key) is not None)
    return kind, next(values, None)


def _calls_in(value: Any, at: str, cell: Cell) -> list[dict[str, Any]]:
    """The tool calls of a `function_call` turn: one or several, as JSON text or as objects."""
    if isinstance(value, str):
        value = _load_or_drop(value, "a tool call that is not JSON")
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise cell.expected("a tool call with name and arguments", value, at=at)
    return [_tool_call(call) for call in calls]


def _tool_call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        _drop("a tool call that is not an object")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        _drop("a tool call without a name")
    if isinstance(arguments, str) and not is_blank(arguments):
        arguments = _load_or_drop(arguments, "tool call arguments that are not JSON")
    if arguments and not isinstance(arguments, dict):
        _drop("tool call arguments that are not an object")
    kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**kept, "type": "function", "function": {"name": name, "arguments": arguments or {}}}


def _drop(reason: str) -> NoReturn:
    raise DroppedRow(reason)


def _load(text: str) -> Any:
    """JSON proper: without NaN and Infinity, which nobody should learn to write."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if is_nested_deeper(value):
        raise ValueError("nested too deeply")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _load_or_drop(text: str, reason: str) -> Any:
    try:
        return _load(text)
    except ValueError:
        raise DroppedRow(reason) from None
