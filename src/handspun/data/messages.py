"""Read messages: normalize the many spellings of roles, texts and tool calls in data sets to one form."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from handspun.config.role_map import ROLES, normalize_role
from handspun.data.json_shapes import exceeds_depth
from handspun.data.marks import mark_kind
from handspun.data.readers import has_lost_nulls
from handspun.data.rows import DroppedRow
from handspun.display import describe_type, printable
from handspun.errors import DataError

CALL = "call"
"""Role of a turn that is only a tool call, as LLaMA-Factory writes them. It becomes an assistant's turn."""

# Lower case, with `_` for spaces and hyphens. A name is listed only if it means the same everywhere: `agent`,
# `customer` or `speaker_1` may be either side, so a role map must say which.
_NAMES = {
    "system": "system developer sys system_prompt system_message systemmessage",
    "user": "user human prompter human_user end_user usermessage humanmessage user_message human_message",
    "assistant": (
        "assistant ai bot chatbot chat_bot model llm gpt chatgpt gpt3 gpt4 gpt_3 gpt_3.5 gpt_3.5_turbo gpt_4 "
        "gpt_4o bing bard claude gemini copilot ai_assistant aimessage ai_message aimessagechunk assistant_message"
    ),
    "tool": (
        "tool function observation tool_response function_response tool_result function_result tool_output "
        "ipython toolmessage functionmessage"
    ),
    CALL: "function_call tool_call",
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}

ROLE_KEYS = ("role", "from", "speaker", "author", "sender", "type")
"""Keys that name a turn's role. The first one present counts."""

UNKNOWN_ROLE = "the unknown role"
"""Start of the reason when a row is dropped because of a role."""


def known_role(name: str, role_map: Mapping[str, str]) -> str | None:
    """Return the role that a name stands for, ignoring case and outer space; None if it is unknown."""
    key = normalize_role(name)
    # The role map comes first, so it can also map a known name to another role.
    return role_map.get(key) or _ROLES.get(key)


def role_name(turn: Mapping[str, Any]) -> tuple[str | None, Any]:
    """Return (key, value) of the turn's role name; (None, None) if it has none."""
    for key in ROLE_KEYS:
        value = turn.get(key)
        if isinstance(value, dict):  # ChatGPT's export: {"author": {"role": "user"}}
            value = value.get("role", value.get("name"))
        if value is not None:
            return key, value
    return None, None


def role_of(turn: Mapping[str, Any], role_map: Mapping[str, str]) -> tuple[str | None, str]:
    """Return (role, "") of a turn, or (None, the reason why it has none)."""
    key, value = role_name(turn)
    if key is None:
        return None, "a message without a role"
    if isinstance(value, list | dict) or value != value:
        return None, f"a role that is {describe_type(value)}"
    # Speakers may be numbers, which a role map can name as well.
    name = value if isinstance(value, str) else json.dumps(value, default=str)
    role = known_role(name, role_map)
    if role is None:
        return None, f"{UNKNOWN_ROLE} '{printable(name)}'"
    others = {known_role(other, role_map) for k in ROLE_KEYS[:-1] if isinstance(other := turn.get(k), str)}
    if key != "type" and others - {None, role}:
        return None, "a message with two roles"
    return role, ""


def role_advice() -> str:
    """Return advice on unknown roles, for the data report."""
    return (
        f"known roles, in any case: {known_roles()}. Map other names with --role-map NAME=ROLE, as in --role-map "
        "agent=assistant"
    )


def known_roles() -> str:
    """Return the names of all known roles, for a message."""
    return "; ".join(f"{role} ({', '.join(_shortest(role))})" for role in ROLES)


def _shortest(role: str) -> list[str]:
    """Return the other names of a role that are worth listing: no class names and no versions."""
    names = _NAMES[role].split()[1:]
    return [name for name in names if "message" not in name and not any(map(str.isdigit, name))]


Message = dict[str, Any]
"""role ("system", "user", "assistant" or "tool"), content (str). An assistant's message may have tool_calls
([{"type": "function", "function": {"name": str, "arguments": dict}}]), reasoning_content (str), and train (False
for a message that is context only)."""

Turn = dict[str, Any]
"""A message as it is in the data."""

