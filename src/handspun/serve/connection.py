"""One connection: uvicorn's HTTP/1.1, with the limits that it lacks.

A client has a limited time to send a header and to read what it is sent, and the number of clients is limited.
"""

import asyncio
import json
import logging
import os
import socket
from typing import Any, cast

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from handspun.config.serving import ServeOptions
from handspun.errors import ConfigError
from handspun.serve.errors import ApiError
from handspun.serve.guard import HEADER_BYTES

SEND_BUFFER_BYTES = 256 * 1024
"""What the system buffers for a client. Its own default grows to megabytes, and would hide that nobody reads."""


class HttpConfig(uvicorn.Config):
    """uvicorn's configuration, with our limits."""

    def __init__(self, app: ASGIApp, limits: ServeOptions) -> None:
        self.limits = limits
        # uvicorn's lines hold tracebacks, and with them prompts.
        for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        super().__init__(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=limits.keep_alive_seconds,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=HEADER_BYTES,
        )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises ConfigError if the address cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror or error}. Use an address of this machine.") from error
    try:
        if os.name == "posix":  # elsewhere it would let two servers share the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        sock.bind(address)
        sock.listen(2048)
    except (OSError, OverflowError) as error:
        sock.close()
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(
            f"--host {host} --port {port} cannot be opened: {reason}. Choose another port, or 0 for a free one."
        ) from error
    return sock


class Connection(H11Protocol):
    """A client's connection."""

    _read_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    @property
    def _limits(self) -> ServeOptions:
        return cast(HttpConfig, self.config).limits

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request. One client too many is told so; far too many are cut off."""
        super().connection_made(transport)
        _notice_lost_clients(transport, self._limits.send_seconds)
        if len(self.connections) > 2 * self._limits.max_connections:
            transport.abort()
        elif len(self.connections) > self._limits.max_connections:
            self.app = cast(Any, _too_many)
        self._read_timer = self.loop.call_later(self._limits.read_seconds, self._close_if_idle)

    def data_received(self, data: bytes) -> None:
        """Read a piece of a request. Its whole header must come within the limit."""
        super().data_received(data)
        if self._is_busy():
            _cancel(self._read_timer)
            self._read_timer = None
        elif self._read_timer is None:
            self._read_timer = self.loop.call_later(self._limits.read_seconds, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        _cancel(self._read_timer)
        _cancel(self._send_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read: give it a limited time."""
        super().pause_writing()
        self._send_timer = self.loop.call_later(self._limits.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        _cancel(self._send_timer)

    def on_response_complete(self) -> None:
        """Close a connection that is to be closed even if the client never reads the rest."""
        super().on_response_complete()
        self._abort_later()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection."""
        super().timeout_keep_alive_handler()
        self._abort_later()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  (uvicorn's own words)
        """Answer what is no HTTP, or has a header that is too large, in the form of all errors."""
        error = ApiError(
            f"this is no HTTP request, or its header is larger than {HEADER_BYTES:,} bytes.", code="invalid_http"
        )
        headers = [("content-type", "application/json"), ("connection", "close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._send(h11.Response(status_code=400, headers=headers, reason=b"Bad Request"))
            self._send(h11.Data(data=json.dumps(error.body()).encode()))
            self._send(h11.EndOfMessage())
        self.transport.close()
        self._abort_later()

    def _send(self, event: h11.Event) -> None:
        self.transport.write(self.conn.send(event) or b"")

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _close_if_idle(self) -> None:
        self._read_timer = None
        if not self._is_busy():
            self.transport.abort()

    def _abort_later(self) -> None:
        if self.transport.is_closing():
            self.loop.call_later(self._limits.send_seconds, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _notice_lost_clients(transport: asyncio.Transport, seconds: float) -> None:
    """Let the system end a connection whose other end is gone without a word, as after a power cut."""
    sock = transport.get_extra_info("socket")
    if sock is None:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": int(seconds * 1000)}
    for name, value in options.items():
        if number := getattr(socket, name, None):  # not every system has all of them
            sock.setsockopt(socket.IPPROTO_TCP, number, value)


async def _too_many(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001  (ASGI gives all)
    error = ApiError(
        "too many clients are connected. Try again later.", "unavailable_error", code="too_many_connections"
    )
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error.body()).encode()})
