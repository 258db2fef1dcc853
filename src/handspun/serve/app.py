"""The HTTP application: one table of routes, from which the router, /openapi.json and the tests are made."""

import json
import logging
import re
import time
from asyncio import Event
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from handspun.config.serving import ServeOptions
from handspun.display import printable
from handspun.serve.errors import ApiError
from handspun.serve.guard import (
    Exchange,
    Guard,
    Keys,
    as_api_error,
    check_content_type,
    read_body,
    read_json,
)
from handspun.serve.metrics import Metrics
from handspun.serve.schemas import check_counts, read
from handspun.serve.served import Context, ServedModel
from handspun.serve.sse import Answer, EventStream, answer, to_json
from handspun.serve.worker import Worker

logger = logging.getLogger("handspun")

State = Literal["loading", "ready", "draining", "failed"]
Handler = Callable[[Context, Any], Awaitable[Answer]]

_UNAVAILABLE: dict[str, tuple[str, str, str]] = {
    "loading": ("loading", "the models are being loaded. Ask again in a few seconds.", "5"),
    "draining": ("draining", "the server is stopping. Ask again once it is back.", "5"),
    "failed": ("engine_failed", "the engine has stopped answering. Restart the server.", "30"),
}
"""By state: code, message and Retry-After."""
_QUIET = ("/health", "/metrics")
"""Paths that machines ask every few seconds. Their successes are not logged."""


@dataclass
class Service:
    """What a running server consists of, and its state."""

    options: ServeOptions
    metrics: Metrics
    keys: Keys
    models: Mapping[str, ServedModel] = field(default_factory=dict)
    worker: Worker | None = None
    is_draining: bool = False
    has_stopped: bool = False
    """Running answers have had their time."""
    answering: set[Event] = field(default_factory=set)
    """One per request that is being answered. If it is set, the answer ends with an error."""

    def stop_answers(self) -> None:
        """End what is being answered with an error. Called in the event loop."""
        self.has_stopped = True
        for stopping in self.answering:
            stopping.set()

    @property
    def state(self) -> State:
        """What /health says."""
        if self.is_draining:
            return "draining"
        return "loading" if self.worker is None else self.worker.state

    def check_ready(self) -> None:
        """Raise ApiError unless requests can be answered."""
        if (state := self.state) != "ready":
            code, message, seconds = _UNAVAILABLE[state]
            raise ApiError(message, "unavailable_error", code=code, headers={"Retry-After": seconds})

    def report(self, exchange: Exchange) -> None:
        """Count a request, and print its line of the log."""
        model = exchange.log.get("model", "")
        label = model if model in self.models else ""
        self.metrics.request(exchange.endpoint, exchange.status, label, exchange.seconds)
        if self.options.log_requests and not (exchange.endpoint in _QUIET and exchange.status == 200):
            logger.info(log_line(exchange))


def log_line(exchange: Exchange) -> str:
    """Return a request's line of the log: method, path, status, seconds, id, and what its handler noted.

    Whatever a client has chosen is escaped, so that it cannot begin a line of its own.
    """
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    told = "".join(f" {name}={json.dumps(value)}" for name, value in exchange.log.items() if value is not None)
    return (
        f"{at} {printable(exchange.method, most=10)} {printable(exchange.path)} {exchange.status} "
        f"{exchange.seconds:.3f}s {exchange.request_id}{told}"
    )


@dataclass(frozen=True)
class Page:
    """What is answered to a GET request: a value as JSON, or text."""

    value: Any
    status: int = 200
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    packed: bytes | None = None
    """The text, compressed by gzip once and for all."""


@dataclass(frozen=True)
class Endpoint:
    """A row of the table of routes.

    GET: page(service, path's parameters). POST: handler(context, body).
    """

    path: str
    summary: str
    page: Callable[[Service, Mapping[str, str]], Page] | None = None
    handler: Handler | None = None
    body: type[BaseModel] | None = None
    needs_key: bool = True
    needs_models: bool = True
    streams: bool = False
    is_named: bool = False
    """Events of a stream have names, as those of OpenAI's responses."""

    @property
    def method(self) -> str:
        """The HTTP method."""
        return "GET" if self.page is not None else "POST"


