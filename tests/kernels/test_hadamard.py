"""The Hadamard transform before rounding: worked out by hand, its own inverse, and what it is there for."""

import pytest
import torch
from torch import nn

from handspun.kernels import native
from handspun.kernels.int8_matmul import block_of, fwht_torch, hadamard
from handspun.models.int8 import int8_linear, quantize_rows

pytestmark = pytest.mark.cpu


def test_a_block_of_four_by_hand() -> None:
    assert hadamard(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[10.0, -2.0, -4.0, 0.0]]


def test_a_blocks_values_lie_apart() -> None:
    """Six is three blocks of two: values 0 and 3, 1 and 4, 2 and 5."""
    found = hadamard(torch.tensor([[1.0, 2.0, 3.0, 10.0, 20.0, 30.0]]))
    assert found.tolist() == [[11.0, 22.0, 33.0, -9.0, -18.0, -27.0]]


@pytest.mark.parametrize(("width", "block"), [(576, 64), (896, 64), (48, 16), (33, 1)])
def test_it_is_its_own_inverse(width: int, block: int) -> None:
    assert block_of(width) == block
    x = torch.randint(-100, 100, (3, width)).float()
    assert torch.equal(hadamard(hadamard(x)), block * x)


@pytest.mark.parametrize("width", [1, 33, 48, 576, 4864])
def test_it_is_sylvesters_matrix(width: int) -> None:
    """In integers, where nothing is rounded: H of 2n is ((H, H), (H, -H)), of values width / block apart."""
    x = torch.randint(-100, 100, (3, width))
    matrix = torch.ones(1, 1, dtype=torch.long)
    while len(matrix) < block_of(width):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    expected = torch.einsum("ij,njd->nid", matrix, x.view(3, len(matrix), -1)).reshape(3, width)
    assert torch.equal(hadamard(x.float()).long(), expected)
    assert torch.equal(fwht_torch(x.float()).long(), expected)


@pytest.mark.skipif(
    native.kernels() is None, reason=f"native kernels: {native.reason_for_none() or 'HANDSPUN_NATIVE=0'}"
)
@pytest.mark.parametrize("width", [33, 48, 576, 4864])
def test_the_kernel_adds_as_pytorch_does(width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2 * width)[:, :width]
    assert torch.equal(native.hadamard(native.kernels(), x), fwht_torch(x))


def test_a_value_a_hundred_times_the_others_does_not_drown_them() -> None:
    """127 steps up to 100 leave a value of 1 hardly any; spread over 64 values, 100 becomes 12.5."""
    torch.manual_seed(0)
    x, linear = torch.randn(20, 256), nn.Linear(256, 256, bias=False)
    x[:, 7] = 100
    exact = linear(x)
    rows, scale = quantize_rows(x)
    plain = nn.functional.linear(rows * scale, linear.weight)
    assert (int8_linear(linear)(x) - exact).norm() < (plain - exact).norm() / 4
