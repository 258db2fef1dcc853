"""Where each option comes from: the user, then the model's generation_config, then the defaults."""

from typing import Any

import pytest

from handspun.config import SAMPLING_OPTIONS, GenerationOptions
from handspun.decoding.options import SamplingParams, resolve
from handspun.errors import ConfigError
from handspun.models.load import ChatModel
from tiny import tiny_model, tiny_tokenizer

_QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
"""What Qwen2.5's instruct models have in their generation_config.json."""


def _model(**generation_config: Any) -> ChatModel:
    model = tiny_model("qwen2")
    for name, value in generation_config.items():
        setattr(model.generation_config, name, value)
    return ChatModel(model, tiny_tokenizer(), "tiny")


def _resolve(model: ChatModel, *, chat: bool = False, **given: Any) -> tuple[SamplingParams, list[str]]:
    return resolve(GenerationOptions(**given), model, chat=chat)


def test_a_model_that_says_nothing_is_decoded_greedily_without_filters() -> None:
    options, notices = _resolve(_model(eos_token_id=3))
    assert options == SamplingParams(eos_token_ids=(3,), pad_token_id=320)
    assert (options.do_sample, options.top_k, options.max_new_tokens) == (False, 0, 512)
    assert notices == []


def test_what_is_taken_from_the_model_is_said() -> None:
    options, notices = _resolve(_model(eos_token_id=3, **_QWEN))
    assert {name: getattr(options, name) for name in _QWEN} == _QWEN
    assert notices == [
        "from the model's generation_config: do_sample True, repetition_penalty 1.1, temperature 0.7, top_k 20, "
        "top_p 0.8"
    ]


def test_what_the_user_gives_wins() -> None:
    options, notices = _resolve(_model(eos_token_id=3, **_QWEN), temperature=1.2, top_k=0, repetition_penalty=1.0)
    assert (options.temperature, options.top_k, options.repetition_penalty) == (1.2, 0, 1.0)
    assert notices == ["from the model's generation_config: do_sample True, top_p 0.8"]


def test_without_sampling_the_model_s_sampling_settings_are_not_taken() -> None:
    for given in ({"do_sample": False}, {"num_beams": 4}):
        options, notices = _resolve(_model(eos_token_id=3, **_QWEN), **given)
        assert (options.do_sample, options.temperature, options.top_p) == (False, 1.0, 1.0)
        assert notices == ["from the model's generation_config: repetition_penalty 1.1"]


def test_the_user_s_sampling_wins_over_the_model_s_beams() -> None:
    model = _model(eos_token_id=3, num_beams=4, length_penalty=2.0)
    options, notices = _resolve(model, do_sample=True, temperature=0.5)
    assert (options.do_sample, options.num_beams, notices) == (True, 1, [])
    options, notices = _resolve(model)
    assert (options.num_beams, options.length_penalty) == (4, 2.0)
    assert notices == ["from the model's generation_config: length_penalty 2.0, num_beams 4"]


def test_a_setting_of_the_model_that_does_nothing_is_not_worth_a_line() -> None:
    assert _resolve(_model(eos_token_id=3, repetition_penalty=1.0, temperature=0.3, top_k=50))[1] == []


def test_a_setting_of_the_model_that_there_is_not_here_is_said() -> None:
    _, notices = _resolve(_model(eos_token_id=3, epsilon_cutoff=0.1, top_h=0.5, min_length=0))
    assert notices == [
        "ignored settings of the model's generation_config (not supported here): epsilon_cutoff 0.1, top_h 0.5"
    ]


def test_biases_and_suppressed_tokens_of_the_model_are_taken_and_said() -> None:
    theirs = {
        "suppress_tokens": [5],
        "bad_words_ids": [[5, 7]],
        "sequence_bias": [[[4, 2], -1.5]],
        "typical_p": 0.9,
    }
    options, notices = _resolve(_model(eos_token_id=3, **theirs))
    assert (options.suppress_tokens, options.bad_words_ids) == ((5,), ((5, 7),))
    assert (options.sequence_bias, options.typical_p) == ((((4, 2), -1.5),), 1.0)  # nothing is sampled
    assert notices == [
        "from the model's generation_config: bad_words_ids ((5, 7),), sequence_bias (((4, 2), -1.5),), "
        "suppress_tokens (5,)"
    ]
    assert _resolve(_model(eos_token_id=3, **theirs), do_sample=True)[0].typical_p == 0.9
    assert _resolve(_model(eos_token_id=3, **theirs), suppress_tokens=())[0].suppress_tokens == ()