def make_app(service: Service, endpoints: Sequence[Endpoint]) -> ASGIApp:
    """Return the application of a table of routes."""
    routes = [
        Route(one.path, endpoint=_Endpoint(service, one), methods=[one.method], name=one.path) for one in endpoints
    ]
    options = service.options
    return Guard(
        Router(routes, redirect_slashes=False),
        hosts=[options.host, *options.allowed_host],
        origins=options.allowed_origin,
        report=service.report,
    )


class _Endpoint:
    """Answers requests to one route. ASGI."""

    def __init__(self, service: Service, endpoint: Endpoint) -> None:
        self._service, self._endpoint = service, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, endpoint, headers = self._service, self._endpoint, Headers(scope=scope)
        exchange: Exchange = scope["exchange"]
        exchange.endpoint = endpoint.path.replace(":path}", "}")
        namespace = service.keys.namespace(headers) if endpoint.needs_key else ""
        if endpoint.needs_models:
            service.check_ready()
        if endpoint.page is not None:
            await _send_page(send, endpoint.page(service, scope["path_params"]), headers)
            return
        body = await self._read(headers, receive, exchange)
        stopping = Event()  # of its own: an event belongs to the loop in which it is first waited for
        service.answering.add(stopping)
        if service.has_stopped:
            stopping.set()
        try:
            await self._answer(body, namespace, exchange, receive, send, stopping)
        finally:
            service.answering.discard(stopping)

    async def _read(self, headers: Headers, receive: Receive, exchange: Exchange) -> BaseModel:
        options = self._service.options
        check_content_type(headers)
        body = await read_body(headers, receive, exchange, options.max_body_bytes, options.read_seconds)
        assert self._endpoint.body is not None
        value = read_json(body, depth=options.max_json_depth)
        check_counts(value, options)
        return read(self._endpoint.body, value)

    async def _answer(
        self,
        body: BaseModel,
        namespace: str,
        exchange: Exchange,
        receive: Receive,
        send: Send,
        stopping: Event,
    ) -> None:
        service, handler = self._service, self._endpoint.handler
        assert handler is not None
        assert service.worker is not None
        context = Context(
            models=service.models,
            worker=service.worker,
            limits=service.options,
            request_id=exchange.request_id,
            namespace=namespace,
            log=exchange.log,
            metrics=service.metrics,
        )
        found = await answer(
            lambda: handler(context, body),
            receive,
            EventStream(send, is_named=self._endpoint.is_named),
            stopping=stopping,
            ping_seconds=service.options.ping_seconds,
            as_error=lambda error: as_api_error(error, exchange),
        )
        if found is not None:
            await _send_page(send, Page(found), Headers())


async def _send_page(send: Send, page: Page, asked: Headers) -> None:
    """Send a page. asked: headers of the request, which say how it may be packed, and what the client has."""
    status, headers = page.status, {"content-type": page.content_type, **page.headers}
    if "ETag" in page.headers and page.headers["ETag"] in asked.get("if-none-match", ""):
        status, body = 304, b""
    else:
        body = to_json(page.value) if page.content_type == "application/json" else str(page.value).encode()
        if page.packed is not None and takes_gzip(asked.get("accept-encoding", "")):
            body, headers["content-encoding"] = page.packed, "gzip"
        headers["content-length"] = str(len(body))
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def takes_gzip(accepted: str) -> bool:
    """Return whether a request's Accept-Encoding names gzip, and does not refuse it with q=0."""
    for one in accepted.lower().split(","):
        name, *parameters = (part.replace(" ", "") for part in one.split(";"))
        if name == "gzip":
            return not any(re.fullmatch(r"q=0(\.0*)?", parameter) for parameter in parameters)
    return False
