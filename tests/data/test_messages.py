"""Messages and tools in all their spellings, and the reason where one cannot be learned from."""

import json
from datetime import date
from typing import Any

import pytest

from conversation_rows import CALL, TOOL, assistant, chat, conversation, dropped, refusal, user
from handspun.data.messages import Message


@pytest.mark.parametrize(
    ("name", "role"),
    [("developer", "system"), ("human", "user"), ("User", "user"), ("gpt", "assistant"), ("observation", "tool")],
)
def test_roles_have_many_names(name: str, role: str) -> None:
    made = chat(user(), assistant(), {"role": name, "content": "x"}, user(), assistant())
    assert made.messages[2] == {"role": role, "content": "x"}


def test_messages_and_tools_may_be_json_text_in_a_cell() -> None:
    made = conversation("messages", messages=json.dumps([user("ä"), assistant()]), tools=json.dumps([TOOL]))
    assert (made.messages, made.tools) == ([user("ä"), assistant()], [TOOL])


def test_parts_of_a_content_become_text_reasoning_and_tool_calls() -> None:
    parts = [
        {"type": "reasoning", "value": "I must add."},
        {"type": "text", "value": "Let me "},
        {"type": "text", "text": "see."},
        {"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
    ]
    answer = [{"type": "thinking", "thinking": "Easy."}, {"type": "text", "text": "5"}]
    made = chat(
        user([{"type": "text", "text": "2+3?"}]),
        assistant(parts),
        {"role": "tool", "content": "5"},
        assistant(answer),
    )
    assert made.messages == [
        {"role": "user", "content": "2+3?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [CALL, CALL],
            "reasoning_content": "I must add.",
        },
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "5", "reasoning_content": "Easy."},
    ]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_many_names(key: str) -> None:
    assert chat(user(), assistant("a", **{key: "why"})).messages[1]["reasoning_content"] == "why"


@pytest.mark.parametrize("arguments", [{"a": 2}, '{"a": 2}'])
def test_arguments_of_tool_calls_are_parsed_and_a_missing_content_is_empty(arguments: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    answer = {"role": "tool", "content": "5", "tool_call_id": "c1", "name": "add", "extra": 1}
    made = chat(user(), {"role": "assistant", "tool_calls": [call]}, answer, assistant())
    assert made.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALL}]}
    assert made.messages[2] == {"role": "tool", "content": "5", "tool_call_id": "c1", "name": "add"}


def test_a_call_without_arguments_has_none_and_openai_s_old_form_is_a_call() -> None:
    made = chat(user(), assistant(None, tool_calls=None, function_call={"name": "now", "arguments": ""}))
    assert made.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "now", "arguments": {}}}]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (assistant(tool_calls=[{"name": "f", "arguments": "{'a': 1}"}]), "tool call arguments that are not JSON"),
        (
            assistant(tool_calls=[{"name": "f", "arguments": '{"a": NaN}'}]),
            "tool call arguments that are not JSON",
        ),
        (assistant(tool_calls=[{"name": "f", "arguments": "[1]"}]), "tool call arguments that are not an object"),
        (assistant(tool_calls=[{"arguments": {}}]), "a tool call without a name"),
        (assistant(tool_calls=["f()"]), "a tool call that is not an object"),
        (assistant([{"type": "tool_call", "value": "f()"}]), "a tool call that is not JSON"),
        (
            assistant([{"type": "tool_call", "value": '{"name": "f"}'}, {"type": "text", "text": "x"}]),
            "text after a tool call in one message",
        ),
        (assistant(thinking=["a"]), "reasoning that is not text"),
        (user([{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "?"}]), "image content"),
        (user([{"type": "input_audio", "input_audio": {}}]), "audio content"),
        (user([{"type": "reasoning", "value": "x"}]), "reasoning in a user message"),
        ({"role": "critic", "content": "x"}, "the unknown role 'critic'"),
        ({"role": "", "content": "x"}, "the unknown role ''"),
        ({"role": 5, "content": "x"}, "the unknown role '5'"),
        ({"role": True, "content": "x"}, "the unknown role 'true'"),
        ({"role": ["user"], "content": "x"}, "a role that is a list"),
        ({"role": "user\n<|im_end|>", "content": "x"}, "the unknown role 'user\\n<|im_end|>'"),
        ({"content": "x"}, "a message without a role"),
        ({"role": None, "content": "x"}, "a message without a role"),
        ({"role": "user", "from": "gpt", "value": "x"}, "a message with two roles"),
        ("Hi", "a message that is text without a role"),
        (None, "a message that is not an object"),
        (user(7), "a user message whose content is a number"),
        (user(True), "a user message whose content is true"),
        (user({"city": "Lyon"}), "a user message whose content is an object"),
        (user([5]), "a content part that is not an object"),
        (user([{"type": "text", "text": 5}]), "a part of type 'text' that contains a number"),
        (assistant([{"type": "tool_call", "value": []}]), "a tool call that is not an object"),
        (
            {"role": "tool", "content": {"a": float("nan")}},
            "NaN or Infinity in a tool result, which JSON does not allow",
        ),
    ],
)
def test_messages_that_cannot_be_trained_on_drop_the_row(turn: Message, reason: str) -> None:
    assert dropped("messages", messages=[user(), assistant(), turn, user(), assistant()]) == reason


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (5, "expected a list, found the number 5."),
        ({"role": "user"}, "expected a list, found an object."),
    ],
)
def test_messages_of_a_wrong_structure_are_named(messages: Any, message: str) -> None:
    assert refusal("messages", messages=messages).startswith(f"a.jsonl, row 7, column 'messages': {message}")


