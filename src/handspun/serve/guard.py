"""What is asked of every request: its addressee, the page it comes from, its key, its size, and its form.

`Guard` is plain ASGI. Starlette's base class of middleware would hide from the application that a client left.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from handspun.config.serving import KEY_VARIABLE
from handspun.config.typed import load_json
from handspun.data.json_shapes import exceeds_depth
from handspun.display import printable
from handspun.errors import ConfigError
from handspun.serve.errors import ApiError

logger = logging.getLogger("handspun")

CLIENT_LEFT = 499
"""Status in the log and the metrics of a request whose client left. Nothing is sent."""
HEADER_BYTES = 16 * 1024
"""Maximum size of a request's line and headers."""
_DISCARD_BYTES, _DISCARD_SECONDS = 16 * 2**20, 5.0
"""How much of a refused body is still read. Closing a socket with unread data resets it, and the client would lose
the answer."""


class ClientLeftError(Exception):
    """The client closed the connection before its answer was complete."""


@dataclass
class Exchange:
    """One request and what became of it, for the log and the metrics."""

    method: str
    path: str
    has_unread_body: bool
    request_id: str = field(default_factory=lambda: f"req-{uuid4().hex}")
    started_at: float = field(default_factory=time.monotonic)
    endpoint: str = "other"
    """The route's path. A client's own path is no label of a metric."""
    status: int = 0
    log: dict[str, Any] = field(default_factory=dict)
    """What the log line says besides."""

    @property
    def seconds(self) -> float:
        """Seconds since the request's header came in."""
        return time.monotonic() - self.started_at


class Guard:
    """Checks Host and Origin, answers preflights, turns every error into an answer, and reports each exchange."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str],
        origins: Collection[str],
        report: Callable[[Exchange], None],
    ) -> None:
        self._app, self._report = app, report
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        exchange = Exchange(scope["method"], scope["path"], _has_body(headers))
        scope["app"], scope["exchange"] = self, exchange  # with an app, the router raises what it refuses
        answer = _Answer(exchange, send, self._cors_headers(headers))
        try:
            check_size(scope)
            check_host(headers, self._hosts)
            check_origin(exchange.method, headers, self._origins)
            if exchange.method == "OPTIONS" and "access-control-request-method" in headers:
                await _send_whole(answer, 204, _preflight_headers(headers), b"")
            else:
                await self._app(scope, receive, answer)
        except ClientLeftError:
            exchange.status = CLIENT_LEFT
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            exchange.status = exchange.status or CLIENT_LEFT
            raise
        except BaseException as error:  # a panic in llguidance is no Exception
            await _refuse(as_api_error(error, exchange), exchange, receive, answer)
        finally:
            self._report(exchange)

    def _cors_headers(self, headers: Headers) -> dict[str, str]:
        origin = headers.get("origin", "")
        if origin.lower() not in self._origins:
            return {}
        exposed = "x-request-id, retry-after"
        return {
            "access-control-allow-origin": origin,
            "access-control-expose-headers": exposed,
            "vary": "Origin",
        }


class _Answer:
    """ASGI's `send`, which adds the headers that every answer has, and notes the status."""

    def __init__(self, exchange: Exchange, send: Send, headers: Mapping[str, str]) -> None:
        self._exchange, self._send = exchange, send
        self._headers = {"x-request-id": exchange.request_id, "x-content-type-options": "nosniff", **headers}
        self.is_started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_started, self._exchange.status = True, message["status"]
            headers = MutableHeaders(raw=[*message.get("headers", [])])
            headers.update(self._headers)
            message = {**message, "headers": headers.raw}
        await self._send(message)


