"""Answer a request while its client is watched: as JSON, or as a stream of server-sent events.

The handler runs in a task of its own. If the client leaves or the server stops, that task is cancelled, and the
handler's `finally` frees what it holds. This is so for streams and for plain answers.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, cast

from starlette.types import Receive, Send

from handspun.serve.errors import ApiError
from handspun.serve.guard import ClientLeftError

Answer = dict[str, Any] | AsyncIterator[dict[str, Any]]

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]
# JSON leaves these as they are, but some clients (httpx among them) end a line at them.
_LINE_ENDS = str.maketrans({code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)})


def to_json(value: Any) -> bytes:
    """Return JSON on one line, whatever a client takes for the end of a line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).translate(_LINE_ENDS).encode()


def to_event(value: dict[str, Any], name: str | None = None) -> bytes:
    """Return one server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + to_json(value) + b"\n\n"


class EventStream:
    """Writes the events of one answer.

    is_named: an event has its "type" as its name, and no [DONE] follows the last one, as in OpenAI's responses.
    """

    def __init__(self, send: Send, *, is_named: bool) -> None:
        self._send, self._is_named = send, is_named
        self._lock = asyncio.Lock()  # a ping and an event may want to begin the answer at the same time
        self._count = 0
        self.sent_at = time.monotonic()
        self.is_open = False
        """The answer is a stream."""
        self.is_started = False
        """Its status was sent."""

    async def event(self, value: dict[str, Any]) -> None:
        """Write an event."""
        self._count += 1
        await self._write(to_event(value, value["type"] if self._is_named else None))

    async def ping(self) -> None:
        """Write a comment, which clients skip, so that no proxy takes the connection for dead."""
        await self._write(b": ping\n\n")

    async def error(self, error: ApiError) -> None:
        """Write an error and end the stream. openai's clients raise for any event with the key "error"."""
        body = error.body()
        if self._is_named:
            what = {"code": error.code, "message": error.message, "param": error.param}
            body = {"type": "error", "sequence_number": self._count, **what, **body}
        await self.event(body)
        await self.end()

    async def end(self) -> None:
        """Write the end of the stream."""
        await self._write(b"" if self._is_named else b"data: [DONE]\n\n", is_last=True)

    async def _write(self, text: bytes, *, is_last: bool = False) -> None:
        async with self._lock:
            if not self.is_started:
                self.is_started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await self._send({"type": "http.response.body", "body": text, "more_body": not is_last})
            self.sent_at = time.monotonic()


async def answer(
    handler: Callable[[], Awaitable[Answer]],
    receive: Receive,
    stream: EventStream,
    *,
    stopping: asyncio.Event,
    ping_seconds: float,
    as_error: Callable[[BaseException], ApiError],
) -> dict[str, Any] | None:
    """Run a handler. Return its dict, or None if it was a stream and all of it was written.

    Raises ClientLeftError if the client leaves. Raises ApiError for what fails before anything was written; what
    fails later becomes an event.

    Args:
        handler: returns a dict or an iterator of events.
        receive: the request's, whose body has been read.
        stream: where events go.
        stopping: set when the server stops: running answers end with an error.
        ping_seconds: silence after which a stream gets a comment.
        as_error: what a client is told of an exception.
    """
    work = asyncio.create_task(_run(handler, stream))
    left = asyncio.create_task(_client_leaves(receive))
    stop = asyncio.create_task(stopping.wait())
    try:
        while not work.done():
            await _wait_or_ping({work, left, stop}, stream, ping_seconds)
            if left.done() and not work.done():
                raise ClientLeftError
            if stop.done() and not work.done():
                await _cancelled(work)
                if work.cancelled():
                    raise _stopped()
        return work.result()
    except (ClientLeftError, asyncio.CancelledError):
        raise
    except BaseException as error:  # a panic in llguidance is no Exception
        if not stream.is_started:
            raise
        await stream.error(as_error(error))
        return None
    finally:
        await _cancelled(work, left, stop)


async def _run(handler: Callable[[], Awaitable[Answer]], stream: EventStream) -> dict[str, Any] | None:
    found = await handler()
    if isinstance(found, dict):
        return found
    stream.is_open = True
    # A generator is closed at once, not when the garbage collector finds it.
    async with aclosing(cast(Any, found)) as events:
        async for event in events:
            await stream.event(event)
    await stream.end()
    return None


def _stopped() -> ApiError:
    return ApiError(
        "the server stops before the answer is complete. Ask again.",
        "unavailable_error",
        code="draining",
        headers={"Retry-After": "5"},
    )


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _wait_or_ping(tasks: set[asyncio.Task[Any]], stream: EventStream, ping_seconds: float) -> None:
    """Wait until a task is done, or write a ping if it is time for one."""
    silence = time.monotonic() - stream.sent_at if stream.is_open else 0.0
    timeout = max(0.0, ping_seconds - silence)
    done, _ = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    if not done and stream.is_open and time.monotonic() - stream.sent_at >= ping_seconds:
        await stream.ping()


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
