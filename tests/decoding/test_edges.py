"""Many prompts, empty ones, no room, nothing said, more beams than tokens: an answer, or a clear error."""

from typing import Any

import pytest

from handspun.decoding import scheduler as decode
from handspun.decoding.engines.choose import make_engine
from handspun.decoding.generate import generate
from handspun.decoding.results import GenerationResult
from handspun.models.load import ChatModel
from parity import assert_same_as_transformers
from tiny import tiny_model, tiny_tokenizer

_TOKENIZER = tiny_tokenizer()
_MODES: list[dict[str, Any]] = [{}, {"do_sample": True, "seed": 1}, {"num_beams": 3}]


@pytest.fixture(scope="module")
def chat() -> ChatModel:
    return ChatModel(tiny_model("qwen2", eos_token_id=list(range(40, 90))), _TOKENIZER, "tiny")


def _generate(model: ChatModel, prompts: Any, **options: Any) -> list[GenerationResult]:
    return generate(model, prompts, **{"max_new_tokens": 6, **options})


def test_a_batch_is_full_while_prompts_are_waiting(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """805 prompts whose answers end at different steps: batch_size rows are under way until none waits."""
    rows: list[int] = []

    def watched(model: ChatModel, kv_tokens: int | None) -> Any:
        engine: Any = make_engine(model, kv_tokens)
        forward = engine.forward
        engine.forward = lambda feeds: rows.append(len(feeds)) or forward(feeds)
        return engine

    monkeypatch.setattr(decode, "make_engine", watched)
    answers = _generate(chat, [f"Say {n}." for n in range(805)], batch_size=32)
    assert [answer.prompt_index for answer in answers] == list(range(805))
    lengths = [len(answer.token_ids) for answer in answers]
    assert len(set(lengths)) > 3
    assert sum(rows) == sum(lengths)  # a row is fed once for every token of its answer
    emptying = rows[-max(lengths) :]
    assert set(rows[: -max(lengths)]) == {32}
    assert emptying == sorted(emptying, reverse=True)


@pytest.mark.slow
def test_a_thousand_prompts_are_answered_as_each_alone(chat: ChatModel) -> None:
    prompts = [f"{'Tell me a joke. ' * (n % 3)}{n}" for n in range(1000)]
    answers = _generate(chat, prompts, max_new_tokens=3)
    assert [answer.prompt_index for answer in answers] == list(range(1000))
    for n in (0, 499, 500, 999):
        assert answers[n].token_ids == _generate(chat, prompts[n], max_new_tokens=3)[0].token_ids


@pytest.mark.slow
def test_one_prompt_a_hundred_times(chat: ChatModel) -> None:
    """The same answer each time if nothing is drawn, and under one seed draws of their own."""
    for mode in ({}, {"num_beams": 3}):
        assert (
            len({tuple(answer.token_ids) for answer in _generate(chat, ["Hi"] * 100, max_new_tokens=3, **mode)})
            == 1
        )
    drawn = _generate(chat, ["Hi"] * 100, do_sample=True, temperature=2.0, min_new_tokens=6)
    assert len({tuple(answer.token_ids) for answer in drawn}) == 100


@pytest.mark.parametrize("mode", _MODES, ids=str)
def test_an_eos_as_the_first_token_is_an_answer_that_says_nothing(chat: ChatModel, mode: dict[str, Any]) -> None:
    eos = _TOKENIZER.eos_token_id
    answers = _generate(chat, ["Hi", "Tell me a joke."], logit_bias={eos: 1000.0}, **mode)
    assert [(a.text, a.token_ids, a.finish_reason) for a in answers] == [("", [eos], "eos")] * 2


@pytest.mark.parametrize("mode", _MODES, ids=str)
@pytest.mark.parametrize("prompt", ["", [{"role": "user", "content": ""}]], ids=["text", "message"])
def test_an_empty_message_is_still_a_turn(chat: ChatModel, mode: dict[str, Any], prompt: Any) -> None:
    [answer] = _generate(chat, [prompt], **mode)
    rendered: Any = _TOKENIZER.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True)
    assert answer.prompt_token_ids == rendered["input_ids"]
    assert answer.token_ids


@pytest.mark.parametrize("mode", _MODES, ids=str)
def test_a_prompt_that_leaves_room_for_one_token_gets_it(mode: dict[str, Any]) -> None:
    short = ChatModel(tiny_model("llama", max_position_embeddings=24), _TOKENIZER, "short")
    [answer] = _generate(short, ["b" * 23], chat=False, **mode)
    assert (len(answer.token_ids), answer.finish_reason) == (1, "length")


def test_there_may_be_more_beams_than_tokens() -> None:
    model = tiny_model("llama", vocab_size=24, pad_token_id=1)
    prompts = [[5, 9, 13, 4], [8]]
    for options in ({"max_new_tokens": 4, "num_return_sequences": 5}, {"max_new_tokens": 1}):
        assert_same_as_transformers(model, _TOKENIZER, prompts, eos_token_ids=[3], num_beams=40, **options)


def test_a_search_has_no_more_answers_than_there_are() -> None:
    """Of one token each there are as many as tokens, each once, the most probable first."""
    few = ChatModel(tiny_model("llama", vocab_size=24, pad_token_id=1, eos_token_id=3), _TOKENIZER, "few")
    answers = _generate(
        few, "&*", chat=False, num_beams=40, num_return_sequences=40, max_new_tokens=1, logprobs=True
    )
    assert sorted(answer.token_ids for answer in answers) == [[token] for token in range(24)]
    logprobs = [answer.logprobs for answer in answers]
    assert logprobs == sorted(logprobs, reverse=True)
