"""What a server asks of the scheduler: a fixed cache, known beginnings, bounded steps, scores, lone faults."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from handspun.config import GenerationOptions
from handspun.decoding.arguments import CallOptions
from handspun.decoding.engines.fused import FusedEngine
from handspun.decoding.generate import make_requests
from handspun.decoding.prefix_cache import BLOCK
from handspun.decoding.processors import Processor
from handspun.decoding.request import Request
from handspun.decoding.results import GenerationResult
from handspun.decoding.scheduler import BatchLimits, Scheduler
from handspun.models.fused import fused_weights
from handspun.models.load import ChatModel
from tiny import tiny_model, tiny_tokenizer

OPENING = "You answer in one word. Be brief, be kind, be right, and never tell a joke that you do not know. " * 2


def float_model() -> Any:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_model("qwen2", initializer_range=0.1, max_position_embeddings=2048, **sizes)


@pytest.fixture(scope="module")
def chat() -> ChatModel:
    """int8 with heads of 32: logits depend neither on other rows nor on where prompts are cut."""
    model = float_model()
    return ChatModel(model, tiny_tokenizer(), "tiny", fused_weights(model, int8=True))


def request_for(chat: ChatModel, text: str, call: dict[str, Any] | None = None, **options: Any) -> Request:
    own = GenerationOptions(**{"max_new_tokens": 12, **options})
    [request] = make_requests(chat, text, own, CallOptions(chat=False, **(call or {})))
    return request


def run_all(scheduler: Scheduler, requests: Sequence[Request]) -> list[list[GenerationResult]]:
    for request in requests:
        scheduler.submit(request)
    found: dict[Request, list[GenerationResult]] = {request: [] for request in requests}
    while not scheduler.is_idle:
        for request, chunk in scheduler.step():
            if chunk.result is not None:
                found[request].append(chunk.result)
    return [sorted(found[request], key=lambda result: result.return_index) for request in requests]


def known(results: Sequence[Sequence[GenerationResult]]) -> list[int]:
    return [one.cached_tokens for answers in results for one in answers]


def without_count(results: Sequence[Sequence[GenerationResult]]) -> list[list[GenerationResult]]:
    return [[replace(one, cached_tokens=0) for one in answers] for answers in results]


def mixed_requests(chat: ChatModel) -> list[Request]:
    kinds: list[dict[str, Any]] = [
        {},
        {"do_sample": True, "seed": 3, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 4},
        {"regex": "(yes|no)[.]"},
        {"do_sample": True, "temperature": 1.4, "repetition_penalty": 1.2, "seed": 9},
    ]
    texts = [OPENING + "a", OPENING + "Say 3.", OPENING, OPENING[:150] + "b", OPENING + "a joke", "Hi"]
    requests = [
        request_for(chat, text, {"logprobs": True}, **kind) for text, kind in zip(texts, kinds, strict=True)
    ]
    return [replace(request, cache_namespace="a", top_logprobs=2) for request in requests]


@pytest.mark.parametrize("step_seconds", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("cache_bytes", [0, 2**16, 2**24])
def test_step_answers_the_same_bits_from_a_warm_cache_and_in_any_pieces(
    step_seconds: float, cache_bytes: int, chat: ChatModel
) -> None:
    requests, dice = mixed_requests(chat), random.Random(f"{step_seconds} {cache_bytes}")
    expected = [run_all(Scheduler(chat), [request])[0] for request in requests]
    limits = BatchLimits(tokens=8000, kv_tokens=8000, step_seconds=step_seconds, cache_bytes=cache_bytes)
    scheduler = Scheduler(chat, limits)
    for _ in range(3):
        order = dice.sample(range(len(requests)), len(requests))
        results = run_all(scheduler, [requests[i] for i in order])
        found = dict(zip(order, results, strict=True))
        assert without_count([found[i] for i in range(len(requests))]) == without_count(expected)
    if cache_bytes == 2**24:
        assert max(known(results)) >= 2 * BLOCK
    else:
        assert scheduler.cache_bytes() <= cache_bytes
    assert scheduler.kv_tokens() == (0, 8000)


def test_step_reads_only_what_is_new_of_a_second_turn(chat: ChatModel) -> None:
    """The first answer's own tokens are known too: in int8 they have the bits that reading them would give."""
    limits = BatchLimits(kv_tokens=4000, step_seconds=0.1, cache_bytes=2**24)
    scheduler = Scheduler(chat, limits)
    first = replace(
        request_for(chat, OPENING, max_new_tokens=2 * BLOCK, min_new_tokens=2 * BLOCK), cache_namespace="a"
    )
    [[answer]] = run_all(scheduler, [first])
    turn = answer.prompt_token_ids + answer.token_ids + first.prompt_token_ids[:9]
    second = replace(first, prompt_token_ids=turn, max_new_tokens=8)
    [[cold]] = run_all(Scheduler(chat), [second])
    [[warm]] = run_all(scheduler, [second])
    fed = len(answer.prompt_token_ids) + len(answer.token_ids) - 1
    assert warm.cached_tokens == fed // BLOCK * BLOCK
    assert replace(warm, cached_tokens=0) == cold
    [[other]] = run_all(scheduler, [replace(second, cache_namespace="b")])
    [[nobody]] = run_all(scheduler, [replace(second, cache_namespace=None)])
    assert known([[other], [nobody]]) == [0, 0]


