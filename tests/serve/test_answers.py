"""From chunks to OpenAI's dicts, with chunks made by hand: no engine runs."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asking import served_chat
from handspun.config.serving import ServeOptions
from handspun.decoding.options import SamplingParams
from handspun.decoding.request import Completion, Request, Score
from handspun.decoding.results import GenerationChunk
from handspun.decoding.text import vocabulary
from handspun.serve.answers import TicketStream
from handspun.serve.chat import ChatForm, chat_completion, chat_events
from handspun.serve.errors import ApiError
from handspun.serve.logprobs import number, token_name
from handspun.serve.schemas import ChatRequest
from handspun.serve.served import Context, ServedModel
from handspun.serve.translate import Prepared

_MODEL = ServedModel.of("tiny", served_chat())
_TOKENIZER = _MODEL.chat.tokenizer
_CONTEXT = Context({"tiny": _MODEL}, None, ServeOptions(), "test")
_EOS = 322


async def _iterate(chunks: Iterable[GenerationChunk]) -> AsyncIterator[GenerationChunk]:
    for chunk in chunks:
        yield chunk


def _answer(
    ids: list[int], stop: tuple[str, ...] = (), **body: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the events and the whole answer that generating these tokens makes."""
    options = SamplingParams(stop_strings=stop, eos_token_ids=(_EOS,))
    request = Request(
        prompt_token_ids=[1, 2],
        options=options,
        vocabulary=_MODEL.vocabulary,
        max_new_tokens=len(ids),
        logprobs=True,
    )
    answer, chunks = Completion.start(request), []
    for position, token_id in enumerate(ids):
        chunks.append(answer.add(token_id, Score(-float(position), [])))
        if answer.finish_reason is not None:
            break
    asked = ChatRequest(messages=[{"role": "user", "content": "Hi"}], logprobs=True, **body)  # type: ignore[list-item]
    form = ChatForm("a", Prepared(model=_MODEL, requests=[request], seeds=[0]), asked, 0)

    async def events() -> list[dict[str, Any]]:
        return [event async for event in chat_events(_CONTEXT, _iterate(chunks), form)]

    result = chunks[-1].result
    assert result is not None
    return asyncio.run(events()), chat_completion(_CONTEXT, [result], form)


def _content(events: list[dict[str, Any]]) -> list[str]:
    return [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]


_TEXTS = st.text(st.sampled_from("ab🎉👩‍👩‍👧 स्ते�"), max_size=12)


@settings(deadline=None)
@given(_TEXTS, st.lists(st.sampled_from(["a", "ab", "🎉", "b🎉a", " ", "👩‍👩"]), max_size=3), st.booleans())
def test_streams_are_cut_at_the_first_stop_string(text: str, stop: list[str], has_end: bool) -> None:
    ids = [*_TOKENIZER(text)["input_ids"], *([_EOS] if has_end else [])] or [_EOS]
    events, whole = _answer(ids, tuple(stop))
    found = [index for index in (text.find(one) for one in stop) if index >= 0]
    # Of stop strings that end at the same character, the longest counts.
    ends = sorted((text.find(one) + len(one), text.find(one)) for one in stop if one in text)
    expected = text[: ends[0][1]] if found else text
    assert "".join(_content(events)) == whole["choices"][0]["message"]["content"] == expected
    entries = [entry for event in events for choice in event["choices"] for entry in _entries(choice)]
    assert entries == _entries(whole["choices"][0])
    shown = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert shown.startswith(expected.encode())
    assert found or shown == expected.encode()


def _entries(choice: dict[str, Any]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = (choice["logprobs"] or {"content": []})["content"]
    return entries


@pytest.mark.parametrize("text", ["🎉🎉", "👩‍👩‍👧‍👦 family", "नमस्ते", "上海 is 🏙️"])
def test_characters_are_whole_in_every_chunk(text: str) -> None:
    events, _ = _answer(_TOKENIZER(text)["input_ids"])
    pieces = _content(events)
    assert len(pieces) > 3
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text


def test_the_role_comes_first_and_the_reason_last_and_alone() -> None:
    events, _ = _answer(_TOKENIZER("ab a")["input_ids"])
    choices = [event["choices"][0] for event in events]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in choice["delta"] for choice in choices[1:])
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert choices[-1]["delta"] == {}
    assert (
        len({(event["id"], event["created"], event["model"], event["system_fingerprint"]) for event in events})
        == 1
    )


def test_special_tokens_and_the_end_are_not_listed() -> None:
    ids = [*_TOKENIZER("a")["input_ids"], 320, *_TOKENIZER("b")["input_ids"], _EOS]
    _, whole = _answer(ids)
    choice = whole["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("ab", "stop")
    assert [(entry["token"], entry["logprob"]) for entry in _entries(choice)] == [("a", 0.0), ("b", -2.0)]
    assert whole["usage"]["completion_tokens"] == 4


def test_token_name_of_a_part_of_a_character() -> None:
    words = vocabulary(_TOKENIZER)
    names = [token_name(token_id, words) for token_id in _TOKENIZER("é")["input_ids"]]
    assert names == ["bytes:\\xc3", "bytes:\\xa9"]


def test_number_writes_infinity_as_json_can() -> None:
    assert number(float("-inf")) == -9999.0
    assert number(-1.5) == -1.5


class _Ticket:
    cancelled = 0

    def cancel(self) -> None:
        self.cancelled += 1


def test_a_stream_that_nobody_reads_is_cancelled_when_it_is_closed() -> None:
    ticket = _Ticket()

    async def events() -> AsyncIterator[dict[str, Any]]:
        yield {}

    asyncio.run(TicketStream(ticket, events()).aclose())  # type: ignore[arg-type]
    assert ticket.cancelled == 1


@pytest.mark.parametrize("how", ["error", "cancelled"])
def test_a_stream_that_breaks_is_cancelled(how: str) -> None:
    ticket = _Ticket()

    async def events() -> AsyncIterator[dict[str, Any]]:
        if how == "error":
            raise ApiError("broken", "server_error")
        await asyncio.sleep(60)
        yield {}

    async def read() -> None:
        task = asyncio.ensure_future(anext(aiter(TicketStream(ticket, events()))))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(ApiError if how == "error" else asyncio.CancelledError):
        asyncio.run(read())
    assert ticket.cancelled == 1
