"""Each processor gives what transformers' own gives, and what a hand calculation gives."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_model
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from handspun.decoding import processors
from handspun.decoding.options import ResolvedOptions
from handspun.decoding.sampling import choose, gumbel_noise, stream_of

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
def _histories(draw: st.DrawFn, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Left-padded tokens with their mask; the pad id, 11, is never a real token."""
    length = draw(st.integers(1, 10))
    real = [draw(st.integers(1, length)) for _ in range(rows)]
    tokens = st.integers(0, 4)
    ids = [[11] * (length - n) + [draw(tokens) for _ in range(n)] for n in real]
    mask = [[0] * (length - n) + [1] * n for n in real]
    return torch.tensor(ids), torch.tensor(mask)


def _by_transformers(processor: LogitsProcessor, logits: Tensor, input_ids: Tensor | None = None) -> Tensor:
    if input_ids is None:
        input_ids = torch.zeros(logits.shape[0], 1, dtype=torch.long)
    return processor(input_ids, logits.clone())


@given(_logits(), _histories(), st.floats(0.25, 4.0))
def test_repetition_penalty_is_that_of_transformers(logits, history, penalty):
    input_ids, mask = history
    theirs = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=mask.argmax(-1))
    ours = processors.repetition_penalty(logits, input_ids, mask, penalty)
    assert torch.equal(ours, _by_transformers(theirs, logits, input_ids))


@given(_logits(), _histories(), st.integers(1, 5))
def test_no_repeat_ngram_is_that_of_transformers_on_the_unpadded_row(logits, history, size):
    input_ids, mask = history
    ours = processors.no_repeat_ngram(logits, input_ids, mask, size)
    for row in range(len(logits)):
        alone = input_ids[row, mask[row] == 1][None]
        theirs = _by_transformers(NoRepeatNGramLogitsProcessor(size), logits[row : row + 1], alone)
        assert torch.equal(ours[row : row + 1], theirs)


@given(_logits(), st.integers(0, 4), st.integers(0, 4))
def test_min_new_tokens_is_that_of_transformers(logits, generated, wanted):
    theirs = MinNewTokensLengthLogitsProcessor(2, wanted, torch.tensor([3, 7]))
    input_ids = torch.zeros(len(logits), 2 + generated, dtype=torch.long)
    ours = processors.process(
        logits,
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        generated=generated,
        options=ResolvedOptions(min_new_tokens=wanted, eos_token_ids=(3, 7)),
    )
    assert torch.equal(ours, _by_transformers(theirs, logits, input_ids))


@given(_logits(), st.floats(0.05, 10.0))
def test_temperature_is_that_of_transformers(logits, value):
    assert torch.equal(
        processors.temperature(logits, value), _by_transformers(TemperatureLogitsWarper(value), logits)
    )


@given(_logits(), st.integers(1, 20))
def test_top_k_is_that_of_transformers(logits, k):
    assert torch.equal(processors.top_k(logits, k), _by_transformers(TopKLogitsWarper(k), logits))


@given(_logits(), st.floats(0.01, 1.0, exclude_max=True))
def test_top_p_is_that_of_transformers(logits, p):
    assert torch.equal(processors.top_p(logits, p), _by_transformers(TopPLogitsWarper(p), logits))


@given(_logits(), st.floats(0.0, 1.0))
def test_min_p_is_that_of_transformers(logits, share):
    assert torch.equal(processors.min_p(logits, share), _by_transformers(MinPLogitsWarper(share), logits))


_MODEL = tiny_model("llama", vocab_size=_VOCAB)


