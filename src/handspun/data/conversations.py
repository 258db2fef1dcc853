"""Conversations: what a row says, whatever format it is written in."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

from handspun.data.formats import MEDIA, NEEDED, used_columns
from handspun.data.marks import check_parts, row_marks, turn_mark
from handspun.data.messages import (
    LOST_NULLS,
    UNKNOWN_ROLE,
    Cell,
    Message,
    is_blank,
    notes_on_turn,
    plain_message,
    read_json_list,
    read_message,
    read_tools,
    read_turns,
    role_of,
    unread_keys,
    with_system_prompt,
)
from handspun.data.readers import has_lost_nulls
from handspun.data.rows import DroppedRow, Row
from handspun.display import join_names

_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)

_MOST_MESSAGES = 1000
"""Of a conversation: a template renders it once for each of its answers."""


@dataclass(frozen=True)
class Conversation:
    """Messages in order, the tools (JSON schemas) that they may call, and the row they came from.

    notes: what of the row is not as it stood or not as elsewhere, for the account of the rows.
    unread_keys: keys of its messages that nothing is read from.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    file: str
    row: int
    notes: tuple[str, ...] = ()
    unread_keys: tuple[str, ...] = ()


@dataclass
class _Read:
    """What was read of a row so far. context: why turns of it are not trained on."""

    role_map: Mapping[str, str]
    context: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unread_keys: dict[str, None] = field(default_factory=dict)

    def messages(self, value: Any, cell: Cell) -> list[Message]:
        """Return the messages of a cell; those that are context only by their marks have `train` False."""
        turns = read_turns(value, cell, self.role_map)
        try:
            return [plain_message(turn, self.role_map) or self._message(turn) for turn in turns]
        except DroppedRow as reason:
            raise DroppedRow(self._all_unknown_roles(turns) or str(reason)) from None

    def _all_unknown_roles(self, turns: list[dict[str, Any]]) -> str | None:
        """Return a reason that names all unknown roles at once, so that one role map can answer it; None if there
        are not several."""
        reasons = {role_of(turn, self.role_map)[1] for turn in turns}
        names = [reason.removeprefix(UNKNOWN_ROLE).strip() for reason in sorted(reasons) if UNKNOWN_ROLE in reason]
        return f"{UNKNOWN_ROLE}s {join_names(names)}" if len(names) > 1 else None

    def _message(self, turn: dict[str, Any]) -> Message:
        message = read_message(turn, self.role_map)
        role = message["role"]
        train, why = turn_mark(turn, role)
        if role == "assistant":
            for key in ("content", "value", "tool_calls"):
                check_parts(turn.get(key))
        (self.context if train is False else self.notes).extend(why)
        self.notes += notes_on_turn(turn, role)
        self.unread_keys.update(dict.fromkeys(unread_keys(turn, role)))
        return message if train is None else {**message, "train": train}


def to_conversation(
    row: Row, data_format: str, *, system_prompt: str | None, role_map: Mapping[str, str] | None = None
) -> Conversation:
    """The row's conversation, its texts as they stand; `system_prompt` goes before one that has none.

    Ends with an assistant turn that is trained on: what comes after it is cut off, and noted. Raises DroppedRow
    for a row that teaches nothing, and DataError for one that is not of the format.
    """
    read = _Read(role_map or {})
    _refuse(row, data_format, read)
    read.notes += row_marks(row.values, _used_columns(data_format))
    messages = _messages(row, data_format, read)
    messages = _answered(messages, read)
    read.notes += filter(None, [_unusual_order(messages)])
    messages = with_system_prompt(_with_column(messages, row), system_prompt)
    messages = _up_to_the_last_trained(_with_greeting_as_context(messages, read), read)
    tools = read_tools(row.values.get("tools"), _cell(row, "tools"))
    if has_lost_nulls(row.values.get("tools")):
        read.notes.append(LOST_NULLS)
    check_writable([messages, tools])
    notes = tuple(dict.fromkeys([*read.context, *read.notes]))
    return Conversation(messages, tools, row.file, row.number, notes, tuple(read.unread_keys))


_used_columns = lru_cache(used_columns)


def _messages(row: Row, data_format: str, read: _Read) -> list[Message]:
    """The messages of the row's own columns."""
    if data_format == "alpaca":
        return _alpaca(row)
    if data_format == "prompt-completion":
        return _prompt_completion(row, read)
    column = NEEDED["messages" if data_format == "messages" else "sharegpt"][0]
    return read.messages(_value(row, column, data_format), _cell(row, column))


def _alpaca(row: Row) -> list[Message]:
    """instruction, and a newline and input where there is one, are the user's; history comes first."""
    instruction = _filled(row, "instruction", "alpaca")
    given = _text(row, "input")
    user = instruction if is_blank(given) else f"{instruction}\n{given}"
    return [*_history(row), *_turns(user, _filled(row, "output", "alpaca"))]