# OpenAI's, Anthropic's and LLaMA-Factory's names for the parts of a content.
_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "text",
    "reasoning": "reasoning",
    "thinking": "reasoning",
    "tool_call": "call",
    "function_call": "call",
}
_MEDIA_PARTS = ("image", "video", "audio", "file")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_CONTENT_KEYS = ("content", "value", "text", "message", "utterance")
_ARGUMENT_KEYS = ("arguments", "args", "parameters", "input")
_CALL_KEYS = ("tool_calls", "function_call")
_NAME_KEYS = ("name", "tool_call_id")

LOST_NULLS = "nulls were removed from tools, calls or tool results: parquet cannot tell them from missing keys"
"""Note on a row."""
_JSON_RESULT = "a tool result that is not text is written as JSON"


@dataclass(frozen=True)
class Cell:
    """The location of a value: in a file, or in a prompt, which has no rows."""

    file: str
    row: int | None = None
    column: str | None = None

    def expected(self, what: str, found: Any, *, at: str = "") -> DataError:
        """Return the error for a value that is not `what`. at: where in the cell the value is."""
        where = f"{at}: " if at else ""
        remedy = "" if self.row is None else " Fix or remove the row."
        return self.error(f"{where}expected {what}, found {describe_type(found)}.{remedy}")

    def error(self, message: str) -> DataError:
        """Return a DataError for this location."""
        return DataError(message, file=self.file, row=self.row, column=self.column)


def read_turns(value: Any, cell: Cell, role_map: Mapping[str, str]) -> list[Turn]:
    """Return the turns of a list of messages. The list may be JSON text (in a csv cell)."""
    return [turn for item in read_json_list(value, cell) for turn in _turns_of(item, role_map)]


def plain_message(turn: Turn, role_map: Mapping[str, str]) -> Message | None:
    """Return the message of a turn that has only a role and a text, as most do; None for any other turn."""
    # A fast path for `read_message`, for millions of rows: such a turn has no marks, notes or unread keys.
    if len(turn) != 2:
        return None
    name, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not (isinstance(name, str) and isinstance(text, str)):
        return None
    role = known_role(name, role_map)
    return None if role is None or role == CALL else {"role": role, "content": text}


def read_message(turn: Turn, role_map: Mapping[str, str]) -> Message:
    """Return a turn as a message. Raises DroppedRow."""
    role, reason = role_of(turn, role_map)
    if role is None:
        _drop(reason)
    key, content = _content_of(turn)
    if role == CALL:
        return {"role": "assistant", "content": "", "tool_calls": _calls_in(turn if key is None else content)}
    text, reasoning, calls = _content(content, role)
    message: Message = {"role": role, "content": text}
    if role == "assistant":
        _add_to_assistant(message, turn, reasoning, calls)
    elif reasoning or calls:
        _drop(f"{'reasoning' if reasoning else 'a tool call'} in a {role} message")
    if role == "tool":
        message |= {key: turn[key] for key in _NAME_KEYS if isinstance(turn.get(key), str)}
    return message


def read_json_list(value: Any, cell: Cell) -> list[Any]:
    """Return a list, which may be JSON text. No value is an empty list."""
    if value is None or (isinstance(value, str) and is_blank(value)):
        return []
    if isinstance(value, str):
        value = _load_or_drop(value, f"text in the column '{cell.column}' that is not JSON")
    if not isinstance(value, list):
        raise cell.expected("a list", value)
    return value


def read_tools(value: Any, cell: Cell) -> list[dict[str, Any]] | None:
    """Return the tools in OpenAI's form, {"type": "function", "function": {"name", ...}}.

    Bare functions are wrapped in that form. `value` is a list, one tool, or JSON text of either. Returns None if
    there are no tools.
    """
    if isinstance(value, str):
        value = None if is_blank(value) else _load_or_drop(value, "tools that are not JSON")
    if not value:
        return None
    tools = [value] if isinstance(value, dict) else value
    if not isinstance(tools, list):
        raise cell.expected("a list of tools", value)
    return [_tool(tool) for tool in tools]


def with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """Return the messages after the system prompt, or unchanged if they have a system message already."""
    if system_prompt is None or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def unread_keys(turn: Turn, role: str) -> set[str]:
    """Return the keys of a turn that are ignored."""
    read = {role_name(turn)[0], _content_of(turn)[0]}
    if role == "assistant":
        read |= {*_CALL_KEYS, *_REASONING_KEYS}
    if role == "tool":
        read |= set(_NAME_KEYS)
    return {
        key
        for key, value in turn.items()
        if key not in read and value is not None and mark_kind(key) in (None, "prompts", "like a mark")
    }