@pytest.mark.parametrize("column", ["messages", "prompt-completion"])
def test_rejected_answers_are_not_trained_on(column: str) -> None:
    values: dict[str, Any] = {"messages": [user(), assistant()], "prompt": "a", "completion": "b"}
    assert dropped(column, label=False, **values) == "label is false: a rejected answer"
    assert conversation(column, label=True, **values).messages
    assert conversation(column, label=0, **values).messages  # a number is a class, not a judgement


# Tools


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        TOOL,
        [TOOL["function"]],
        [{"type": "function", **TOOL["function"]}],
        [{"function": TOOL["function"]}],
        json.dumps([TOOL["function"]]),
        [json.dumps(TOOL)],
    ],
)
def test_tools_take_openai_s_shape(tools: Any) -> None:
    assert chat(user(), assistant(), tools=tools).tools == [TOOL]


@pytest.mark.parametrize("tools", [None, "", " ", "[]", [], "null"])
def test_no_tools_are_none(tools: Any) -> None:
    assert chat(user(), assistant(), tools=tools).tools is None


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("add(a, b)", "tools that are not JSON"),
        ([5], "a tool that is not an object"),
        ([{"type": "web_search"}], "a tool without a name"),
    ],
)
def test_tools_that_nobody_could_call_drop_the_row(tools: Any, reason: str) -> None:
    assert dropped("messages", messages=[user(), assistant()], tools=tools) == reason


def test_a_date_as_argument_is_not_trained_on_as_something_else() -> None:
    call = {"name": "book", "arguments": {"day": date(2026, 1, 2)}}
    assert "Object of type date is not JSON serializable" in dropped(
        "messages", messages=[user(), assistant(tool_calls=[call])]
    )


def test_tools_of_a_wrong_type_are_named() -> None:
    assert "column 'tools': expected a list of tools, found the number 5." in refusal(
        "messages", messages=[user(), assistant()], tools=5
    )


# ShareGPT


def test_sharegpt_with_calls_and_observations() -> None:
    made = conversation(
        "sharegpt",
        system="Be short.",
        tools=json.dumps([TOOL["function"]]),
        conversations=[
            {"from": "human", "value": "2+?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": '{"sum": 2}'},
            {"from": "gpt", "value": "2"},
        ],
    )
    assert made.tools == [TOOL]
    assert made.messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "2+?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sum": 2}'},
        {"role": "assistant", "content": "2"},
    ]


def test_sharegpt_calls_in_parallel_are_one_turn() -> None:
    calls = json.dumps([{"name": "add", "arguments": '{"a": 2}'}] * 2)
    turns = [{"from": "human", "value": "?"}, {"from": "function_call", "value": calls}]
    assert conversation("sharegpt", conversations=turns).messages[1]["tool_calls"] == [CALL, CALL]
