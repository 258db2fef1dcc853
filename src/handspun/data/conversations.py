"""Turn a row of any supported format into a conversation."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

from handspun.data.formats import MEDIA, NEEDED, TEXT, used_columns
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
"""Limit per conversation. A template renders a conversation once for each of its answers."""


@dataclass(frozen=True)
class Conversation:
    """Messages in order, the tools (JSON schemas) that they may call, and the row they came from.

    notes: what was changed in the row or is unusual about it, for the data report.
    unread_keys: keys of its messages that are ignored.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    file: str
    row: int
    notes: tuple[str, ...] = ()
    unread_keys: tuple[str, ...] = ()


@dataclass
class _Read:
    """What has been read from a row so far. context: why some of its turns are not trained on."""

    role_map: Mapping[str, str]
    context: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unread_keys: dict[str, None] = field(default_factory=dict)

    def messages(self, value: Any, cell: Cell) -> list[Message]:
        """Return the messages of a cell. Messages that are marked as context have `train` False."""
        turns = read_turns(value, cell, self.role_map)
        try:
            return [plain_message(turn, self.role_map) or self._message(turn) for turn in turns]
        except DroppedRow as reason:
            raise DroppedRow(self._all_unknown_roles(turns) or str(reason)) from None

    def _all_unknown_roles(self, turns: list[dict[str, Any]]) -> str | None:
        """Return a reason that names all unknown roles, so that one role map fixes them; None for fewer."""
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
    """Return the row's conversation, with its texts unchanged. Plain text is one assistant turn without a prompt.

    It ends with an assistant turn that is trained on. Anything after that is cut off, and noted. Raises DroppedRow
    for a row with nothing to train on, and DataError for a row that does not match the format.

    Args:
        row: the row to read.
        data_format: its format.
        system_prompt: added if the conversation has no system message.
        role_map: more names of roles, each with the role that it stands for.
    """
    read = _Read(role_map or {})
    _refuse(row, data_format, read)
    read.notes += row_marks(row.values, _used_columns(data_format))
    if data_format == TEXT:
        check_writable(text := _filled(row, TEXT, data_format))
        return Conversation(
            [{"role": "assistant", "content": text}], None, row.file, row.number, tuple(read.notes)
        )
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
    """Return the messages in the row's own columns."""
    if data_format == "alpaca":
        return _alpaca(row)
    if data_format == "prompt-completion":
        return _prompt_completion(row, read)
    column = NEEDED["messages" if data_format == "messages" else "sharegpt"][0]
    return read.messages(_value(row, column, data_format), _cell(row, column))


def _alpaca(row: Row) -> list[Message]:
    """Return history, then instruction (plus a newline and input, if any) as the user's turn, then output."""
    instruction = _filled(row, "instruction", "alpaca")
    given = _text(row, "input")
    user = instruction if is_blank(given) else f"{instruction}\n{given}"
    return [*_history(row), *_turns(user, _filled(row, "output", "alpaca"))]


def _history(row: Row) -> list[Message]:
    """Return the turns of LLaMA-Factory's list of earlier [user, assistant] pairs."""
    cell = _cell(row, "history")
    messages = []
    for pair in read_json_list(row.values.get("history"), cell):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise cell.expected("pairs of strings, [user, assistant]", pair)
        messages += _turns(*pair)
    return messages


def _prompt_completion(row: Row, read: _Read) -> list[Message]:
    """Return the messages of two texts, or of two lists of messages (TRL's conversational form)."""
    prompt, completion = (
        read.messages(value, _cell(row, column))
        if isinstance(value := _value(row, column, "prompt-completion"), list)
        else [{"role": role, "content": _filled(row, column, "prompt-completion")}]
        for column, role in (("prompt", "user"), ("completion", "assistant"))
    )
    if not completion:
        raise DroppedRow("empty completion")
    if any(message["role"] == "assistant" and is_trained(message) for message in prompt):
        read.notes.append("assistant turns in the prompt are trained on too")
    return prompt + completion