def as_api_error(error: BaseException, exchange: Exchange) -> ApiError:
    """Return what a client is told of an error. One that is our own fault is logged without its message.

    The message may hold a prompt, so the log says the error's type and where it was raised.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return _of_router(error, exchange)
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    logger.error(f"{exchange.request_id}: {type(error).__name__} at {where}")
    return ApiError(
        f"the server failed to answer. Its log says more under {exchange.request_id}.",
        "server_error",
        code="internal_error",
    )


def _of_router(error: HTTPException, exchange: Exchange) -> ApiError:
    path = printable(exchange.path)
    if error.status_code == 405:
        allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        return ApiError(
            f"{path} does not take {printable(exchange.method)} (expected {allowed}).",
            status=405,
            headers={"Allow": allowed},
        )
    return ApiError(f"there is nothing at {path}. GET /openapi.json lists all paths.", "not_found_error")


async def _refuse(error: ApiError, exchange: Exchange, receive: Receive, answer: _Answer) -> None:
    if answer.is_started:  # the connection is closed, which tells the client that the answer is not complete
        return
    headers, body = {**error.headers}, json.dumps(error.body()).encode()
    headers["content-type"] = "application/json"
    if not exchange.has_unread_body:
        await _send_whole(answer, error.status, headers, body)
        return
    headers["connection"] = "close"
    await _send_start(answer, error.status, headers, len(body))
    await answer({"type": "http.response.body", "body": body, "more_body": True})
    await _discard(receive)
    await answer({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_whole(answer: Send, status: int, headers: Mapping[str, str], body: bytes) -> None:
    await _send_start(answer, status, headers, len(body))
    await answer({"type": "http.response.body", "body": body, "more_body": False})


async def _send_start(answer: Send, status: int, headers: Mapping[str, str], length: int) -> None:
    # A 204 has no body, and so no length of it.
    known = headers if status == 204 else {**headers, "content-length": str(length)}
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in known.items()]
    await answer({"type": "http.response.start", "status": status, "headers": raw})


async def _discard(receive: Receive) -> None:
    total = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while total < _DISCARD_BYTES:
                message = await receive()
                total += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


# Who may ask


def check_size(scope: Scope) -> None:
    """Raise ApiError if a request's line and headers are too large."""
    pieces = [
        *(piece for header in scope["headers"] for piece in header),
        scope["raw_path"],
        scope["query_string"],
    ]
    if sum(map(len, pieces)) > HEADER_BYTES:
        raise ApiError(
            f"the header is larger than {HEADER_BYTES:,} bytes. Send fewer or shorter fields.",
            status=431,
            code="header_too_large",
        )


def check_host(headers: Headers, hosts: Collection[str]) -> None:
    """Raise ApiError unless the request is addressed to an IP address, to localhost, or to one of the names.

    A web page can make its own name point to this machine (DNS rebinding), but it cannot hide that name.
    """
    text = headers.get("host")
    if text is None:  # HTTP/1.0, which no browser speaks
        return
    host = _without_port(text)
    if _is_address(host) or host == "localhost" or host.endswith(".localhost") or host in hosts:
        return
    raise ApiError(
        f"this server is not known as {printable(host)}. Use its IP address, or start it with --allowed-host.",
        "permission_error",
        code="host_not_allowed",
    )


def check_origin(method: str, headers: Headers, origins: Collection[str]) -> None:
    """Raise ApiError if a web page of another origin wants more than to read, which its browser prevents."""
    origin = headers.get("origin")
    if origin is None or method in ("GET", "HEAD") or origin.lower() in origins:
        return
    if _netloc(origin) == headers.get("host", "").lower():
        return
    raise ApiError(
        f"pages of {printable(origin)} may not use this server. Start it with --allowed-origin to let them.",
        "permission_error",
        code="origin_not_allowed",
    )


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _preflight_headers(headers: Headers) -> dict[str, str]:
    found = {
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": "authorization, content-type, x-api-key",
        "access-control-max-age": "600",
    }
    if headers.get("access-control-request-private-network") == "true":
        found["access-control-allow-private-network"] = "true"
    # openai's client for browsers sends headers of its own (x-stainless-...).
    if asked := headers.get("access-control-request-headers"):
        found["access-control-allow-headers"] = asked
    return found


