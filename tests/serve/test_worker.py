"""The engine thread with a real model: tickets in, chunks out, limits, cancellation, faults."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from handspun.config import GenerationOptions
from handspun.decoding.arguments import CallOptions
from handspun.decoding.generate import answer_all, make_requests
from handspun.decoding.processors import Processor
from handspun.decoding.request import Request
from handspun.models.fused import fused_weights
from handspun.models.load import ChatModel
from handspun.serve.errors import ApiError
from handspun.serve.metrics import Metrics
from handspun.serve.worker import Ticket, Turns, Worker, WorkerLimits
from tiny import tiny_model, tiny_tokenizer

SMALL = WorkerLimits(rows=4, kv_tokens=4000, cache_bytes=2**22, queue=2)


@pytest.fixture(scope="module")
def chat() -> ChatModel:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_model("qwen2", initializer_range=0.1, max_position_embeddings=4096, **sizes)
    return ChatModel(model, tiny_tokenizer(), "tiny", fused_weights(model, int8=True))


def request_for(chat: ChatModel, text: str, **options: Any) -> Request:
    own = GenerationOptions(**{"max_new_tokens": 12, **options})
    [request] = make_requests(chat, text, own, CallOptions(chat=False))
    return request


def endless(chat: ChatModel) -> Request:
    """2,000 tokens: what is not cancelled takes seconds."""
    return request_for(chat, "Hi", max_new_tokens=2000, min_new_tokens=2000)


@asynccontextmanager
async def running(chat: ChatModel, limits: WorkerLimits = SMALL) -> AsyncIterator[Worker]:
    worker = Worker({"tiny": chat}, limits, Metrics(["tiny"]))
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 60))


async def text_of(ticket: Ticket) -> str:
    return "".join([chunk.text async for chunk in ticket])


async def until(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def figures(worker: Worker) -> Iterator[tuple[str, float]]:
    """The metrics' lines, as (name with labels, value)."""
    for line in worker._metrics.text(engine_up=True).splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            yield name, float(value)


def test_tickets_answer_as_the_requests_alone(chat: ChatModel) -> None:
    requests = [
        request_for(chat, "Hi"),
        request_for(chat, "Say 3.", do_sample=True, seed=4, num_return_sequences=3),
        request_for(chat, "A joke", num_beams=3, num_return_sequences=2),
    ]
    expected = [[one.text for one in answer_all(chat, [request])] for request in requests]

    async def check() -> None:
        async with running(chat, replace(SMALL, queue=9)) as worker:
            tickets = [worker.submit("tiny", [request]) for request in requests]
            for ticket, texts in zip(tickets, expected, strict=True):
                grown = [""] * len(texts)
                async for chunk in ticket:
                    grown[chunk.return_index] += chunk.text
                assert grown == texts
            assert worker._unfinished == worker._waiting == 0

    run(check())


def test_a_ticket_has_the_answers_of_all_its_requests(chat: ChatModel) -> None:
    async def check() -> None:
        async with running(chat) as worker:
            requests = [replace(request_for(chat, text), prompt_index=i) for i, text in enumerate(("a", "b", "c"))]
            chunks = [chunk async for chunk in worker.submit("tiny", requests)]
            ends = [chunk for chunk in chunks if chunk.result is not None]
            assert sorted(chunk.prompt_index for chunk in ends) == [0, 1, 2]

    run(check())


def test_submit_refuses_more_than_the_queue_holds_and_takes_them_again_later(chat: ChatModel) -> None:
    async def check() -> None:
        async with running(chat, replace(SMALL, rows=1)) as worker:
            first = worker.submit("tiny", [endless(chat)])
            await anext(aiter(first))
            waiting = [worker.submit("tiny", [request_for(chat, "Hi")]) for _ in range(2)]
            with pytest.raises(ApiError) as refused:
                worker.submit("tiny", [request_for(chat, "Hi")])
            assert (refused.value.status, refused.value.code) == (429, "queue_full")
            assert 1 <= int(refused.value.headers["Retry-After"]) <= 60
            first.cancel()
            assert len({await text_of(ticket) for ticket in waiting}) == 1
            assert await text_of(worker.submit("tiny", [request_for(chat, "Hi")]))

    run(check())


def test_turns_tell_each_refused_client_a_later_time() -> None:
    now = 0.0
    turns = Turns(lambda: now)
    assert turns.refuse() == 1  # at once, before anything has begun
    for _ in range(4):  # a request leaves the queue every 2 seconds
        now += 2.0
        turns.begin(is_last=False)
    assert [turns.refuse() for _ in range(3)] == [2, 4, 6]
    turns.begin(is_last=False)  # 5 in 8 seconds; the first one's place is there
    assert turns.refuse() == 5  # 3 * 8 / 5
    now = 500.0
    assert turns.refuse() == 60  # nothing has begun for minutes
    turns.begin(is_last=True)
    now = 501.0
    assert turns.refuse() == 1  # all who were sent away could have had a place


def test_cancel_frees_rows_at_once_whether_queued_or_running(chat: ChatModel) -> None:
    async def check() -> None:
        async with running(chat, replace(SMALL, rows=1)) as worker:
            one, two = worker.submit("tiny", [endless(chat)]), worker.submit("tiny", [endless(chat)])
            await anext(aiter(one))
            assert worker._waiting == 1
            two.cancel()
            await until(lambda: worker._waiting == 0)
            assert worker._unfinished == 1
            one.cancel()
            one.cancel()
            await until(lambda: worker._unfinished == 0)
            assert worker._schedulers["tiny"].kv_tokens()[0] == 0
            cancelled = {name: value for name, value in figures(worker) if "cancelled" in name and value}
            assert sum(cancelled.values()) == 2

    run(check())


