"""Real servers on real sockets: uvicorn in a thread, handlers without a model, and a client that speaks bytes."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import BaseModel, ConfigDict
from starlette.types import ASGIApp

from handspun.config.serving import ServeOptions
from handspun.serve.app import Endpoint
from handspun.serve.connection import HttpConfig, listen
from handspun.serve.errors import ApiError
from handspun.serve.served import Context


class Order(BaseModel):
    """What the handlers below are asked to do."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: str = ""
    events: int | None = None
    seconds: float = 0.0
    fails_at: int | None = None
    model: str = ""


@dataclass
class Kitchen:
    """Handlers, and what became of them."""

    begun: int = 0
    ended: int = 0
    namespaces: list[str] = field(default_factory=list)
    loop: asyncio.AbstractEventLoop | None = None

    async def cook(self, context: Context, order: Order) -> dict[str, Any] | AsyncIterator[dict[str, Any]]:
        """Answer with the text, or stream so many events, each after so many seconds; or fail."""
        context.log.update(model=order.model, prompt_tokens=len(order.text))
        self.namespaces.append(context.namespace)
        self.loop = asyncio.get_running_loop()
        if order.events is not None:
            self.begun += 1
            return self._events(order)
        self.begun += 1
        try:
            self._fail(order, 0)
            await asyncio.sleep(order.seconds)
        finally:
            self.ended += 1
        return {"text": order.text}

    async def _events(self, order: Order) -> AsyncIterator[dict[str, Any]]:
        try:
            for number in range(order.events or 0):
                await asyncio.sleep(order.seconds)
                self._fail(order, number)
                yield {"type": "piece", "number": number, "text": order.text}
        finally:
            self.ended += 1

    def _fail(self, order: Order, number: int) -> None:
        if order.fails_at == number:
            if order.text == "refused":
                raise ApiError("the queue is full.", "rate_limit_error", code="queue_full")
            if order.text == "panic":
                raise BaseException(f"panicked over {order.text}")
            raise ValueError(f"secret prompt {order.text}")

    def endpoints(self) -> list[Endpoint]:
        """The routes of these handlers."""
        table = {"/cook": False, "/named": True}
        return [
            Endpoint(path, "Cook.", handler=self.cook, body=Order, streams=True, is_named=is_named)
            for path, is_named in table.items()
        ]


@contextmanager
def served(app: ASGIApp, options: ServeOptions, port: int = 0) -> Iterator[int]:
    """Serve an application from a thread, and yield its port."""
    sock = listen("127.0.0.1", port)
    server = uvicorn.Server(HttpConfig(app, options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()
        assert not thread.is_alive()


@contextmanager
def server_process(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`handspun serve` in a process of its own, and its port."""
    command = [sys.executable, "-m", "handspun", "serve", str(folder), "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as running:
        try:
            assert running.stderr is not None
            lines = list[str]()
            while not (match := re.match(r"ready: http://127\.0\.0\.1:(\d+)/v1", lines[-1] if lines else "")):
                line = running.stderr.readline()
                assert line, lines
                lines.append(line)
            yield running, int(match[1])
        finally:
            running.kill()


def wait_until(is_so: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for something that must become true."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@dataclass
class Reply:
    """One answer as it came over the socket."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body's value."""
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """The error's code; the body must be an error in OpenAI's form."""
        error = self.json()["error"]
        assert set(error) >= {"message", "type", "param", "code"}
        found: str | None = error["code"]
        return found


class Client:
    """A connection that sends and receives bytes."""

    def __init__(self, port: int, *, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(10)
        try:
            self.socket.connect(("127.0.0.1", port))
        except OSError:
            self.socket.close()
            raise
        self._port, self._read = port, b""

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self.socket.sendall(data)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Sequence[tuple[str, str]] = ()
    ) -> Reply:
        """Send a request and return its answer."""
        self.send(self.head(method, path, body, headers) + (body or b""))
        return self.reply(has_body=method != "HEAD")

    def head(
        self, method: str, path: str, body: bytes | None = None, headers: Sequence[tuple[str, str]] = ()
    ) -> bytes:
        """Return a request's line and headers. Headers with the value "" are left out."""
        known = {"Host": f"127.0.0.1:{self._port}"}
        if body is not None:
            known |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in {**known, **dict(headers)}.items() if value)
        return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode()

    def reply(self, *, has_body: bool = True) -> Reply:
        """Read an answer."""
        head = self.read_until(b"\r\n\r\n").decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        status = int(first.split()[1])
        if not has_body or status == 204:
            return Reply(status, headers, b"")
        if "content-length" in headers:
            return Reply(status, headers, self.read(int(headers["content-length"])))
        if headers.get("transfer-encoding") == "chunked":
            return Reply(status, headers, b"".join(self.chunks()))
        return Reply(status, headers, self.read_to_end())

    def chunks(self) -> Iterator[bytes]:
        """Yield the pieces of a chunked body."""
        while size := int(self.read_until(b"\r\n"), 16):
            yield self.read(size)
            self.read(2)
        self.read(2)

    def read_until(self, end: bytes) -> bytes:
        """Read up to and with an end."""
        while end not in self._read:
            self._receive()
        at = self._read.index(end) + len(end)
        return self.read(at)

    def read(self, size: int) -> bytes:
        """Read so many bytes."""
        while len(self._read) < size:
            self._receive()
        found, self._read = self._read[:size], self._read[size:]
        return found

    def read_to_end(self) -> bytes:
        """Read until the server closes."""
        with suppress(ConnectionError):
            while True:
                self._receive()
        found, self._read = self._read, b""
        return found

    def is_closed(self) -> bool:
        """Wait for the server to close the connection. False if it sends something."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def _receive(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError(f"the server closed the connection after {self._read!r}")
        self._read += data


def longest_gap(client: Client) -> float:
    """Seconds of processor time between two chunks of a stream, at most.

    They are of the whole process, so that whatever holds up the engine counts, and other work on the machine does
    not.
    """
    newest, longest = time.process_time(), 0.0
    for _ in client.chunks():
        longest = max(longest, time.process_time() - newest)
        newest = time.process_time()
    return longest


def ask(port: int, path: str, body: Any = None, *headers: tuple[str, str], method: str = "") -> Reply:
    """Send one request on a connection of its own: POST if there is a body."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    with Client(port) as client:
        return client.request(method or ("GET" if data is None else "POST"), path, data, headers)
