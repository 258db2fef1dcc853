"""What other servers got wrong, as their users reported it, asked of ours over real sockets."""

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from asking import served_chat
from handspun.config.serving import ServeOptions
from handspun.decoding.constraint import Constraint
from handspun.display import log_lines_to
from live import CHAT, COMPLETIONS, ENDLESS, HI, Live, live, live_chat
from serving import ask, longest_gap, wait_until

LONG_PROMPT = "Give me a brief introduction to the city. " * 60
SHORT = {"messages": HI, "max_tokens": 6, "seed": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(live_chat(), ServeOptions(log_requests=False, max_connections=400), rows=2) as server:
        yield server


@pytest.fixture(scope="module")
def long() -> Iterator[Live]:
    options = ServeOptions(log_requests=False, max_connections=400, max_tokens=10_000)
    chat = served_chat(max_position_embeddings=16_384)
    with live(chat, options, kv_tokens=100_000, cache_bytes=0, queue=200, step_seconds=0.03) as server:
        yield server


def streamed_text(events: list[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


@pytest.mark.parametrize("stream", [True, False])
def test_rows_and_memory_are_free_once_a_client_has_left(server: Live, stream: bool) -> None:
    before = server.figure("handspun_cancelled_total")
    with server.begin(COMPLETIONS, **ENDLESS, stream=stream):
        wait_until(lambda: server.figure("handspun_running") == 1)
        assert server.figure("handspun_kv_tokens_used") > 0
    wait_until(server.is_idle, 1)
    assert server.figure("handspun_cancelled_total") == before + 1


def test_a_queued_client_that_leaves_changes_no_other_answer(server: Live) -> None:
    body = {**ENDLESS, "max_tokens": 300, "min_tokens": 300}
    expected = server.answer(COMPLETIONS, **body)["choices"]
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(server.answer, COMPLETIONS, **body) for _ in range(2)]
        wait_until(lambda: server.figure("handspun_running") == 2)
        with server.begin(COMPLETIONS, **ENDLESS):
            wait_until(lambda: server.figure("handspun_waiting") == 1)
        wait_until(lambda: server.figure("handspun_waiting") == 0, 1)
        assert [future.result()["choices"] for future in running] == [expected, expected]


def prompt_of_8k(number: int) -> list[int]:
    """Token ids that begin like no other number's."""
    return [65 + number, *[65 + (number + position) % 60 for position in range(8000)]]


def test_a_client_that_leaves_and_asks_again_piles_up_no_work(long: Live) -> None:
    for number in range(20):
        with long.begin(COMPLETIONS, prompt=prompt_of_8k(number), max_tokens=1):
            time.sleep(0.05)
    began = time.monotonic()
    assert long.post(CHAT, **SHORT).status == 200
    assert time.monotonic() - began < 1
    wait_until(long.is_idle)


def test_streams_go_on_while_four_prompts_of_8k_come_in(long: Live) -> None:
    body = {**ENDLESS, "max_tokens": 200, "min_tokens": 200, "stream": True}
    with ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        streams = [stack.enter_context(long.begin(COMPLETIONS, **body)) for _ in range(4)]
        for stream in streams:
            stream.read_until(b"\r\n\r\n")
        gaps = [pool.submit(longest_gap, stream) for stream in streams]
        asked = [
            pool.submit(long.post, COMPLETIONS, prompt=prompt_of_8k(number), max_tokens=1) for number in range(4)
        ]
        assert all(future.result().status == 200 for future in asked)
        # A step may take 0.03 seconds here. Without a limit to steps, the gap is longer than this.
        assert max(future.result() for future in gaps) < 0.15


def test_two_hundred_requests_that_are_left_cost_nothing(long: Live) -> None:
    """Ten fit into the KV cache at a time, and the others wait."""
    before = long.figure("handspun_cancelled_total")
    body = {**ENDLESS, "max_tokens": 10_000, "min_tokens": 10_000}
    clients = [long.begin(COMPLETIONS, **body) for _ in range(200)]
    wait_until(lambda: long.figure("handspun_running") + long.figure("handspun_waiting") == 200)
    for client in clients:
        client.socket.close()
    began = time.monotonic()
    wait_until(lambda: long.post(CHAT, **SHORT).status == 200)
    assert time.monotonic() - began < 5
    wait_until(long.is_idle)
    assert long.figure("handspun_cancelled_total") == before + 200


def test_any_stop_string_cuts_streams_and_answers_alike(server: Live) -> None:
    hidden = {"320": 5, "321": 5, "322": 5}  # special tokens, which are not shown, come often
    body = {"messages": HI, "max_tokens": 40, "seed": 3, "ignore_eos": True, "logit_bias": hidden}
    whole = server.answer(CHAT, **body)["choices"][0]["message"]["content"]
    for start in range(0, len(whole) - 8, 7):
        for length in (1, 3, 8):
            stop = whole[start : start + length]
            if not stop.strip() or "\ufffd" in stop:  # bytes that are no character match nothing
                continue
            answer = server.answer(CHAT, **body, stop=[stop])["choices"][0]
            events = server.events(CHAT, **body, stop=[stop])
            assert streamed_text(events) == answer["message"]["content"] == whole[: whole.index(stop)]
            assert answer["finish_reason"] == events[-1]["choices"][0]["finish_reason"] == "stop"


def test_usage_counts_the_prompt_once_and_all_answers(server: Live) -> None:
    ids = server.answer("/apply-template", messages=HI)["tokens"]
    body = {**SHORT, "n": 2, "return_token_ids": True}
    answer = server.answer(CHAT, **body)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(ids)
    assert usage["completion_tokens"] == sum(len(choice["token_ids"]) for choice in answer["choices"])
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
    *_, last = server.events(CHAT, **SHORT, n=2, stream_options={"include_usage": True})
    assert {**last["usage"], "prompt_tokens_details": 0} == {**usage, "prompt_tokens_details": 0}


NUMBERS = [-1, 0, 1, None, 2, 10**8, 10**30, 1.0, 1.5, True, "1", [], {}]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", ["max_tokens", "n", "top_k", "min_tokens", "num_beams", "seed"])
def test_any_number_is_answered_or_refused(server: Live, name: str, path: str, stream: bool) -> None:
    prompt = {"messages": HI} if path == CHAT else {"prompt": "Hi"}
    for value in NUMBERS:
        body = {**prompt, "max_tokens": 2, name: value, "stream": stream}
        if name == "max_tokens":
            body["stop"] = list("aeiou <\ufffd")
        reply = server.post(path, **body)
        assert reply.status in (200, 400), (value, reply.body)
        if reply.status == 400:
            assert reply.code
        elif stream:
            assert reply.body.endswith(b"data: [DONE]\n\n")


MESSAGES: list[Any] = [
    [], None, [None], "Hi", {}, [[]], [1], [{}], [{"role": "user"}], [{"content": "Hi"}],
    [{"role": "user", "content": None}], [{"role": "user", "content": 5}], [{"role": "god", "content": "Hi"}],
    [{"role": "user", "content": [None]}], [{"role": "user", "content": {"a": 1}}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}]}],
    [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": 1, "arguments": "{}"}}]}],
    [{"role": "tool", "content": "x", "tool_call_id": 5}],
]  # fmt: skip


