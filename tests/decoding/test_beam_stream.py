"""Streams of beam searches: what is shown early is what all possible answers begin with; nothing is taken back."""

import random
from collections.abc import Iterable
from typing import Any

import pytest

from handspun.decoding.beam import BeamState, BeamStream, CopyingBeamCache, TreeBeamCache, agreed, sure_answers
from handspun.decoding.generate import stream
from handspun.decoding.request import Completion
from handspun.decoding.results import GenerationChunk, GenerationResult
from handspun.decoding.scheduler import BatchLimits, run
from handspun.models.load import ChatModel
from parity import answers_to, requests_of
from tiny import tiny_model, tiny_tokenizer

_TOKENIZER = tiny_tokenizer()
_CHAT = ChatModel(tiny_model("qwen2", eos_token_id=[3, 7]), _TOKENIZER, "tiny")


def _answer(text: str, *, stops: tuple[str, ...] = (), ended: bool = False) -> Completion:
    [request] = requests_of(_CHAT, [[5]], num_beams=3, max_new_tokens=50, stop_strings=stops)
    answer = Completion.start(request)
    for token in _TOKENIZER(text)["input_ids"]:
        answer.add(token)
    if ended:
        answer.finish("eos")
    return answer


def _put_together(chunks: Iterable[GenerationChunk]) -> tuple[list[GenerationResult], list[str]]:
    """The results, each checked to be what its chunks say end to end; and the texts that came before the ends."""
    texts: dict[tuple[int, int], str] = {}
    ids: dict[tuple[int, int], list[int]] = {}
    results, early = {}, []
    for chunk in chunks:
        name = (chunk.prompt_index, chunk.return_index)
        assert name not in results, "a chunk behind the last one"
        texts[name] = texts.get(name, "") + chunk.text
        ids[name] = ids.get(name, []) + chunk.token_ids
        if chunk.result is None:
            assert chunk.finish_reason is None
            early.append(chunk.text)
        else:
            results[name] = chunk.result
    assert texts == {name: result.text for name, result in results.items()}
    assert ids == {name: result.token_ids for name, result in results.items()}
    return [results[name] for name in sorted(results)], early


def test_answers_agree_on_what_all_of_them_begin_with() -> None:
    assert agreed([_answer("the cat"), _answer("the car"), _answer("the cab")])[0] == "the ca"
    assert agreed([_answer("the cat"), _answer("")]) == ("", [])
    [alone] = [_answer("the cat")]
    assert agreed([alone]) == ("the cat", alone.token_ids)


def test_what_may_become_a_stop_string_or_is_no_character_yet_is_not_agreed_on() -> None:
    assert agreed([_answer("the ca", stops=("a!",)), _answer("the cab", stops=("a!",))])[0] == "the c"
    half = _answer("好")
    half.add(_TOKENIZER("好")["input_ids"][0])
    assert agreed([half, _answer("好好")])[0] == "好"


def test_texts_agree_where_tokens_do_not() -> None:
    request, ids = _answer("").request, _TOKENIZER(" the")["input_ids"]
    letters = [_TOKENIZER(letter)["input_ids"][0] for letter in " the"]
    whole, spelled = Completion.start(request), Completion.start(request)
    for answer, tokens in ((whole, ids), (spelled, letters)):
        for token in tokens:
            answer.add(token)
    assert ids[0] != letters[0]
    assert agreed([whole, spelled]) == (" the", [])
    [chunk] = BeamStream(1).grow([whole, spelled])
    assert (chunk.text, chunk.token_ids) == (" the", [])


def test_only_what_may_still_be_returned_counts() -> None:
    """Not a beam without a chance, and not the second hypothesis where one is asked for."""
    beams = [_answer("the cat"), _answer("the car"), _answer("dog")]
    hypotheses = [(-1.0, _answer("the cab", ended=True)), (-2.0, _answer("a", ended=True))]
    search = BeamState(beams[0].request, beams, [-1.0, -2.0, -1e9], BeamStream(1), hypotheses=hypotheses)
    [chunk] = search.chunks()
    assert (chunk.text, chunk.return_index, chunk.result) == ("the ca", 0, None)
    assert search.chunks() == []
    search.beams[1] = _answer("the cap")
    search.hypotheses[0] = (-1.0, _answer("the cash", ended=True))
    assert search.chunks() == []
    search.beams[:2] = [_answer("the cash"), _answer("the cash is")]
    [chunk] = search.chunks()
    assert chunk.text == "sh"


