"""Rounding to bfloat16: the mean is kept, and so is what needs no rounding."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from handspun.models import save as rounding
from handspun.models.save import round_stochastically


def rounded(values: list[float], seed: int = 0) -> torch.Tensor:
    return round_stochastically(torch.tensor(values), torch.Generator().manual_seed(seed))


def test_a_quarter_of_the_way_up_is_rounded_up_a_quarter_of_the_time() -> None:
    step = 2**-7  # bfloat16 has 7 bits behind the point: 1, 1.0078125, ...
    found = rounded([1 + step / 4] * 40_000).float()
    assert set(found.tolist()) == {1.0, 1 + step}
    assert abs((found > 1).float().mean().item() - 0.25) < 0.01


def test_negative_values_keep_their_mean_too() -> None:
    found = rounded([-(1 + 2**-7 * 3 / 4)] * 40_000).float()
    assert abs(found.mean().item() + 1 + 2**-7 * 3 / 4) < 1e-4


def test_what_bfloat16_can_hold_stays() -> None:
    values = [0.0, -0.0, 1.0, -3.140625, 2.0**-133, math.inf, -math.inf]
    assert rounded(values).float().tolist() == values
    assert rounded([math.nan]).isnan().all()


@example(-3.39e38, 0)  # between the largest bfloat16 and the largest float32
@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 2**32))
def test_no_value_moves_further_than_to_a_neighbor(value: float, seed: int) -> None:
    neighbors = {rounded([value], seed=n).item() for n in range(4)} | {rounded([value], seed=seed).item()}
    assert len(neighbors) <= 2
    assert all(abs(found - value) <= max(abs(value) * 2**-7, 2.0**-133) for found in neighbors)


def test_the_same_seed_rounds_alike_also_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(3, 5, 7)
    monkeypatch.setattr(rounding, "_AT_ONCE", 16)
    first, second = (round_stochastically(values, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first.float(), values, rtol=2**-7, atol=0)
