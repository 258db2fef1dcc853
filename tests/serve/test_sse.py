"""Streams as bytes, and what happens to a handler whose client leaves."""

import json
import time
from collections.abc import Iterator

import pytest

from handspun.config.serving import ServeOptions
from handspun.serve.app import Service, make_app
from handspun.serve.guard import Keys
from handspun.serve.metrics import Metrics
from handspun.serve.sse import to_event, to_json
from handspun.serve.worker import Worker
from serving import Client, Kitchen, ask, served, wait_until

OPTIONS = ServeOptions(ping_seconds=0.1, log_requests=False)


@pytest.fixture(scope="module")
def service(worker: Worker) -> Service:
    return Service(OPTIONS, Metrics(), Keys([]), worker=worker)


@pytest.fixture(scope="module")
def port(service: Service, kitchen: Kitchen) -> Iterator[int]:
    with served(make_app(service, kitchen.endpoints()), OPTIONS) as port:
        yield port


def test_to_event_writes_one_line_of_json() -> None:
    assert to_event({"a": "ä\n"}) == 'data: {"a": "ä\\n"}\n\n'.encode()
    assert to_event({"type": "x.y"}, "x.y") == b'event: x.y\ndata: {"type": "x.y"}\n\n'


def test_to_json_has_no_end_of_a_line_for_any_client() -> None:
    """httpx, among others, cuts lines where str.splitlines does."""
    text = "".join(map(chr, range(0x20))) + "\x7f\x85\u2028\u2029"
    found = to_json({"text": text}).decode()
    assert len(found.splitlines()) == 1
    assert json.loads(found) == {"text": text}


def test_to_json_refuses_what_json_has_no_word_for() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"logprob": float("-inf")})


def test_a_stream_is_written_byte_for_byte(port: int) -> None:
    reply = ask(port, "/cook", {"text": "ä", "events": 2})
    assert reply.body == (
        b'data: {"type": "piece", "number": 0, "text": "\xc3\xa4"}\n\n'
        b'data: {"type": "piece", "number": 1, "text": "\xc3\xa4"}\n\n'
        b"data: [DONE]\n\n"
    )
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"


def test_a_stream_of_named_events_has_no_done(port: int) -> None:
    reply = ask(port, "/named", {"text": "a", "events": 1})
    assert reply.body == b'event: piece\ndata: {"type": "piece", "number": 0, "text": "a"}\n\n'


def test_a_stream_without_events_ends(port: int) -> None:
    assert ask(port, "/cook", {"events": 0}).body == b"data: [DONE]\n\n"


def test_each_event_is_sent_at_once(port: int) -> None:
    body = b'{"events": 3, "seconds": 0.08}'
    with Client(port) as client:
        client.send(client.head("POST", "/cook", body) + body)
        client.read_until(b"\r\n\r\n")
        times = []
        for _ in client.chunks():
            times.append(time.monotonic())
    assert len(times) == 4  # [DONE] comes with the last event or after it
    assert times[1] - times[0] > 0.04
    assert times[2] - times[1] > 0.04


def test_two_requests_share_a_connection(port: int) -> None:
    with Client(port) as client:
        assert client.request("POST", "/cook", b'{"events": 1}').body.endswith(b"data: [DONE]\n\n")
        assert client.request("POST", "/cook", b'{"text": "Hi"}').json() == {"text": "Hi"}


def test_pings_fill_a_silence_and_clients_skip_them(port: int) -> None:
    body = ask(port, "/cook", {"events": 1, "seconds": 0.35}).body
    assert body.startswith(b": ping\n\n: ping\n\n")
    assert body.endswith(b'data: {"type": "piece", "number": 0, "text": ""}\n\ndata: [DONE]\n\n')


def test_a_plain_answer_has_no_pings(port: int) -> None:
    assert ask(port, "/cook", {"text": "Hi", "seconds": 0.25}).body == b'{"text": "Hi"}'


def test_a_refusal_before_the_first_event_is_a_plain_answer(port: int) -> None:
    reply = ask(port, "/cook", {"text": "refused", "events": 2, "fails_at": 0})
    assert (reply.status, reply.code) == (429, "queue_full")


