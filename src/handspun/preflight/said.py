"""What the user and the assistant say in each row, without the template and system prompts around it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from handspun.config import DataConfig
from handspun.data.conversations import DroppedRow, Message, is_trained, to_conversation
from handspun.data.examples import RowAccount
from handspun.data.rows import Row


@dataclass(frozen=True)
class Said:
    """What a row says. prompts: what users and tools say, and the assistant where it is context only. answers:
    what the assistant says, tool calls as JSON."""

    file: str
    row: int
    prompts: list[str]
    answers: list[str]

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join([*self.prompts, *self.answers])


def said_in(rows: Sequence[Row], account: RowAccount, config: DataConfig) -> Iterator[Said]:
    """That of each row which was kept."""
    dropped = {(note.file, note.row) for note in account.dropped}
    for row in rows:
        if (row.file, row.number) in dropped:
            continue
        try:
            messages = to_conversation(
                row, account.formats[row.file], system_prompt=config.system_prompt, role_map=config.roles
            ).messages
        except DroppedRow:  # with --data that changed since the account was made
            continue
        said = [message for message in messages if message["role"] == "assistant" and is_trained(message)]
        prompts = [m["content"] for m in messages if m["role"] in ("user", "tool") or not is_trained(m)]
        answers = [part for message in said for part in _answered(message)]
        yield Said(row.file, row.number, prompts, answers)


def _answered(message: Message) -> Iterator[str]:
    if message["content"]:
        yield message["content"]
    if message.get("tool_calls"):
        yield json.dumps(message["tool_calls"], ensure_ascii=False)
