"""Tool calls of an answer that is still being written, as OpenAI's deltas.

Fed with an answer's text in any pieces, the deltas add up to what `parse_tool_calls` returns for the whole text. A
call is told when its block is complete: until then the model may still write something that is no call.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from handspun.decoding.tool_calls import CLOSING_TAG, OPENING_TAG, Block, read_block


@dataclass
class ToolDeltas:
    """Content and calls of one answer. answer_id: part of the calls' ids, which are different in every answer."""

    answer_id: str
    calls: list[dict[str, Any]] = field(default_factory=list)
    """The complete calls so far, as an assistant's message has them."""
    _held: str = ""
    """Text that may belong to a block."""
    _space: str = ""
    """White space at the end of the content, which is left out if nothing but calls follows."""
    _looked_at: int = 0
    """Length of the held text when its block was last looked at."""

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Add text. Return the new content and the new calls."""
        self._held += text
        return self._read(is_finished=False)

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """Return the rest of the content and of the calls, after the last text."""
        content, calls = self._read(is_finished=True)
        return content + ("" if self.calls else self._space), calls

    def _read(self, *, is_finished: bool) -> tuple[str, list[dict[str, Any]]]:
        content, before = "", len(self.calls)
        while self._held:
            start = self._held.find(OPENING_TAG)
            if start < 0:
                start = len(self._held) - (0 if is_finished else _partial_tag(self._held))
                content += self._shown(self._take(start))
                break
            content += self._shown(self._take(start))
            if not is_finished and CLOSING_TAG not in self._held[self._looked_at :]:
                self._looked_at = max(0, len(self._held) - len(CLOSING_TAG))
                break
            block = read_block(self._held, 0)
            if isinstance(block, Block):
                self.calls.append(_with_id(block.call, f"{self.answer_id}/{len(self.calls)}"))
                self._take(block.end)
            elif block == "unfinished" and not is_finished:
                self._looked_at = len(self._held)
                break
            else:
                content += self._shown(self._take(len(OPENING_TAG)))
        return content, self.calls[before:]

    def _take(self, count: int) -> str:
        taken, self._held, self._looked_at = self._held[:count], self._held[count:], 0
        return taken

    def _shown(self, text: str) -> str:
        """Return content without the white space at its end, which is kept for later."""
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        return shown


def delta_of(call: dict[str, Any], index: int) -> dict[str, Any]:
    """Return a call as a member of a delta's tool_calls. index: its number in the answer."""
    return {"index": index, **call}


def _partial_tag(text: str) -> int:
    """Return the length of the longest end of a text that an opening tag begins with."""
    longest = min(len(text), len(OPENING_TAG) - 1)
    return next((n for n in range(longest, 0, -1) if OPENING_TAG.startswith(text[-n:])), 0)


def _with_id(call: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the call in OpenAI's form: with an id, and its arguments as JSON text."""
    function = call["function"]
    return {
        "id": f"call_{hashlib.sha256(name.encode()).hexdigest()[:24]}",
        "type": "function",
        "function": {
            "name": _encodable(function["name"]),
            "arguments": _json_text(function["arguments"]),
        },
    }


def _json_text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # A model can write half of a surrogate pair as an escape, which only an escape can hold.
    return text if _encodable(text) == text else json.dumps(value)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