def test_step_lets_the_second_of_two_equal_prompts_wait_for_the_first(chat: ChatModel) -> None:
    requests = [replace(request_for(chat, OPENING + end), cache_namespace="a") for end in ("x", "yz")]
    scheduler = Scheduler(chat, BatchLimits(kv_tokens=4000, step_seconds=1.0, cache_bytes=2**24))
    counts = known(run_all(scheduler, requests))
    assert counts == [0, len(requests[0].prompt_token_ids) // BLOCK * BLOCK]


def test_step_admits_only_what_has_room_in_a_fixed_cache(chat: ChatModel) -> None:
    """Each answer reserves its full length: two of 100 tokens fit into 250 slots, so the third waits."""
    requests = []
    for _ in range(3):
        request = request_for(chat, "Hi")
        requests.append(replace(request, max_new_tokens=100 - len(request.prompt_token_ids)))
    scheduler = Scheduler(chat, BatchLimits(tokens=10_000, kv_tokens=250))
    for request in requests:
        scheduler.submit(request)
    scheduler.step()
    assert scheduler.kv_tokens() == (200, 250)
    assert scheduler.waiting() == {requests[2]}
    scheduler.cancel(requests[0])
    scheduler.step()
    assert scheduler.waiting() == set()


def test_step_ends_a_request_that_has_no_room_at_all(chat: ChatModel) -> None:
    errors: list[BaseException] = []
    request = replace(request_for(chat, "Hi", max_new_tokens=500), on_error=errors.append)
    scheduler = Scheduler(chat, BatchLimits(tokens=10_000, kv_tokens=250))
    assert run_all(scheduler, [request]) == [[]]
    assert [type(error) for error in errors] == [MemoryError]


class Panic(BaseException):
    """As llguidance raises them: no Exception."""


def broken(after: int) -> Processor:
    """A processor that fails once an answer has this many tokens."""

    def apply(logits: torch.Tensor, rows: Sequence[Any]) -> torch.Tensor:
        if any(len(row.token_ids) >= after for row in rows):
            raise Panic("no more parents")
        return logits

    return Processor("regex", apply)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("after", [0, 3])
def test_step_ends_only_the_request_whose_processor_fails(after: int, beams: int, chat: ChatModel) -> None:
    errors: list[BaseException] = []
    others = [replace(one, on_error=errors.append) for one in mixed_requests(chat)]
    expected = run_all(Scheduler(chat), others)
    victim = request_for(chat, "Well?", num_beams=beams)
    failing = replace(victim, processors=(broken(after),), on_error=errors.append)
    scheduler = Scheduler(chat)
    *found, none = run_all(scheduler, [*others, failing])
    assert (found, none) == (expected, [])
    assert [type(error) for error in errors] == [Panic]
    assert isinstance(scheduler._engine, FusedEngine)
    assert scheduler._engine.cache._rows == {}


def test_step_ends_only_the_request_whose_forward_pass_fails(
    chat: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that fails in its middle has added tokens to all rows: they are taken back, and rows run alone."""
    errors: list[BaseException] = []
    others = [replace(one, on_error=errors.append) for one in mixed_requests(chat)]
    expected = run_all(Scheduler(chat), others)
    failing = replace(request_for(chat, "Well?"), on_error=errors.append)
    attention, marker = FusedEngine._attention, failing.prompt_token_ids
    scheduler = Scheduler(chat)
    forward, fed = scheduler._engine.forward, list[list[int]]()

    def watched(feeds: Any) -> torch.Tensor:
        fed[:] = [list(feed.token_ids) for feed in feeds]
        return forward(feeds)

    def failing_attention(self: FusedEngine, number: int, *rest: Any) -> torch.Tensor:
        if number == 1 and marker in fed:
            raise RuntimeError("injected")
        return attention(self, number, *rest)

    assert isinstance(scheduler._engine, FusedEngine)
    scheduler._engine.decoder = None  # from layer to layer: a native call does not end in its middle
    scheduler._engine.forward = watched  # type: ignore[method-assign]
    monkeypatch.setattr(FusedEngine, "_attention", failing_attention)
    *found, none = run_all(scheduler, [*others, failing])
    assert (found, none) == (expected, [])
    assert [str(error) for error in errors] == ["injected"]


def test_step_raises_the_error_of_a_request_that_takes_none(chat: ChatModel) -> None:
    request = replace(request_for(chat, "Well?"), processors=(broken(0),))
    with pytest.raises(Panic):
        run_all(Scheduler(chat), [request])


@pytest.mark.parametrize("kind", ["int8", "transformers"])
def test_prompt_logprobs_are_those_of_the_models_own_forward(kind: str, chat: ChatModel) -> None:
    """300 tokens and more, in pieces of 128; the first has none. max_new_tokens 0 answers nothing."""
    model = float_model()
    if kind == "transformers":
        model.config.model_type = "other"  # decides the engine
        chat = ChatModel(model, tiny_tokenizer(), "tiny")
    request = request_for(chat, OPENING * 3, {"logprobs": True})
    scored = replace(request, prompt_logprobs=True, top_logprobs=3, max_new_tokens=0)
    other = replace(request_for(chat, OPENING + "b"), prompt_logprobs=True, max_new_tokens=3)
    [[result], [continued]] = run_all(Scheduler(chat), [scored, other])
    ids = request.prompt_token_ids
    assert len(ids) > 300
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    tolerance = 0.2 if kind == "int8" else 1e-4
    assert (result.token_ids, result.text, result.finish_reason) == ([], "", "length")
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    own = expected[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert result.prompt_logprobs[1:] == pytest.approx(own, abs=tolerance)
    assert result.prompt_top_logprobs is not None
    assert [len(top) for top in result.prompt_top_logprobs] == [0] + [3] * (len(ids) - 1)
    assert all(top == sorted(top, key=lambda one: -one[1]) for top in result.prompt_top_logprobs)
    assert len(continued.token_ids) == 3
    assert len(continued.prompt_logprobs or []) == len(other.prompt_token_ids)


def test_only_an_end_of_a_prompt_is_scored_and_its_beginning_is_known(chat: ChatModel) -> None:
    request = replace(request_for(chat, OPENING * 3), prompt_logprobs=True, top_logprobs=2, max_new_tokens=0)
    ids = request.prompt_token_ids
    start = len(ids) - 150
    part = replace(request, scored_from=start, cache_namespace="a")
    scheduler = Scheduler(chat, BatchLimits(kv_tokens=4000, step_seconds=0.1, cache_bytes=2**24))
    [[whole], [cold]] = [run_all(scheduler, [one])[0] for one in (request, part)]
    [[warm]] = run_all(scheduler, [part])
    assert (cold.cached_tokens, warm.cached_tokens) == (0, (start - 1) // BLOCK * BLOCK)
    for found in (cold, warm):
        for name in ("prompt_logprobs", "prompt_ranks", "prompt_top_logprobs"):
            own, expected = getattr(found, name), getattr(whole, name)
            assert own[start:] == expected[start:]
            assert len(own) == len(ids)
            assert not any(own[:start])
    assert whole.prompt_ranks is not None
    assert whole.prompt_top_logprobs is not None
    tops = zip(ids[1:], whole.prompt_ranks[1:], whole.prompt_top_logprobs[1:], strict=True)
    assert all((token == top[0][0]) == (rank == 1) for token, rank, top in tops)


@pytest.mark.parametrize("given", [1, 5, 11])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 4, "repetition_penalty": 1.3}])
def test_answer_token_ids_go_on_as_the_whole_answer_does(
    options: dict[str, Any], given: int, chat: ChatModel
) -> None:
    whole = replace(request_for(chat, "Hi", {"logprobs": True, "explain": True}, **options), top_logprobs=2)
    [[expected]] = run_all(Scheduler(chat), [whole])
    [[rest]] = run_all(Scheduler(chat), [replace(whole, answer_token_ids=expected.token_ids[:given])])
    assert (rest.text, rest.token_ids) == (expected.text, expected.token_ids)
    assert expected.logprobs is not None
    assert rest.logprobs == expected.logprobs[given:]
    assert rest.explanation == (expected.explanation or [])[given:]


def test_top_logprobs_are_the_best_of_each_step(chat: ChatModel) -> None:
    request = replace(request_for(chat, "Hi", {"logprobs": True}), top_logprobs=3)
    [[result]] = run_all(Scheduler(chat), [request])
    assert result.top_logprobs is not None
    assert result.logprobs is not None
    for token, logprob, top in zip(result.token_ids, result.logprobs, result.top_logprobs, strict=True):
        assert top[0] == (token, logprob)  # greedy
        assert [one[1] for one in top] == sorted((one[1] for one in top), reverse=True)
