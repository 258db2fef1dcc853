"""Requests of all kinds in one loop: they join and leave at any step, and none changes another's answer."""

import random
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, get_type_hints

import pytest

from handspun.config import GenerationOptions
from handspun.decoding import scheduler as scheduler_module
from handspun.decoding.arguments import CallOptions, GenerateArguments
from handspun.decoding.engines.fused import FusedEngine
from handspun.decoding.generate import make_requests
from handspun.decoding.request import Request
from handspun.decoding.results import GenerationResult
from handspun.decoding.scheduler import BatchLimits, Scheduler
from handspun.models.fused import fused_weights
from handspun.models.load import ChatModel
from tiny import tiny_model, tiny_tokenizer

KINDS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    {"do_sample": True, "temperature": 1.5, "seed": 7, "num_return_sequences": 3},
    {"do_sample": True, "top_p": 0.9, "seed": 8, "logprobs": True},
    {"prompt_lookup_num_tokens": 4, "logprobs": True},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 4, "length_penalty": 0.6, "early_stopping": True},
    {"num_beams": 3, "num_return_sequences": 3, "repetition_penalty": 1.2},
    {"regex": "The answer is (yes|no)[.]"},
    {"explain": True, "max_new_tokens": 5},
]
TEXTS = ["Hi", "Tell me a joke. " * 3, "the the the the", "Say 3.", "joke", "abacabacab", "Hi", "a", "Well?", "b"]


@pytest.fixture(scope="module")
def int8_chat() -> ChatModel:
    """With heads of 32, so that the native kernels take part where they can be had."""
    model = tiny_model(
        "qwen2", initializer_range=0.1, hidden_size=64, num_attention_heads=2, num_key_value_heads=1
    )
    return ChatModel(model, tiny_tokenizer(), "tiny", fused_weights(model, int8=True))


def requests_for(chat: ChatModel) -> list[Request]:
    requests = []
    for text, kind in zip(TEXTS, KINDS, strict=True):
        own = {name: kind[name] for name in ("logprobs", "explain") if name in kind}
        options = {"max_new_tokens": 12, **{name: value for name, value in kind.items() if name not in own}}
        call = CallOptions(**own)
        requests += make_requests(chat, text, GenerationOptions(**options), call)
    return requests


def finished(steps: Sequence[tuple[Request, Any]]) -> dict[Request, list[GenerationResult]]:
    """The results by request, each checked to be what its chunks say in order."""
    texts: dict[tuple[Request, int], str] = {}
    results: dict[Request, list[GenerationResult]] = {}
    for request, chunk in steps:
        name = (request, chunk.return_index)
        texts[name] = texts.get(name, "") + chunk.text
        if chunk.result is not None:
            assert chunk.result.text == texts[name]
            results.setdefault(request, []).append(chunk.result)
    return {request: sorted(found, key=lambda result: result.return_index) for request, found in results.items()}


def alone(chat: ChatModel, request: Request) -> list[GenerationResult]:
    scheduler = Scheduler(chat)
    scheduler.submit(request)
    steps: list[tuple[Request, Any]] = []
    while not scheduler.is_idle:
        steps += scheduler.step()
    return finished(steps)[request]


