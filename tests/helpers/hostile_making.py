"""How hostile inputs are made, and what is said of each."""

import io
import json
import os
import socket
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

GOOD = "instruction,output\nSay hi.,Hi.\n"
MANY, WIDE = 1_000_000, 300_000
LARGE = 100 * 2**20
"""Characters of a cell."""


@dataclass(frozen=True)
class Case:
    """An input, and its outcome: an error that begins with `error`, or the account of every row.

    make: writes it into the working folder, and gives the name for --data.
    dropped, noted: row -> the reason, as far as it matters.
    """

    name: str
    make: Callable[[], str]
    error: str = ""
    kept: int = 0
    dropped: Mapping[int, str] = field(default_factory=dict)
    noted: Mapping[int, str] = field(default_factory=dict)
    truncated: tuple[int, ...] = ()

    @property
    def outcome(self) -> str:
        """For the table."""
        if self.error:
            return f"error: `{self.error} …`"
        parts = [f"{self.kept} kept"]
        parts += [f"row {row} dropped: {reason}" for row, reason in self.dropped.items()]
        parts += [f"row {row} noted: {reason}" for row, reason in self.noted.items()]
        parts += [f"row {row} truncated" for row in self.truncated]
        return "; ".join(parts)


def file(name: str, content: str | bytes) -> Callable[[], str]:
    """Writes a file."""

    def make() -> str:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return name

    return make


def csv(*lines: str, header: str = "instruction,output") -> Callable[[], str]:
    return file("train.csv", "\n".join([header, *lines]) + "\n")


def jsonl(*rows: Any) -> Callable[[], str]:
    return file("train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def pair(instruction: Any = "Say hi.", output: Any = "Hi.", **more: Any) -> dict[str, Any]:
    return {"instruction": instruction, "output": output, **more}


def chats(*conversations: Any, **more: Any) -> Callable[[], str]:
    return jsonl(*({"messages": messages, **more} for messages in conversations))


def turns(roles: str, **contents: Any) -> list[dict[str, Any]]:
    """Messages by the first letters of their roles; contents by their places: _0, _1 ..."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool", "x": "critic"}
    return [{"role": names[role], "content": contents.get(f"_{i}", f"text {i}")} for i, role in enumerate(roles)]


def parquet(table: Any, name: str = "train.parquet") -> Callable[[], str]:
    def make() -> str:
        pq.write_table(table(), name)
        return name

    return make


def made(*steps: Callable[[], Any], name: str) -> Callable[[], str]:
    """Several steps; what they give is left aside."""

    def make() -> str:
        for step in steps:
            step()
        return name

    return make


def link(name: str, target: str) -> Callable[[], None]:
    def make() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(target, name)

    return make


def fifo(name: str) -> Callable[[], None]:
    def make() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(name)

    return make


def listening_socket() -> str:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("train.csv")
    return "train.csv"


def half_a_parquet_file() -> str:
    pq.write_table(pa.table({"instruction": ["a"] * 1000, "output": ["b"] * 1000}), "train.parquet")
    whole = Path("train.parquet").read_bytes()
    return file("train.parquet", whole[: len(whole) // 2])()


def not_utf8() -> Any:
    texts = pa.array([b"fine", b"caf\xe9"]).cast(pa.binary()).view(pa.string())
    return pa.table({"instruction": ["a", "b"], "output": texts})


def far_future() -> Any:
    days = pa.array([0, 2**40], pa.int64()).cast(pa.timestamp("s"))
    return pa.table({"instruction": ["a", "b"], "output": ["c", "d"], "day": days})


def nested_nulls() -> Any:
    message = pa.struct({"role": pa.string(), "content": pa.string(), "name": pa.string()})
    whole = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": None}]
    return pa.table({"messages": pa.array([whole, whole], pa.list_(message)), "tools": pa.nulls(2)})


def null_messages() -> Any:
    message = pa.struct({"role": pa.string(), "content": pa.string()})
    whole = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return pa.table({"messages": pa.array([whole, [None, *whole]], pa.list_(message))})


def columns(cells: str = "", names: str = "") -> Callable[[], str]:
    header = ",".join(map(str, range(WIDE)))
    return lambda: csv("," * (WIDE - 1 + bool(names)) + cells, header=header + names)()


def hole_of_a_terabyte() -> str:
    with Path("train.csv").open("wb") as hole:
        hole.truncate(2**40)
    return "train.csv"


def zipped() -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("train.csv", GOOD)
    return archive.getvalue()


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def deep_text(levels: int) -> str:
    return "[" * levels + "]" * levels


def called(arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return [turns("u")[0], {"role": "assistant", "content": "", "tool_calls": [call]}]


def marked(**marks: Any) -> list[dict[str, Any]]:
    user, assistant = turns("ua")
    return [user, {**assistant, **marks}]
