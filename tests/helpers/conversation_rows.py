"""Rows for the tests of conversations, and what becomes of them."""

from typing import Any

import pytest

from handspun.data.conversations import Conversation, to_conversation
from handspun.data.messages import Message
from handspun.data.rows import DroppedRow, Row
from handspun.errors import DataError

CALL: dict[str, Any] = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
}


def conversation(data_format: str, system_prompt: str | None = None, **values: Any) -> Conversation:
    return to_conversation(Row("a.jsonl", 7, values), data_format, system_prompt=system_prompt)


def chat(*turns: Message, **values: Any) -> Conversation:
    return conversation("messages", messages=list(turns), **values)


def dropped(data_format: str, **values: Any) -> str:
    with pytest.raises(DroppedRow) as caught:
        conversation(data_format, **values)
    return str(caught.value)


def refusal(data_format: str, **values: Any) -> str:
    with pytest.raises(DataError) as caught:
        conversation(data_format, **values)
    return str(caught.value)


def user(content: Any = "Hi") -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any = "Hello", **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}