@pytest.mark.parametrize("messages", MESSAGES, ids=str)
def test_messages_that_are_none_are_refused_by_name(server: Live, messages: Any) -> None:
    reply = server.post(CHAT, messages=messages)
    assert reply.status == 400, reply.body
    assert reply.json()["error"]["param"].startswith("messages")


BODIES: list[dict[str, Any]] = [
    {"logit_bias": {"99999": 1}}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"a": 1}}, {"logit_bias": {"1": 101}},
    {"stop_token_ids": [99999]}, {"stop_token_ids": [-1]}, {"top_logprobs": 5},
    {"logprobs": True, "top_logprobs": 21}, {"logprobs": True, "top_logprobs": -1}, {"tools": []},
    {"tool_choice": "required"},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice":
        {"type": "function", "function": {"name": "g"}}},
    {"response_format": {"type": "json_schema"}}, {"response_format": {"type": "json_schema", "json_schema": {}}},
    {"response_format": {"type": "xml"}}, {"stream_options": {"include_usage": True}}, {"stop": [""]},
    {"stop": ["a"] * 17}, {"stop": "a" * 257}, {"n": 17}, {"n": 16384}, {"model": "../../etc/passwd"},
    {"model": "/etc/passwd"}, {"chat_template": "{{ 1 }}"}, {"guided_json": "/etc/passwd"},
    {"guided_json": "x.json"}, {"structured_outputs": {"json": "/etc/passwd"}}, {"functions": []},
    {"grammar": "start: x"},
    {"temperature": 2.1}, {"temperature": -0.1}, {"top_p": 0}, {"top_p": 1.1},
    {"max_tokens": 1, "max_completion_tokens": 2},
    {"guided_regex": "("}, {"tempature": 1},
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda body: json.dumps(body)[:60])
def test_what_cannot_be_is_refused_with_the_field_s_name(server: Live, body: dict[str, Any]) -> None:
    error = server.post(CHAT, **{**SHORT, **body}).json()["error"]
    assert error["type"] in ("invalid_request_error", "not_found_error"), error
    assert re.split(r"[.\[]", error["param"])[0] in body, error
    assert "root:" not in error["message"]


