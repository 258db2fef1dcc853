"""The largest values of rows are PyTorch's, whatever the width, with ties and with -inf."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from handspun.decoding.top import first_largest, top_values


@given(
    width=st.integers(1, 3000),
    count=st.integers(1, 9),
    kinds=st.integers(2, 5000),
    seed=st.integers(0, 2**32),
)
def test_top_values_equal_topk(width: int, count: int, kinds: int, seed: int) -> None:
    """`kinds` different values, of which one is -inf: so values tie, within blocks and between them."""
    generator, count = torch.Generator().manual_seed(seed), min(count, width)
    rows = torch.randint(0, kinds, (3, width), generator=generator).float()
    rows[rows == 0] = -math.inf
    values, indices = top_values(rows, count)
    assert torch.equal(values, rows.topk(count).values)
    assert torch.equal(rows.gather(1, indices), values)
    assert all(len(set(row)) == count for row in indices.tolist())


@pytest.mark.parametrize("width", [5, 64, 1000])
def test_first_largest_of_equal_values(width: int) -> None:
    rows = torch.zeros(2, width)
    rows[0, 3], rows[0, 4], rows[1, 0] = 2.0, 2.0, -math.inf
    assert first_largest(rows).tolist() == [3, 1]
    assert rows.argmax(-1).tolist() == [3, 1]
