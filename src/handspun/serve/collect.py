"""POST /collect: append a conversation to the file that --collect names, as a row to train on."""

import asyncio
import errno
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

from handspun.data.conversations import to_conversation
from handspun.data.formats import recognize_format
from handspun.data.json_shapes import MOST_LEVELS, exceeds_depth
from handspun.data.rows import DroppedRow, Row
from handspun.errors import ConfigError, DataError, OutputError
from handspun.files import output_errors, sync
from handspun.serve.chat import as_message, check_conversation
from handspun.serve.errors import ApiError
from handspun.serve.schemas import RowRequest
from handspun.serve.served import Context
from handspun.serve.translate import refuse

logger = logging.getLogger("handspun")

_FORMAT = "messages"
_FIRST_BYTES = 2**24
"""Longest first row of a file that was there before."""
_appending = threading.Lock()


async def collect(context: Context, body: RowRequest) -> dict[str, Any]:
    """Append a row to the server's file. It is on the disk when this returns. Raises ApiError."""
    if context.limits.collect is None:
        raise ApiError(
            "this server collects no rows. Start it with --collect rows.jsonl.",
            "not_found_error",
            code="not_collecting",
        )
    check_conversation(body.messages, body.tools)
    row = row_of(body)
    check_row(row)
    line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        await asyncio.to_thread(append_line, Path(context.limits.collect), line.encode())
    except OSError as error:
        logger.error(f"{context.request_id}: --collect {context.limits.collect}: {error.strerror}")
        raise ApiError(
            f"the row was not saved: {error.strerror}. Fix the server's file, and send it again.",
            "server_error",
            code="row_not_saved",
        ) from error
    return {"object": "row", "bytes": len(line.encode())}


def row_of(body: RowRequest) -> dict[str, Any]:
    """Return the row of the format `messages` that a body holds."""
    messages = [
        as_message(message) if message.weight is None else {**as_message(message), "weight": message.weight}
        for message in body.messages
    ]
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def check_row(row: dict[str, Any]) -> None:
    """Raise ApiError unless training reads all of the row, and learns its last message."""
    if exceeds_depth(row):
        raise refuse("messages", f"the row is nested more than {MOST_LEVELS} levels deep. Make it flatter.")
    try:
        conversation = to_conversation(Row("the row", 1, row), _FORMAT, system_prompt=None)
    except (DroppedRow, DataError) as error:
        raise refuse("messages", f"training would drop the row: {error}. Fix it.") from error
    if len(conversation.messages) < len(row["messages"]):
        raise refuse(
            "messages",
            f"training would read {len(conversation.messages)} of {len(row['messages'])} messages (expected an "
            "answer with a text or calls, and without weight 0, as the last one). Leave out what follows it.",
        )


def append_line(path: Path, line: bytes) -> None:
    """Append a line whole and flush it to the disk. Raises OSError, and the file is then as it was.

    One system call writes it at the end, so that rows of several writers do not mix.
    """
    with _appending:
        is_new = not path.exists()
        with path.open("ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            line = _separator(file, size) + line
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
        if is_new:
            sync(path.parent)


def _separator(file: Any, size: int) -> bytes:
    """Return the line end that a file lacks, if someone edited it: a row would else be joined to the last one."""
    if size == 0:
        return b""
    file.seek(-1, os.SEEK_END)
    return b"" if file.read(1) == b"\n" else b"\n"


def check_collect_file(path: Path) -> None:
    """Create the file if there is none. Raises OutputError, or ConfigError if its rows have another format."""
    with output_errors(path, option="--collect"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is no regular file. Choose another --collect.")
        with path.open("ab+") as file:
            file.seek(0)
            first = file.readline(_FIRST_BYTES).strip()
    if first and not _is_row(first):
        raise ConfigError(
            f"--collect {path}: its first line is no row of the format messages (expected "
            '{"messages": [...]}). Choose another file, since a file has one format.'
        )


def _is_row(line: bytes) -> bool:
    try:
        row = json.loads(line.decode("utf-8"))
        return isinstance(row, dict) and recognize_format(row, "") == _FORMAT
    except (ValueError, RecursionError, DataError):
        return False