def notes_on_turn(turn: Turn, role: str) -> list[str]:
    """Return notes on how a turn was read."""
    _, content = _content_of(turn)
    notes = []
    if role == "tool" and not (content is None or isinstance(content, str) or _is_parts(content)):
        notes.append(_JSON_RESULT)
        if has_lost_nulls(content):
            notes.append(LOST_NULLS)
    calls = [*(turn.get(key) for key in _CALL_KEYS), content]
    if role == "assistant" and has_lost_nulls(list(_arguments_in(calls))):
        notes.append(LOST_NULLS)
    return notes


def is_blank(text: str) -> bool:
    """Return whether the text is only white space."""
    return not text.strip()


def _turns_of(item: Any, role_map: Mapping[str, str]) -> list[Turn]:
    """Return the turns of one item of a list of messages: usually the item itself."""
    if isinstance(item, str):  # datasets' Json type, in a reader that does not know it
        item = _load_or_drop(item, "a message that is text without a role")
    if not isinstance(item, dict):
        _drop("a message that is not an object")
    if item.get("lc") == 1 and isinstance(item.get("kwargs"), dict) and isinstance(item.get("id"), list):
        return [{"type": str((item["id"] or [""])[-1]), **item["kwargs"]}]  # LangChain's dumps
    if isinstance(item.get("data"), dict) and _content_of(item)[0] is None:  # LangChain's messages_to_dict
        return [{**item["data"], **{key: value for key, value in item.items() if key != "data"}}]
    return _pairs_in(item, role_map) or [item]


def _pairs_in(item: Turn, role_map: Mapping[str, str]) -> list[Turn]:
    """Return the turns of an object such as {"human": "Hi", "assistant": "Hello"}; none for any other object."""
    filled = {key: value for key, value in item.items() if value is not None}
    if role_name(item)[0] is not None or not all(
        known_role(key, role_map) in ("system", "user", "assistant") and isinstance(value, str)
        for key, value in filled.items()
    ):
        return []
    return [{"role": key, "content": value} for key, value in filled.items()]


def _content_of(turn: Turn) -> tuple[str | None, Any]:
    """Return (key, value) of a turn's content; (None, None) if it has none."""
    for key in _CONTENT_KEYS:
        if turn.get(key) is not None:
            return key, turn[key]
    return None, None


def _arguments_in(value: Any) -> Iterator[Any]:
    """Yield the arguments of all tool calls in a value."""
    if isinstance(value, list):
        for item in value:
            yield from _arguments_in(item)
    elif isinstance(value, dict):
        yield from (value[key] for key in _ARGUMENT_KEYS if key in value)
        yield from (inner for key in ("function", *_PARTS) for inner in _arguments_in(value.get(key)))


def _add_to_assistant(message: Message, turn: Turn, reasoning: str, calls: list[Any]) -> None:
    given = turn.get("tool_calls") or turn.get("function_call") or []
    if isinstance(given, str):
        given = [] if is_blank(given) else _load_or_drop(given, "a tool call that is not JSON")
    calls = calls + [_tool_call(call) for call in (given if isinstance(given, list) else [given])]
    written = next((turn[key] for key in _REASONING_KEYS if turn.get(key)), "")
    if not isinstance(written, str):
        _drop("reasoning that is not text")
    if calls:
        message["tool_calls"] = calls
    if reasoning + written:
        message["reasoning_content"] = reasoning + written


def _content(content: Any, role: str) -> tuple[str, str, list[Any]]:
    """Return (text, reasoning, tool calls) of a text or a list of parts. No content is an empty text."""
    if content is None or isinstance(content, str):
        return content or "", "", []
    if role == "tool" and not _is_parts(content):
        return _as_json(content), "", []
    parts = _parts_of(content)
    if parts is None:
        _drop(f"a {role} message whose content is {_kind(content)}")
    text = reasoning = ""
    calls: list[Any] = []
    for part in parts:
        kind, value = _part(part)
        if kind == "call":
            calls += _calls_in(value)
        elif not isinstance(value, str):
            _drop(f"a part of type {kind!r} that contains {_kind(value)}")
        elif kind == "reasoning":
            reasoning += value
        elif calls and not is_blank(value):
            _drop("text after a tool call in one message")
        else:
            text += value
    return text, reasoning, calls


