"""The server's life: loading, ready, draining; in this process and in one of its own."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from handspun.cli import main
from handspun.config.serving import ServeOptions
from handspun.display import log_lines_to
from handspun.errors import ConfigError, ModelError
from handspun.models.load import ChatModel
from handspun.serve.connection import listen
from handspun.serve.server import serve
from serving import Client, ask, server_process, wait_until

LONG = {"prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True, "seed": 1}


def free_port() -> int:
    with listen("127.0.0.1", 0) as sock:
        port: int = sock.getsockname()[1]
    return port


def serve_while(options: ServeOptions, load: Callable[[str], ChatModel], act: Callable[[], None]) -> None:
    """Serve in this thread, which gets the signals, while another acts and at last sends one."""
    errors = list[BaseException]()

    def client() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=client)
    thread.start()
    serve(options, load)
    thread.join()
    if errors:
        raise errors[0]


def is_ready(port: int) -> bool:
    try:
        return ask(port, "/health").status == 200
    except ConnectionError:
        return False


def test_serve_says_503_until_the_models_have_answered_once(
    chat: ChatModel, capfd: pytest.CaptureFixture[str]
) -> None:
    port, may_load, seen = free_port(), threading.Event(), list[tuple[int, str | None]]()

    def load(_: str) -> ChatModel:
        assert may_load.wait(10)
        return chat

    def act() -> None:
        wait_until(lambda: is_up(port))
        for path, body in (("/health", None), ("/v1/models", None), ("/v1/completions", LONG)):
            reply = ask(port, path, body)
            seen.append((reply.status, reply.code))
        assert ask(port, "/metrics").status == 200
        may_load.set()
        wait_until(lambda: is_ready(port), seconds=20)
        assert [one["id"] for one in ask(port, "/v1/models").json()["data"]] == ["base", "tuned"]
        os.kill(os.getpid(), signal.SIGINT)

    options = ServeOptions(model=("base=x", "tuned=y"), port=port, kv_tokens=2048)
    serve_while(options, load, act)
    assert seen == [(503, "loading")] * 3
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ready: ")]
    assert re.fullmatch(
        rf"ready: http://127\.0\.0\.1:{port}/v1 \(without an API key\), "
        r"models: base \(float32\), tuned \(float32\), memory \d+\.\d GB, "
        rf"up to 32 answers at a time and 64 requests waiting; chat page: http://127\.0\.0\.1:{port}/",
        line,
    )


def is_up(port: int) -> bool:
    try:
        return ask(port, "/health").status in (200, 503)
    except ConnectionError:
        return False


def test_serve_ends_with_the_error_of_a_model_that_cannot_be_loaded() -> None:
    def load(path: str) -> ChatModel:
        raise ModelError(f"there is no model {path}")

    port = free_port()
    with pytest.raises(ModelError, match="there is no model nothing"):
        serve(ServeOptions(model=("nothing",), port=port), load)
    with listen("127.0.0.1", port):  # the port is free again
        pass


def test_serve_refuses_a_port_that_is_taken_before_it_loads_anything() -> None:
    def load(path: str) -> ChatModel:
        raise AssertionError(f"{path} was loaded")

    with listen("127.0.0.1", 0) as sock, pytest.raises(ConfigError, match="cannot be opened"):
        serve(ServeOptions(model=("any",), port=sock.getsockname()[1]), load)


def test_sigterm_lets_a_running_answer_end_and_refuses_new_ones(chat: ChatModel) -> None:
    port, bodies = free_port(), list[bytes]()

    def act() -> None:
        wait_until(lambda: is_ready(port), seconds=20)
        with streaming(port) as client:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: ask(port, "/health").json()["status"] == "draining")
            assert ask(port, "/v1/completions", LONG).code == "draining"
            bodies.append(b"".join(client.chunks()))
        wait_until(lambda: not is_up(port))

    serve_while(ServeOptions(model=("tiny",), port=port, kv_tokens=2048), lambda _: chat, act)
    assert bodies[0].endswith(b"data: [DONE]\n\n")
    assert b'"finish_reason": "length"' in bodies[0]
    assert b'"error"' not in bodies[0]


def test_sigterm_ends_a_running_answer_with_an_error_after_the_time_to_drain(chat: ChatModel) -> None:
    port, bodies = free_port(), list[bytes]()

    def act() -> None:
        wait_until(lambda: is_ready(port), seconds=20)
        with streaming(port) as client:
            os.kill(os.getpid(), signal.SIGTERM)
            bodies.append(b"".join(client.chunks()))
        wait_until(lambda: not is_up(port))

    options = ServeOptions(model=("tiny",), port=port, kv_tokens=2048, drain_seconds=0)
    serve_while(options, lambda _: chat, act)
    error, done = bodies[0].decode().split("\n\n")[-3:-1]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "draining"
    assert done == "data: [DONE]"


def test_sighup_reads_the_keys_again(chat: ChatModel, tmp_path: Path) -> None:
    port, file, lines, taken = free_port(), tmp_path / "keys.txt", list[str](), list[list[str]]()
    file.write_text("old\n")

    def try_keys() -> None:
        statuses = {
            key: ask(port, "/v1/models", None, ("X-Api-Key", key)).status for key in ("old", "new", "newer")
        }
        taken.append([key for key, status in statuses.items() if status == 200])

    def hang_up_until(text: str) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        wait_until(lambda: text in lines[-1])

    def act() -> None:
        wait_until(lambda: is_ready(port), seconds=20)
        try_keys()
        file.write_text("new\nnewer\n")
        hang_up_until("read again: 2 keys")
        try_keys()
        file.write_text("")
        hang_up_until("keys.txt holds no key. Write one per line. The keys stay as they were.")
        try_keys()
        os.kill(os.getpid(), signal.SIGTERM)

    options = ServeOptions(model=("tiny",), port=port, kv_tokens=512, api_key_file=str(file), log_requests=False)
    with log_lines_to(lines.append):
        serve_while(options, lambda _: chat, act)
    assert taken == [["old"], ["new", "newer"], ["new", "newer"]]


@contextmanager
def streaming(port: int) -> Iterator[Client]:
    """A client whose long answer has begun."""
    body = json.dumps(LONG).encode()
    with Client(port) as client:
        client.send(client.head("POST", "/v1/completions", body) + body)
        client.read_until(b"\r\n\r\n")
        yield client


@pytest.mark.slow
def test_a_process_exits_with_0_after_a_signal(tiny_folder: Path) -> None:
    with server_process(tiny_folder) as (running, port):
        with streaming(port) as client:
            running.send_signal(signal.SIGINT)
            assert b"".join(client.chunks()).endswith(b"data: [DONE]\n\n")
        assert running.wait(10) == 0
        assert "finishing 1 request, 30 seconds at most" in running.stderr.read()


@pytest.mark.slow
def test_a_second_signal_ends_a_process_at_once(tiny_folder: Path) -> None:
    with server_process(tiny_folder) as (running, port), streaming(port):
        running.send_signal(signal.SIGTERM)
        wait_until(lambda: ask(port, "/health").status == 503)
        begun = time.monotonic()
        running.send_signal(signal.SIGTERM)
        assert running.wait(5) == 128 + signal.SIGTERM
        assert time.monotonic() - begun < 1


def test_the_command_reports_all_wrong_options_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "M", "--port", "99999", "--host", "0.0.0.0", "--max-rows", "0"]) == 2
    printed = capsys.readouterr().err
    assert "--port is 99999: expected at least 0 and at most 65,535." in printed
    assert "--max-rows is 0: expected at least 1." in printed


def test_the_command_refuses_other_machines_without_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "M", "--host", "0.0.0.0"]) == 2
    assert "--host 0.0.0.0 lets other machines in, and there is no API key." in capsys.readouterr().err
