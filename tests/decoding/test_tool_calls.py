"""Calls in an answer's text."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handspun.decoding.tool_calls import parse_tool_calls


def _call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_calls_leave_the_content() -> None:
    text = (
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "上海"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    )
    assert parse_tool_calls(text) == ("Let me see.", [_call("weather", {"city": "上海"}), _call("time", {})])


def test_text_without_calls_stays_as_it_is() -> None:
    assert parse_tool_calls("  No call here.\n") == ("  No call here.\n", [])


@pytest.mark.parametrize(
    "block",
    [
        "<tool_call>\n{not json}\n</tool_call>",
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": "no json"}\n</tool_call>',
        '<tool_call>\n["f"]\n</tool_call>',
        '<tool_call>\n{"name": "f"} and more\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {}}\n',
        "<tool_call>" + "[" * 100_000,
    ],
)
def test_malformed_calls_stay_in_the_text(block: str) -> None:
    good = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    assert parse_tool_calls(block) == (block, [])
    assert parse_tool_calls(good + block) == (block.strip(), [_call("g", {})])


def test_arguments_that_are_json_in_a_string_are_read() -> None:
    text = '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>'
    assert parse_tool_calls(text) == ("", [_call("f", {"a": 1})])


def test_a_closing_tag_inside_an_argument_does_not_close() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "</tool_call><tool_call>"}}</tool_call>'
    assert parse_tool_calls(text) == ("", [_call("f", {"a": "</tool_call><tool_call>"})])


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.text(min_size=1), st.dictionaries(st.text(), _JSON, max_size=3))
def test_whatever_is_called_comes_back(name: str, arguments: Any) -> None:
    written = json.dumps({"name": name, "arguments": arguments})
    assert parse_tool_calls(f"<tool_call>\n{written}\n</tool_call>") == ("", [_call(name, arguments)])