def _turns(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _with_column(messages: list[Message], row: Row) -> list[Message]:
    """Add the system message from the row's column if the conversation has none."""
    own = next((message["content"] for message in messages if message["role"] == "system"), None)
    of_column = _text(row, "system")
    if own is None:
        return messages if is_blank(of_column) else with_system_prompt(messages, of_column)
    if not is_blank(of_column) and of_column != own:
        raise DroppedRow("two system messages, in the column 'system' and in the conversation")
    return messages


def _answered(messages: list[Message], read: _Read) -> list[Message]:
    """Return the messages up to the last assistant turn before any empty turn. Note what was cut off."""
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
        read.notes.append(f"cut off after {_MOST_MESSAGES} messages")
    elif len(answered) < len(messages):
        read.notes.append("cut off after the last assistant turn")
    return answered


def _with_greeting_as_context(messages: list[Message], read: _Read) -> list[Message]:
    """Make an assistant's turn before the first user's turn context."""
    # No prompt asked for such a greeting, and templates disagree on how to prompt for it. A mark on the turn wins
    # if a system message comes before it. A row without any user turn keeps its turns as they are.
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
    """Cut off what follows the last turn that is trained on, and keep marks only on context turns.

    Raises DroppedRow if no turn is trained on.
    """
    trained = [i for i, message in enumerate(messages) if message["role"] == "assistant" and is_trained(message)]
    if not trained:
        raise DroppedRow("; ".join(["no turn to train on", *dict.fromkeys(read.context)]))
    kept = messages[: trained[-1] + 1]
    return [{key: m[key] for key in m if key != "train"} if m.get("train") else m for m in kept]


def is_trained(message: Message) -> bool:
    """Return whether an assistant's message is trained on, rather than being context."""
    return message.get("train") is not False


def _unusual_order(messages: list[Message]) -> str | None:
    """Return a note on turns in an order that no chat has, or None. Such turns are trained on as they are."""
    for before, message in pairwise([{"role": "nobody"}, *messages]):
        role = message["role"]
        if role in ("user", "assistant") and role == before["role"]:
            return f"two {role} turns in a row"
        if role == "system" and before["role"] != "nobody":
            return "a system message after the beginning"
        if role == "tool" and before["role"] != "tool" and not before.get("tool_calls"):
            return "a tool result that no call asked for"
    return None


def _says_nothing(message: Message) -> bool:
    """Return whether a user or assistant turn is empty. Tool results and system messages may be empty."""
    return (
        message["role"] in ("user", "assistant") and is_blank(message["content"]) and not message.get("tool_calls")
    )


def _refuse(row: Row, data_format: str, read: _Read) -> None:
    """Raise DroppedRow for rows that contain more than text, and for rejected answers (KTO)."""
    for column in MEDIA:
        if row.values.get(column):
            raise DroppedRow(f"{column.removesuffix('s')} content")
    for column in ("kto_tag", "label") if data_format not in ("alpaca", TEXT) else ("kto_tag",):
        value = row.values.get(column)
        text = value.strip().lower() if isinstance(value, str) else value  # csv cells are strings
        if text is False or text == "false" or (column == "kto_tag" and text in (0, "0")):
            raise DroppedRow(f"{column} is false: a rejected answer")
        if column == "label" and text in (0, "0"):
            read.notes.append("the column 'label' is 0, and read as a class: write false for a rejected answer")


def check_writable(value: Any) -> None:
    """Raise DroppedRow for values that no template can write: half of a surrogate pair, a date as an argument."""
    try:
        _JSON.encode(value).encode()
    except UnicodeEncodeError:
        raise DroppedRow("broken Unicode (a lone surrogate)") from None
    except ValueError:
        raise DroppedRow("NaN or Infinity in a tool or its arguments, which JSON does not allow") from None
    except TypeError as error:
        raise DroppedRow(f"a value in a tool or its arguments that JSON cannot represent ({error})") from None


def _cell(row: Row, column: str) -> Cell:
    return Cell(row.file, row.number, column)


def _value(row: Row, column: str, data_format: str) -> Any:
    if column not in row.values:
        needed = next((columns for name, columns in NEEDED.items() if name == data_format), (TEXT,))
        raise _cell(row, column).error(
            f"this row does not have the column. {data_format} needs {' and '.join(needed)}; the row has "
            f"{join_names(row.values) or 'none'}."
        )
    return row.values[column]


def _text(row: Row, column: str) -> str:
    """Return the text of a column, empty if the column is missing or null."""
    value = row.values.get(column)
    if value is not None and not isinstance(value, str):
        raise _cell(row, column).expected("a string", value)
    return value or ""


def _filled(row: Row, column: str, data_format: str) -> str:
    """Return the text of a required column. Raises DroppedRow if it is blank."""
    _value(row, column, data_format)
    text = _text(row, column)
    if is_blank(text):
        raise DroppedRow(f"empty {column}")
    return text
