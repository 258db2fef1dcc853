"""The engine thread: one for all models, whose schedulers step in turn. Requests come from the event loop.

The thread alone touches the schedulers. The event loop hands it tickets; it hands back the chunks of each step.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from handspun.decoding.beam import BeamState
from handspun.decoding.request import Completion, Request
from handspun.decoding.results import GenerationChunk
from handspun.decoding.scheduler import BatchLimits, Scheduler
from handspun.display import logger
from handspun.errors import ConfigError
from handspun.models.load import ChatModel
from handspun.serve.errors import ApiError
from handspun.serve.metrics import Metrics
from handspun.serve.translate import in_fields

State = Literal["ready", "draining", "failed"]
_STUCK_SECONDS = 30.0
_LONGEST_RETRY = 60
"""Seconds. openai's clients take no longer Retry-After for serious."""
_IDLE_SECONDS = 0.5
"""Longest sleep of the idle thread; a new request wakes it."""


@dataclass(frozen=True, kw_only=True)
class WorkerLimits(BatchLimits):
    """What the engine takes on at a time: of each model, what a batch's limits say, with these defaults."""

    kv_tokens: int = 65536
    cache_bytes: int = 512 * 2**20
    step_seconds: float = 0.1
    queue: int = 64
    """Requests that wait."""
    queue_seconds: float = 60.0
    request_seconds: float = 600.0


