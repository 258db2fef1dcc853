"""The native product of bytes and int8 weights: exact sums, for every number of rows and channels."""

import pytest
import torch
from torch import Tensor

from handspun.models import native
from handspun.models.products import Int8Product

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="no C compiler, or no AVX-512 with VNNI")


def bytes_of(count: int, width: int) -> Tensor:
    return torch.randint(0, 256, (count, width), dtype=torch.uint8)


def weights_of(channels: int, width: int) -> Tensor:
    return torch.randint(-127, 128, (channels, width), dtype=torch.int8)


@pytest.mark.parametrize("width", [4, 36, 896])
@pytest.mark.parametrize("channels", [1, 17, 64, 130])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_the_exact_sum_scaled_in_pytorchs_order(width: int, channels: int, has_bias: bool) -> None:
    """From one row to more than two tiles of them."""
    torch.manual_seed(0)
    weight, scale = weights_of(channels, width), torch.rand(channels)
    bias = torch.randn(channels) if has_bias else None
    for count in range(1, 15):
        rows, row_scale = bytes_of(count, width), torch.rand(count, 1)
        found = native.product(rows, row_scale, native.tiles(weight), scale, bias)
        sums = (rows.long() - 128) @ weight.long().T
        expected = sums.float() * scale * row_scale
        assert torch.equal(found, expected if bias is None else expected + bias)


def test_the_largest_sums_are_exact() -> None:
    """Pairs of 255 * 127 do not fit into 16 bits, where older instructions add them."""
    weight, width = torch.full((64, 8192), 127, dtype=torch.int8), 8192
    for byte, value in ((255, 127), (0, -128)):
        rows = torch.full((7, width), byte, dtype=torch.uint8)
        found = native.product(rows, torch.ones(7, 1), native.tiles(weight), torch.ones(64), None)
        assert (found == float(value * 127 * width)).all()


def test_a_row_is_the_same_whatever_is_beside_it() -> None:
    torch.manual_seed(0)
    product = Int8Product(torch.randn(200, 68), torch.randn(200))
    x = torch.randn(40, 68)
    whole = product(x)
    for count in (1, 2, 3, 7, 13, 39):
        assert torch.equal(product(x[-count:]), whole[-count:])


def test_rows_of_the_tiles_are_those_of_the_matrix() -> None:
    """The embedding's, where it is the head's matrix too."""
    torch.manual_seed(0)
    weight = weights_of(130, 36)
    rows = torch.tensor([0, 129, 63, 64, 63])
    assert torch.equal(native.tiles(weight).rows(rows), weight[rows])


def test_the_kernel_gives_the_bits_of_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(200, 68), torch.randn(200), torch.randn(9, 68)
    with_kernel = Int8Product(weight, bias, is_embedding=True)
    monkeypatch.setattr(native, "can_multiply", lambda _: False)
    without = Int8Product(weight, bias, is_embedding=True)
    assert torch.equal(with_kernel(x), without(x))
    places = torch.tensor([3, 199])
    assert torch.equal(with_kernel.rows_of_weight(places), without.rows_of_weight(places))
