"""The data of a conversation behind sentinels, so that a template can be rendered without it.

Every string is replaced by a unique sentinel. In what the template makes of it, each character is then known to be
the template's or the data's.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from handspun.data.messages import Message

# Private-use characters and a quote. The quote tells where the template escaped it: behind `tojson` it
# comes back as \" and the data must be escaped alike.
_OPEN, _CLOSE = "\ue000", "\ue001"
SENTINEL = re.compile(r'(?:\ue000|\\ue000)(\\*)"(\d+)(?:\ue001|\\ue001)')

# Words of JSON Schema that templates branch on (`if param.type == "string"`), so they must stay readable.
_SCHEMA_WORDS = {"string", "number", "integer", "boolean", "object", "array", "null", "function"}


class Placeholder(NamedTuple):
    """A place of hidden data in rendered text: which, and how the template escaped it there."""

    sentinel: str
    number: int
    escapes: int
    """How many times JSON was made of it."""
    ascii: bool
    """Whether JSON escaped what is not ASCII."""


class _Hidden(NamedTuple):
    """One hidden string: its text, whose it is, and what a template that leaves it out has left out."""

    text: str
    owner: str
    what: str


class Placeholders:
    """The data of one conversation, each string behind its sentinel."""

    def __init__(self, markers: re.Pattern[str], any_added: re.Pattern[str]) -> None:
        self.values: list[_Hidden] = []
        self._markers, self._any_added = markers, any_added

    def conversation(
        self, messages: list[Message], tools: list[dict[str, Any]] | None
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """The same conversation with all its data hidden."""
        hidden = [self._message(message) for message in messages]
        return hidden, [self._json(tool, "the tools") for tool in tools] if tools else None

    def _message(self, message: Message) -> Message:
        role = message["role"]
        if role == "assistant":
            pieces = self._markers.split(message.get("content") or "")
            marks = [*self._markers.findall(message.get("content") or ""), ""]
            content = "".join(
                self._hide(piece, "assistant", "an assistant's text") + mark
                for piece, mark in zip(pieces, marks, strict=True)
            )
        else:
            content = self._hide(message.get("content") or "", "data", f"the {role} message")
        hidden: Message = {"role": role, "content": content}
        if message.get("reasoning_content"):
            hidden["reasoning_content"] = self._hide(message["reasoning_content"], "assistant", "the reasoning")
        if message.get("tool_calls"):
            hidden["tool_calls"] = [self._tool_call(call) for call in message["tool_calls"]]
        if message.get("train") is False:
            hidden["train"] = False
        for key in ("name", "tool_call_id"):
            if message.get(key):
                hidden[key] = self._hide(message[key], "data", "a name")
        return hidden

    def _tool_call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        hidden = {
            "name": self._hide(function["name"], "data", "the tool calls"),
            "arguments": self._json(
                json.loads(arguments) if isinstance(arguments, str) else arguments, "arguments"
            ),
        }
        kept = {key: self._json(value, "a tool call's id") for key, value in call.items() if key == "id"}
        return {**kept, "type": "function", "function": hidden}

    def _json(self, value: Any, what: str) -> Any:
        if isinstance(value, str):
            return value if value in _SCHEMA_WORDS else self._hide(value, "data", what)
        if isinstance(value, dict):
            # Templates look keys up by name, so a key is hidden only if it could forge something.
            return {
                self._hide(key, "data", what) if self._could_forge(key) else key: self._json(item, what)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self._json(item, what) for item in value]
        return value

    def _could_forge(self, key: str) -> bool:
        return bool(self._any_added.search(key)) or any(mark in key for mark in (_OPEN, _CLOSE, "\\ue00"))

    def reasoning_left_out(self, rendered: Iterable[str]) -> str | None:
        """What to tell of reasoning that none of the texts shows."""
        shown = {int(match[2]) for text in rendered for match in SENTINEL.finditer(text)}
        lost = [i for i, value in enumerate(self.values) if value.what == "the reasoning" and i not in shown]
        return "the template leaves out the reasoning of an assistant turn" if lost else None

    def _hide(self, text: str, owner: str, what: str) -> str:
        """White space at both ends stays, so that a template that trims its contents trims these."""
        core = text.strip()
        if not core:
            return text
        self.values.append(_Hidden(core, owner, what))
        start = text.index(core)
        return f'{text[:start]}{_OPEN}"{len(self.values) - 1}{_CLOSE}{text[start + len(core) :]}'

    def data_of(self, slot: Placeholder) -> tuple[str, str]:
        """(text as it is rendered, whose it is: "data" or "assistant")."""
        value = self.values[slot.number]
        text = value.text
        for _ in range(slot.escapes):
            text = json.dumps(text, ensure_ascii=slot.ascii)[1:-1]
        return text, value.owner


def cut_at_sentinels(rendered: str) -> Iterator[str | Placeholder]:
    """Rendered text in parts: the template's text, and the places of data."""
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
    """Return where a message's content ends in what was rendered; None if it is not in there."""
    found = list(SENTINEL.finditer(content))
    if not found:  # it is nothing but marks that a template looks for
        core = content.strip()
        place = rendered.rfind(core) if core else -1
        return None if place < 0 else place + len(core)
    ends = [match.end() for match in SENTINEL.finditer(rendered) if match[2] == found[-1][2]]
    if not ends:
        return None
    after = content[found[-1].end() :]  # white space, unless the template has trimmed it, or marks
    return ends[-1] + (len(after) if rendered.startswith(after, ends[-1]) else 0)


def alternatives(texts: Any) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; with no texts, nothing."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")
