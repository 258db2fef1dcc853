"""A layer's products through oneDNN: the gradients of F.linear, added where they lie."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from handspun.training import linear as linear_module
from handspun.training.linear import products_by_onednn


def test_a_layer_by_hand() -> None:
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, 3.0]]))
        layer.bias.fill_(1.0)
    x = torch.tensor([[[1.0, 10.0], [0.0, 1.0]]], requires_grad=True)
    with products_by_onednn(nn.Sequential(layer)):
        y = layer(x)
        y.backward(torch.tensor([[[1.0], [2.0]]]))
    assert y.tolist() == [[[33.0], [4.0]]]
    assert x.grad is not None
    assert x.grad.tolist() == [[[2.0, 3.0], [4.0, 6.0]]]
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[1.0, 12.0]]
    assert layer.bias.grad is not None
    assert layer.bias.grad.tolist() == [3.0]


@pytest.mark.parametrize("trained", ["all", "weight", "bias", "none"])
def test_gradients_are_autograds_and_add_up(trained: str) -> None:
    def gradients(*, onednn: bool) -> list[Tensor | None]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 96), nn.SiLU(), nn.Linear(96, 32, bias=False))
        for name, parameter in model.named_parameters():
            parameter.requires_grad = trained == "all" or name == f"0.{trained}"
        inputs = [torch.randn(2, count, 48, requires_grad=True) for count in (7, 12)]
        with products_by_onednn(model if onednn else nn.Identity()):
            for x in inputs:
                model(x).square().sum().backward()
        return [tensor.grad for tensor in (*model.parameters(), *inputs)]

    for found, wanted in zip(gradients(onednn=True), gradients(onednn=False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_only_float32_goes_there_and_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, product = [0], linear_module.product

    def counted(*arguments: Any) -> Tensor:
        counts[0] += 1
        return product(*arguments)

    monkeypatch.setattr(linear_module, "product", counted)
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    with products_by_onednn(nn.Sequential(layer)):
        layer(x).sum().backward()
        assert counts == [1]  # and none for an input that wants no gradient
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    layer(x)
    assert counts == [1]
    assert "forward" not in vars(layer)