def _parts_of(content: Any) -> list[Any] | None:
    """Return the parts of a content: a list, a single part, or ChatGPT's object that contains parts."""
    if isinstance(content, list):
        return content
    if isinstance(content, dict) and isinstance(content.get("parts"), list):
        return list(content["parts"])
    if isinstance(content, dict) and (
        isinstance(content.get("type"), str) or isinstance(content.get("text"), str)
    ):
        return [content]
    return None


def _is_parts(content: Any) -> bool:
    """Return whether a tool's result is message content in parts, rather than data that the tool returned."""
    if isinstance(content, dict) and "content_type" in content:
        return True
    parts = [content] if isinstance(content, dict) else content
    return isinstance(parts, list) and bool(parts) and all(map(_is_part, parts))


def _is_part(part: Any) -> bool:
    name = part.get("type") if isinstance(part, dict) else None
    if not isinstance(name, str):
        return False
    return _PARTS.get(name) == "text" or any(media in name for media in _MEDIA_PARTS)


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise DroppedRow("NaN or Infinity in a tool result, which JSON does not allow") from None
    except TypeError as error:
        raise DroppedRow(f"a value in a tool result that JSON cannot represent ({error})") from None


def _part(part: Any) -> tuple[str, Any]:
    """Return (kind, value) of one part of a content. kind: "text", "reasoning" or "call"."""
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict):
        _drop("a content part that is not an object")
    name = part.get("type", "text")
    kind = _PARTS.get(name) if isinstance(name, str) else None
    if kind is None:
        _drop(f"{printable(str(name)).removeprefix('input_').removesuffix('_url')} content")
    values = (part[key] for key in ("value", name, "text", "content") if part.get(key) is not None)
    return kind, next(values, None)


def _calls_in(value: Any) -> list[dict[str, Any]]:
    """Return the tool calls of a `function_call` turn: one or several, as JSON text or as objects."""
    if isinstance(value, str):
        value = _load_or_drop(value, "a tool call that is not JSON")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        _drop("a tool call that is not an object")
    return [_tool_call(call) for call in calls]


def _tool_call(call: Any) -> dict[str, Any]:
    call = _loaded(call)
    function = _loaded(call.get("function", call)) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        _drop("a tool call that is not an object")
    name = function.get("name")
    arguments = next((function[key] for key in _ARGUMENT_KEYS if function.get(key) is not None), None)
    if not isinstance(name, str) or not name:
        _drop("a tool call without a name")
    if isinstance(arguments, str) and not is_blank(arguments):
        arguments = _load_or_drop(arguments, "tool call arguments that are not JSON")
    if arguments and not isinstance(arguments, dict):
        _drop("tool call arguments that are not an object")
    kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**kept, "type": "function", "function": {"name": name, "arguments": arguments or {}}}


def _tool(tool: Any) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = _load_or_drop(tool, "tools that are not JSON")
    if not isinstance(tool, dict):
        _drop("a tool that is not an object")
    function = _loaded(tool.get("function"))
    if not isinstance(function, dict):
        function = {key: item for key, item in tool.items() if key != "type"}
        tool = {}
    if not isinstance(function.get("name"), str) or not function["name"]:
        _drop("a tool without a name")
    if isinstance(function.get("parameters"), str):
        function = {**function, "parameters": _loaded(function["parameters"])}
    return {**tool, "type": "function", "function": function}


def _loaded(value: Any) -> Any:
    """Return the object in a JSON text, as in columns that Arrow has no type for; any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        loaded = _load(value)
    except ValueError:
        return value
    return loaded if isinstance(loaded, dict) else value


def _kind(value: Any) -> str:
    """Describe a value's type without its content, so that many rows share one reason."""
    return "a number" if isinstance(value, int | float) and not isinstance(value, bool) else describe_type(value)


def _drop(reason: str) -> NoReturn:
    raise DroppedRow(reason)


def _load(text: str) -> Any:
    """Return the value of strict JSON text: without NaN and Infinity, which no model should learn to write."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if exceeds_depth(value):
        raise ValueError("nested too deeply")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _load_or_drop(text: str, reason: str) -> Any:
    try:
        return _load(text)
    except ValueError:
        raise DroppedRow(reason) from None