def _history(row: Row) -> list[Message]:
    """LLaMA-Factory's list of earlier [user, assistant] pairs."""
    cell = _cell(row, "history")
    messages = []
    for pair in read_json_list(row.values.get("history"), cell):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise cell.expected("pairs of texts, [user, assistant]", pair)
        messages += _turns(*pair)
    return messages


def _prompt_completion(row: Row, read: _Read) -> list[Message]:
    """Two texts, or two lists of messages (TRL's conversational form)."""
    prompt, completion = (
        read.messages(value, _cell(row, column))
        if isinstance(value := _value(row, column, "prompt-completion"), list)
        else [{"role": role, "content": _filled(row, column, "prompt-completion")}]
        for column, role in (("prompt", "user"), ("completion", "assistant"))
    )
    if not completion:
        raise DroppedRow("empty completion")
    if any(message["role"] == "assistant" and is_trained(message) for message in prompt):
        read.notes.append("assistant turns of the prompt are learned too")
    return prompt + completion


def _turns(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _with_column(messages: list[Message], row: Row) -> list[Message]:
    """With the system message of the row's column, if it has none of its own."""
    own = next((message["content"] for message in messages if message["role"] == "system"), None)
    of_column = _text(row, "system")
    if own is None:
        return messages if is_blank(of_column) else with_system_prompt(messages, of_column)
    if not is_blank(of_column) and of_column != own:
        raise DroppedRow("two system messages, in the column 'system' and in the conversation")
    return messages


def _answered(messages: list[Message], read: _Read) -> list[Message]:
    """The messages to the last assistant turn before any empty turn. What was cut off is noted."""
    given, messages = len(messages), messages[:_MOST_MESSAGES]
    empty = next((i for i, message in enumerate(messages) if _says_nothing(message)), None)
    answered = messages[:empty]
    while answered and answered[-1]["role"] != "assistant":
        answered = answered[:-1]
    if empty is not None:
        reason = f"empty {messages[empty]['role']} turn"
        if not answered:
            raise DroppedRow(reason)
        read.notes.append(f"cut off before an {reason}")
        return answered
    if not answered:
        raise DroppedRow("no assistant turn" if messages else "no messages")
    if given > _MOST_MESSAGES:
        read.notes.append(f"cut off behind {_MOST_MESSAGES} messages")
    elif len(answered) < len(messages):
        read.notes.append("cut off behind the last assistant turn")
    return answered


def _with_greeting_as_context(messages: list[Message], read: _Read) -> list[Message]:
    """The messages, an assistant's turn before the first user's as context: nobody asked for it, and templates do
    not agree on a prompt for it. A mark wins where a system message comes before it; so does a row without any
    user."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    decided = []
    for i, message in enumerate(messages):
        is_early = i == 0 or (bool(users) and i < users[0] and "train" not in message)
        if message["role"] == "assistant" and is_early and message.get("train") is not False:
            read.context.append(
                "an assistant turn before the first user turn (a greeting) is context, not trained on"
            )
            message = {**message, "train": False}
        decided.append(message)
    return decided


def _up_to_the_last_trained(messages: list[Message], read: _Read) -> list[Message]:
    """Without what comes after the last turn that is trained on, and with a mark only on turns that are context.

    Raises DroppedRow if no turn is trained on.
    """
    trained = [i for i, message in enumerate(messages) if message["role"] == "assistant" and is_trained(message)]
    if not trained:
        raise DroppedRow("; ".join(["no turn to train on", *dict.fromkeys(read.context)]))
    kept = messages[: trained[-1] + 1]
    return [{key: m[key] for key in m if key != "train"} if m.get("train") else m for m in kept]


def is_trained(message: Message) -> bool:
    """Return whether an assistant's message is trained on, and not context only."""
    return message.get("train") is not False


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


def _refuse(row: Row, data_format: str, read: _Read) -> None:
    """Raises DroppedRow for rows with more than text in them, and for answers that someone rejected (KTO)."""
    for column in MEDIA:
        if row.values.get(column):
            raise DroppedRow(f"{column.removesuffix('s')} content")
    for column in ("kto_tag", "label") if data_format != "alpaca" else ("kto_tag",):
        value = row.values.get(column)
        text = value.strip().lower() if isinstance(value, str) else value  # csv cells are texts
        if text is False or text == "false" or (column == "kto_tag" and text in (0, "0")):
            raise DroppedRow(f"{column} is false: a rejected answer")
        if column == "label" and text in (0, "0"):
            read.notes.append("the column 'label' is 0, and read as a class: write false for a rejected answer")


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
            f"{join_names(row.values) or 'none'}."
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
