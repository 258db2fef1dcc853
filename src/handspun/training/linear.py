"""A float32 layer's products through oneDNN, its gradients added where they lie.

    y = x W.T + b    dx = dy W    dW = dy.T x    db = sum of dy

`F.linear` takes MKL for float32, which oneDNN outruns (`models/onednn.py`), and autograd makes a new array for
each gradient before it adds it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handspun.models.onednn import product, takes
from handspun.training.head import add_gradients


@contextmanager
def products_by_onednn(model: nn.Module) -> Iterator[None]:
    """The model's plain linear layers with these products, and afterwards as they were."""
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.forward = partial(_linear, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """x: (..., in). Returns (..., out)."""
    if not takes(layer.weight) or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, layer.weight, layer.bias)
    apply: Any = _Linear.apply
    y: Tensor = apply(x.flatten(0, -2), layer.weight, layer.bias, layer)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Linear(torch.autograd.Function):
    """x: (tokens, in). Weight and bias are arguments so that autograd comes by where only they are trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Linear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        add_gradients(ctx.layer, grad, x)
        return product(grad, ctx.layer.weight.t()) if ctx.needs_input_grad[0] else None, None, None, None