@pytest.mark.parametrize("seed", range(4))
def test_step_answers_as_alone_whatever_else_is_decoded(
    seed: int, int8_chat: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8: every number is the same. Requests join at random steps; prompts go through in pieces."""
    monkeypatch.setattr(scheduler_module, "_PROMPT_TOKENS", 8)
    requests, dice = requests_for(int8_chat), random.Random(seed)
    expected = {request: alone(int8_chat, request) for request in requests}
    explained = [result for request, results in expected.items() if request.explain for result in results]
    assert [len(result.explanation or []) for result in explained] == [5]
    waiting, steps = dice.sample(requests, len(requests)), list[tuple[Request, Any]]()
    scheduler = Scheduler(int8_chat, BatchLimits(rows=dice.choice([4, 9, 32])))
    while waiting or not scheduler.is_idle:
        for _ in range(dice.choice([0, 0, 1, 3])):
            if waiting:
                scheduler.submit(waiting.pop())
        if not scheduler.is_idle:
            steps += scheduler.step()
    assert finished(steps) == expected


@pytest.mark.parametrize("kind", ["qwen2", "other"])
def test_step_mixes_all_kinds_of_requests_in_float(kind: str) -> None:
    """The same tokens as alone. "other" is decoded by transformers' forward, whose rows share a padded batch."""
    model = tiny_model("qwen2", initializer_range=0.3)
    model.config.model_type = kind  # type: ignore[misc]  # decides the engine
    chat = ChatModel(model, tiny_tokenizer(), "tiny")
    requests = requests_for(chat)
    expected = {request: [result.token_ids for result in alone(chat, request)] for request in requests}
    scheduler, steps = Scheduler(chat), list[tuple[Request, Any]]()
    for request in requests:
        scheduler.submit(request)
    while not scheduler.is_idle:
        steps += scheduler.step()
    found = {request: [result.token_ids for result in results] for request, results in finished(steps).items()}
    assert found == expected


@pytest.mark.parametrize(
    ("limits", "joined"),
    [({}, 3), ({"tokens": 30}, 3), ({"tokens": 29}, 2), ({"rows": 2}, 2), ({"tokens": 5}, 1), ({"rows": 0}, 1)],
)
def test_step_admits_what_fits_by_hand(limits: dict[str, int], joined: int, int8_chat: ChatModel) -> None:
    """Three answers of 10 tokens, their prompts included: each that is admitted gets its first token."""
    scheduler = Scheduler(int8_chat, BatchLimits(**limits))
    for text in ("a", "b", "c"):
        [request] = make_requests(int8_chat, text, GenerationOptions(), CallOptions(chat=False))
        own = replace(request, max_new_tokens=10 - len(request.prompt_token_ids))
        scheduler.submit(own)
    assert len(scheduler.step()) == joined


@pytest.mark.parametrize("steps_before", [0, 1, 2, 6])
@pytest.mark.parametrize("victim", range(len(KINDS)), ids=lambda number: ",".join(KINDS[number]) or "greedy")
def test_cancel_ends_one_request_and_frees_its_rows(
    victim: int, steps_before: int, int8_chat: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 0 steps it waits, after 1 or 2 its prompt may be half read, after 6 it is being answered."""
    monkeypatch.setattr(scheduler_module, "_PROMPT_TOKENS", 8)
    requests = requests_for(int8_chat)
    chosen, other = requests[victim], requests[(victim + 1) % len(requests)]
    scheduler = Scheduler(int8_chat)
    engine = scheduler._engine
    assert isinstance(engine, FusedEngine)
    steps: list[tuple[Request, Any]] = []
    for request in (chosen, other):
        scheduler.submit(request)
    for _ in range(steps_before):
        steps += scheduler.step()
    was_done = chosen in finished(steps)
    chunks = scheduler.cancel(chosen)
    steps += [(chosen, chunk) for chunk in chunks]
    results = finished(steps)[chosen]
    assert len(results) == chosen.options.num_return_sequences
    assert was_done or {result.finish_reason for result in results} == {"cancelled"}
    assert scheduler.cancel(chosen) == []
    while not scheduler.is_idle:
        steps += scheduler.step()
    assert finished(steps)[other] == alone(int8_chat, other)
    assert engine.cache._rows == {}


def test_generate_arguments_are_those_of_call_options_and_generation_options() -> None:
    """The type that editors read, and the dataclasses that hold the defaults, say the same."""
    options = {field.name for field in fields(GenerationOptions)}
    expected = get_type_hints(CallOptions) | {
        name: hint for name, hint in get_type_hints(GenerationOptions).items() if name in options
    }
    assert get_type_hints(GenerateArguments) == expected
