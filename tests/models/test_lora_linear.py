"""The adapter's one operation computes what peft's layer computes, forward and backward."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from handspun.errors import ConfigError
from handspun.models.lora import LoraLinear, add_lora
from tiny import tiny_model


def layer(*, bias: bool = True, dropout: float = 0.0) -> tuple[LoraLinear, Tensor]:
    """A layer of a model with adapters, with values in A and B, and an input."""
    torch.manual_seed(0)
    model: Any = add_lora(tiny_model("qwen2"), "tiny", rank=3, alpha=6, dropout=dropout)
    attention = model.base_model.model.model.layers[1].self_attn
    found = attention.q_proj if bias else attention.o_proj
    assert isinstance(found, LoraLinear)
    nn.init.normal_(found.lora_B["default"].weight)
    assert (found.base_layer.bias is not None) is bias
    if bias:
        nn.init.normal_(found.base_layer.bias)  # zeros until then
    return found, torch.randn(2, 5, 32, requires_grad=True)


def result_and_gradients(forward: Any, lora: LoraLinear, x: Tensor) -> list[Tensor]:
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    y = forward(x)
    weights = torch.arange(y.numel(), dtype=y.dtype).view_as(y) / y.numel()
    return [y, *torch.autograd.grad((y * weights).sum(), [x, a, b])]


def test_add_lora_adapts_the_named_layers_alone() -> None:
    model: Any = add_lora(
        tiny_model("qwen2"), "tiny", rank=3, alpha=6, dropout=0.0, target_modules=["q_proj", "1.mlp.up_proj"]
    )
    adapted = {
        name.partition(".layers.")[2] for name, module in model.named_modules() if isinstance(module, LoraLinear)
    }
    assert adapted == {"0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"}
    trained = {name.rpartition(".lora_")[0] for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.partition(".layers.")[2] for name in trained} == adapted


@pytest.mark.parametrize("name", ["attn", "proj", "lm_head", "self_attn"])
def test_add_lora_lists_the_layers_for_an_unknown_name(name: str) -> None:
    names = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ConfigError, match=rf"no linear layer {name} \(expected some of {names}\)"):
        add_lora(tiny_model("qwen2"), "tiny", rank=3, alpha=6, dropout=0.0, target_modules=["q_proj", name])


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_pefts_layer_to_rounding(bias: bool) -> None:
    lora, x = layer(bias=bias)
    expected = result_and_gradients(lambda x: Linear.forward(lora, x), lora, x)
    for found, wanted in zip(result_and_gradients(lora, lora, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_under_autocast_products_are_bfloat16_and_gradients_float32() -> None:
    lora, x = layer()
    expected = result_and_gradients(lora, lora, x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = result_and_gradients(lora, lora, x)
    assert rounded[0].dtype == torch.bfloat16
    for found, wanted in zip(rounded, expected, strict=True):
        assert (found.float() - wanted).norm() < 0.02 * wanted.norm()
    assert {gradient.dtype for gradient in rounded[1:]} == {torch.float32}


def test_gradients_are_those_of_finite_differences() -> None:
    lora, x = layer()
    lora = lora.double()
    assert torch.autograd.gradcheck(lora, x.detach().double().requires_grad_(), fast_mode=True)


def test_a_frozen_input_gets_no_gradient_and_the_adapter_does() -> None:
    lora, x = layer()
    lora(x.detach()).sum().backward()
    assert lora.lora_A["default"].weight.grad is not None
    assert lora.base_layer.weight.grad is None


def test_dropout_is_on_the_adapters_input_in_training_and_off_otherwise() -> None:
    """y = x @ W.T + bias + 2 * dropped(x) @ A.T @ B.T, with what the same seed drops of x."""
    lora, x = layer(dropout=0.5)
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    base = F.linear(x, lora.base_layer.weight, lora.base_layer.bias)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    assert 0.3 < (dropped == 0).float().mean() < 0.7
    torch.manual_seed(1)
    torch.testing.assert_close(lora.train()(x), base + 2 * dropped @ a.t() @ b.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lora.eval()(x), base + 2 * x @ a.t() @ b.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dropout", "training", "at_once"),
    [(0.0, True, True), (0.0, False, True), (0.5, False, True), (0.5, True, False)],
)
def test_it_is_one_operation_wherever_nothing_is_dropped(dropout: float, training: bool, at_once: bool) -> None:
    """peft's way gives the same numbers, and is slower."""
    lora, x = layer(dropout=dropout)
    view = lora.train(training)(x).grad_fn
    assert view is not None
    made_by = type(view.next_functions[0][0]).__name__
    assert (made_by == "_LoraProductBackward") is at_once


def test_two_active_adapters_are_both_added() -> None:
    lora, x = layer()
    lora.update_layer("other", 2, lora_alpha=2, config=LoraConfig(r=2, lora_alpha=2))
    nn.init.normal_(lora.lora_B["other"].weight)
    lora.set_adapter(["default", "other"])
    expected = F.linear(x, lora.base_layer.weight, lora.base_layer.bias)
    for name, scaling in (("default", 2.0), ("other", 1.0)):
        expected = expected + scaling * x @ lora.lora_A[name].weight.t() @ lora.lora_B[name].weight.t()
    torch.testing.assert_close(lora(x), expected, rtol=1e-4, atol=1e-4)
    lora.set_adapter("other")
    assert not torch.allclose(lora(x), expected, atol=0.01)


def test_disabled_and_merged_adapters_are_not_added_again() -> None:
    lora, x = layer()
    with_adapter, base = lora(x), F.linear(x, lora.base_layer.weight, lora.base_layer.bias)
    assert not torch.allclose(with_adapter, base, atol=0.01)
    lora.enable_adapters(False)
    torch.testing.assert_close(lora(x), base)
    lora.enable_adapters(True)
    lora.merge()
    torch.testing.assert_close(lora(x), with_adapter, rtol=1e-4, atol=1e-4)
