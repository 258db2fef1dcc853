"""Thousands of requests, cancelled and refused ones among them: nothing grows, nothing stays, nobody waits."""

import json
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from handspun.config.serving import ServeOptions
from live import CHAT, COMPLETIONS, ENDLESS, HI, Live, Remote, live, live_chat
from recorded_requests import RECORDED
from serving import Client, ask, server_process, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    options = ServeOptions(log_requests=False, send_seconds=2, read_seconds=60, max_connections=400)
    with live(live_chat(), options, queue=8, cache_bytes=2**18) as server:
        yield server


@dataclass
class Held:
    """What a process holds: bytes of its own memory, swapped out or not, threads, and open files."""

    memory: int
    threads: int
    files: int

    @classmethod
    def by(cls, process: int) -> "Held":
        """Read what a process holds now."""
        folder = Path("/proc") / str(process)
        lines = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        memory, swapped, threads = (int(lines[name].split()[0]) for name in ("RssAnon", "VmSwap", "Threads"))
        return cls((memory + swapped) * 1024, threads, len(os.listdir(folder / "fd")))


def mixed(server: Remote, seed: int) -> int:
    """One request: answered, streamed, refused, or left in the middle. Returns the status that came, or 0."""
    choice = random.Random(seed)
    path, body = choice.choice(RECORDED)
    kind = choice.randrange(6)
    if kind == 0:
        return server.post(path, **{**body, "temperature": 9}).status
    if kind == 1:
        return ask(server.port, path, b"{" * choice.randrange(1, 100)).status
    if kind == 2:
        with server.begin(COMPLETIONS, **ENDLESS, stream=choice.random() < 0.5):
            time.sleep(choice.random() / 20)
        return 0
    if kind == 3 and "best_of" not in body and not ("echo" in body and "logprobs" in body):
        return server.post(path, **body, stream=True).status
    return server.post(path, **body).status


def test_nothing_grows_over_thousands_of_mixed_requests(tiny_folder: Path) -> None:
    """In a process of its own: the threads of 32 clients would hold more memory with time than the server does."""
    options = ("--no-log-requests", "--no-page", "--max-queue", "8", "--cache-mb", "1", "--kv-tokens", "16000")
    with server_process(tiny_folder, *options) as (running, port), ThreadPoolExecutor(32) as pool:
        server = Remote(port)

        def held_after(seeds: range) -> Held:
            statuses = set(pool.map(lambda seed: mixed(server, seed), seeds))
            assert statuses == {0, 200, 400, 429}
            wait_until(server.is_idle, 10)
            return Held.by(running.pid)

        # The allocator fills up in the first thousand requests and a little later on. A leak goes on and on.
        rounds = [held_after(range(1000))]
        while len(rounds) < 2 or rounds[-1].memory - rounds[-2].memory > 750 * 1024:
            assert len(rounds) < 10, f"more than a kilobyte per request in every round: {rounds}"
            rounds.append(held_after(range(1000 * len(rounds), 1000 * len(rounds) + 750)))
        assert rounds[-1].threads <= rounds[0].threads
        assert rounds[-1].files <= rounds[0].files + 2
        assert ask(port, "/health").status == 200


def test_those_who_never_read_are_cut_off_and_others_are_answered(server: Live) -> None:
    body = json.dumps({**ENDLESS, "stream": True, "logprobs": 20, "return_token_ids": True}).encode()
    with ExitStack() as stack:
        for _ in range(3):
            client = stack.enter_context(Client(server.port, receive_buffer=2048))
            client.send(client.head("POST", COMPLETIONS, body) + body)
        wait_until(lambda: server.figure("handspun_running") == 3)
        began = time.monotonic()
        assert server.post(CHAT, messages=HI, max_tokens=4).status == 200
        assert time.monotonic() - began < 3
        wait_until(server.is_idle, 30)


def test_connections_that_say_nothing_or_half_a_word_harm_nobody(server: Live) -> None:
    with ExitStack() as stack:
        for number in range(300):
            client = stack.enter_context(Client(server.port))
            if number % 3:
                client.send(client.head("POST", CHAT, b"x" * 100)[: -1 - number % 30])
        assert server.post(CHAT, messages=HI, max_tokens=4).status == 200
    for _ in range(50):  # gone with a reset, in the middle of a body
        with Client(server.port) as client:
            client.send(client.head("POST", CHAT, b"x" * 100) + b"x")
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert server.post(CHAT, messages=HI, max_tokens=4).status == 200


def test_three_hundred_clients_are_answered_or_told_to_come_back(server: Live) -> None:
    body = json.dumps({"messages": HI, "max_tokens": 8, "seed": 1, "stream": True}).encode()
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(server.port)) for _ in range(300)]
        for client in clients:
            client.socket.settimeout(60)
            client.send(client.head("POST", CHAT, body) + body)
        replies = [client.reply() for client in clients]
    assert {reply.status for reply in replies} == {200, 429}
    assert all("retry-after" in reply.headers for reply in replies if reply.status == 429)
    texts = set()
    for reply in replies:
        if reply.status == 200:
            events = [json.loads(line[6:]) for line in reply.body.decode().split("\n\n")[:-2]]
            texts.add("".join(event["choices"][0]["delta"].get("content", "") for event in events))
    assert len(texts) == 1
    wait_until(server.is_idle)
