"""int8 layers: their rounding worked out by hand, exact sums, and gradients through them."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from backends import chosen
from handspun.kernels.native import TiledInt8Weight, install_command
from handspun.kernels.reference import quantize_rows
from handspun.models import int8
from handspun.models.int8 import (
    Int8Linear,
    float_activations,
    int8_linear,
    quantize_base,
    speed_notices,
)
from handspun.models.lora import add_lora
from tiny import tiny_model

pytestmark = pytest.mark.cpu


def test_the_largest_value_of_a_row_becomes_127() -> None:
    rows, scale = quantize_rows(torch.tensor([[254.0, -127.0, 1.0, 3.1], [0.5, 0.0, -0.25, 0.1]]))
    assert rows.dtype == torch.int8
    assert rows.tolist() == [[127, -64, 0, 2], [127, 0, -64, 25]]  # halves to even: -63.5 is -64
    torch.testing.assert_close(scale, torch.tensor([[2.0], [0.5 / 127]]))


def test_a_row_of_zeros_stays_zeros() -> None:
    rows, scale = quantize_rows(torch.zeros(2, 4))
    assert not rows.any()
    assert scale.isfinite().all()


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
def test_no_value_moves_by_more_than_half_a_step(values: list[float]) -> None:
    row = torch.tensor([values])
    found, scale = quantize_rows(row)
    assert ((found * scale - row).abs() <= 0.5001 * scale + 1e-12).all()


def small_layer() -> tuple[nn.Linear, Int8Linear]:
    """Weights that int8 holds exactly: in units of 0.5 and of 0.25."""
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[63.5, -1.0, 0.5], [0.25, 31.75, -2.5]]))
        linear.bias.copy_(torch.tensor([1.0, -1.0]))
    return linear, int8_linear(linear)


def test_a_product_by_hand() -> None:
    linear, layer = small_layer()
    assert layer.matrix.rows(torch.arange(2)).tolist() == [[127, -2, 1], [1, 127, -10]]
    assert layer.scale.tolist() == [0.5, 0.25]
    x = torch.tensor([[127.0, 2.0, -3.0]])
    # 63.5 * 127 - 2 - 1.5 + 1 and 0.25 * 127 + 31.75 * 2 + 7.5 - 1: nothing is rounded
    assert layer(x).tolist() == [[8062.0, 101.75]]
    assert torch.equal(layer(x), linear(x))


def test_its_gradient_is_that_of_the_rounded_weights() -> None:
    linear, layer = small_layer()
    x = torch.randn(4, 3, requires_grad=True)
    # Folded into the channels' scales, the gradient is (127, 2) in each row: nothing is rounded.
    gradient = torch.tensor([[254.0, 8.0]]).expand(4, 2)
    [found] = torch.autograd.grad(layer(x), x, gradient)
    torch.testing.assert_close(found, gradient @ linear.weight, rtol=1e-6, atol=0)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    torch.manual_seed(0)
    layer = int8_linear(nn.Linear(64, 48))
    x = torch.randn(33, 64)
    together = layer(x)
    for rows in (x[:1], x[3:20]):
        start = 0 if len(rows) == 1 else 3
        assert torch.equal(layer(rows), together[start : start + len(rows)])


def test_rows_can_be_left_unrounded_for_a_while() -> None:
    torch.manual_seed(0)
    layer, x = int8_linear(nn.Linear(64, 48)), torch.randn(5, 64)
    rounded = layer(x)
    with float_activations(nn.Sequential(layer)):
        exact = layer(x)
    torch.testing.assert_close(exact, nn.functional.linear(x, layer.float_weight(), layer.bias))
    assert torch.equal(layer(x), rounded)
    assert 1e-4 < (exact - rounded).abs().max() < 0.1


def test_a_quarter_of_the_memory() -> None:
    linear = nn.Linear(256, 512)
    layer = int8_linear(linear)
    held = sum(tensor.nbytes for tensor in layer.buffers())
    # The weights, a scale and a bias for each channel; and natively a sum of each channel and each column.
    sums = 4 * 512 + 4 * 256 if isinstance(layer.matrix, TiledInt8Weight) else 0
    assert held == 256 * 512 + 2 * 4 * 512 + sums
    assert not list(layer.parameters())


@pytest.mark.parametrize("targets", [None, ["q_proj"]])
def test_all_layers_but_embedding_head_and_adapters_are_rounded(targets: list[str] | None) -> None:
    model: Any = add_lora(tiny_model("llama"), "tiny", rank=2, alpha=4, dropout=0.0, target_modules=targets)
    quantize_base(model)
    kinds = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    assert isinstance(model.base_model.model.lm_head, nn.Linear)
    assert isinstance(kinds["embed_tokens"], nn.Embedding)
    rounded = [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]
    assert len(rounded) == 2 * 7
    floats = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name.rpartition(".")[2] for name in floats} == {"default", "lm_head"}  # peft's name of the adapter


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("is_fast", [False, True])
def test_training_without_kernels_says_what_it_costs(
    is_fast: bool, is_int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "has_fast_int_mm", lambda: is_fast)
    assert speed_notices(torch.device("cuda"), is_int8=is_int8) == []
    with chosen("none"):
        first, *more = speed_notices(torch.device("cpu"), is_int8=is_int8)
    assert first == (
        "training runs without native kernels, which is slower: they were not compiled when the package was "
        "installed, for want of a C compiler. Install one, such as gcc, and then the package again: "
        f"{install_command()}"
    )
    assert [notice[:36] for notice in more] == (
        ["int8 layers are computed in float32:"] if is_int8 and not is_fast else []
    )