def test_biases_are_read_in_every_form_in_which_people_write_them() -> None:
    given: object
    for given in ({"4 2": -1.5}, {(4, 2): -1.5}, [[[4, 2], -1.5]]):
        assert _resolve(_model(), sequence_bias=given)[0].sequence_bias == (((4, 2), -1.5),)
    for given in ({"4": -1.5}, {4: -1.5}):
        assert _resolve(_model(), logit_bias=given)[0].logit_bias == (((4,), -1.5),)


def test_malformed_biases_and_ids_are_errors_that_say_what_was_expected() -> None:
    with pytest.raises(ConfigError) as error:
        _resolve(_model(), logit_bias={"x": 1}, suppress_tokens=(-1,), bad_words_ids=((),), sequence_bias={"": 1})
    assert [problem.split(" is ")[0] for problem in error.value.problems] == [
        "logit_bias", "sequence_bias", "bad_words_ids", "suppress_tokens",
    ]  # fmt: skip
    assert error.value.problems[0] == (
        "logit_bias is {'x': 1}: expected a token id before each bias. For example {\"42\": -100}."
    )
    assert error.value.problems[3] == "suppress_tokens is (-1,): expected at least 0."


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {"330": 5.0}),
        ("sequence_bias", {"5 330": 5.0}),
        ("bad_words_ids", ((5, 330),)),
        ("suppress_tokens", (5, 330)),
        ("begin_suppress_tokens", (330,)),
    ],
)
def test_ids_that_the_model_has_no_logits_for_are_errors(name: str, value: Any) -> None:
    """330 rows: 329 is the last id, whether a token has it or not."""
    with pytest.raises(ConfigError, match="has 330, but the model's token ids end at 329"):
        _resolve(_model(), **{name: value})
    with pytest.raises(ConfigError, match="generation_config cannot be used: --suppress-tokens has 10000"):
        _resolve(_model(suppress_tokens=[10_000]))
    assert _resolve(_model(), suppress_tokens=(329,))[0].suppress_tokens == (329,)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300, "1", True, None])
def test_a_bias_is_a_number(value: Any) -> None:
    with pytest.raises(ConfigError, match="logit_bias is"):
        _resolve(_model(), logit_bias={"5": value})
    with pytest.raises(ConfigError, match="sequence_bias is"):
        _resolve(_model(), sequence_bias=[[[5, 7], value]])


def test_bad_words_are_banned_alone_and_behind_a_space() -> None:
    model = _model()
    ids = [tuple(model.tokenizer(text)["input_ids"]) for text in ("joke", " joke")]
    assert _resolve(model, bad_words=("joke",))[0].bad_words_ids == tuple(ids)
    assert _resolve(model, bad_words="joke", bad_words_ids=((5,),))[0].bad_words_ids == ((5,), *ids)


def test_an_exemption_without_a_penalty_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match="--repetition-penalty-exempt has no effect without a repetition penalty"
    ):
        _resolve(_model(), repetition_penalty_exempt="template")


def test_a_setting_of_the_model_that_is_out_of_range_is_an_error_with_a_remedy() -> None:
    model = _model(eos_token_id=3, do_sample=True, top_p=0.0)
    with pytest.raises(ConfigError, match=r"generation_config cannot be used: --top-p is 0.*Give your own value"):
        _resolve(model)
    assert _resolve(model, top_p=0.5)[0].top_p == 0.5
    assert not _resolve(model, do_sample=False)[0].do_sample


