"""Whatever is given as an option or a prompt: an answer, or one error in words."""

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handspun.config import GenerationOptions
from handspun.decoding.generate import generate, stream
from handspun.errors import ConfigError, DataError, HandspunError
from handspun.models.load import ChatModel
from tiny import tiny_model, tiny_tokenizer

_CHAT = ChatModel(tiny_model("qwen2", eos_token_id=322), tiny_tokenizer(), "tiny")
_NUMBERS = [0, 1, -1, 2, 0.5, 1e-6, 1e-300, 1e6, 1e300, -1e300, math.inf, math.nan, 10**9, 10**30, "5", True, None]
_TEXTS = ["", "a", " ", "<|im_end|>", "\nUser:", "\ud800", "\0", "色", b"a", ["a", ""], [], [5], "a" * 300]
_IDS = [0, 329, 330, -1, [5, 7], [], ["5"], 10**30, 1.5]
_OTHERS: dict[str, list[Any]] = {
    "do_sample": [True, False, 1, "yes"],
    "early_stopping": [True, "never", "no"],
    "repetition_penalty_exempt": ["template", "none", True],
    "logit_bias": [{"5": 1e9}, {"5": -1e9}, {5: 1}, {"330": 1}, {"5": math.nan}, {"a": 1}, [], {}],
    "sequence_bias": [{"5 7": 2.0}, [[[5, 7], 2.0]], {(5, 7): 1}, [[5]], {"5 330": 1}, {}],
    "bad_words_ids": [[[5, 7], [330]], [[5]], [[]], [5], [], "5"],
    "suppress_tokens": _IDS,
    "begin_suppress_tokens": _IDS,
    "seed": [0, 2**64 - 1, 2**64, -1, [1], (1, 2), [], "1"],
    "num_return_sequences": [1, 2, 3, 0, 10**9, "2"],
    "num_beams": [1, 2, 50, 1000, 1001, 10**9, 0],
    "choice": _TEXTS,
    "bad_words": _TEXTS,
    "stop_strings": _TEXTS,
    "regex": [*_TEXTS, "a{1000}", "(", "a|b", "[^a]*"],
    "json_schema": [*_TEXTS, "{}", {}, {"type": "integer"}, {"minimun": 1}, {"a": math.nan}, {"enum": []}],
}
_VALUES: dict[str, st.SearchStrategy[Any]] = {
    field.name: st.sampled_from(_OTHERS.get(field.name, _NUMBERS)) for field in fields(GenerationOptions)
}


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(list(_VALUES)), st.none(), max_size=4), st.data())
def test_any_options_give_answers_or_one_config_error(names: dict[str, None], data: st.DataObject) -> None:
    options = {name: data.draw(_VALUES[name], label=name) for name in names}
    try:
        answers = generate(_CHAT, "Hi", **{"max_new_tokens": 2, **options})
    except ConfigError as error:
        assert error.problems  # noqa: PT017
        return
    assert len(answers) >= 1
    assert all(math.isfinite(logprob) for answer in answers for logprob in answer.logprobs or [])
    assert all(answer.token_ids or answer.finish_reason for answer in answers)


@pytest.mark.parametrize("name", list(_OTHERS))
def test_each_value_of_an_option_by_itself_is_an_answer_or_one_config_error(name: str) -> None:
    outcomes: list[Any] = []
    for value in _OTHERS[name]:
        try:
            outcomes.append(generate(_CHAT, "Hi", **{"max_new_tokens": 2, name: value}))
        except ConfigError as error:
            outcomes.append(error.problems)
    assert all(outcomes)


@pytest.mark.parametrize(
    "prompts",
    [
        None, 5, 1.5, b"Hi", bytearray(b"Hi"), True, pytest.param(object(), id="an object"),
        {"role": "user", "content": "Hi"}, ["Hi", None],
        ["Hi", 5], [b"Hi"], ["Hi", {"a": 1}], [[None]], [[5]], [["Hi"]], [[{"role": 5, "content": "Hi"}]],
        [[{"role": "user", "content": b"Hi"}]], [[{"role": "user", "content": 5}]], "\ud800", ["Hi", "a\udcff"],
        [[{"role": "user", "content": "\ud800"}]], [[{"role": "\ud800", "content": "Hi"}]], np.array([1, 2]),
        np.array(["Hi", "\ud800"]), [[]], pytest.param({"Hi"} | {5}, id="a set"),
    ],
    ids=lambda value: ascii(value)[:40],
)  # fmt: skip
@pytest.mark.parametrize("chat", [True, False])
def test_what_is_no_prompt_is_one_error(prompts: Any, chat: bool) -> None:
    for answer in (generate, stream):
        with pytest.raises((ConfigError, DataError), match="prompt|a conversation needs a chat template"):
            answer(_CHAT, prompts, chat=chat, max_new_tokens=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", "8"), ("batch_size", 1.5), ("batch_size", 0), ("batch_size", True), ("batch_size", None),
        ("max_batch_tokens", math.nan), ("chat", "no"), ("logprobs", 1), ("explain", "yes"), ("show_tree", None),
        ("system_prompt", 5), ("system_prompt", "\ud800"), ("options", {"max_new_tokens": 5}),
        ("tools", 5), ("tools", "weather"), ("tools", [5]),
    ],
)  # fmt: skip
def test_arguments_beside_the_options_are_checked_too(name: str, value: Any) -> None:
    with pytest.raises(HandspunError):
        generate(_CHAT, "Hi", **{"max_new_tokens": 1, name: value})


def test_values_of_numpy_are_taken() -> None:
    prompts: Any = np.array(["Hi"])
    options: dict[str, Any] = {
        "max_new_tokens": np.int64(2), "batch_size": np.int32(4), "suppress_tokens": np.array([5, 7]),
        "do_sample": np.bool_(True), "temperature": np.float32(0.5),
    }  # fmt: skip
    [answer] = generate(_CHAT, prompts, **options)
    assert len(answer.token_ids) <= 2
