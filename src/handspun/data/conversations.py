"""Conversations: what a row says, whatever format it is written in."""

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from handspun.data.formats import MEDIA, NEEDED, recognise_format, used_columns
from handspun.data.messages import (
    Cell,
    DroppedRow,
    Message,
    is_blank,
    read_json_list,
    read_messages,
    read_tools,
)
from handspun.data.naming import listed
from handspun.data.rows import Row

__all__ = [
    "Conversation",
    "DroppedRow",
    "Message",
    "check_writable",
    "recognise_format",
    "to_conversation",
    "used_columns",
]


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)

_MOST_MESSAGES = 1000
"""Of a conversation: a template renders it once for each of its answers."""


@dataclass(frozen=True)
class Conversation:
    """Messages in order, the tools (JSON schemas) that they may call, and the row they came from.

    note: what of the row is not as it stood or not as elsewhere, for the account of the rows.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    file: str
    row: int
    note: str | None = None


def to_conversation(row: Row, data_format: str, *, system_prompt: str | None) -> Conversation:
    """The row's conversation, its texts as they stand; `system_prompt` goes before one that has none.

    Ends with an assistant turn: what no turn answers is cut off, and noted. Raises DroppedRow for a row that
    teaches nothing, and DataError for one that is not of the format.
    """
    _refuse(row, data_format)
    messages, note = _messages(row, data_format)
    messages, cut = _answered(messages)
    notes = (note, cut, _unusual_order(messages))
    messages = _with_system(messages, row, system_prompt)
    tools = read_tools(row.values.get("tools"), _cell(row, "tools"))
    check_writable([messages, tools])
    return Conversation(messages, tools, row.file, row.number, "; ".join(filter(None, notes)) or None)


def _messages(row: Row, data_format: str) -> tuple[list[Message], str | None]:
    """The messages of the row's own columns, and a note."""
    if data_format == "alpaca":
        return _alpaca(row), None
    if data_format == "prompt-completion":
        return _prompt_completion(row)
    column = NEEDED["messages" if data_format == "messages" else "sharegpt"][0]
    return read_messages(_value(row, column, data_format), _cell(row, column)), None


def _alpaca(row: Row) -> list[Message]:
    """instruction, and a newline and input where there is one, are the user's; history comes first."""
    instruction = _filled(row, "instruction", "alpaca")
    given = _text(row, "input")
    user = instruction if is_blank(given) else f"{instruction}\n{given}"
    return [*_history(row), *_turns(user, _filled(row, "output", "alpaca"))]


def _history(row: Row) -> list[Message]:
    """LLaMA-Factory's list of earlier [user, assistant] pairs."""
    value, cell = row.values.get("history"), _cell(row, "history")
    if value is None or (isinstance(value, str) and is_blank(value)):
        return []
    messages = []
    for pair in read_json_list(value, cell):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise cell.expected("pairs of texts, [user, assistant]", pair)
        messages += _turns(*pair)
    return messages


def _prompt_completion(row: Row) -> tuple[list[Message], str | None]:
    """Two texts, or two lists of messages (TRL's conversational form)."""
    prompt, completion = (
        read_messages(value, _cell(row, column))
        if isinstance(value := _value(row, column, "prompt-completion"), list)
        else [{"role": role, "content": _filled(row, column, "prompt-completion")}]
        for column, role in (("prompt", "user"), ("completion", "assistant"))
    )
    if not completion:
        raise DroppedRow("empty completion")
    earlier = any(message["role"] == "assistant" for message in prompt)
    return prompt + completion, "assistant turns of the prompt are learned too" if earlier else None


