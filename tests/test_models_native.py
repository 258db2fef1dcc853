"""Native products of bytes and int8 weights: exact sums, whatever the numbers of rows and channels, both ways."""

import pytest
import torch
from torch import Tensor, nn

from handspun.models import native
from handspun.models.int8 import int8_linear
from handspun.models.products import Int8Product
from handspun.models.tiles import Tiles

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="no C compiler, or no AVX-512 with VNNI")


def bytes_of(count: int, width: int) -> Tensor:
    return torch.randint(0, 256, (count, width), dtype=torch.uint8)


def weights_of(channels: int, width: int) -> Tensor:
    return torch.randint(-127, 128, (channels, width), dtype=torch.int8)


@pytest.mark.parametrize("width", [4, 36, 896])
@pytest.mark.parametrize("channels", [4, 20, 64, 132])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_the_exact_sum_scaled_in_pytorchs_order(width: int, channels: int, has_bias: bool) -> None:
    """From one row to more than two rounds of them."""
    torch.manual_seed(0)
    weight, scale = weights_of(channels, width), torch.rand(channels)
    bias = torch.randn(channels) if has_bias else None
    for count in range(1, 15):
        rows, row_scale = bytes_of(count, width), torch.rand(count, 1)
        found = Tiles(weight).product(rows, row_scale, scale, bias)
        expected = sums(rows, weight.T) * scale * row_scale
        assert torch.equal(found, expected if bias is None else expected + bias)


@pytest.mark.parametrize("width", [4, 36, 896])
@pytest.mark.parametrize("channels", [4, 20, 64, 132])
def test_so_is_the_product_with_the_transposed_matrix(width: int, channels: int) -> None:
    torch.manual_seed(0)
    weight = weights_of(channels, width)
    for count in (1, 2, 5, 6, 7, 13):
        rows, row_scale = bytes_of(count, channels), torch.rand(count, 1)
        assert torch.equal(Tiles(weight).transposed_product(rows, row_scale), sums(rows, weight) * row_scale)


def sums(rows: Tensor, matrix: Tensor) -> Tensor:
    return ((rows.long() - 128) @ matrix.long()).float()


def test_the_largest_sums_are_exact() -> None:
    """Pairs of 255 * 127 do not fit into 16 bits, where older instructions add them."""
    width = 8192
    tiles, one = Tiles(torch.full((width, width), 127, dtype=torch.int8)), torch.ones(7, 1)
    for byte, value in ((255, 127), (0, -128)):
        rows = torch.full((7, width), byte, dtype=torch.uint8)
        assert (tiles.product(rows, one, torch.ones(width), None) == float(value * 127 * width)).all()
        assert (tiles.transposed_product(rows, one) == float(value * 127 * width)).all()


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
    weight = weights_of(132, 36)
    rows = torch.tensor([0, 131, 63, 64, 63])
    assert torch.equal(Tiles(weight).rows(rows), weight[rows])


def test_decoding_has_the_bits_of_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(200, 68), torch.randn(200), torch.randn(9, 68)
    with_kernel = Int8Product(weight, bias, is_embedding=True)
    monkeypatch.setattr(native, "can_multiply", lambda: False)
    without = Int8Product(weight, bias, is_embedding=True)
    assert torch.equal(with_kernel(x), without(x))
    places = torch.tensor([3, 199])
    assert torch.equal(with_kernel.rows_of_weight(places), without.rows_of_weight(places))


@pytest.mark.parametrize("has_bias", [False, True])
def test_training_has_the_bits_of_pytorch(has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear, x, gradient = nn.Linear(68, 200, bias=has_bias), torch.randn(9, 68), torch.randn(9, 200)
    found = []
    for is_native in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(native, "can_multiply", lambda is_native=is_native: is_native)
            layer, into = int8_linear(linear), x.clone().requires_grad_()
        assert (layer.tiles is not None) == is_native
        y = layer(into)
        found.append([y.detach(), *torch.autograd.grad(y, into, gradient), layer.float_weight()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
