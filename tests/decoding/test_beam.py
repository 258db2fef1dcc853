"""Beam search: transformers' token ids, and rules of our own where transformers has none."""

from itertools import product
from typing import Any, Literal

import pytest
import torch
from transformers import PreTrainedModel

from handspun.decoding.beam import BeamState
from handspun.decoding.generate import generate
from handspun.decoding.options import SamplingParams
from handspun.decoding.request import Request
from handspun.decoding.text import vocabulary
from handspun.models.load import ChatModel
from parity import answers_to, assert_same_as_transformers
from tiny import tiny_model, tiny_tokenizer

_PROMPTS = [[5, 9, 13, 4], [8], [11, 6, 17, 9, 10, 12, 21, 5, 19]]
_TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param, vocab_size=24, pad_token_id=1)


_GRID = list(product((2, 4, 5), (0.6, 1.0, 2.0), (True, False, "never"), ([3], [3, 7])))


@pytest.mark.slow
@pytest.mark.parametrize(("beams", "length_penalty", "early_stopping", "eos"), _GRID, ids=str)
def test_beams_are_those_of_transformers(
    model: PreTrainedModel, beams: int, length_penalty: float, early_stopping: bool | str, eos: list[int]
) -> None:
    options: dict[str, Any] = {
        "num_beams": beams,
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
        "max_new_tokens": 12,
        "num_return_sequences": 2,
    }
    assert_same_as_transformers(model, _TOKENIZER, _PROMPTS, eos_token_ids=eos, **options)
    assert_same_as_transformers(model, _TOKENIZER, _PROMPTS[2:], eos_token_ids=eos, **options)


def test_the_compared_searches_end_in_all_ways(model: PreTrainedModel) -> None:
    """Otherwise the comparison above would say nothing about finished hypotheses."""
    options: dict[str, Any] = {
        "num_beams": 5,
        "length_penalty": 0.6,
        "max_new_tokens": 12,
        "num_return_sequences": 5,
    }
    answers = assert_same_as_transformers(model, _TOKENIZER, _PROMPTS, eos_token_ids=[3, 7], **options)
    answers += assert_same_as_transformers(model, _TOKENIZER, _PROMPTS, eos_token_ids=[3], **options)
    assert {answer.finish_reason for answer in answers} == {"eos", "length"}
    assert len({len(answer.token_ids) for answer in answers}) > 3


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 5},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 3},
        {"length_penalty": -1.0},
        {"length_penalty": 0.0, "early_stopping": "never"},
    ],
    ids=str,
)
def test_beams_with_processors_are_those_of_transformers(model: PreTrainedModel, options: dict[str, Any]) -> None:
    # the pad id, 1, is in no prompt: n-grams there see the padding
    beams = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 10}
    assert_same_as_transformers(model, _TOKENIZER, _PROMPTS, eos_token_ids=[3, 7], **beams, **options)


@pytest.mark.parametrize("seed", range(6))
def test_two_eos_ids_make_three_candidates_a_beam(seed: int) -> None:
    """The two eos ids are probable throughout, so that more than half of the best 2 * num_beams candidates end."""
    model = tiny_model("llama", seed=seed, vocab_size=16, pad_token_id=1, initializer_range=0.2)
    with torch.no_grad():  # the first feature is there at every position, and speaks for the eos ids
        model.model.embed_tokens.weight[:, 0] = 3.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[[3, 7], 0] = 0.3
    options: dict[str, Any] = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "max_new_tokens": 8,
        "early_stopping": "never",
    }
    assert_same_as_transformers(model, _TOKENIZER, [[5, 9, 4], [8]], eos_token_ids=[3, 7], **options)


@pytest.mark.parametrize("stops", [("$",), ("%", "&"), ("*.", "-")], ids=str)
def test_beams_with_stop_strings_are_those_of_transformers(model: PreTrainedModel, stops: tuple[str, ...]) -> None:
    """The first ids of the tokenizer are single characters: 3 is "$", 4 is "%"."""
    options: dict[str, Any] = {
        "num_beams": 4,
        "num_return_sequences": 2,
        "max_new_tokens": 10,
        "stop_strings": stops,
    }
    answers = assert_same_as_transformers(model, _TOKENIZER, _PROMPTS, eos_token_ids=[23], **options)
    for answer in answers:
        assert not any(stop in answer.text for stop in stops)
        assert (answer.finish_reason == "stop") == (answer.stop_string in stops)
        if answer.stop_string:
            assert _TOKENIZER.decode(answer.token_ids) == answer.text + answer.stop_string