@pytest.mark.parametrize("deep", ["[", '{"a":', '{"messages":['])
def test_deep_bodies_are_refused(server: Live, deep: str) -> None:
    assert ask(server.port, CHAT, (deep * 3000).encode()).status == 400


def test_deep_schemas_tools_and_arguments_are_refused(server: Live) -> None:
    deep: Any = {}
    for _ in range(55):
        deep = {"properties": {"a": deep}} if _ % 2 else {"items": deep}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a":' * 4000 + "1" + "}" * 4000}}
    for body in (
        {"guided_json": deep},
        {"tools": [tool], "tool_choice": "required"},
        {"messages": [*HI, {"role": "assistant", "tool_calls": [call]}]},
    ):
        assert server.post(CHAT, **{**SHORT, **body}).status == 400


def test_conversations_with_the_same_beginning_never_mix() -> None:
    def body(number: int) -> dict[str, Any]:
        secret = f"{LONG_PROMPT[:400]} The word is {number:04}."
        return {
            "messages": [{"role": "user", "content": secret}],
            "max_tokens": 8,
            "temperature": 0,
            "logprobs": True,
        }

    with live(live_chat(), cache_bytes=0) as cold:
        expected = [cold.answer(CHAT, **body(number))["choices"] for number in range(16)]
    with live(live_chat(), cache_bytes=2**18) as warm, ThreadPoolExecutor(16) as pool:
        for _ in range(63):  # a thousand requests
            found = pool.map(lambda number: warm.answer(CHAT, **body(number))["choices"], range(16))
            assert list(found) == expected


def test_a_key_s_prompts_are_known_to_that_key_alone() -> None:
    body = {**SHORT, "messages": [{"role": "user", "content": LONG_PROMPT}]}
    with live(live_chat(), keys=["one", "two"]) as server:

        def known(key: str, **more: Any) -> int:
            reply = ask(server.port, CHAT, {**body, **more}, ("Authorization", f"Bearer {key}"))
            found: int = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            return found

        assert known("one") == known("two") == 0
        assert known("one") > 64
        assert known("one", cache_salt="s") == 0
        assert known("two", cache_salt="s") == 0
        assert known("one", cache_prompt=False) == known("one", cache_prompt=False, seed=2) == 0
        assert known("one", cache_prompt=True) > 64


