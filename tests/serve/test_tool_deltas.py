"""Tool calls in pieces of text."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handspun.decoding.tool_calls import parse_tool_calls
from handspun.serve.tool_deltas import ToolDeltas

_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "上海"}}\n</tool_call>'


def _rebuilt(pieces: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """Return (content, calls) as a client puts the deltas together."""
    deltas = ToolDeltas("a")
    content, calls = "", []
    for new, added in [*(deltas.push(piece) for piece in pieces), deltas.finish()]:
        content += new
        calls += added
    return content, [_read(call) for call in calls]


def _read(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {
        "type": call["type"],
        "function": {"name": function["name"], "arguments": json.loads(function["arguments"])},
    }


def test_a_call_is_told_once_it_is_complete() -> None:
    deltas = ToolDeltas("answer")
    shown = [deltas.push(character) for character in f"Let me see.\n{_CALL}"]
    assert "".join(content for content, _ in shown) == "Let me see."
    [call] = [call for _, calls in shown for call in calls]
    assert shown[-1] == ("", [call])
    assert call["function"] == {"name": "weather", "arguments": '{"city": "上海"}'}


def test_two_calls_have_different_ids() -> None:
    deltas = ToolDeltas("answer")
    _, calls = deltas.push(_CALL + _CALL)
    assert len({call["id"] for call in calls}) == 2


def test_content_is_not_held_back_longer_than_a_tag_takes() -> None:
    deltas = ToolDeltas("answer")
    assert deltas.push("a < b") == ("a < b", [])
    assert deltas.push(" <tool") == ("", [])
    assert deltas.push("s> c") == (" <tools> c", [])


_PARTS = st.sampled_from(
    [
        *(_CALL, "<tool_call>", "</tool_call>", "<tool_call>\n{", '{"name": "f"', ', "arguments": {"a": 1}', "}"),
        *('{"name": "f", "arguments": {"t": "</tool_call>"}}', '{"name": "f", "arguments": "{}"}', "x", "[1", "]"),
        *('{"name": "f", "arguments": [1e', "5]}", "tru", "e", "-", "NaN", "\\u12", "\\ud83d", '"', "\\"),
        *("\n", " "),
    ]
)


@given(st.lists(_PARTS, max_size=12), st.data())
def test_any_pieces_add_up_to_the_whole(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=20)) | {0, len(text)})
    pieces = [text[start:end] for start, end in pairwise(cuts)]
    assert _rebuilt(pieces) == parse_tool_calls(text)


@pytest.mark.parametrize(
    "text", ["<tool_call>" * 3_000, '<tool_call>{"a": ' * 3_000, "<tool_call>" + "[" * 30_000]
)
def test_openings_without_an_end_are_text(text: str) -> None:
    assert _rebuilt([text[i : i + 5] for i in range(0, len(text), 5)]) == (text, [])


def test_half_of_a_surrogate_pair_can_be_sent() -> None:
    deltas = ToolDeltas("answer")
    _, [call] = deltas.push('<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>')
    assert call["function"]["arguments"] == '{"a": "\\ud83d"}'
