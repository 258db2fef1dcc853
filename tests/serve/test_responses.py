"""/v1/responses with a real engine thread."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from asking import Asker, served, served_chat
from handspun.serve.chat import chat_completions
from handspun.serve.responses import as_chat, responses
from handspun.serve.schemas import ChatRequest, ResponsesRequest, read

_TOOL = {"type": "function", "name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Shanghai"]}}, "required": ["city"],
    "additionalProperties": False}}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Asker]:
    with served(served_chat()) as asker:
        yield asker


def _ask(server: Asker, **body: Any) -> dict[str, Any]:
    return server.ask(
        responses, ResponsesRequest, **{"input": "Tell me", "max_output_tokens": 8, "seed": 5, **body}
    )


def _stream(server: Asker, **body: Any) -> list[dict[str, Any]]:
    given = {"input": "Tell me", "max_output_tokens": 8, "seed": 5, **body}
    return server.stream(responses, ResponsesRequest, **given)


def test_the_answer_is_that_of_a_chat(server: Asker) -> None:
    chat = {"messages": [{"role": "user", "content": "Tell me"}], "max_tokens": 8, "seed": 5}
    expected = server.ask(chat_completions, ChatRequest, **chat)
    response = _ask(server)
    [message] = response["output"]
    assert (response["object"], response["id"], message["role"]) == ("response", "resp_test", "assistant")
    assert message["content"][0]["text"] == expected["choices"][0]["message"]["content"]
    assert response["usage"]["total_tokens"] == expected["usage"]["total_tokens"]
    is_cut = expected["choices"][0]["finish_reason"] == "length"
    assert response["status"] == ("incomplete" if is_cut else "completed")
    assert response["incomplete_details"] == ({"reason": "max_output_tokens"} if is_cut else None)


@pytest.mark.parametrize(
    "body",
    [{}, {"include": ["message.output_text.logprobs"], "top_logprobs": 2}, {"tools": [_TOOL]},
     {"tools": [_TOOL], "tool_choice": "required", "max_output_tokens": 150}],
    ids=str,
)  # fmt: skip
def test_a_stream_adds_up_to_the_response(server: Asker, body: dict[str, Any]) -> None:
    whole, events = _ask(server, **body), _stream(server, **body)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["output"] == []
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    streamed = events[-1]["response"]
    volatile = {"created_at": 0, "usage": 0}
    assert {**streamed, **volatile} == {**whole, **volatile}
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == whole["output"]
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == "".join(item["content"][0]["text"] for item in whole["output"] if item["type"] == "message")


def test_a_required_call_is_an_item(server: Asker) -> None:
    body = {"tools": [_TOOL], "tool_choice": {"type": "function", "name": "weather"}, "max_output_tokens": 200}
    output = _ask(server, **body, text={"format": {"type": "text"}})["output"]
    assert [item["type"] for item in output] == ["function_call"]
    assert output[0]["name"] == "weather"
    assert json.loads(output[0]["arguments"]) == {"city": "Shanghai"}


def test_a_schema_is_held_to(server: Asker) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    response = _ask(
        server, text={"format": {"type": "json_schema", "name": "x", "schema": schema}}, max_output_tokens=60
    )
    assert json.loads(response["output"][0]["content"][0]["text"]) == {"a": 1}


def test_items_are_messages() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "message", "id": "m", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "id": "f", "call_id": "c", "name": "weather", "arguments": "{}",
         "status": "completed"},
        {"type": "function_call_output", "call_id": "c", "output": "Rain"},
    ]  # fmt: skip
    chat = as_chat(read(ResponsesRequest, {"input": items, "instructions": "Speak English."}))
    assert [message.role for message in chat.messages] == ["developer", "user", "assistant", "tool"]
    assert chat.messages[0].content == "Speak English.\n\nBe brief."
    assert chat.messages[2].tool_calls is not None
    assert chat.messages[2].tool_calls[0].function.name == "weather"
    assert (chat.messages[3].name, chat.messages[3].tool_call_id, chat.messages[3].content) == (
        "weather",
        "c",
        "Rain",
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "arguments": "{}"}]}, "input[0].name"),
        ({"input": "a " * 2000}, "input"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_is_refused(server: Asker, body: dict[str, Any], param: str) -> None:
    error = server.refused(responses, ResponsesRequest, **{"input": "Hi", **body})
    assert (error.status, error.param) == (400, param)
    assert "messages" not in error.message