def test_a_request_that_waits_too_long_is_told_so(chat: ChatModel) -> None:
    async def check() -> None:
        async with running(chat, replace(SMALL, rows=1, queue_seconds=0.2)) as worker:
            first = worker.submit("tiny", [endless(chat)])
            second = worker.submit("tiny", [request_for(chat, "Hi")])
            with pytest.raises(ApiError) as late:
                await text_of(second)
            assert (late.value.status, late.value.code) == (504, "timeout")
            first.cancel()

    run(check())


def test_a_request_that_takes_too_long_is_ended(chat: ChatModel) -> None:
    async def check() -> None:
        async with running(chat, replace(SMALL, request_seconds=0.2)) as worker:
            ticket = worker.submit("tiny", [endless(chat)])
            with pytest.raises(ApiError) as late:
                await text_of(ticket)
            assert late.value.status == 504
            assert len(ticket.newest) == 1  # it had begun

    run(check())


def test_submit_refuses_what_can_never_fit(chat: ChatModel) -> None:
    async def check() -> None:
        async with running(chat, replace(SMALL, kv_tokens=100)) as worker:
            for request in (endless(chat), request_for(chat, "Hi", num_beams=5)):
                with pytest.raises(ApiError) as refused:
                    worker.submit("tiny", [request])
                assert refused.value.status == 400
                assert refused.value.param in ("max_tokens", "num_beams")

    run(check())


def test_a_ticket_ends_though_a_search_finds_fewer_answers_than_were_asked_for(chat: ChatModel) -> None:
    """Two texts match, and three answers are asked for."""
    request = request_for(chat, "Hi", num_beams=4, num_return_sequences=3, regex="yes|no")
    expected = [one.text for one in answer_all(chat, [request])]
    assert sorted(expected) == ["no", "yes"]

    async def check() -> None:
        async with running(chat) as worker:
            ticket = worker.submit("tiny", [request])
            assert [chunk.result.text async for chunk in ticket if chunk.result is not None] == expected
            assert worker._unfinished == 0

    run(check())


class Panic(BaseException):
    """No Exception, as llguidance's."""


def test_a_fault_ends_its_request_alone_and_the_engine_goes_on(chat: ChatModel) -> None:
    def fail(logits: torch.Tensor, rows: Any) -> torch.Tensor:  # noqa: ARG001
        raise Panic("a secret of the prompt")

    failing = replace(request_for(chat, "Well?"), processors=(Processor("regex", fail),))
    [expected] = answer_all(chat, [request_for(chat, "Hi")])

    async def check() -> None:
        async with running(chat) as worker:
            other, bad = worker.submit("tiny", [request_for(chat, "Hi")]), worker.submit("tiny", [failing])
            with pytest.raises(ApiError) as failed:
                await text_of(bad)
            assert (failed.value.status, failed.value.code) == (500, "internal_error")
            assert "secret" not in failed.value.message
            assert await text_of(other) == expected.text
            assert await text_of(worker.submit("tiny", [request_for(chat, "Hi")])) == expected.text
            assert worker.state == "ready"

    run(check())


def test_state_is_failed_if_the_thread_dies(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with running(chat) as worker:
            monkeypatch.setattr(worker, "_count", lambda: 1 / 0)
            ticket = worker.submit("tiny", [request_for(chat, "Hi")])
            await until(lambda: worker.state == "failed")
            with pytest.raises(ApiError):
                await text_of(ticket)
            with pytest.raises(ApiError) as refused:
                worker.submit("tiny", [request_for(chat, "Hi")])
            assert (refused.value.status, refused.value.code) == (503, "engine_failed")

    run(check())


def test_drain_ends_what_runs_and_takes_no_more(chat: ChatModel) -> None:
    async def check() -> None:
        async with running(chat) as worker:
            ticket = worker.submit("tiny", [request_for(chat, "Hi")])
            worker.drain()
            with pytest.raises(ApiError) as refused:
                worker.submit("tiny", [request_for(chat, "Hi")])
            assert (refused.value.status, refused.value.code) == (503, "draining")
            await worker.drained()
            assert await text_of(ticket)

    run(check())


def test_stop_tells_those_that_wait(chat: ChatModel) -> None:
    async def check() -> None:
        async with running(chat) as worker:
            ticket = worker.submit("tiny", [endless(chat)])
            await anext(aiter(ticket))
            worker.stop()
            with pytest.raises(ApiError) as ended:
                await text_of(ticket)
            assert ended.value.status == 503

    run(check())


def test_a_second_turn_finds_the_first_ones_tokens_under_the_same_key_only(chat: ChatModel) -> None:
    async def check() -> None:
        async with running(chat) as worker:
            request = request_for(chat, "Tell me a joke. " * 20)
            known = []
            for key in ("a", "a", "b"):
                ticket = worker.submit("tiny", [request], namespace=key)
                await text_of(ticket)
                known.append(ticket.cached_tokens)
            most = (len(request.prompt_token_ids) - 1) // 64 * 64
            assert known == [0, most, 0]

    run(check())