def test_a_fault_of_a_step_ends_one_stream_with_an_error_and_done(
    server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """No Exception, as llguidance's."""

    apply = Constraint.apply

    def fails_later(self: Constraint, logits: Any, generated: Any) -> Any:
        if max(map(len, generated)) >= 5:
            raise Panic("a secret of the prompt")
        return apply(self, logits, generated)

    expected = server.answer(CHAT, **SHORT)["choices"]
    monkeypatch.setattr(Constraint, "apply", fails_later)
    body = {"messages": HI, "guided_regex": "[a-z]{40}", "max_tokens": 60, "seed": 1}
    *pieces, error = server.events(CHAT, **body)
    assert (error["error"]["type"], error["error"]["code"]) == ("server_error", "internal_error")
    assert "secret" not in json.dumps(error)
    assert len(pieces) > 2
    assert server.post(CHAT, **body).status == 500
    assert server.answer(CHAT, **SHORT)["choices"] == expected
    assert ask(server.port, "/health").status == 200
    wait_until(server.is_idle)


def test_a_prompt_that_is_too_long_is_refused_with_both_counts(server: Live) -> None:
    ids = [65] * 4097
    reply = server.post(COMPLETIONS, prompt=ids)
    assert (reply.status, reply.code) == (400, "context_length_exceeded")
    assert "4,097" in reply.json()["error"]["message"]
    assert "4,096" in reply.json()["error"]["message"]
    fits = server.answer(COMPLETIONS, prompt=ids[:4090], max_tokens=100, ignore_eos=True)
    assert (fits["usage"]["completion_tokens"], fits["choices"][0]["finish_reason"]) == (6, "length")


def test_a_refusal_comes_at_once(server: Live) -> None:
    bodies: tuple[dict[str, Any], ...] = (
        {"n": 16_384},
        {"best_of": 10**6},
        {"stop": ["a"] * 400_000},  # more would be a body that is too large
        {"messages": HI * 30_000},
        {"logit_bias": dict.fromkeys(map(str, range(50_000)), 1)},
        {"bad_words": [5] * 50_000},
        {"tools": [{}] * 50_000},
    )

    def seconds(data: bytes) -> float:
        """Processor time of all threads but the client's: other work on the machine does not count."""
        began = time.process_time() - time.thread_time()
        assert ask(server.port, CHAT, data).status == 400
        return time.process_time() - time.thread_time() - began

    for body in bodies:
        data = json.dumps({**SHORT, **body}).encode()
        assert min(seconds(data) for _ in range(5)) < 0.05, data[:80]


def test_a_neighbor_s_tokens_come_while_hostile_grammars_are_read(server: Live) -> None:
    hostile = ["(a|a)*" * 30 + "b", "((a{1,1000}){1,1000}){1,1000}", "(([a-z])+.)+[A-Z]([a-z])+" * 20]
    body = {**ENDLESS, "max_tokens": 800, "min_tokens": 800, "stream": True}
    with server.begin(COMPLETIONS, **body) as neighbor, ThreadPoolExecutor(3) as pool:
        neighbor.read_until(b"\r\n\r\n")
        asked = [pool.submit(server.post, CHAT, **SHORT, guided_regex=regex) for regex in hostile]
        assert longest_gap(neighbor) < 0.5
        assert {future.result().status for future in asked} <= {200, 400}


def test_a_request_is_one_line_of_the_log_whatever_it_asks() -> None:
    bodies: tuple[dict[str, Any], ...] = (
        {"max_tokens": 10**6, "stop": ["e"]},
        {"repetition_penalty": 1.3},
        {"temperature": 0, "top_k": 5},
    )
    lines = list[str]()
    with live(live_chat(), ServeOptions()) as server, log_lines_to(lines.append):
        for body in bodies:
            assert server.post(CHAT, **{**SHORT, **body}).status == 200
        wait_until(lambda: len(lines) == len(bodies))
    assert all("POST /v1/chat/completions 200" in line for line in lines)


def test_two_models_keep_their_token_tables(server: Live) -> None:
    body = {**SHORT, "guided_regex": "[a-z]{3}"}
    with live(live_chat(), names=("one", "two")) as both:
        texts = [
            both.answer(CHAT, **body, model=name)["choices"][0]["message"]["content"]
            for name in ("one", "two") * 3
        ]
    assert set(texts) == {server.answer(CHAT, **body)["choices"][0]["message"]["content"]}
