"""Who may ask, and what a body must be: on real sockets."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from handspun.config.serving import KEY_VARIABLE, ServeOptions
from handspun.errors import ConfigError
from handspun.serve.app import Service, make_app
from handspun.serve.errors import ApiError
from handspun.serve.guard import Keys, read_json
from handspun.serve.metrics import Metrics
from handspun.serve.routes import ABOUT
from handspun.serve.worker import Worker
from serving import Client, Kitchen, ask, served, wait_until

OPTIONS = ServeOptions(
    host="::1",
    allowed_host=("Chat.example",),
    allowed_origin=("https://app.example",),
    max_body_mb=0.01,
    read_seconds=0.3,
    log_requests=False,
)
KEYS = ["first-key", "second-key"]


@pytest.fixture(scope="module")
def port(worker: Worker, kitchen: Kitchen) -> Iterator[int]:
    service = Service(OPTIONS, Metrics(), Keys([]), worker=worker)
    with served(make_app(service, [*ABOUT, *kitchen.endpoints()]), OPTIONS) as port:
        yield port


@pytest.fixture(scope="module")
def guarded(worker: Worker, kitchen: Kitchen) -> Iterator[int]:
    service = Service(OPTIONS, Metrics(), Keys(KEYS), worker=worker)
    with served(make_app(service, [*ABOUT, *kitchen.endpoints()]), OPTIONS) as port:
        yield port


def test_hosts_that_are_answered_and_those_that_are_not(port: int) -> None:
    """A web page whose name was pointed at this machine sends that name."""
    good = ["127.0.0.1", f"127.0.0.1:{port}", "[::1]:80", "localhost", "LOCALHOST:1", "x.localhost", "10.1.2.3"]
    good += ["chat.example", "chat.example.", "CHAT.EXAMPLE:8000"]
    bad = [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "notlocalhost",
        "chat.example.evil",
        "a b",
    ]
    found = {host: ask(port, "/health", None, ("Host", host)) for host in good + bad}
    assert {host: reply.status for host, reply in found.items() if reply.status != 200} == dict.fromkeys(bad, 403)
    assert {found[host].code for host in bad} == {"host_not_allowed"}


def test_a_request_of_http_1_0_needs_no_host(port: int) -> None:
    with Client(port) as client:
        client.send(b"GET /health HTTP/1.0\r\n\r\n")
        assert client.reply().status == 200


def test_a_foreign_page_may_not_post(port: int) -> None:
    own = [f"http://127.0.0.1:{port}", "https://app.example"]
    foreign = ["https://evil.example", "null", "http://127.0.0.1:1", f"http://127.0.0.1:{port}.evil.example", "%["]
    found = {origin: ask(port, "/cook", {"text": "Hi"}, ("Origin", origin)) for origin in own + foreign}
    assert {origin for origin, reply in found.items() if reply.status == 200} == {*own}
    assert {found[origin].code for origin in foreign} == {"origin_not_allowed"}


def test_only_an_allowed_page_may_read(port: int) -> None:
    foreign = ask(port, "/health", None, ("Origin", "https://evil.example"))
    assert [name for name in foreign.headers if name.startswith("access-control")] == []
    own = ask(port, "/health", None, ("Origin", "https://app.example"))
    assert own.headers["access-control-allow-origin"] == "https://app.example"
    assert own.headers["vary"] == "Origin"
    refused = ask(port, "/cook", b"{", ("Origin", "https://app.example"))
    assert refused.status == 400
    assert refused.headers["access-control-allow-origin"] == "https://app.example"


def test_preflights_are_answered_for_allowed_origins_only(port: int) -> None:
    asked = [
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "content-type,x-stainless-os"),
        ("Access-Control-Request-Private-Network", "true"),
    ]
    good = ask(port, "/cook", None, ("Origin", "https://app.example"), *asked, method="OPTIONS")
    assert good.status == 204
    assert good.headers["access-control-allow-headers"] == "content-type,x-stainless-os"
    assert good.headers["access-control-allow-private-network"] == "true"
    bad = ask(port, "/cook", None, ("Origin", "https://evil.example"), *asked, method="OPTIONS")
    assert bad.code == "origin_not_allowed"
    assert [name for name in bad.headers if name.startswith("access-control")] == []
    assert ask(port, "/cook", None, method="OPTIONS").status == 405


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (("Authorization", ""), 401),
        (("Authorization", "Bearer wrong"), 401),
        (("Authorization", "Bearer first-ke"), 401),
        (("Authorization", "Bearer "), 401),
        (("Authorization", "Basic first-key"), 401),
        (("Authorization", "first-key"), 401),
        (("X-Api-Key", "wrong"), 401),
        (("Authorization", "Bearer first-key"), 200),
        (("Authorization", "bearer second-key"), 200),
        (("X-Api-Key", "second-key"), 200),
    ],
)
def test_keys(guarded: int, header: tuple[str, str], expected: int) -> None:
    reply = ask(guarded, "/cook", {"text": "Hi"}, header)
    assert reply.status == expected
    if expected == 401:
        assert reply.code == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    else:
        assert reply.json() == {"text": "Hi"}


def test_every_route_but_health_needs_a_key(guarded: int) -> None:
    paths = ["/health", "/metrics", "/version", "/v1/models", "/v1/models/tiny"]
    assert {path: ask(guarded, path).status for path in paths} == {**dict.fromkeys(paths, 401), "/health": 200}
    assert ask(guarded, "/nowhere").status == 404


def test_each_key_has_a_namespace_of_its_own(guarded: int, kitchen: Kitchen) -> None:
    for key in (*KEYS, KEYS[0]):
        ask(guarded, "/cook", {}, ("X-Api-Key", key))
    first, second, again = kitchen.namespaces[-3:]
    assert first == again != second
    assert not any(key in name for key in KEYS for name in kitchen.namespaces)


def test_keys_read_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("# of the team\nfirst-key\n\n  second-key  \n")
    monkeypatch.setenv(KEY_VARIABLE, "third-key")
    keys = Keys.read(str(file))
    names = {keys.namespace(Headers({"x-api-key": f"{name}-key"})) for name in ("first", "second", "third")}
    assert len(names) == 3
    with pytest.raises(ApiError):
        keys.namespace(Headers({"x-api-key": "# of the team"}))


@pytest.mark.parametrize(("text", "expected"), [("# none\n", "holds no key"), ("two words\n", "holds spaces")])
def test_keys_read_refuses_a_file_without_keys(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        Keys.read(str(file))


def test_keys_read_refuses_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.read(str(tmp_path / "keys.txt"))


@pytest.mark.parametrize(
    ("kind", "status"),
    [("application/json", 200), ("application/json; charset=utf-8", 200), ("APPLICATION/JSON", 200), ("", 415),
     ("text/plain", 415), ("application/x-www-form-urlencoded", 415), ("application/jsonp", 415)],
)  # fmt: skip
def test_only_json_is_read(port: int, kind: str, status: int) -> None:
    assert ask(port, "/cook", b'{"text": "Hi"}', ("Content-Type", kind)).status == status


def test_a_compressed_body_is_refused(port: int) -> None:
    assert ask(port, "/cook", b"{}", ("Content-Encoding", "gzip")).code == "unsupported_media_type"


LIMIT = OPTIONS.max_body_bytes


def of_size(size: int) -> bytes:
    return json.dumps({"text": "x" * (size - len('{"text": ""}'))}).encode()


def test_a_body_at_the_limit_is_read_and_one_beyond_it_is_not(port: int) -> None:
    assert ask(port, "/cook", of_size(LIMIT)).status == 200
    assert ask(port, "/cook", of_size(LIMIT + 1)).code == "request_too_large"


def test_a_large_body_is_refused_before_it_is_sent(port: int) -> None:
    with Client(port) as client:
        client.send(client.head("POST", "/cook", b"", [("Content-Length", str(10**9))]))
        reply = client.reply()
    assert (reply.status, reply.headers["connection"]) == (413, "close")


def test_a_body_without_a_length_is_refused_while_it_is_read(port: int) -> None:
    with Client(port) as client:
        client.send(client.head("POST", "/cook", b"", [("Content-Length", ""), ("Transfer-Encoding", "chunked")]))
        piece = b"x" * 4096
        for _ in range(LIMIT // len(piece) + 1):
            client.send(b"1000\r\n" + piece + b"\r\n")
        assert client.reply().code == "request_too_large"


def test_a_chunked_body_is_read(port: int) -> None:
    with Client(port) as client:
        client.send(client.head("POST", "/cook", b"", [("Content-Length", ""), ("Transfer-Encoding", "chunked")]))
        client.send(b'9\r\n{"text": \r\n5\r\n"Hi"}\r\n0\r\n\r\n')
        assert client.reply().json() == {"text": "Hi"}


def test_a_client_that_sends_all_of_a_large_body_still_gets_the_answer(port: int) -> None:
    """Closing the socket at once would reset it, and take the answer with it."""
    with Client(port) as client:
        reply = client.request("POST", "/cook", of_size(5 * 2**20))
    assert reply.code == "request_too_large"


def test_a_body_that_does_not_come_is_given_up(port: int, kitchen: Kitchen) -> None:
    before = kitchen.begun
    with Client(port) as client:
        client.send(client.head("POST", "/cook", b"", [("Content-Length", "100")]) + b'{"text": ')
        reply = client.reply()
    assert (reply.status, reply.code) == (408, "body_timeout")
    assert kitchen.begun == before


def test_a_client_that_leaves_while_it_sends_is_forgotten(port: int, kitchen: Kitchen) -> None:
    before = kitchen.begun
    with Client(port) as client:
        client.send(client.head("POST", "/cook", b"", [("Content-Length", "100")]) + b'{"text": ')
    assert ask(port, "/cook", {"text": "Hi"}).status == 200
    assert kitchen.begun == before + 1


def test_a_refused_request_leaves_the_connection_usable_if_its_body_was_read(port: int) -> None:
    with Client(port) as client:
        assert client.request("POST", "/cook", b"[]").status == 400
        assert client.request("POST", "/cook", b"{}").status == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b'{"text": "Hi"} x', "is not valid JSON"),
        (b"{'text': 'Hi'}", "is not valid JSON"),
        (b'{"seconds": NaN}', "NaN is not a JSON number"),
        (b'{"seconds": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"seconds": 1e999}', "is not valid JSON"),
        (b'{"seconds": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"text": "a", "text": "b"}', "has 'text' twice"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"\\udc00": 1}', "lone surrogate"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        ('{"text": "ä"}'.encode("utf-16"), "is not UTF-8"),
        (b"[]", "is not a JSON object"),
        (b'"text"', "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b'{"text": ' + b"[" * 64 + b"]" * 64 + b"}", "more than 64 levels deep"),
        (b"[" * 4000 + b"]" * 4000, "more than 64 levels deep"),
        (b'{"a":' * 1500 + b"1" + b"}" * 1500, "more than 64 levels deep"),
    ],
)
def test_bodies_that_are_no_strict_json_are_refused(port: int, body: bytes, message: str) -> None:
    reply = ask(port, "/cook", body)
    assert (reply.status, reply.code) == (400, "invalid_json")
    assert message in reply.json()["error"]["message"]


def test_read_json_at_its_depth() -> None:
    assert read_json(b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}", depth=64)["a"] is not None
    assert read_json(b'{"a": "\\ud83d\\ude00 \\u0000"}', depth=64) == {"a": "\N{GRINNING FACE} \0"}


def test_a_null_character_is_served(port: int) -> None:
    assert ask(port, "/cook", {"text": "a\0b"}).json() == {"text": "a\0b"}


def test_unknown_paths_and_methods_are_errors_in_the_usual_form(port: int) -> None:
    missing = ask(port, "/v1/embeddings", {"input": "Hi"})
    assert (missing.status, missing.json()["error"]["type"]) == (404, "not_found_error")
    wrong = ask(port, "/cook")
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["type"] == "invalid_request_error"
    assert ask(port, "/health", {}).headers["allow"] == "GET, HEAD"
    assert ask(port, "/cook/", {}).status == 404  # no redirect, which would repeat the Host header
    assert ask(port, "/v1/../../etc/passwd").status == 404


def test_every_answer_has_an_id_and_forbids_guessing_its_type(port: int) -> None:
    replies = [ask(port, "/cook", {}), ask(port, "/nowhere"), ask(port, "/health"), ask(port, "/cook", b"x")]
    assert len({reply.headers["x-request-id"] for reply in replies}) == 4
    assert {reply.headers["x-content-type-options"] for reply in replies} == {"nosniff"}


def test_many_clients_at_once_get_their_own_answers(port: int) -> None:
    answers = {}

    def client(number: int) -> None:
        answers[number] = [ask(port, "/cook", {"text": f"{number}.{turn}"}).json()["text"] for turn in range(5)]

    threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: [f"{number}.{turn}" for turn in range(5)] for number in range(16)}


def test_a_reset_connection_does_no_harm(port: int, kitchen: Kitchen) -> None:
    ended, client, body = kitchen.ended, Client(port), b'{"events": 1000, "seconds": 0.01}'
    client.send(client.head("POST", "/cook", body) + body)
    client.read_until(b"data: ")
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    client.socket.close()
    wait_until(lambda: kitchen.ended == ended + 1)
    assert ask(port, "/health").status == 200
