"""Clients that leave the whole product: what they asked for is given up within a step."""

import json
import re

import pytest

from serving import Client, ask, wait_until

LONG = {"model": "tuned", "prompt": "Hi", "max_tokens": 450, "ignore_eos": True, "n": 4}


def metric(port: int, name: str) -> float:
    text = ask(port, "/metrics").body.decode()
    return sum(float(value) for value in re.findall(rf"^handspun_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("stream", [False, True])
def test_closing_a_connection_frees_the_rows(product: int, stream: bool) -> None:
    cancelled, body = metric(product, "cancelled_total"), json.dumps({**LONG, "stream": stream}).encode()
    with Client(product) as client:
        client.send(client.head("POST", "/v1/completions", body) + body)
        wait_until(lambda: metric(product, "running") > 0 and metric(product, "kv_tokens_used") > 0)
    wait_until(lambda: metric(product, "running") == 0, seconds=1)
    wait_until(lambda: metric(product, "kv_tokens_used") == 0, seconds=1)
    assert metric(product, "cancelled_total") == cancelled + 1
    short = {"model": "tuned", "prompt": "Hi", "max_tokens": 2, "ignore_eos": True}
    assert ask(product, "/v1/completions", short).json()["usage"]["completion_tokens"] == 2


def test_the_same_seed_answers_the_same_after_others_have_left(product: int) -> None:
    short = {"model": "base", "prompt": "Tell me", "max_tokens": 12, "seed": 7, "temperature": 1}
    alone = ask(product, "/v1/completions", short).json()["choices"]
    body = json.dumps({**LONG, "stream": True}).encode()
    with Client(product) as client:
        client.send(client.head("POST", "/v1/completions", body) + body)
        client.read_until(b"data: ")
    assert ask(product, "/v1/completions", short).json()["choices"] == alone
