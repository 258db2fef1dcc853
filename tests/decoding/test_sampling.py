"""Draws: the argmax of logits and noise, with the frequencies of the softmax, under the stream's own name."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from handspun.decoding import sampling
from handspun.decoding.sampling import gumbel_argmax, gumbel_noise, select_tokens, stream_of
from handspun.verification.processors import goodness_of_fit

VALUES = st.sampled_from([0.0, -7.99, -8.0, -8.01, -30.0, -math.inf]) | st.floats(-40, 40, width=32)


def plainly(logits: torch.Tensor, stream: tuple[int, int, int], step: int) -> int:
    """The draw by its definition, with the noise of every token."""
    return int((logits + gumbel_noise(stream, step, len(logits))).argmax())


def test_draw_takes_tokens_far_below_the_best_as_often_as_they_are_probable() -> None:
    """One token at 0, and 3,000 at -8.5, which have 38 % of the probability together."""
    logits = torch.full((3001,), -8.5)
    logits[1234] = 0.0
    drawn = [gumbel_argmax(logits, (7, prompt, 0), 3) for prompt in range(1500)]
    assert drawn == [plainly(logits, (7, prompt, 0), 3) for prompt in range(1500)]
    far, share = sum(token != 1234 for token in drawn), 3000 / (3000 + math.exp(8.5))
    assert abs(far - 1500 * share) < 4 * math.sqrt(1500 * share * (1 - share))
    assert len(set(drawn)) > 0.8 * far


@given(
    st.lists(VALUES, min_size=1).filter(lambda values: max(values) > -math.inf),
    st.tuples(st.integers(0, 2**63), st.integers(0, 2**31), st.integers(0, 2**31)),
    st.integers(0, 10_000),
)
def test_draw_is_the_argmax_of_logits_and_noise(
    values: list[float], stream: tuple[int, int, int], step: int
) -> None:
    logits = torch.tensor(values)
    assert gumbel_argmax(logits, stream, step) == plainly(logits, stream, step)


def test_gumbel_argmax_computes_little_of_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10,000 tokens at -20, one in a thousand has noise above 7, and none can win against the token at 0."""
    sizes, whole = list[int](), sampling._gumbel
    monkeypatch.setattr(sampling, "_gumbel", lambda bits: sizes.append(len(bits)) or whole(bits))
    logits = torch.full((10_000,), -20.0)
    logits[77] = 0.0
    assert [gumbel_argmax(logits, (3, prompt, 0), 0) for prompt in range(20)] == [77] * 20
    assert max(sizes) < 500


def test_gumbel_argmax_takes_a_far_token_that_wins_by_little() -> None:
    """The lowest noise has the highest logit, so the highest noise may be 8.0001 below and win by 0.0004."""
    noise = gumbel_noise((7, 0, 0), 0, 1000)
    lowest, highest, other = int(noise.argmin()), int(noise.argmax()), int(noise.argsort()[500])
    logits = torch.full((1000,), -math.inf)
    logits[lowest], logits[highest] = 0.0, -8.0001
    logits[other] = noise[highest] - 8.0005 - noise[other]
    assert -8 < logits[other] < 0
    assert gumbel_argmax(logits, (7, 0, 0), 0) == highest == plainly(logits, (7, 0, 0), 0)


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    probabilities, draws = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05, 0.0]), 4000
    tokens = select_tokens(probabilities.log().expand(draws, -1), draws=[((0, i, 0), 3) for i in range(draws)])
    p, bins = goodness_of_fit(tokens, probabilities)
    assert (p > 1e-3, bins) == (True, 5)


def test_noise_of_the_least_and_the_most_bits_by_hand() -> None:
    """Half of 2 ** -52 from 0 and from 1: -log(53 log 2) = -3.604, and 53 log 2 = 36.737."""
    noise = sampling._gumbel(np.array([0, 2**52 - 1], dtype=np.uint64))
    assert noise.tolist() == pytest.approx([-3.60378, 36.73680], abs=1e-5)


def test_noise_is_standard_gumbel() -> None:
    """Its mean is Euler's constant, its variance pi ** 2 / 6."""
    assert gumbel_noise((1, 2, 3), 4, 5).dtype == torch.float32
    noise = gumbel_noise((1, 2, 3), 4, 100_000).double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)
    assert noise.isfinite().all()


@pytest.mark.parametrize(
    "name", [(0, 0, 0), (2**63 - 1, 5, 3), (2**63 - 2, 5, 3), (-3, 5, 3), (8, 2**32 + 4, 2**32 + 3)]
)
def test_noise_of_a_name_is_the_same_in_every_version(name: tuple[int, int, int]) -> None:
    """Philox under the key (seed, prompt * 2 ** 32 + answer) at the counter (0, step, 0, 0): its upper 52 bits.

    The seed has 64 bits, and the prompt's and the answer's number have 32 bits each.
    """
    seed, prompt, answer = name
    key = np.array([seed % 2**64, prompt % 2**32 * 2**32 + answer % 2**32], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=[0, 7, 0, 0]).random_raw(5) >> np.uint64(12)
    expected = [-math.log(-math.log((int(value) + 0.5) / 2**52)) for value in bits]
    assert gumbel_noise(name, 7, 5).tolist() == pytest.approx(expected, rel=1e-6)


def test_each_seed_prompt_answer_and_step_has_noise_of_its_own() -> None:
    names = [((0, 0, 0), 0), ((1, 0, 0), 0), ((0, 1, 0), 0), ((0, 0, 1), 0), ((0, 0, 0), 1), ((0, 1, 1), 0)]
    noises = {tuple(gumbel_noise(stream, step, 8).tolist()) for stream, step in names}
    assert len(noises) == len(names)
    assert torch.equal(gumbel_noise((0, 1, 2), 3, 8), gumbel_noise((0, 1, 2), 3, 8))
    assert torch.equal(gumbel_noise((0, 1, 2), 3, 9)[:8], gumbel_noise((0, 1, 2), 3, 8))  # not of the vocabulary


def test_large_and_negative_seeds_are_not_rounded() -> None:
    assert gumbel_noise((-1, 0, 0), 0, 100_000).isfinite().all()
    assert not torch.equal(gumbel_noise((2**60, 1, 0), 0, 8), gumbel_noise((2**60 + 1, 1, 0), 0, 8))
    assert not torch.equal(gumbel_noise((2**60, 1, 0), 0, 8), gumbel_noise((2**60, 1, 1), 0, 8))


def test_stream_of_one_seed_and_of_a_seed_for_each_prompt() -> None:
    assert stream_of(5, 2, 1) == (5, 2, 1)
    assert stream_of((7, 8, 9), 2, 1) == (9, 0, 1)


def test_choose_takes_the_best_or_draws_each_row_from_its_stream() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    assert select_tokens(logits, draws=None).tolist() == [1, 0]
    draws = [((4, 0, 0), 6), ((4, 1, 0), 2)]
    expected = [plainly(row, stream, step) for row, (stream, step) in zip(logits, draws, strict=True)]
    assert select_tokens(logits, draws=draws).tolist() == expected