@pytest.mark.parametrize(
    ("name", "value", "greedy"),
    [
        ("num_beams", 10**9, False),
        ("num_beams", "4", False),
        ("do_sample", "true", False),
        ("max_new_tokens", "20", False),
        ("repetition_penalty", "1.1", False),
        ("suppress_tokens", ["5"], False),
        ("temperature", "0.7", True),
        ("top_k", 20.5, True),
    ],
)
def test_settings_of_the_model_with_texts_for_numbers_are_one_clear_error(
    name: str, value: Any, greedy: bool
) -> None:
    model = _model(**{"do_sample": True if greedy else None, name: value})
    with pytest.raises(ConfigError, match="the model's generation_config cannot be used: --") as error:
        _resolve(model)
    assert len(error.value.problems) == 1
    if greedy:  # it is not asked for without sampling
        assert _resolve(model, do_sample=False)[0].num_beams == 1


def test_temperature_0_is_greedy_decoding() -> None:
    for given in ({}, {"do_sample": True}, {"do_sample": True, "top_p": 0.9, "top_k": 5}, {"do_sample": False}):
        assert not _resolve(_model(), temperature=0, **given)[0].do_sample
    assert not _resolve(_model(**_QWEN), temperature=0.0)[0].do_sample
    assert _resolve(_model(num_beams=4), temperature=0)[0].num_beams == 1
    assert _resolve(_model(), temperature=0, num_beams=4)[0].num_beams == 4
    with pytest.raises(ConfigError, match="the same answer 2 times"):
        _resolve(_model(), temperature=0, num_return_sequences=2)


def test_a_model_s_temperature_0_is_greedy_decoding_and_is_said() -> None:
    options, notices = _resolve(_model(do_sample=True, temperature=0.0, top_p=0.9))
    assert not options.do_sample
    assert notices == ["from the model's generation_config: temperature 0.0, which is greedy decoding"]
    assert _resolve(_model(do_sample=True, temperature=0.0), temperature=0.5)[0].do_sample


@pytest.mark.parametrize("own", [{}, {"do_sample": False}, {"num_beams": 4}], ids=str)
@pytest.mark.parametrize("name", SAMPLING_OPTIONS)
def test_resolve_a_sampling_option_means_sampling(name: str, own: dict[str, Any]) -> None:
    value: Any = 1 if name == "top_k" else 0.5
    options, _ = _resolve(_model(**own), **{name: value})
    assert (options.do_sample, options.num_beams) == (True, 1)


def test_resolve_a_temperature_of_0_is_greedy_whatever_else_is_given() -> None:
    options, _ = _resolve(_model(do_sample=True), temperature=0.0, top_p=0.9)
    assert (options.do_sample, options.num_beams) == (False, 1)


def test_resolve_sampling_options_against_no_sampling_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"temperature only affects sampling, and do_sample=False does not"):
        _resolve(_model(), temperature=0.5, do_sample=False)


def test_several_greedy_answers_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--num-return-sequences 3 .* one greedy answer"):
        _resolve(_model(), num_return_sequences=3)
    with pytest.raises(ConfigError, match="only --num-beams 2"):
        _resolve(_model(num_beams=2), num_return_sequences=3)


def test_an_empty_stop_string_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no empty text, which would end every answer at once"):
        _resolve(_model(), stop_strings=("",))


def test_a_chat_ends_with_the_template_s_turn_besides_the_model_s_eos() -> None:
    options, _ = _resolve(_model(eos_token_id=[320, 5]), chat=True)
    assert options.eos_token_ids == (320, 5, 322)
    assert options.stop_strings == ("<|im_end|>", "\nUser:")
    assert _resolve(_model(eos_token_id=322), chat=True)[0].eos_token_ids == (322,)
    assert _resolve(_model(), chat=True, stop_strings=())[0].stop_strings == ()


def test_the_tokenizer_s_eos_serves_where_the_model_names_none() -> None:
    assert _resolve(_model())[0].eos_token_ids == (322,)
    model = _model()
    model.tokenizer.eos_token = None
    options, notices = _resolve(model)
    assert options.eos_token_ids == ()
    assert "has an end-of-sequence token" in notices[0]


def test_a_pad_id_of_0_is_not_taken_for_none_and_one_out_of_range_is() -> None:
    assert _resolve(_model(pad_token_id=0))[0].pad_token_id == 0
    assert _resolve(_model(pad_token_id=-1))[0].pad_token_id == 320
    assert _resolve(_model(pad_token_id=9999))[0].pad_token_id == 320
