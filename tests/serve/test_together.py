"""Requests side by side: answers stay the same, and clients that leave free their rows."""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest

from asking import Asker, served, served_chat
from handspun.serve import schemas
from handspun.serve.chat import chat_completions
from handspun.serve.completions import completions
from handspun.serve.responses import responses

_HI = [{"role": "user", "content": "Tell me a joke about the city"}]
_TOOL = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
_REQUESTS: list[tuple[Any, Any, dict[str, Any]]] = [
    (chat_completions, schemas.ChatRequest, {"messages": _HI, "seed": 1, "n": 3}),
    (chat_completions, schemas.ChatRequest, {"messages": _HI, "temperature": 0, "logprobs": True}),
    (chat_completions, schemas.ChatRequest, {"messages": _HI, "num_beams": 3, "logprobs": True}),
    (chat_completions, schemas.ChatRequest, {"messages": _HI, "seed": 2, "guided_regex": "[a-z ]{20,40}"}),
    (chat_completions, schemas.ChatRequest, {"messages": _HI, "seed": 3, "guided_regex": "[a-z ]{20,40}"}),
    (chat_completions, schemas.ChatRequest, {"messages": _HI, "seed": 4, "tools": [_TOOL],
                                             "tool_choice": "required"}),
    (chat_completions, schemas.ChatRequest, {"messages": _HI, "temperature": 0, "prompt_lookup_num_tokens": 4}),
    (chat_completions, schemas.ChatRequest, {"messages": _HI, "seed": 5, "stop": "e", "repetition_penalty": 1.2}),
    (completions, schemas.CompletionRequest, {"prompt": ["The sum", "Give me"], "seed": 6, "logprobs": 3}),
    (completions, schemas.CompletionRequest, {"prompt": "The sum", "echo": True, "logprobs": 1, "seed": 7}),
    (responses, schemas.ResponsesRequest, {"input": "Tell me", "seed": 8}),
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Asker]:
    with served(served_chat()) as asker:
        yield asker


def _without_times(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in ("created", "created_at", "usage")}


def _body(model: Any, body: dict[str, Any]) -> Any:
    limit = "max_output_tokens" if model is schemas.ResponsesRequest else "max_tokens"
    return schemas.read(model, {limit: 16, "seed": 9, **body})


def _alone(server: Asker) -> list[dict[str, Any]]:
    return [
        _without_times(
            server.ask(handler, model, **_body(model, body).model_dump(exclude_unset=True, by_alias=True))
        )
        for handler, model, body in _REQUESTS
    ]


async def _together(server: Asker, order: int) -> list[dict[str, Any]]:
    mixed = list(enumerate(_REQUESTS))
    random.Random(order).shuffle(mixed)
    tasks = {
        number: asyncio.ensure_future(handler(server.context(), _body(model, body)))
        for number, (handler, model, body) in mixed
    }
    return [_without_times(await tasks[number]) for number in range(len(tasks))]


@pytest.mark.parametrize("order", range(3))
def test_answers_together_have_the_bits_of_those_alone(server: Asker, order: int) -> None:
    assert asyncio.run(asyncio.wait_for(_together(server, order), 60)) == _alone(server)


async def _leave(server: Asker, how: str) -> None:
    """Leave a request that takes long, and wait until the worker has nothing to do, a second at most."""
    fields = {"seed": 1, "ignore_eos": True, "stream": "stream" in how}
    if how == "response":
        asked = schemas.read(schemas.ResponsesRequest, {"input": "Tell me", "seed": 1})
        task: asyncio.Future[Any] = asyncio.ensure_future(responses(server.context(), asked))
    else:
        long = schemas.read(schemas.ChatRequest, {"messages": _HI, **fields})
        task = asyncio.ensure_future(chat_completions(server.context(), long))
    if "stream" in how:
        events = await task
        if how == "stream":
            await anext(events)
        await events.aclose()
    else:
        await asyncio.sleep(0.05)
        task.cancel()
    for _ in range(200):
        await asyncio.sleep(0.005)
        if not server.worker._unfinished:
            break


@pytest.mark.parametrize("how", ["whole", "stream", "unread stream", "response"])
def test_a_client_that_leaves_frees_its_rows(server: Asker, how: str) -> None:
    asyncio.run(asyncio.wait_for(_leave(server, how), 60))
    assert server.worker._unfinished == 0
