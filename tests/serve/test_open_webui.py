"""The requests that Open WebUI makes, as its source has them: models, chats, and what follows an answer."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from handspun.config.serving import ServeOptions
from live import CHAT, HI, Live, live, live_chat
from serving import ask, longest_gap, wait_until

HEADERS = (
    ("Authorization", "Bearer none"),
    ("X-OpenWebUI-User-Name", "Ada%20Lovelace"),
    ("X-OpenWebUI-User-Id", "5b1"),
    ("X-OpenWebUI-User-Role", "admin"),
)
TASK = '### Task:\nGenerate a concise, 3-5 word title with an emoji.\n### Output:\nJSON format: { "title": "" }\n'
FOLLOWING: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": TASK * 3}], "stream": False, "max_completion_tokens": 1000},
    {"messages": [{"role": "user", "content": f"{TASK * 3} Generate 1-3 broad tags."}], "stream": False},
    {"messages": [{"role": "user", "content": f"{TASK * 3} Suggest 3-5 follow-up questions."}], "stream": False},
]  # fmt: skip
"""After an answer: a title, tags, follow-up questions."""
TOOL = {
    "type": "function",
    "function": {
        "name": "search_web",
        "description": "Search the web.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    options = ServeOptions(log_requests=False, max_tokens=600)
    with live(live_chat(), options, names=("tuned", "base")) as server:
        yield server


def test_the_models_are_found(server: Live) -> None:
    found = ask(server.port, "/v1/models", None, *HEADERS).json()
    assert [(model["id"], model["owned_by"]) for model in found["data"]] == [
        ("tuned", "handspun"),
        ("base", "handspun"),
    ]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"stream_options": {"include_usage": True}, "user": "chat-1"},
        {"temperature": 0.8, "top_p": 0.9, "min_p": 0.05, "max_tokens": 9, "frequency_penalty": 0.1,
         "presence_penalty": 0.1, "reasoning_effort": "low", "seed": 7, "stop": ["\n\n"],
         "logit_bias": {"65": 5}},
        {"tools": [TOOL]},
        {"response_format": {"type": "json_object"}, "max_tokens": 20},
    ],
    ids=str,
)  # fmt: skip
def test_a_chat_is_streamed(server: Live, params: dict[str, Any]) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        *HI,
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": [{"type": "text", "text": "And you?"}]},
    ]
    events = server.events(CHAT, model="tuned", messages=messages, **{"max_tokens": 8, **params})
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert deltas[0]["role"] == "assistant"
    assert any(delta.get("content") or delta.get("tool_calls") for delta in deltas)
    if "stream_options" in params:
        assert events[-1]["usage"]["total_tokens"] > 8


def test_what_follows_an_answer_leaves_running_streams_their_pace(server: Live) -> None:
    """It is asked without a limit on its tokens, as soon as an answer has ended, while others are answered."""
    body = {"model": "tuned", "messages": HI, "stream": True, "max_tokens": 600, "min_tokens": 600, "seed": 1}
    with server.begin(CHAT, **body) as stream, ThreadPoolExecutor(3) as pool:
        stream.read_until(b"\r\n\r\n")
        asked = [pool.submit(answer, server, following) for following in FOLLOWING]
        gap = longest_gap(stream)
        assert all(future.result()["choices"][0]["message"]["content"] for future in asked)
    assert gap < 0.5
    wait_until(server.is_idle)


def answer(server: Live, body: dict[str, Any]) -> Any:
    reply = ask(server.port, CHAT, {"model": "tuned", **body}, *HEADERS)
    assert reply.status == 200, reply.body
    return reply.json()