@settings(max_examples=50)
@given(
    _logits(),
    _histories(),
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
        }
    ),
)
def test_all_together_come_in_the_order_of_transformers(logits, history, options):
    input_ids, mask = history
    config = GenerationConfig(**options)
    config._eos_token_tensor = torch.tensor([3, 7])
    # n-grams there see the padding, so the padded rows get n-grams that nothing can repeat
    input_ids = torch.where(mask == 1, input_ids, torch.arange(100, 100 + mask.shape[1]))
    theirs = _MODEL._get_logits_processor(
        config, input_ids_seq_length=input_ids.shape[1], device="cpu", model_kwargs={"attention_mask": mask}
    )(input_ids, logits.clone())
    ours = processors.process(
        logits,
        input_ids=input_ids,
        attention_mask=mask,
        generated=0,
        options=ResolvedOptions(**options, eos_token_ids=(3, 7)),
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_repetition_penalty_lowers_both_signs_of_seen_tokens_only():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    processed = processors.repetition_penalty(logits, torch.tensor([[0, 1]]), torch.tensor([[1, 1]]), 2.0)
    assert processed.tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_padding_takes_part_in_no_penalty_whatever_its_id():
    logits = torch.ones(1, 4)
    input_ids, mask = torch.tensor([[2, 2, 1]]), torch.tensor([[0, 0, 1]])
    assert processors.repetition_penalty(logits, input_ids, mask, 2.0).tolist() == [[1.0, 0.5, 1.0, 1.0]]
    assert processors.no_repeat_ngram(logits, input_ids, mask, 1).tolist() == [[1.0, -_INF, 1.0, 1.0]]


def test_no_repeat_ngram_forbids_what_followed_before():
    input_ids = torch.tensor([[1, 2, 3, 1, 2]])  # 1 2 has been followed by 3
    processed = processors.no_repeat_ngram(torch.zeros(1, 5), input_ids, torch.ones_like(input_ids), 3)
    assert processed.tolist() == [[0, 0, 0, -_INF, 0]]


def test_top_k_keeps_ties():
    assert processors.top_k(torch.tensor([[3.0, 2.0, 2.0, 1.0]]), 2).tolist() == [[3.0, 2.0, 2.0, -_INF]]


def test_top_p_keeps_the_token_that_reaches_it_and_at_least_one():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert (processors.top_p(logits, 0.6) > -_INF).tolist() == [[True, True, False]]
    assert (processors.top_p(logits, 1e-9) > -_INF).tolist() == [[True, False, False]]


def test_processors_leave_their_input_as_it_was():
    logits = torch.tensor([[3.0, 2.0, 2.0, 1.0]])
    options = ResolvedOptions(
        do_sample=True, temperature=0.5, top_k=2, top_p=0.5, min_p=0.1, repetition_penalty=1.2,
        no_repeat_ngram_size=1, min_new_tokens=1, eos_token_ids=(0,),
    )  # fmt: skip
    ids = torch.tensor([[1]])
    processors.process(logits, input_ids=ids, attention_mask=ids, generated=0, options=options)
    assert logits.tolist() == [[3.0, 2.0, 2.0, 1.0]]


def test_sampling_filters_do_nothing_to_greedy_logits():
    options = ResolvedOptions(temperature=0.5, top_k=1)
    logits, ids = torch.tensor([[3.0, 2.0]]), torch.tensor([[1]])
    same = processors.process(logits, input_ids=ids, attention_mask=ids, generated=0, options=options)
    assert torch.equal(same, logits)
    sampled = processors.process(
        logits, input_ids=ids, attention_mask=ids, generated=0, options=replace(options, do_sample=True)
    )
    assert sampled.tolist() == [[6.0, -_INF]]


def test_draws_follow_the_softmax():
    """Pearson's chi-squared of 4,000 draws over 5 tokens; 4 degrees of freedom, 18.5 at 1 in 1,000."""
    probabilities, draws = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]), 4000
    streams = [(0, i, 0) for i in range(draws)]
    tokens = choose(probabilities.log().expand(draws, 5), streams=streams, step=3)
    expected = probabilities * draws
    assert ((tokens.bincount(minlength=5) - expected) ** 2 / expected).sum() < 18.5


def test_noise_is_a_function_of_seed_prompt_answer_and_step():
    names = [((0, 0, 0), 0), ((1, 0, 0), 0), ((0, 1, 0), 0), ((0, 0, 1), 0), ((0, 0, 0), 1)]
    noises = [gumbel_noise(stream, step, 8) for stream, step in names]
    assert all(not torch.equal(a, b) for i, a in enumerate(noises) for b in noises[i + 1 :])
    assert torch.equal(gumbel_noise((0, 0, 0), 0, 8), noises[0])
    assert torch.equal(gumbel_noise((0, 0, 0), 0, 5), noises[0][:5])


def test_large_and_negative_seeds_are_not_rounded():
    assert gumbel_noise((-1, 0, 0), 0, 100_000).isfinite().all()
    assert not torch.equal(gumbel_noise((2**60, 1, 0), 0, 8), gumbel_noise((2**60 + 1, 1, 0), 0, 8))
    assert not torch.equal(gumbel_noise((2**60, 1, 0), 0, 8), gumbel_noise((2**60, 1, 1), 0, 8))


def test_noise_is_the_same_on_every_machine_and_version():
    noise = gumbel_noise((7, 2, 1), 5, 3)
    assert noise.tolist() == pytest.approx([1.0427676, -0.2876433, -0.7914059], abs=1e-6)


def test_a_seed_for_each_prompt_goes_with_its_prompt():
    assert stream_of((5, 9), 1, 2) == (9, 0, 2)
    assert stream_of(5, 1, 2) == (5, 1, 2)


def test_forbidden_tokens_are_never_drawn():
    logits = torch.tensor([-_INF, 0.0, -_INF]).expand(200, 3)
    assert set(choose(logits, streams=[(0, i, 0) for i in range(200)], step=0).tolist()) == {1}