def _turns(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _with_system(messages: list[Message], row: Row, system_prompt: str | None) -> list[Message]:
    """With the system message of the row's column, or else the given one, if it has none of its own."""
    own = next((message["content"] for message in messages if message["role"] == "system"), None)
    of_column = _text(row, "system")
    if own is None:
        content = system_prompt if is_blank(of_column) else of_column
        return messages if content is None else [{"role": "system", "content": content}, *messages]
    if not is_blank(of_column) and of_column != own:
        raise DroppedRow("two system messages, in the column 'system' and in the conversation")
    return messages


def _answered(messages: list[Message]) -> tuple[list[Message], str | None]:
    """The messages to the last assistant turn before any empty turn, and a note of what was cut off."""
    given, messages = len(messages), messages[:_MOST_MESSAGES]
    empty = next((i for i, message in enumerate(messages) if _says_nothing(message)), None)
    answered = messages[:empty]
    while answered and answered[-1]["role"] != "assistant":
        answered = answered[:-1]
    if empty is not None:
        reason = f"empty {messages[empty]['role']} turn"
        if not answered:
            raise DroppedRow(reason)
        return answered, f"cut off before an {reason}"
    if not answered:
        raise DroppedRow("no assistant turn" if messages else "no messages")
    if given > _MOST_MESSAGES:
        return answered, f"cut off behind {_MOST_MESSAGES} messages"
    return answered, "cut off behind the last assistant turn" if len(answered) < len(messages) else None


def _unusual_order(messages: list[Message]) -> str | None:
    """What to tell of turns that no chat would take in this order. They are learned as they stand."""
    for before, message in pairwise([{"role": "nobody"}, *messages]):
        role = message["role"]
        if role in ("user", "assistant") and role == before["role"]:
            return f"two {role} turns in a row"
        if role == "system" and before["role"] != "nobody":
            return "a system message behind the beginning"
        if role == "tool" and before["role"] != "tool" and not before.get("tool_calls"):
            return "a tool result that no call asked for"
    return None


def _says_nothing(message: Message) -> bool:
    """Whether a user or assistant turn is empty: a tool may return nothing, a system message may be blank."""
    return (
        message["role"] in ("user", "assistant") and is_blank(message["content"]) and not message.get("tool_calls")
    )


def _refuse(row: Row, data_format: str) -> None:
    """Raises DroppedRow for rows with more than text in them, and for answers that someone rejected (KTO)."""
    for column in MEDIA:
        if row.values.get(column):
            raise DroppedRow(f"{column.removesuffix('s')} content")
    for column in ("kto_tag", "label") if data_format != "alpaca" else ("kto_tag",):
        if row.values.get(column) is False:
            raise DroppedRow(f"{column} is false: a rejected answer")


def check_writable(value: Any) -> None:
    """Raises DroppedRow for what no template can write as it is: half of a surrogate pair, a date as argument."""
    try:
        _JSON.encode(value).encode()
    except UnicodeEncodeError:
        raise DroppedRow("broken Unicode (a lone surrogate)") from None
    except ValueError:
        raise DroppedRow("NaN or Infinity in a tool or its arguments, which no JSON has") from None
    except TypeError as error:
        raise DroppedRow(f"a value that JSON does not have in a tool or its arguments ({error})") from None


def _cell(row: Row, column: str) -> Cell:
    return Cell(row.file, row.number, column)


def _value(row: Row, column: str, data_format: str) -> Any:
    if column not in row.values:
        needed = next(columns for name, columns in NEEDED.items() if name == data_format)
        raise _cell(row, column).error(
            f"the column is missing in this row. {data_format} needs {' and '.join(needed)}; the row has "
            f"{listed(row.values) or 'none'}."
        )
    return row.values[column]


def _text(row: Row, column: str) -> str:
    """The text of a column; one that is missing or null is empty."""
    value = row.values.get(column)
    if value is not None and not isinstance(value, str):
        raise _cell(row, column).expected("a text", value)
    return value or ""


def _filled(row: Row, column: str, data_format: str) -> str:
    """The text of a column that must be there. Raises DroppedRow if there is nothing in it."""
    _value(row, column, data_format)
    text = _text(row, column)
    if is_blank(text):
        raise DroppedRow(f"empty {column}")
    return text