@pytest.mark.slow
@pytest.mark.parametrize("make_beams", [TreeBeamCache, CopyingBeamCache])
@pytest.mark.parametrize("seed", range(25))
def test_streamed_texts_end_to_end_are_the_answers(seed: int, make_beams: Any) -> None:
    """Random models and options; tokens are bytes of characters, words, and special ones."""
    choose = random.Random(seed)
    model = tiny_model(
        choose.choice(["qwen2", "llama"]), seed=seed, initializer_range=choose.choice([0.1, 0.5, 1.0]),
        eos_token_id=choose.sample(range(330), choose.randint(0, 40)) or None,
    )  # fmt: skip
    beams = choose.randint(2, 6)
    options: dict[str, Any] = {
        "num_beams": beams,
        "num_return_sequences": choose.randint(1, beams),
        "length_penalty": choose.choice([-1.0, 0.0, 0.6, 1.0, 2.0]),
        "early_stopping": choose.choice([True, False, "never"]),
        "max_new_tokens": choose.randint(1, 30),
        "stop_strings": tuple(choose.sample(["e", "th", "s t", "(", "\n", "\ufffd", "a b"], choose.randint(0, 4))),
    }  # fmt: skip
    if choose.random() < 0.3:
        options["repetition_penalty"] = 1.3
    prompts = [[choose.randrange(320) for _ in range(choose.randint(1, 8))] for _ in range(3)]
    chat = ChatModel(model, _TOKENIZER, "random")
    limits = BatchLimits(rows=choose.choice([1, 64]))
    results, _ = _put_together(run(chat, requests_of(chat, prompts, **options), limits, make_beams=make_beams))
    assert results == answers_to(chat, prompts, **options)
    assert len(results) == 3 * options["num_return_sequences"]
    if not options["stop_strings"]:
        assert [a.text for a in results] == [
            _TOKENIZER.decode(a.token_ids[: -1 if a.finish_reason == "eos" else None], skip_special_tokens=True)
            for a in results
        ]


def test_all_of_a_prompts_answers_get_what_they_share_before_they_end() -> None:
    options: dict[str, Any] = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "max_new_tokens": 40,
        "min_new_tokens": 40,
    }
    chunks = list(stream(_CHAT, ["Hi", "Tell me a joke."], **options))
    results, early = _put_together(chunks)
    shared = [_shared(results[2 * prompt : 2 * prompt + 2], chunks, prompt) for prompt in range(2)]
    assert any(shared)
    assert early


def _shared(results: list[GenerationResult], chunks: list[GenerationChunk], prompt: int) -> str:
    """What came early, which is the same for both of a prompt's answers."""
    early = [chunk for chunk in chunks if chunk.prompt_index == prompt and chunk.result is None]
    first, second = ("".join(chunk.text for chunk in early if chunk.return_index == n) for n in range(2))
    assert first == second
    assert all(result.text.startswith(first) for result in results)
    return first


@pytest.mark.parametrize("answers", [1, 3])
def test_the_beginning_that_a_form_fixes_is_shown_before_the_end(answers: int) -> None:
    """However its beams spell it; and once, for under a constraint only the best answer is sure to be there."""
    options: dict[str, Any] = {
        "num_beams": 4,
        "num_return_sequences": answers,
        "regex": "The answer is (yes|no)[.]",
    }
    results, early = _put_together(stream(_CHAT, "Hi", max_new_tokens=40, **options))
    assert len(results) == answers
    assert "".join(early) == "The answer is "
    assert {result.text for result in results} <= {"The answer is yes.", "The answer is no."}


def test_an_answer_that_may_not_exist_is_not_streamed() -> None:
    options: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 9}
    assert _sure_answers(_CHAT, **options) == 4
    assert _sure_answers(_CHAT, repetition_penalty=1.1, **options) == 4
    assert _sure_answers(_CHAT, no_repeat_ngram_size=2, **options) == 1
    for vocab_size, answers in ((5, 1), (6, 4)):  # four beams need four tokens that go on
        few = ChatModel(tiny_model("llama", vocab_size=vocab_size, eos_token_id=[3, 4]), _TOKENIZER, "few")
        assert _sure_answers(few, **options) == answers


def _sure_answers(chat: ChatModel, **options: Any) -> int:
    [request] = requests_of(chat, [[2]], **options)
    return sure_answers(request, chat.model.config.vocab_size)


@pytest.mark.parametrize("steps", range(8))
def test_a_search_that_is_cancelled_takes_nothing_back(steps: int) -> None:
    calls = iter([False] * steps)
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "should_stop": lambda: next(calls, True)}
    results, _ = _put_together(stream(_CHAT, ["Hi", "joke"], min_new_tokens=9, **options))
    assert [(r.prompt_index, r.return_index, r.finish_reason) for r in results] == [
        (prompt, number, "cancelled") for prompt in range(2) for number in range(3)
    ]
    assert {len(result.token_ids) for result in results} == {steps}