def test_an_error_in_the_middle_is_an_event_and_the_stream_ends(port: int) -> None:
    reply = ask(port, "/cook", {"text": "refused", "events": 3, "fails_at": 1})
    first, second, done = reply.body.decode().split("\n\n")[:3]
    assert reply.status == 200
    assert json.loads(first.removeprefix("data: "))["number"] == 0
    assert json.loads(second.removeprefix("data: ")) == {
        "error": {"message": "the queue is full.", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    }
    assert done == "data: [DONE]"


def test_an_error_among_named_events_has_their_form(port: int) -> None:
    reply = ask(port, "/named", {"text": "refused", "events": 3, "fails_at": 1})
    name, data = reply.body.decode().split("\n\n")[1].split("\n")
    found = json.loads(data.removeprefix("data: "))
    assert name == "event: error"
    assert found.pop("error")["code"] == "queue_full"
    what = {"code": "queue_full", "message": "the queue is full.", "param": None}
    assert found == {"type": "error", "sequence_number": 1, **what}


@pytest.mark.parametrize("text", ["oops", "panic"])
@pytest.mark.parametrize("order", [{"fails_at": 0}, {"fails_at": 1, "events": 3}])
def test_a_fault_is_told_without_its_message_and_the_server_goes_on(
    port: int, order: dict[str, int], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A panic in llguidance is no Exception."""
    reply = ask(port, "/cook", {"text": text, **order})
    assert reply.status == (200 if "events" in order else 500)
    assert '"code": "internal_error"' in reply.body.decode()
    printed = capfd.readouterr().err
    for told in (reply.body.decode(), printed):
        assert "secret prompt" not in told
        assert "panicked" not in told
    assert reply.headers["x-request-id"] in printed
    assert f"{'BaseException' if text == 'panic' else 'ValueError'} at serving.py" in printed
    assert ask(port, "/cook", {"text": "Hi"}).status == 200


@pytest.mark.parametrize(
    "order", [{"seconds": 60}, {"seconds": 60, "events": 1}, {"seconds": 0.01, "events": 9999}]
)
def test_a_handler_ends_when_its_client_leaves(
    port: int, service: Service, kitchen: Kitchen, order: dict[str, float]
) -> None:
    """Plain, before the first event, and between events."""
    begun, ended, body = kitchen.begun, kitchen.ended, json.dumps(order).encode()
    with Client(port) as client:
        client.send(client.head("POST", "/cook", body) + body)
        wait_until(lambda: kitchen.begun == begun + 1)
        assert kitchen.ended == ended
    wait_until(lambda: kitchen.ended == ended + 1, seconds=1)
    wait_until(lambda: not service.answering, seconds=1)
    assert 'status="499"' in service.metrics.text(engine_up=True)


def test_a_client_that_leaves_disturbs_no_other(port: int) -> None:
    body = b'{"events": 20, "seconds": 0.01, "text": "a"}'
    with Client(port) as other, Client(port) as one:
        one.send(one.head("POST", "/cook", body) + body)
        one.read_until(b'"number": 3')
        other.send(other.head("POST", "/cook", body) + body)
        other.read_until(b'"number": 3')
        other.socket.close()
        rest = one.read_until(b"[DONE]")
    assert rest.count(b"data: ") == 17  # 16 events and the end


def test_a_pipelined_request_is_answered_after_the_first(port: int) -> None:
    first, second = b'{"text": "1", "seconds": 0.05}', b'{"text": "2"}'
    with Client(port) as client:
        client.send(client.head("POST", "/cook", first) + first + client.head("POST", "/cook", second) + second)
        assert [client.reply().json()["text"] for _ in range(2)] == ["1", "2"]


@pytest.mark.parametrize(("order", "status"), [({"seconds": 60}, 503), ({"seconds": 0.02, "events": 9999}, 200)])
def test_running_answers_end_with_an_error_when_the_server_stops(
    worker: Worker, kitchen: Kitchen, order: dict[str, float], status: int
) -> None:
    service = Service(OPTIONS, Metrics(), Keys([]), worker=worker)
    begun, body = kitchen.begun, json.dumps(order).encode()
    with served(make_app(service, kitchen.endpoints()), OPTIONS) as port, Client(port) as client:
        client.send(client.head("POST", "/cook", body) + body)
        wait_until(lambda: kitchen.begun == begun + 1)
        if "events" in order:
            time.sleep(0.1)  # let some be written
        kitchen.loop.call_soon_threadsafe(service.stop_answers)
        reply = client.reply()
    assert reply.status == status
    assert '"code": "draining"' in reply.body.decode()
    if status == 200:
        assert reply.body.endswith(b"}\n\ndata: [DONE]\n\n")
    else:
        assert reply.headers["retry-after"] == "5"
