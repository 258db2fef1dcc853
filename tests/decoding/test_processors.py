"""Each processor gives what transformers' own gives, and what a hand calculation gives."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig

from handspun.decoding import filters
from handspun.decoding.constraint import make_constraint
from handspun.decoding.options import SamplingParams
from handspun.decoding.processors import History, check_some_left, make_processors, process
from handspun.errors import ConfigError
from handspun.verification.processors import process_both
from tiny import tiny_model, tiny_tokenizer

_VOCAB = 12
_INF = math.inf


@st.composite
def _logits(draw: st.DrawFn, rows: int = 3) -> Tensor:
    """Logits with ties among them, some of them forbidden already."""
    values = st.one_of(st.integers(-4, 4).map(float), st.floats(-20, 20, width=32), st.just(-_INF))
    table = [[draw(values) for _ in range(_VOCAB)] for _ in range(rows)]
    for row in table:
        row[draw(st.integers(0, _VOCAB - 1))] = 1.5  # at least one can be chosen
    return torch.tensor(table)


@st.composite
def _rows(draw: st.DrawFn) -> list[History]:
    """Rows of any lengths."""
    tokens = st.lists(st.integers(0, 4), max_size=5)
    return [History(draw(st.lists(st.integers(0, 4), min_size=1, max_size=5)), draw(tokens)) for _ in range(3)]


_RUNS = st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple)
_TOKENS = st.lists(st.integers(0, 11), min_size=1).map(tuple)
_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0.05, 10.0),
    "top_k": st.integers(1, 20),
    "top_p": st.floats(0.01, 1.0, exclude_max=True),
    "min_p": st.floats(0.0, 1.0),
    "typical_p": st.floats(0.01, 1.0, exclude_max=True),
    "repetition_penalty": st.floats(0.25, 4.0),
    "no_repeat_ngram_size": st.integers(1, 5),
    "min_new_tokens": st.integers(1, 4),
    "sequence_bias": st.dictionaries(_RUNS, st.floats(-5, 5), min_size=1).map(
        lambda biases: tuple(biases.items())
    ),
    "bad_words_ids": st.lists(_RUNS, min_size=1, unique=True).filter(lambda runs: runs != [(3,)]).map(tuple),
    "suppress_tokens": _TOKENS,
    "begin_suppress_tokens": _TOKENS,
}


@pytest.mark.parametrize("name", _VALUES)
@given(logits=_logits(), rows=_rows(), data=st.data())
def test_process_gives_what_transformers_gives(
    name: str, logits: Tensor, rows: list[History], data: st.DataObject
) -> None:
    ours, theirs = process_both(logits, rows, name, data.draw(_VALUES[name]), eos_token_ids=(3, 7))
    near = 1e-6 if name == "sequence_bias" else 0.0  # several biases are added up in another order
    torch.testing.assert_close(ours, theirs, rtol=near, atol=near)


def test_bad_words_spare_a_single_eos() -> None:
    options = SamplingParams(bad_words_ids=((3,),), eos_token_ids=(3,))
    assert process(torch.zeros(1, 5), [History([1])], make_processors(options)).tolist() == [[0.0] * 5]


@given(st.integers(0, 2**32), st.sampled_from([0.05, 0.5, 0.9, 0.99, 0.999999]), st.sampled_from([0.1, 1.0, 6.0]))
@settings(max_examples=40)
def test_top_p_without_sorting_is_top_p_by_sorting(seed: int, p: float, spread: float) -> None:
    """A vocabulary larger than the few tokens that it looks at first; rounded values, so that many tie."""
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(seed)) * spread
    logits[1] = (logits[1] * 2).round() / 2
    logits[2, 40:] = -_INF
    assert torch.equal(filters.top_p(logits, p), filters.top_p_by_sorting(logits, p))


def test_most_rows_of_a_peaked_distribution_are_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(50, 5000, generator=torch.Generator().manual_seed(0)) * 4
    expected = filters.top_p_by_sorting(logits, 0.9)
    again: list[int] = []
    monkeypatch.setattr(
        filters, "top_p_by_sorting", lambda rows, _: again.append(len(rows)) or torch.full_like(rows, -_INF)
    )
    filtered = filters.top_p(logits, 0.9)
    sorted_rows = (filtered == -_INF).all(-1)
    assert sorted_rows.sum() == sum(again) < 5
    assert torch.equal(filtered[~sorted_rows], expected[~sorted_rows])


_MODEL: Any = tiny_model("llama", vocab_size=_VOCAB)


@settings(max_examples=50)
@given(
    _logits(),
    _rows(),
    st.fixed_dictionaries(
        {
            "min_new_tokens": st.integers(0, 2),
            "do_sample": st.booleans(),
            "temperature": st.sampled_from([0.5, 1.0, 1.5]),
            "top_k": st.integers(0, 6),
            "top_p": st.sampled_from([0.3, 0.8, 1.0]),
            "min_p": st.sampled_from([0.0, 0.2]),
            "repetition_penalty": st.sampled_from([1.0, 1.3]),
            "no_repeat_ngram_size": st.integers(0, 3),
            "typical_p": st.sampled_from([0.5, 1.0]),
            "suppress_tokens": st.sampled_from([None, [1, 5]]),
            "begin_suppress_tokens": st.sampled_from([None, [2]]),
            "bad_words_ids": st.sampled_from([None, [[0], [1, 2]]]),
            "sequence_bias": st.sampled_from([None, {(0,): 0.5, (1, 4): -2.0}]),
        }
    ),
)
def test_all_together_come_in_the_order_of_transformers(
    logits: Tensor, rows: list[History], options: dict[str, Any]
) -> None:
    config = GenerationConfig(**options)
    config._eos_token_tensor = torch.tensor([3, 7])
    values = {name: value for name, value in options.items() if value is not None}
    if "sequence_bias" in values:
        values["sequence_bias"] = tuple(values["sequence_bias"].items())
    made = make_processors(SamplingParams(**values, eos_token_ids=(3, 7)))
    expected = []
    for row, history in zip(logits.clone()[:, None], rows, strict=True):
        length = len(history.prompt_token_ids)
        theirs = _MODEL._get_logits_processor(config, input_ids_seq_length=length, device="cpu")
        expected.append(theirs(torch.tensor([[*history.prompt_token_ids, *history.token_ids]]), row))
    torch.testing.assert_close(process(logits, rows, made), torch.cat(expected), equal_nan=True)


def test_repetition_penalty_lowers_both_signs_of_seen_tokens_only() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    processed = filters.repetition_penalty(logits, [[0, 1, 0]], 2.0)
    assert processed.tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_no_repeat_ngram_forbids_what_followed_before() -> None:
    processed = filters.no_repeat_ngram(torch.zeros(1, 5), [[1, 2, 3, 1, 2]], 3)  # 1 2 has been followed by 3
    assert processed.tolist() == [[0, 0, 0, -_INF, 0]]


def _probable(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def _kept(logits: Tensor) -> list[int]:
    return (logits[0] > -_INF).nonzero()[:, 0].tolist()


def test_the_numbers_that_others_test_their_processors_with() -> None:
    assert _kept(filters.top_p(_probable(0.3, 0.1, 0.1, 0.5), 0.8)) == [0, 3]
    assert _kept(filters.min_p(_probable(0.9, 0.0274, 0.047, 0.0274), 0.05)) == [0, 2]
    assert _kept(filters.typical_p(_probable(0.97, 0.01, 0.01, 0.01), 0.5)) == [0]
    penalized = filters.repetition_penalty(torch.tensor([[-0.1, 0.1, 0.4]]), [[0, 1, 2]], 2.0)
    torch.testing.assert_close(penalized, torch.tensor([[-0.2, 0.05, 0.2]]))
    assert filters.no_repeat_ngram(torch.zeros(1, 4), [[1, 1, 2, 1]], 2).tolist() == [[0, -_INF, -_INF, 0]]


def test_presence_counts_a_token_once_and_frequency_every_time() -> None:
    logits, generated = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]), [[1, 1, 2], []]
    assert filters.presence_penalty(logits, generated, 0.5).tolist() == [[1.0, 0.5, 0.5], [1.0, 1.0, 1.0]]
    assert filters.frequency_penalty(logits, generated, 0.5).tolist() == [[1.0, 0.0, 0.5], [1.0, 1.0, 1.0]]
    made = make_processors(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25))
    assert process(logits[:1], [History([0, 0], [1, 1])], made).tolist() == [[1.0, 0.0, 1.0]]  # not the prompt's


def test_a_bias_waits_for_what_comes_before_it() -> None:
    biases = [((2,), 1.0), ((0, 1), 0.5), ((1,), 0.25)]
    assert filters.sequence_bias(torch.zeros(2, 3), [[2, 0], [2]], biases).tolist() == [[0, 0.75, 1], [0, 0.25, 1]]


def test_the_repetition_penalty_can_spare_tokens() -> None:
    made = make_processors(SamplingParams(repetition_penalty=2.0, unpenalized_ids=frozenset({1})))
    assert process(torch.ones(1, 4), [History([0, 1], [1, 2])], made).tolist() == [[0.5, 1.0, 0.5, 1.0]]


def test_a_function_of_one_s_own_sees_each_row_and_comes_before_sampling() -> None:
    seen = []

    def only_even(logits: Tensor, token_ids: list[int]) -> Tensor:
        seen.append(token_ids)
        logits[1::2] = -_INF  # in place, which may not reach the model's own logits
        return logits

    logits = torch.tensor([[3.0, 4.0, 1.0], [1.0, 0.0, 2.0]])
    made = make_processors(SamplingParams(do_sample=True, top_k=1, repetition_penalty=1.5), [only_even])
    assert [processor.name for processor in made] == ["repetition_penalty", "only_even", "top_k"]
    processed = process(logits, [History([0], [1]), History([1])], made)
    assert processed.tolist() == [[2.0, -_INF, -_INF], [-_INF, -_INF, 2.0]]
    assert seen == [[0, 1], [1]]
    assert logits.tolist() == [[3.0, 4.0, 1.0], [1.0, 0.0, 2.0]]


@pytest.mark.parametrize(
    ("returned", "described"),
    [(None, "None"), (torch.zeros(2), r"a tensor of shape \(2,\)"), ("x" * 99, "'x{59}")],
    ids=["None", "shape", "text"],
)
def test_a_function_that_returns_something_else_is_named(returned: Any, described: str) -> None:
    def broken(*_: Any) -> Any:
        return returned

    with pytest.raises(
        ConfigError, match=rf"the processor broken returned {described} \(expected the logits of one row"
    ):
        process(torch.zeros(1, 3), [History([1])], make_processors(SamplingParams(), [broken]))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([0.0, -_INF, math.nan], "broken returned 1 logits that are NaN or infinite, after 2 tokens"),
        ([_INF, 0.0, _INF], "broken returned 2 logits that are NaN or infinite, after 2 tokens"),
        ([-_INF, -_INF, -_INF], "broken excluded every next token after 2 tokens"),
    ],
)
def test_a_function_whose_logits_leave_no_token_is_named(returned: list[float], message: str) -> None:
    def broken(*_: Any) -> Tensor:
        return torch.tensor(returned)

    made = make_processors(SamplingParams(), [broken])
    with pytest.raises(ConfigError, match=message):
        process(torch.zeros(1, 3), [History([1], [2])], made)


def test_a_constraint_sees_each_rows_answer_and_not_its_prompt() -> None:
    tokenizer = tiny_tokenizer()
    constraint = make_constraint(SamplingParams(choice=("yes", "no"), eos_token_ids=(3,)), tokenizer)
    assert constraint is not None
    begun = tokenizer("yes")["input_ids"][:1]
    rows, logits = [History([1, 2]), History([1], begun)], torch.zeros(2, 330)
    processed = process(logits, rows, make_processors(SamplingParams(), constraint=constraint))
    assert torch.equal(processed, constraint.apply(logits, [[], begun]))
    assert processed[0, begun[0]] == 0.0
    assert (processed == -_INF).any(-1).tolist() == [True, True]
    assert not torch.equal(processed[0], processed[1])


def test_excluding_everything_is_an_error_that_names_the_options() -> None:
    made = make_processors(SamplingParams(suppress_tokens=(0, 1), eos_token_ids=(2,), min_new_tokens=2))
    rows = [History([0], [1, 1]), History([0], [1])]
    filtered = process(torch.zeros(2, 3), rows, made)
    with pytest.raises(
        ConfigError, match="after 1 tokens .* --min-new-tokens, --suppress-tokens together exclude"
    ):
        check_some_left(filtered, rows, made)
    check_some_left(filtered[:1], rows[:1], made)


@pytest.mark.parametrize("beyond", [3, 4, 7])
def test_ids_that_the_head_cannot_give_are_passed_over(beyond: int) -> None:
    """The head gives 0, 1 and 2; a tokenizer may have more ids."""
    ones = torch.ones(1, 3)
    assert filters.repetition_penalty(ones, [[1, beyond]], 2.0).tolist() == [[1.0, 0.5, 1.0]]
    assert filters.presence_penalty(ones, [[1, beyond]], 0.5).tolist() == [[1.0, 0.5, 1.0]]
    assert filters.frequency_penalty(ones, [[1, beyond, 1]], 0.25).tolist() == [[1.0, 0.5, 1.0]]
    biases = [((1,), 2.0), ((beyond,), 3.0), ((1, beyond), 4.0)]
    assert filters.sequence_bias(ones, [[1]], biases).tolist() == [[1.0, 3.0, 1.0]]
    assert filters.mask_tokens(ones, (1, beyond), [True]).tolist() == [[1.0, -_INF, 1.0]]
    assert filters.no_repeat_ngram(ones, [[0, beyond, 0]], 2).tolist() == [[1.0, 1.0, 1.0]]


def test_top_k_keeps_ties() -> None:
    assert filters.top_k(torch.tensor([[3.0, 2.0, 2.0, 1.0]]), 2).tolist() == [[3.0, 2.0, 2.0, -_INF]]


def test_top_p_keeps_the_token_that_reaches_it_and_at_least_one() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert (filters.top_p(logits, 0.6) > -_INF).tolist() == [[True, True, False]]
    assert (filters.top_p(logits, 1e-9) > -_INF).tolist() == [[True, False, False]]


@pytest.mark.parametrize(
    ("probabilities", "p", "kept"),
    [
        ((0.5, 0.25, 0.125, 0.125), 0.75, [0, 1]),
        ((0.5, 0.25, 0.125, 0.125), 0.5, [0]),
        ((0.125, 0.125, 0.25, 0.5), 0.75, [2, 3]),
        ((0.5, 0.25, 0.125, 0.125), 0.76, [0, 1, 3]),  # of equals the last, as transformers sorts them
        ((0.5, 0.5), 0.5, [1]),
    ],
)
def test_top_p_at_equality_keeps_no_more_than_reach_it(
    probabilities: tuple[float, ...], p: float, kept: list[int]
) -> None:
    assert _kept(filters.top_p(_probable(*probabilities), p)) == kept


def test_typical_p_at_equality_keeps_no_more_than_reach_it() -> None:
    """The entropy is 1.21, and the surprises are 0.69, 1.39 and twice 2.08: the second token comes first."""
    logits = _probable(0.5, 0.25, 0.125, 0.125)
    assert _kept(filters.typical_p(logits, 0.2)) == [1]
    assert _kept(filters.typical_p(logits, 0.25)) == [1]
    assert _kept(filters.typical_p(logits, 0.26)) == [0, 1]
    assert _kept(filters.typical_p(logits, 0.75)) == [0, 1]
    assert _kept(filters.typical_p(logits, 0.76)) == [0, 1, 2, 3]  # the two are as typical as each other


@pytest.mark.parametrize(
    ("probabilities", "share", "kept"),
    [((0.5, 0.25, 0.125, 0.125), 0.5, [0, 1]), ((0.5, 0.25, 0.125, 0.125), 0.51, [0])],
)
def test_min_p_at_equality_keeps_the_token(
    probabilities: tuple[float, ...], share: float, kept: list[int]
) -> None:
    assert _kept(filters.min_p(_probable(*probabilities), share)) == kept


def test_processors_leave_their_input_as_it_was() -> None:
    logits = torch.tensor([[3.0, 2.0, 2.0, 1.0]])
    options = SamplingParams(
        do_sample=True, temperature=0.5, top_k=2, top_p=0.5, min_p=0.1, repetition_penalty=1.2,
        no_repeat_ngram_size=1, min_new_tokens=1, eos_token_ids=(0,),
    )  # fmt: skip
    process(logits, [History([1])], make_processors(options))
    assert logits.tolist() == [[3.0, 2.0, 2.0, 1.0]]


def test_without_processors_the_very_same_logits_come_back() -> None:
    logits = torch.tensor([[3.0, 2.0]])
    assert process(logits, [History([1])], make_processors(SamplingParams())) is logits


def test_sampling_filters_do_nothing_to_greedy_logits() -> None:
    options = SamplingParams(temperature=0.5, top_k=1)
    assert make_processors(options) == ()
    sampled = process(
        torch.tensor([[3.0, 2.0]]), [History([1])], make_processors(replace(options, do_sample=True))
    )
    assert sampled.tolist() == [[6.0, -_INF]]