class Turns:
    """How often a place in the queue becomes free, and who was sent away since.

    clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun: deque[float] = deque([clock()], maxlen=33)
        """When the newest requests left the queue, and first of all, when the server began."""
        self._refused = 0

    def begin(self, *, is_last: bool) -> None:
        """Note that a request left the queue. is_last: the queue is empty now."""
        self._begun.append(self._clock())
        self._refused = 0 if is_last else max(0, self._refused - 1)

    def refuse(self) -> int:
        """Return the seconds after which there should be a place for one more of those who were sent away.

        Clients that were sent away earlier have theirs before.
        """
        self._refused += 1
        now = self._clock()
        recent = [when for when in self._begun if now - when < _LONGEST_RETRY]
        each = (now - recent[0]) / max(1, len(recent) - 1) if recent else _LONGEST_RETRY
        return max(1, min(_LONGEST_RETRY, math.ceil(each * self._refused)))


Item = GenerationChunk | ApiError | None
"""None ends a ticket: how many answers there are is not known before, since a search may find fewer."""


class Ticket:
    """The answers of some requests, as they grow."""

    def __init__(self, model: str, requests: Sequence[Request], worker: "Worker") -> None:
        self.model = model
        self.requests = [replace(one, on_start=self._on_start, on_error=self._on_error) for one in requests]
        self.cached_tokens = 0
        self.submitted = time.monotonic()
        self.first_step: float | None = None
        self.error: ApiError | None = None
        self.newest: dict[tuple[int, int], float] = {}
        """When each answer had its newest chunk."""
        self._worker = worker
        self.loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Item] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        """Yield the chunks until every answer has had its last. Raises ApiError where one failed."""
        while (item := await self._items.get()) is not None:
            if isinstance(item, ApiError):
                raise item
            yield item

    def cancel(self) -> None:
        """End what is not finished. Its rows are free within one step."""
        self._worker.cancel(self)

    def put(self, items: Sequence[Item]) -> None:
        """Add what `__aiter__` yields or raises. Called in the event loop."""
        for item in items:
            self._items.put_nowait(item)

    def _on_start(self, known: int) -> None:
        self.cached_tokens += known

    def _on_error(self, error: BaseException) -> None:
        self.error = self.error or _as_api_error(error)


class Worker:
    """Decodes the requests of all models in a thread of its own.

    models: by the name under which each is served.
    """

    def __init__(self, models: Mapping[str, ChatModel], limits: WorkerLimits, metrics: Metrics) -> None:
        self._limits, self._metrics = limits, metrics
        batch = replace(limits, tokens=limits.kv_tokens)
        self._schedulers = {name: Scheduler(model, batch) for name, model in models.items()}
        self._vocabularies = {
            name: model.model.config.get_text_config().vocab_size for name, model in models.items()
        }
        self._tickets: dict[Request, Ticket] = {}
        """The unfinished ones, by their requests. Of the engine thread."""
        self._lock = threading.Lock()
        self._incoming: deque[Ticket] = deque()
        self._leaving: deque[Ticket] = deque()
        self._waiting = 0
        """Tickets of which nothing has begun."""
        self._turns = Turns()
        self._unfinished = 0
        self._wake = threading.Event()
        self._is_draining = self._is_stopping = False
        self._step_ended = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def state(self) -> State:
        """Whether requests are taken. "failed": the thread died, or work waits for more than 30 seconds."""
        is_stuck = self._unfinished > 0 and time.monotonic() - self._step_ended > _STUCK_SECONDS
        if is_stuck or (self._thread.ident is not None and not self._thread.is_alive() and not self._is_stopping):
            return "failed"
        return "draining" if self._is_draining else "ready"

    def submit(self, model: str, requests: Sequence[Request], *, namespace: str | None = "") -> Ticket:
        """Queue requests. Call it in the event loop.

        namespace: whose prompts' beginnings may be used again; None for nobody's. Raises ApiError if the queue is
        full, if the server stops, or if an answer can never fit into the KV cache.
        """
        state = self.state
        if state != "ready":
            what, code = ("The server is stopping.", "draining") if state == "draining" else (
                "The engine has stopped answering; restart the server.", "engine_failed"
            )  # fmt: skip
            self._metrics.rejected(code)
            raise ApiError(what, "unavailable_error", code=code, headers={"Retry-After": "5"})
        own = [replace(request, cache_namespace=namespace) for request in requests]
        self._check_size(model, own)
        ticket = Ticket(model, own, self)
        with self._lock:
            if self._waiting >= self._limits.queue:
                self._metrics.rejected("queue_full")
                raise ApiError(
                    f"{self._waiting} requests are waiting, which is the most that --max-queue allows. Try later.",
                    "rate_limit_error", code="queue_full", headers={"Retry-After": str(self._turns.refuse())},
                )  # fmt: skip
            self._incoming.append(ticket)
            self._waiting += 1
            self._unfinished += 1
            if self._unfinished == 1:
                self._step_ended = time.monotonic()  # the watchdog counts from here
        self._wake.set()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a ticket's answers. Ended ones are left alone."""
        with self._lock:
            self._leaving.append(ticket)
        self._wake.set()

    def drain(self) -> None:
        """Take no more requests."""
        self._is_draining = True

    async def drained(self) -> None:
        """Wait until nothing is unfinished."""
        while self._unfinished and self.state != "failed":
            await asyncio.sleep(0.02)

    def stop(self) -> None:
        """End the thread, and what is unfinished with an error."""
        self._is_draining = self._is_stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_STUCK_SECONDS)

    def _check_size(self, model: str, requests: Sequence[Request]) -> None:
        for request in requests:
            beams = request.options.num_beams
            rows = max(beams, request.options.num_return_sequences)
            vocabulary = self._vocabularies[model]
            unit = BeamState.start(request, vocabulary) if beams > 1 else Completion.start(request)
            if rows > self._limits.rows:
                raise ApiError(
                    f"{rows} answers or beams are more than the {self._limits.rows} rows of this server "
                    "(--max-rows).",
                    param="num_beams" if beams > 1 else "n",
                )
            needed = max(unit.reserved_tokens, unit.max_total_tokens)
            if needed > self._limits.kv_tokens:
                raise ApiError(
                    f"Prompt and answers need {needed:,} tokens of the KV cache, which has "
                    f"{self._limits.kv_tokens:,} (--kv-tokens). Ask for fewer tokens or beams.",
                    param="max_tokens",
                )

    def _work(self) -> None:
        """Run steps until `stop`."""
        try:
            while not self._is_stopping:
                self._take_orders()
                busy = [name for name, scheduler in self._schedulers.items() if not scheduler.is_idle]
                for name in busy:
                    self._step(name)
                self._count()
                self._step_ended = time.monotonic()
                if not busy:
                    self._wake.wait(_IDLE_SECONDS)
                self._wake.clear()
        except BaseException:
            logger.exception("the engine failed")  # from now on, `state` says so
        finally:
            stopped = ApiError("The server stopped.", "unavailable_error", code="draining")
            _deliver({ticket: [stopped] for ticket in {*self._tickets.values(), *self._incoming}})
            self._unfinished = 0

    def _take_orders(self) -> None:
        """Submit what came in, cancel what left, and end what took too long."""
        with self._lock:
            incoming, leaving = list(self._incoming), list(self._leaving)
            self._incoming.clear()
            self._leaving.clear()
        for ticket in incoming:
            for request in ticket.requests:
                self._tickets[request] = ticket
                self._schedulers[ticket.model].submit(request)
        for ticket in leaving:
            self._end(ticket, None)
        now = time.monotonic()
        for ticket in set(self._tickets.values()):
            age = now - ticket.submitted
            if ticket.first_step is None and age > self._limits.queue_seconds:
                self._metrics.rejected("timeout")
                self._end(
                    ticket, f"The request waited for {self._limits.queue_seconds:g} seconds and was not begun."
                )
            elif age > self._limits.request_seconds:
                self._end(ticket, f"The request took more than {self._limits.request_seconds:g} seconds.")

    def _end(self, ticket: Ticket, why: str | None) -> None:
        """Cancel a ticket's unfinished requests. why: what its client is told, if anyone listens."""
        if not any(request in self._tickets for request in ticket.requests):
            return
        phase = "queued" if ticket.first_step is None else "decode" if ticket.newest else "prefill"
        self._metrics.cancelled(phase)
        for request in ticket.requests:
            self._schedulers[ticket.model].cancel(request)
        self._forget(ticket)
        if why is not None:
            _deliver({ticket: [ApiError(why, "timeout_error", code="timeout")]})

    def _forget(self, ticket: Ticket) -> None:
        for request in ticket.requests:
            self._tickets.pop(request, None)
        with self._lock:
            self._unfinished -= 1
            self._waiting -= ticket.first_step is None

    def _step(self, name: str) -> None:
        """Run one step of a model's scheduler, and deliver what it added."""
        scheduler, started = self._schedulers[name], time.monotonic()
        added = scheduler.step()
        ended = time.monotonic()
        load = scheduler.load
        kind = "mixed" if load.answers and load.prompt_tokens else "decode" if load.answers else "prefill"
        self._metrics.step(kind, ended - started)
        waiting = scheduler.waiting()
        for ticket in {ticket for ticket in self._tickets.values() if ticket.model == name}:
            if ticket.first_step is None and not waiting.issuperset(ticket.requests):
                self._note_start(ticket, started)
        items: dict[Ticket, list[Item]] = {}
        for request, chunk in added:
            ticket = self._tickets[request]
            items.setdefault(ticket, []).append(chunk)
            self._note_chunk(ticket, chunk, ended)
        for ticket in {ticket for ticket in self._tickets.values() if ticket.error is not None}:
            assert ticket.error is not None
            items.setdefault(ticket, []).append(ticket.error)
            for request in ticket.requests:
                scheduler.cancel(request)
            self._forget(ticket)
        unfinished = scheduler.unfinished()
        for ticket, own in items.items():
            if ticket.error is None and unfinished.isdisjoint(ticket.requests):
                self._forget(ticket)
                own.append(None)
        _deliver(items)

    def _note_start(self, ticket: Ticket, started: float) -> None:
        ticket.first_step = started
        with self._lock:
            self._waiting -= 1
            self._turns.begin(is_last=self._waiting == 0)
        self._metrics.queued(started - ticket.submitted)
        self._metrics.request_started(ticket.model)

    def _note_chunk(self, ticket: Ticket, chunk: GenerationChunk, now: float) -> None:
        answer = (chunk.prompt_index, chunk.return_index)
        if not ticket.newest:
            prompt = sum(len(request.prompt_token_ids) for request in ticket.requests)
            self._metrics.first_token(ticket.model, now - ticket.submitted)
            self._metrics.tokens(prompt=prompt, cached=ticket.cached_tokens)
        elif answer in ticket.newest:
            self._metrics.token_gap(now - ticket.newest[answer])
        ticket.newest[answer] = now
        self._metrics.tokens(generated=len(chunk.token_ids))
        if chunk.result is not None:
            self._metrics.tokens(drafted=chunk.result.drafted_tokens, accepted=chunk.result.accepted_tokens)

    def _count(self) -> None:
        used, capacity = (
            sum(values) for values in zip(*(s.kv_tokens() for s in self._schedulers.values()), strict=True)
        )
        self._metrics.gauges(
            running=self._unfinished - self._waiting,
            waiting=self._waiting,
            kv_used=used,
            kv_capacity=capacity,
            cache_bytes=sum(scheduler.cache_bytes() for scheduler in self._schedulers.values()),
        )


def _deliver(items: Mapping[Ticket, Sequence[Item]]) -> None:
    """Hand a step's chunks over to the event loop, in one call: each wakes it up."""

    def put(loop: asyncio.AbstractEventLoop) -> None:
        for ticket, own in items.items():
            if ticket.loop is loop:
                ticket.put(own)

    for loop in {ticket.loop for ticket in items}:
        with suppress(RuntimeError):  # the loop has been closed: nobody waits
            loop.call_soon_threadsafe(put, loop)


def _as_api_error(error: BaseException) -> ApiError:
    """Return what a client is told about a failed step. The log has the error's type, and no text of it."""
    if isinstance(error, ConfigError):  # options that leave no token, or a constraint that becomes too complex
        return ApiError(in_fields(str(error)), code="invalid_value")
    logger.error("a request failed: %s", type(error).__name__)
    if isinstance(error, MemoryError):
        return ApiError("The server's memory is full. Try later.", "unavailable_error", code="engine_failed")
    return ApiError(
        f"The answer could not be computed ({type(error).__name__}).", "server_error", code="internal_error"
    )