def _without_port(text: str) -> str:
    host = text.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Keys:
    """The API keys. Without any, everyone who reaches the server may use it."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    @classmethod
    def read(cls, file: str | None) -> "Keys":
        """Return the keys of the file and of the environment. Raises ConfigError."""
        keys = [key] if (key := os.environ.get(KEY_VARIABLE, "").strip()) else []
        if file is not None:
            try:
                lines = Path(file).read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError) as error:
                raise ConfigError(f"--api-key-file {file} cannot be read: {error}") from error
            found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not found:
                raise ConfigError(f"--api-key-file {file} holds no key. Write one per line.")
            keys += found
        if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
            raise ConfigError("an API key holds spaces or characters that are not ASCII. Use letters and digits.")
        return cls(keys)

    @property
    def count(self) -> int:
        """Number of keys."""
        return len(self._keys)

    @property
    def are_needed(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._keys)

    def namespace(self, headers: Headers) -> str:
        """Return whose cached prompts a request may use: "" without keys. Raises ApiError for a wrong key."""
        if not self._keys:
            return ""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = (token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")).encode()
        # All keys are compared, so that the time does not tell which one is near.
        if not sum(hmac.compare_digest(given, key) for key in self._keys):
            raise ApiError(
                "the API key is missing or wrong. Send it as the header Authorization: Bearer KEY.",
                "authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return hashlib.sha256(given).hexdigest()[:16]


# What they send


def check_content_type(headers: Headers) -> None:
    """Raise ApiError unless the body is JSON. A form of a web page can send text, but not JSON."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = headers.get("content-encoding", "identity").lower()
    if kind != "application/json" or encoding != "identity":
        found = kind if kind != "application/json" else f"{kind} in {encoding}"
        raise ApiError(
            f"Content-Type: {printable(found) or 'it is missing'} (expected application/json).",
            status=415,
            code="unsupported_media_type",
        )


async def read_body(headers: Headers, receive: Receive, exchange: Exchange, limit: int, seconds: float) -> bytes:
    """Return a request's body. Raises ApiError if it is too large or slow, ClientLeftError if it ends early."""
    if int(headers.get("content-length", "0")) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while exchange.has_unread_body:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeftError
                body += message.get("body", b"")
                if len(body) > limit:
                    raise _too_large(limit)
                exchange.has_unread_body = message.get("more_body", False)
    except TimeoutError:
        raise ApiError(
            f"the body did not arrive within {seconds:g} seconds. Send it again.",
            "timeout_error",
            code="body_timeout",
            status=408,
        ) from None
    return bytes(body)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        f"the body is larger than {limit:,} bytes. Send less, or start the server with a larger --max-body-mb.",
        status=413,
        code="request_too_large",
    )


def read_json(body: bytes, *, depth: int) -> dict[str, Any]:
    """Return the object that a body holds. Raises ApiError for anything that is not strictly JSON, or too deep."""
    try:
        text = body.decode("utf-8")
        value = load_json(text)
        if exceeds_depth(value, depth - 1):  # its levels are those below the value
            raise _invalid_json(f"is nested more than {depth} levels deep")
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # finds lone surrogates
    except RecursionError:
        raise _invalid_json(f"is nested more than {depth} levels deep") from None
    except UnicodeDecodeError:
        raise _invalid_json("is not UTF-8") from None
    except UnicodeEncodeError:
        raise _invalid_json("holds a lone surrogate, which is half a character") from None
    except ValueError as error:
        raise _invalid_json(f"is not valid JSON: {printable(str(error), most=200)}") from None
    if not isinstance(value, dict):
        raise _invalid_json("is not a JSON object")
    return value


def _invalid_json(what: str) -> ApiError:
    return ApiError(f"the body {what}.", code="invalid_json")
