"""What is told about a body that is wrong."""

from typing import Any

import pytest

from handspun.serve import schemas
from handspun.serve.errors import ApiError

_HI = [{"role": "user", "content": "Hi"}]


def _refusal(model: type[Any], body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        schemas.read(model, body)
    assert caught.value.status == 400
    return caught.value


def test_read_returns_the_body() -> None:
    body = schemas.read(schemas.ChatRequest, {"messages": _HI, "max_tokens": 8.0, "user": "me", "stop": "x"})
    assert (body.max_tokens, body.messages[0].content, body.stop, body.temperature) == (8, "Hi", "x", None)


@pytest.mark.parametrize(
    ("fields", "param", "code", "message"),
    [
        ({"temprature": 1}, "temprature", "unknown_parameter", "Did you mean temperature?"),
        ({"temperature": 3}, "temperature", "invalid_value", "less than or equal to 2, got 3"),
        ({"temperature": "hot"}, "temperature", "invalid_value", "expected a valid number"),
        ({"top_p": 0}, "top_p", "invalid_value", "greater than 0, got 0"),
        ({"n": 0}, "n", "invalid_value", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value", "a valid integer, got 1.5"),
        ({"max_tokens": True}, "max_tokens", "invalid_value", "a valid integer"),
        ({"seed": 2**63}, "seed", "invalid_value", "less than"),
        ({"stop": 5}, "stop", "invalid_value", "a valid string or a valid list, got 5"),
        ({"stop": ["a", 5]}, "stop[1]", "invalid_value", "a valid string, got 5"),
        ({"logprobs": 0}, "logprobs", "invalid_value", "a valid boolean"),
        ({"tools": []}, "tools", "invalid_value", "at least 1"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value", "'json_schema'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema", "missing_required_parameter", "is missing",
        ),
        ({"chat_template": "{{ x }}"}, "chat_template", "unsupported_parameter", "never used"),
        ({"functions": []}, "functions", "unsupported_parameter", "replaced by tools"),
        ({"tool_choice": "maybe"}, "tool_choice", "invalid_value", "'none', 'auto' or 'required'"),
        ({"request_id": "a\nb"}, "request_id", "invalid_value", "pattern"),
    ],
)  # fmt: skip
def test_read_names_the_field(fields: dict[str, Any], param: str, code: str, message: str) -> None:
    error = _refusal(schemas.ChatRequest, {"messages": _HI, **fields})
    assert (error.param, error.code) == (param, code)
    assert message in error.message


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ([None], "messages[0]"),
        (["Hi"], "messages[0]"),
        ([{"content": "Hi"}], "messages[0].role"),
        ([{"role": "wizard", "content": "Hi"}], "messages[0].role"),
        ([*_HI, {"role": "user", "content": 5}], "messages[1].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
         "messages[0].content[0].type"),
        ([{"role": "user", "content": "Hi", "contents": "x"}], "messages[0].contents"),
    ],
)  # fmt: skip
def test_read_names_the_message(messages: Any, param: str) -> None:
    assert _refusal(schemas.ChatRequest, {"messages": messages}).param == param


@pytest.mark.parametrize("body", [None, [], 5, "text", True])
def test_read_refuses_what_is_no_object(body: Any) -> None:
    assert _refusal(schemas.ChatRequest, body).param is None


def test_read_names_every_wrong_field() -> None:
    error = _refusal(schemas.ChatRequest, {"messages": _HI, "temperature": 3, "top_p": 2, "n": 0})
    assert all(name in error.message for name in ("temperature", "top_p", "n:"))


@pytest.mark.parametrize("prompt", ["Hi", ["Hi", "Ho"], [1, 2], [[1, 2], [3]]])
def test_read_takes_every_form_of_a_prompt(prompt: Any) -> None:
    assert schemas.read(schemas.CompletionRequest, {"prompt": prompt}).prompt == prompt


@pytest.mark.parametrize("prompt", [None, 5, [None], [[None]], ["a", 1], [[1], "a"], [-1], {"a": 1}])
def test_read_refuses_other_prompts(prompt: Any) -> None:
    assert str(_refusal(schemas.CompletionRequest, {"prompt": prompt}).param).startswith("prompt")
