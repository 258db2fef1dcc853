"""Matmuls of bytes and int8 weights, by native kernels and without: exact sums, whatever the numbers of rows and
channels, both ways."""

import pytest
import torch
from torch import Tensor, nn

from handspun.kernels import native
from handspun.kernels.int8_matmul import exact_sums
from handspun.kernels.tiles import TiledInt8Weight
from handspun.models import fused
from handspun.models.fused import Int8Matrix, Int8Product
from handspun.models.int8 import Int8Linear, int8_linear

pytestmark = pytest.mark.cpu
needs_kernels = pytest.mark.skipif(
    native.kernels() is None, reason=f"native kernels: {native.reason_for_none() or 'HANDSPUN_NATIVE=0'}"
)
BACKENDS = [pytest.param(True, id="native", marks=needs_kernels), pytest.param(False, id="PyTorch")]


@pytest.fixture(params=BACKENDS)
def is_native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether matmuls are native: with AMX they are not by themselves."""
    monkeypatch.setattr(native, "can_multiply", lambda: request.param)
    return bool(request.param)


def bytes_of(count: int, width: int) -> Tensor:
    return torch.randint(0, 256, (count, width), dtype=torch.uint8)


def weights_of(channels: int, width: int) -> Tensor:
    return torch.randint(-127, 128, (channels, width), dtype=torch.int8)


@pytest.mark.parametrize("width", [4, 36, 896])
@pytest.mark.parametrize("channels", [4, 20, 64, 132])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_the_exact_sum_scaled_in_pytorchs_order(
    width: int, channels: int, has_bias: bool, is_native: bool
) -> None:
    """From one row to more than two rounds of them, in decoding and in training."""
    torch.manual_seed(0)
    weight, scale = weights_of(channels, width), torch.rand(channels)
    bias = torch.randn(channels) if has_bias else None
    layer, matrix = Int8Linear(weight, scale, bias), Int8Matrix(weight, keeps_rows=False)
    assert (layer.tiles is not None) == is_native
    for count in range(1, 15):
        rows, row_scale = bytes_of(count, width), torch.rand(count, 1)
        expected = exact_sums(rows.int() - 128, weight).float() * scale * row_scale
        expected = expected if bias is None else expected + bias
        assert torch.equal(layer.matmul_of_bytes(rows, row_scale), expected)
        assert torch.equal(matrix.matmul(rows, row_scale, scale, bias), expected)


@pytest.mark.parametrize("width", [4, 36, 896])
@pytest.mark.parametrize("channels", [4, 20, 64, 132])
@pytest.mark.usefixtures("is_native")
def test_so_is_the_product_with_the_transposed_matrix(width: int, channels: int) -> None:
    torch.manual_seed(0)
    weight = weights_of(channels, width)
    layer = Int8Linear(weight, torch.ones(channels), None)
    for count in (1, 2, 5, 6, 7, 13):
        rows, row_scale = bytes_of(count, channels), torch.rand(count, 1)
        expected = exact_sums(rows.int() - 128, weight.T).float() * row_scale
        assert torch.equal(layer.transposed_matmul_of_bytes(rows, row_scale), expected)


@pytest.mark.usefixtures("is_native")
def test_the_largest_sums_are_exact() -> None:
    """Pairs of 255 * 127 do not fit into 16 bits, where older instructions add them."""
    width, channels = 8192, 68
    weight, one = torch.full((channels, width), 127, dtype=torch.int8), torch.ones(7, 1)
    layer, transposed = (
        Int8Linear(matrix, torch.ones(len(matrix)), None) for matrix in (weight, weight.T.contiguous())
    )
    for byte, value in ((255, 127), (0, -128)):
        rows = torch.full((7, width), byte, dtype=torch.uint8)
        assert (layer.matmul_of_bytes(rows, one) == float(value * 127 * width)).all()
        assert (transposed.transposed_matmul_of_bytes(rows, one) == float(value * 127 * width)).all()


@pytest.mark.usefixtures("is_native")
def test_a_row_is_the_same_whatever_is_beside_it() -> None:
    torch.manual_seed(0)
    matmul = Int8Product(torch.randn(200, 68), torch.randn(200))
    x = torch.randn(40, 68)
    whole = matmul(x)
    for count in (1, 2, 3, 7, 13, 39):
        assert torch.equal(matmul(x[-count:]), whole[-count:])


@pytest.mark.usefixtures("is_native")
def test_rows_of_the_matrix_as_an_embedding() -> None:
    """Where it is the head's matrix too."""
    torch.manual_seed(0)
    weight = weights_of(132, 36)
    rows = torch.tensor([0, 131, 63, 64, 63])
    assert torch.equal(Int8Matrix(weight, keeps_rows=True).rows(rows), weight[rows])


def test_a_pytorch_without_onednns_products_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are internal to PyTorch, and may go: the plain matmul takes their place."""

    def is_gone(_: Tensor) -> None:
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qlinear_prepack'")

    torch.manual_seed(0)
    weight, bias, x = torch.randn(200, 68), torch.randn(200), torch.randn(9, 68)
    monkeypatch.setattr(native, "can_multiply", lambda: False)
    usual = Int8Product(weight, bias)(x)
    monkeypatch.setattr(fused, "packed_int8", is_gone)
    matmul = Int8Product(weight, bias, is_embedding=True)
    assert torch.equal(matmul(x), usual)
    assert matmul._matrix._packed is None


@needs_kernels
def test_rows_of_the_tiles_are_those_of_the_matrix() -> None:
    weight = weights_of(132, 36)
    rows = torch.tensor([0, 131, 63, 64, 63])
    assert torch.equal(TiledInt8Weight(weight).rows(rows), weight[rows])


@needs_kernels
def test_decoding_has_the_bits_of_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(200, 68), torch.randn(200), torch.randn(9, 68)
    monkeypatch.setattr(native, "can_multiply", lambda: True)
    with_kernel = Int8Product(weight, bias, is_embedding=True)
    monkeypatch.setattr(native, "can_multiply", lambda: False)
    without = Int8Product(weight, bias, is_embedding=True)
    assert torch.equal(with_kernel(x), without(x))
    places = torch.tensor([3, 199])
    assert torch.equal(with_kernel.embed(places), without.embed(places))


@needs_kernels
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
