"""/v1/completions with a real engine thread."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import handspun
from asking import Asker, served, served_chat
from handspun.serve.completions import completions
from handspun.serve.schemas import CompletionRequest

_TEXT = "The sum of the first"


@pytest.fixture(scope="module")
def server() -> Iterator[Asker]:
    with served(served_chat()) as asker:
        yield asker


def _ask(server: Asker, **body: Any) -> dict[str, Any]:
    return server.ask(completions, CompletionRequest, **{"prompt": _TEXT, "max_tokens": 10, "seed": 5, **body})


def _stream(server: Asker, **body: Any) -> list[dict[str, Any]]:
    return server.stream(completions, CompletionRequest, **{"prompt": _TEXT, "max_tokens": 10, "seed": 5, **body})


def _ids(server: Asker, text: str = _TEXT) -> list[int]:
    ids: list[int] = server.models["tiny"].chat.tokenizer(text)["input_ids"]
    return ids


def test_an_answer_has_openais_form(server: Asker) -> None:
    answer = _ask(server)
    assert (answer["object"], answer["id"]) == ("text_completion", "cmpl-test")
    [choice] = answer["choices"]
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason"}
    assert answer["usage"]["prompt_tokens"] == len(_ids(server))


def test_the_answer_is_that_of_generate(server: Asker) -> None:
    chat = server.models["tiny"].chat
    [expected] = handspun.generate(chat, _TEXT, chat=False, max_new_tokens=10, do_sample=True, seed=(5,))
    choice = _ask(server, return_token_ids=True)["choices"][0]
    assert (choice["text"], choice["token_ids"]) == (expected.text, expected.token_ids)


@pytest.mark.parametrize("prompt", ["text", "ids"])
def test_ids_and_text_are_the_same_prompt(server: Asker, prompt: str) -> None:
    given: Any = _TEXT if prompt == "text" else _ids(server)
    answer = _ask(server, prompt=given, echo=True)
    assert answer["choices"][0]["text"] == _TEXT + _ask(server)["choices"][0]["text"]


def test_several_prompts_have_the_answers_that_each_has_alone(server: Asker) -> None:
    texts = [_TEXT, "Give me", "The user"]
    alone = [choice["text"] for text in texts for choice in _ask(server, prompt=text, n=2)["choices"]]
    together = _ask(server, prompt=texts, n=2)
    assert [choice["text"] for choice in together["choices"]] == alone
    assert [choice["index"] for choice in together["choices"]] == list(range(6))
    assert together["usage"]["prompt_tokens"] == sum(len(_ids(server, text)) for text in texts)
    assert together["handspun"] == {"seed": 5}


def test_without_a_seed_each_prompt_has_its_own(server: Asker) -> None:
    answer = _ask(server, prompt=[_TEXT] * 4, seed=None)
    assert len({choice["text"] for choice in answer["choices"]}) > 1
    assert len(answer["handspun"]["seed"]) == 4


@pytest.mark.parametrize(
    "body",
    [{}, {"n": 3}, {"echo": True}, {"prompt": ["Give", "The"], "n": 2}, {"temperature": 0, "n": 2},
     {"logprobs": 2}, {"logprobs": 0}, {"stop": "e", "logprobs": 1}, {"num_beams": 2, "logprobs": 1}],
    ids=str,
)  # fmt: skip
def test_a_stream_adds_up_to_the_answer(server: Asker, body: dict[str, Any]) -> None:
    whole = _ask(server, **body, return_token_ids=True)
    *events, last = _stream(server, **body, return_token_ids=True, stream_options={"include_usage": True})
    assert last["usage"] | {"prompt_tokens_details": 0} == whole["usage"] | {"prompt_tokens_details": 0}
    for expected in whole["choices"]:
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in own) == expected["text"]
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + [expected["finish_reason"]]
        assert [token for choice in own for token in choice.get("token_ids", [])] == expected["token_ids"]
        for name in ("tokens", "token_logprobs", "text_offset"):
            parts = [item for choice in own if choice["logprobs"] for item in choice["logprobs"][name]]
            assert parts == (expected["logprobs"] or {name: []})[name]


def test_echo_scores_the_prompt_as_the_model_does(server: Asker) -> None:
    answer = _ask(server, echo=True, logprobs=2, max_tokens=0)
    [choice] = answer["choices"]
    scores = choice["logprobs"]
    assert choice["text"] == _TEXT
    assert (choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 0)
    assert "".join(scores["tokens"]) == _TEXT
    assert scores["token_logprobs"][0] is None
    assert scores["top_logprobs"][0] is None
    assert scores["text_offset"] == [len("".join(scores["tokens"][:i])) for i in range(len(scores["tokens"]))]
    # The tokens' ranks by another way: each prompt's best next token is the greedy answer to its beginning.
    for length in (1, 5, len(_ids(server)) - 1):
        greedy = _ask(server, prompt=_ids(server)[:length], temperature=0, max_tokens=1, logprobs=1)["choices"][0]
        best, value = max(scores["top_logprobs"][length].items(), key=lambda item: item[1])
        assert greedy["logprobs"]["tokens"] == [best]
        assert greedy["logprobs"]["token_logprobs"] == pytest.approx([value], abs=1e-5)


def test_echo_with_an_answer_lists_one_entry_per_token(server: Asker) -> None:
    """lm-eval counts on it: it leaves out the one token that it asked for."""
    [choice] = _ask(server, prompt=_ids(server), echo=True, logprobs=1, max_tokens=1, temperature=0)["choices"]
    assert len(choice["logprobs"]["token_logprobs"]) == len(_ids(server)) + 1


def test_logprobs_0_lists_the_tokens_alone(server: Asker) -> None:
    scores = _ask(server, logprobs=0)["choices"][0]["logprobs"]
    assert scores["top_logprobs"] is None
    assert torch.tensor(scores["token_logprobs"]).le(0).all()


def test_best_of_returns_the_most_probable_answer(server: Asker) -> None:
    every = _ask(server, n=6, logprobs=0)["choices"]
    means = [sum(one["logprobs"]["token_logprobs"]) / len(one["logprobs"]["token_logprobs"]) for one in every]
    [best] = _ask(server, best_of=6)["choices"]
    assert best["text"] == every[means.index(max(means))]["text"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [330]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": [1] * 600}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 17}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_is_refused(server: Asker, body: dict[str, Any], param: str) -> None:
    error = server.refused(completions, CompletionRequest, **{"prompt": _TEXT, **body})
    assert (error.status, error.param) == (400, param)
