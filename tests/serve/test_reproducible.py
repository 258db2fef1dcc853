"""An answer with int8 weights is the same to the byte, whatever else runs, and however its prompt was cut."""

import json
import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from handspun.models.load import ChatModel
from live import Live, live, live_chat
from recorded_requests import RECORDED


@pytest.fixture(scope="module")
def served_model() -> ChatModel:
    return live_chat()


@pytest.fixture(scope="module")
def alone(served_model: ChatModel) -> list[bytes]:
    """The answers of a server that has one request at a time and remembers nothing."""
    with live(served_model, cache_bytes=0) as server:
        return [answer(server, number) for number in range(len(RECORDED))]


def answer(server: Live, number: int, **more: Any) -> bytes:
    """An answer's bytes, without what is new each time: its id, when, its calls' ids, what the cache knew."""
    path, body = RECORDED[number]
    reply = server.post(path, **body, **more)
    assert reply.status == 200, reply.body
    text = re.sub(rb'"(?:id|created)": (?:"[^"]*"|\d+|null),? ?', b"", reply.body)
    return re.sub(rb'"cached_tokens": \d+', b"", text)


def together(server: Live, numbers: Sequence[int]) -> dict[int, bytes]:
    with ThreadPoolExecutor(len(numbers)) as pool:
        return dict(zip(numbers, pool.map(lambda number: answer(server, number), numbers), strict=True))


def differing(found: dict[int, bytes], expected: list[bytes]) -> list[Any]:
    return [RECORDED[number] for number, text in found.items() if text != expected[number]]


def test_there_are_32_requests_with_different_answers(alone: list[bytes]) -> None:
    assert len(alone) == 32
    assert len(set(alone)) == 32
    assert all(json.loads(text)["choices"] for text in alone)


@pytest.mark.parametrize(
    ("cache_bytes", "step_seconds"), [(0, 0.02), (2**22, 0.02), (0, 0.1), (2**22, 0.1), (0, 1.0), (2**22, 1.0)]
)
def test_answers_are_the_same_together(
    served_model: ChatModel, alone: list[bytes], cache_bytes: int, step_seconds: float
) -> None:
    order = list(range(len(RECORDED)))
    random.Random(f"{cache_bytes} {step_seconds}").shuffle(order)
    with live(served_model, cache_bytes=cache_bytes, step_seconds=step_seconds) as server:
        assert differing(together(server, order), alone) == []
        order.reverse()
        assert differing(together(server, order), alone) == []  # from the cache now, if there is one
        hits = server.figure("handspun_cached_tokens_total")
    assert (hits > 0) == (cache_bytes > 0)


def test_answers_are_the_same_in_pieces_of_a_stream(served_model: ChatModel, alone: list[bytes]) -> None:
    with live(served_model) as server:
        for number, (path, body) in enumerate(RECORDED):
            if "best_of" in body or ("echo" in body and "logprobs" in body):  # neither can be streamed
                continue
            whole = json.loads(alone[number])["choices"]
            texts = [""] * len(whole)
            for event in server.events(path, **body):
                for choice in event["choices"]:
                    texts[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content") or ""
            assert texts == [one["text"] if "text" in one else one["message"]["content"] or "" for one in whole], (
                body
            )


@pytest.mark.slow
def test_answers_are_the_same_in_five_rounds(served_model: ChatModel, alone: list[bytes]) -> None:
    order = list(range(len(RECORDED)))
    with live(served_model, step_seconds=0.02, rows=7, cache_bytes=2**20) as server:
        for seed in range(5):
            random.Random(seed).shuffle(order)
            assert differing(together(server, order), alone) == []