def test_stop_strings_do_end_beams(model: PreTrainedModel) -> None:
    options: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 10, "stop_strings": ("$", "%", "&")}
    chat = ChatModel(model, _TOKENIZER, "tiny")
    assert "stop" in {answer.finish_reason for answer in answers_to(chat, _PROMPTS, **options)}


def test_a_prompt_s_beams_do_not_depend_on_its_batch_mates(model: PreTrainedModel) -> None:
    chat = ChatModel(model, _TOKENIZER, "tiny")
    model.generation_config.eos_token_id = [3, 7]
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12}
    together = answers_to(chat, _PROMPTS, logprobs=True, batch_size=64, **options)
    alone = answers_to(chat, _PROMPTS, logprobs=True, batch_size=1, **options)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert [(a.prompt_index, a.return_index) for a in together] == list(product(range(3), range(3)))


def test_beams_come_best_first_by_the_model_s_own_log_probabilities(model: PreTrainedModel) -> None:
    chat = ChatModel(model, _TOKENIZER, "tiny")
    model.generation_config.eos_token_id = [3]
    answers = answers_to(
        chat,
        _PROMPTS[:1],
        logprobs=True,
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=8,
        length_penalty=2.0,
    )
    scores = [sum(answer.logprobs) / len(answer.token_ids) ** 2.0 for answer in answers]
    assert scores == sorted(scores, reverse=True)
    for answer in answers:
        ids = torch.tensor([answer.prompt_token_ids + answer.token_ids])
        table = model(ids).logits.log_softmax(-1)[0, len(answer.prompt_token_ids) - 1 : -1]
        expected = table.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0].tolist()
        assert answer.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_pad_id_of_0_is_a_pad_id(model: PreTrainedModel) -> None:
    """transformers takes 0 for "none" there and fills with the eos; what comes before is the same."""
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 8}
    assert_same_as_transformers(model, _TOKENIZER, _PROMPTS, eos_token_ids=[3], pad_token_id=0, **options)


def _search(early_stopping: Literal["never"] | bool, length_penalty: float, hypotheses: list[float]) -> BeamState:
    options = SamplingParams(num_beams=2, early_stopping=early_stopping, length_penalty=length_penalty)
    request = Request(prompt_token_ids=[5], options=options, vocabulary=vocabulary(_TOKENIZER), max_new_tokens=10)
    search = BeamState.start(request, vocab_size=24)
    search.hypotheses = [(score, search.beams[0]) for score in hypotheses]
    return search


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "hypotheses", "best_score", "ends"),
    [
        (True, 1.0, [-1.0], -9.0, False),  # one hypothesis is missing
        (True, 1.0, [-1.0, -2.0], -0.1, True),
        (False, 1.0, [-1.0, -2.0], -9.0, True),  # -9 / 4 tokens = -2.25, worse than -2
        (False, 1.0, [-1.0, -2.0], -7.0, False),  # -7 / 4 = -1.75
        (False, 1.0, [-1.0, -2.0], -8.0, True),  # -8 / 4 = -2, no better than the worst
        ("never", 1.0, [-1.0, -2.0], -20.0, True),
        (False, 2.0, [-1.0, -2.0], -32.0, True),  # -32 / 4 ** 2 = -2
        (False, 2.0, [-1.0, -2.0], -31.9, False),
        ("never", 1.0, [-1.0, -2.0], -9.0, False),  # -9 / 10 tokens, the limit, = -0.9
        ("never", 1.0, [-1.0, -2.0], -21.0, True),  # -21 / 10 = -2.1
        ("never", 0.0, [-1.0, -2.0], -1.9, False),  # undivided
        ("never", 0.0, [-1.0, -2.0], -2.1, True),
        ("never", -1.0, [-1.0, -8.0], -1.9, False),  # -1.9 * 4 = -7.6
        ("never", -1.0, [-1.0, -8.0], -2.1, True),  # -2.1 * 4 = -8.4
    ],
)
def test_when_a_search_ends(
    early_stopping: Literal["never"] | bool,
    length_penalty: float,
    hypotheses: list[float],
    best_score: float,
    ends: bool,
) -> None:
    search = _search(early_stopping, length_penalty, hypotheses)
    assert search.has_ended(best_score, 4) is ends


def test_a_cancelled_search_gives_what_it_has(model: PreTrainedModel) -> None:
    chat, calls = ChatModel(model, _TOKENIZER, "tiny"), iter([False, False, False, True])
    model.generation_config.eos_token_id = []
    answers = generate(
        chat,
        "&*",
        chat=False,
        num_beams=2,
        num_return_sequences=2,
        should_stop=lambda: next(calls, True),
    )
    assert [(a.finish_reason, len(a.token_ids)) for a in answers] == [("cancelled", 3)] * 2
    assert answers[0].token_ids != answers[1].token_ids
