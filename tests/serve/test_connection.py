"""Clients that are slow, silent, or too many."""

import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from handspun.config.serving import ServeOptions
from handspun.errors import ConfigError
from handspun.serve.app import Service, make_app
from handspun.serve.connection import listen
from handspun.serve.guard import HEADER_BYTES, Keys
from handspun.serve.metrics import Metrics
from handspun.serve.routes import ABOUT
from handspun.serve.worker import Worker
from serving import Client, Kitchen, ask, served, wait_until

OPTIONS = ServeOptions(
    max_connections=4, read_seconds=0.3, send_seconds=0.4, keep_alive_seconds=1, log_requests=False
)


@pytest.fixture
def port(worker: Worker, kitchen: Kitchen) -> Iterator[int]:
    service = Service(OPTIONS, Metrics(), Keys([]), worker=worker)
    with served(make_app(service, [*ABOUT, *kitchen.endpoints()]), OPTIONS) as port:
        yield port


def seconds_until_closed(client: Client) -> float:
    begun = time.monotonic()
    assert client.is_closed()
    return time.monotonic() - begun


@pytest.mark.parametrize("sent", [b"", b"POST /cook HTTP/1.1\r\nHost: x\r\n"])
def test_a_client_that_sends_no_whole_header_is_cut_off(port: int, sent: bytes) -> None:
    with Client(port) as client:
        client.send(sent)
        assert 0.2 < seconds_until_closed(client) < 2


def test_a_header_that_trickles_is_cut_off(port: int) -> None:
    begun = time.monotonic()
    with Client(port) as client, suppress(ConnectionError):
        client.send(b"GET /health HTTP/1.1\r\n")
        while time.monotonic() - begun < 5:
            client.send(b"A: b\r\n")
            time.sleep(0.05)
    assert 0.2 < time.monotonic() - begun < 2


def test_a_second_header_that_trickles_is_cut_off_too(port: int) -> None:
    with Client(port) as client:
        assert client.request("GET", "/health").status == 200
        client.send(b"GET /health HTTP/1.1\r\n")
        assert 0.2 < seconds_until_closed(client) < 2


def test_an_idle_connection_is_closed(port: int) -> None:
    with Client(port) as client:
        assert client.request("GET", "/health").status == 200
        assert 0.8 < seconds_until_closed(client) < 3


def test_an_answer_that_takes_long_is_not_cut_off(port: int) -> None:
    with Client(port) as client:
        assert client.request("POST", "/cook", b'{"seconds": 1.2, "text": "Hi"}').json() == {"text": "Hi"}


def test_a_large_header_is_refused(port: int) -> None:
    filler = ("X", "x" * (HEADER_BYTES - 100))
    assert ask(port, "/health", None, filler).status == 200
    reply = ask(port, "/health", None, ("X", "x" * HEADER_BYTES))
    # It depends on the pieces in which it comes who notices.
    assert (reply.status, reply.code) in [(431, "header_too_large"), (400, "invalid_http")]


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"])
def test_what_is_no_http_is_told_so(port: int, sent: bytes) -> None:
    """TLS, a fragment, and HTTP/1.1 without a Host."""
    with Client(port) as client:
        client.send(sent)
        reply = client.reply()
    assert (reply.status, reply.code) == (400, "invalid_http")


def test_a_client_that_reads_nothing_is_cut_off(port: int, kitchen: Kitchen) -> None:
    """Its handler ends, and others are not kept waiting."""
    begun, ended = kitchen.begun, kitchen.ended
    body = b'{"events": 1000000, "text": "' + b"x" * 10_000 + b'"}'
    with Client(port, receive_buffer=4096) as client:
        client.send(client.head("POST", "/cook", body) + body)
        wait_until(lambda: kitchen.begun == begun + 1)
        assert ask(port, "/cook", {"text": "Hi"}).status == 200
        wait_until(lambda: kitchen.ended == ended + 2, seconds=5)
        assert b"[DONE]" not in client.read_to_end()


def test_a_client_that_reads_slowly_but_steadily_gets_everything(port: int) -> None:
    body = b'{"events": 300, "text": "' + b"x" * 10_000 + b'"}'
    with Client(port, receive_buffer=65536) as client:
        client.send(client.head("POST", "/cook", body) + body)
        client.read_until(b"\r\n\r\n")
        total = 0
        for piece in client.chunks():
            total += len(piece)
            time.sleep(0.002)
    assert total > 3_000_000


def test_one_client_too_many_is_told_and_far_too_many_are_cut_off(port: int) -> None:
    clients = [Client(port) for _ in range(4)]
    assert clients[-1].request("GET", "/health").status == 200
    with Client(port) as fifth:
        reply = fifth.request("GET", "/health")
        assert (reply.status, reply.code) == (503, "too_many_connections")
        assert fifth.is_closed()
    more = [Client(port) for _ in range(5)]
    assert more[-1].is_closed()
    for client in clients + more:
        client.socket.close()
    wait_until(lambda: ask(port, "/health").status == 200)


def test_listen_refuses_a_port_that_is_taken() -> None:
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    with sock, pytest.raises(ConfigError, match=rf"--port {port} cannot be opened: Address already in use"):
        listen("127.0.0.1", port)


def test_listen_refuses_an_address_of_another_machine() -> None:
    with pytest.raises(ConfigError, match=r"--host 203\.0\.113\.1 --port 8000 cannot be opened"):
        listen("203.0.113.1", 8000)


def test_listen_refuses_a_name_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"--host no\.such\.invalid"):
        listen("no.such.invalid", 8000)


def test_listen_takes_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    with listen("::1", 0) as sock:
        assert sock.getsockname()[1] > 0
