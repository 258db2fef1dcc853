"""Hide the data of a conversation behind placeholders, so that a template can be rendered without it.

A unique sentinel replaces every string. In the rendered text, each character is then known to come from the
template or from the data.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from handspun.data.messages import Message

# Private-use characters and a quote. The quote shows where the template escaped the sentinel: after `tojson` it
# comes back as \" and the data must be escaped in the same way.
_OPEN, _CLOSE = "\ue000", "\ue001"
SENTINEL = re.compile(r'(?:\ue000|\\ue000)(\\*)"(\d+)(?:\ue001|\\ue001)')

# Words of JSON Schema that templates branch on (`if param.type == "string"`), so they are not hidden.
_SCHEMA_WORDS = {"string", "number", "integer", "boolean", "object", "array", "null", "function"}


class Placeholder(NamedTuple):
    """An occurrence of hidden data in rendered text: which data, and how the template escaped it there."""

    sentinel: str
    number: int
    escapes: int
    """How many times it was encoded as JSON."""
    ascii: bool
    """True if JSON escaped characters that are not ASCII."""


class _Hidden(NamedTuple):
    """A hidden string: its text, its owner ("data" or "assistant"), and what it is, for errors.

    writer: the role that wrote it; "tool" for tools' definitions.
    """

    text: str
    owner: str
    what: str
    writer: str


class Placeholders:
    """The data of one conversation, each string behind its own sentinel."""

    def __init__(self, markers: re.Pattern[str], any_added: re.Pattern[str]) -> None:
        self.values: list[_Hidden] = []
        self._markers, self._any_added = markers, any_added

    def conversation(
        self, messages: list[Message], tools: list[dict[str, Any]] | None
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """Return the same conversation with all its data hidden."""
        hidden = [self._message(message) for message in messages]
        return hidden, [self._json(tool, "the tools", "tool") for tool in tools] if tools else None

    def _message(self, message: Message) -> Message:
        role = message["role"]
        if role == "assistant":
            pieces = self._markers.split(message.get("content") or "")
            marks = [*self._markers.findall(message.get("content") or ""), ""]
            content = "".join(
                self._hide(piece, "assistant", "an assistant's text", role) + mark
                for piece, mark in zip(pieces, marks, strict=True)
            )
        else:
            content = self._hide(message.get("content") or "", "data", f"the {role} message", role)
        hidden: Message = {"role": role, "content": content}
        if message.get("reasoning_content"):
            hidden["reasoning_content"] = self._hide(
                message["reasoning_content"], "assistant", "the reasoning", role
            )
        if message.get("tool_calls"):
            hidden["tool_calls"] = [self._tool_call(call) for call in message["tool_calls"]]
        if message.get("train") is False:
            hidden["train"] = False
        for key in ("name", "tool_call_id"):
            if message.get(key):
                hidden[key] = self._hide(message[key], "data", "a name", role)
        return hidden

    def _tool_call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        hidden = {
            "name": self._hide(function["name"], "data", "the tool calls", "assistant"),
            "arguments": self._json(
                json.loads(arguments) if isinstance(arguments, str) else arguments, "arguments", "assistant"
            ),
        }
        kept = {
            key: self._json(value, "a tool call's id", "assistant") for key, value in call.items() if key == "id"
        }
        return {**kept, "type": "function", "function": hidden}

    def _json(self, value: Any, what: str, writer: str) -> Any:
        if isinstance(value, str):
            return value if value in _SCHEMA_WORDS else self._hide(value, "data", what, writer)
        if isinstance(value, dict):
            # Templates look up keys by name, so a key is hidden only if it could forge a turn.
            return {
                self._hide(key, "data", what, writer) if self._could_forge(key) else key: self._json(
                    item, what, writer
                )
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self._json(item, what, writer) for item in value]
        return value

    def _could_forge(self, key: str) -> bool:
        return bool(self._any_added.search(key)) or any(mark in key for mark in (_OPEN, _CLOSE, "\\ue00"))

    def reasoning_left_out(self, rendered: Iterable[str]) -> str | None:
        """Return a note if the rendered texts leave out reasoning."""
        shown = {int(match[2]) for text in rendered for match in SENTINEL.finditer(text)}
        lost = [i for i, value in enumerate(self.values) if value.what == "the reasoning" and i not in shown]
        return "the template leaves out the reasoning of an assistant turn" if lost else None

    def _hide(self, text: str, owner: str, what: str, writer: str) -> str:
        """Hide a text but keep white space at both ends, so that templates that trim still trim it."""
        core = text.strip()
        if not core:
            return text
        self.values.append(_Hidden(core, owner, what, writer))
        start = text.index(core)
        return f'{text[:start]}{_OPEN}"{len(self.values) - 1}{_CLOSE}{text[start + len(core) :]}'

    def data_of(self, slot: Placeholder) -> tuple[str, str]:
        """Return (the text as rendered, its owner: "data" or "assistant")."""
        value = self.values[slot.number]
        text = value.text
        for _ in range(slot.escapes):
            text = json.dumps(text, ensure_ascii=slot.ascii)[1:-1]
        return text, value.owner


def cut_at_sentinels(rendered: str) -> Iterator[str | Placeholder]:
    """Split rendered text into the template's text and placeholders."""
    position = 0
    for match in SENTINEL.finditer(rendered):
        if match.start() > position:
            yield rendered[position : match.start()]
        escapes = (len(match[1]) + 1).bit_length() - 1  # 1 backslash: in JSON, 3: in JSON in JSON
        yield Placeholder(match[0], int(match[2]), escapes, ascii=match[0].startswith("\\"))
        position = match.end()
    if position < len(rendered):
        yield rendered[position:]


def end_of_content(rendered: str, content: str) -> int | None:
    """Return where a message's content ends in the rendered text; None if it is not there."""
    found = list(SENTINEL.finditer(content))
    if not found:  # only markers that the template looks for
        core = content.strip()
        position = rendered.rfind(core) if core else -1
        return None if position < 0 else position + len(core)
    ends = [match.end() for match in SENTINEL.finditer(rendered) if match[2] == found[-1][2]]
    if not ends:
        return None
    after = content[found[-1].end() :]  # white space, unless the template trimmed it, or markers
    return ends[-1] + (len(after) if rendered.startswith(after, ends[-1]) else 0)


def alternatives(texts: Any) -> re.Pattern[str]:
    """Return a pattern that matches any of the texts, the longest first. Without texts, it matches nothing."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")
