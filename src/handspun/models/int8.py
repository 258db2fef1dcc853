"""int8 linear layers: weights with a scale for each output channel, activations with a scale for each row.

The symmetric scheme of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), with its outlier columns spread over
their neighbours by a Hadamard transform (hadamard.py):

    hadamard(x) = row_scale * x_int8                hadamard(w) / block = channel_scale * w_int8
    y = row_scale * channel_scale * (x_int8 @ w_int8.T)

Sums of int8 products are exact integers, so a row's result does not depend on the rows beside it. The backward
pass uses the same matrix: the channels' scales are folded into the gradient before it is quantised, row by row,
and the input's gradient is transformed back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from handspun.errors import ModelError
from handspun.models import native
from handspun.models.hadamard import block_of, hadamard
from handspun.models.tiles import Tiles, can_tile

_SMALLEST_SCALE = 1e-12  # rows of zeros
_CHANNELS_AT_ONCE = 8192  # in float: an embedding has 150,000


def quantize_base(model: PreTrainedModel) -> None:
    """Replaces the linear layers under a model's LoRA adapters (peft's) by int8 layers, one at a time.

    Embedding and head stay in float: the gradient of a softmax is one large value and thousands of small ones a
    row, and with a scale for each row the small ones would be lost.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(module.base_layer, nn.Linear):
            module.base_layer = int8_linear(module.base_layer)


def int8_linear(linear: nn.Linear) -> "Int8Linear":
    """The layer in int8; its float weights are not kept."""
    bias = None if linear.bias is None else linear.bias.detach().float()
    return Int8Linear(*quantize_channels(linear.weight), bias)


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in), float, to hadamard(weight) / block in int8 and a scale for each channel, (out,)."""
    block = block_of(weight.shape[1])
    parts = [quantize_rows(hadamard(part.float()) / block) for part in weight.detach().split(_CHANNELS_AT_ONCE)]
    rows, scales = zip(*parts, strict=True)
    return torch.cat(rows), torch.cat(scales).squeeze(1)


def refuse_inexact_products(device: torch.device, *, remedy: str = "--base-weights float32") -> None:
    """Tries the largest sums: CPUs without an int8 dot product (VNNI) add pairs in 16 bits, which overflow.

    Raises ModelError, with what to use in their place, where int8 products are not exact, or not to be had.
    """
    rows = torch.full((32, 64), 127, dtype=torch.int8, device=device)
    expected = 64 * 127 * 127
    try:
        sums = [int_mm(rows, matrix) for matrix in (rows.t(), -rows.t())]
        exact = bool((sums[0] == expected).all() and (sums[1] == -expected).all())
    except (RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"int8 products cannot be had on {device}: {str(error).splitlines()[0]} Use {remedy}."
        ) from error
    if not exact:
        raise ModelError(
            f"int8 products overflow on {device} (a CPU without VNNI adds them in 16 bits). Use {remedy}."
        )


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """values: (rows, width), float. Returns int8 (rows, width) and its float32 scale, (rows, 1):
    values ≈ int8 * scale, with an error of at most scale / 2, a 254th of the row's largest value."""
    scale = values.abs().amax(1, keepdim=True).float().div_(127).clamp_min_(_SMALLEST_SCALE)
    return (values / scale).round_().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A frozen linear layer in int8. Gradients flow to its input, none to its weight."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """weight: (out, in), int8. scale: (out,). bias: (out,)."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.tiles = Tiles(weight) if can_tile(weight) else None
        self.weight = nn.Buffer(weight if self.tiles is None else weight[:0].clone())  # one of the two holds it
        self.scale = nn.Buffer(scale)
        self.bias = None if bias is None else nn.Buffer(bias)
        self.rounds_rows = True

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns float32, (..., out)."""
        apply: Any = _Int8Product.apply
        y: Tensor = apply(x.flatten(0, -2), self)
        return y.view(*x.shape[:-1], self.out_features)

    def float_weight(self) -> Tensor:
        """(out, in), float32: what the rounded weights stand for."""
        weight = self.weight if self.tiles is None else self.tiles.rows(torch.arange(self.out_features))
        return hadamard(weight.float().mul_(self.scale[:, None]))

    def product(self, x: Tensor) -> Tensor:
        """(tokens, in) to float32, (tokens, out)."""
        if not self.rounds_rows:
            return nn.functional.linear(x.float(), self.float_weight(), self.bias)
        if self.tiles is not None:
            return self.tiles.product(*native.quantize(native.kernels(), x.float()), self.scale, self.bias)
        rows, row_scale = quantize_rows(hadamard(x.float()))
        y = int_mm(rows, self.weight.t()).float().mul_(self.scale).mul_(row_scale)
        return y if self.bias is None else y.add_(self.bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """(tokens, out) to float32, (tokens, in)."""
        if self.tiles is not None:
            in_bytes = native.scale_quantize(native.kernels(), grad.float(), self.scale)
            return hadamard(self.tiles.transposed_product(*in_bytes))
        rows, row_scale = quantize_rows(grad.float() * self.scale)
        return hadamard(int_mm(rows, self.weight).float().mul_(row_scale))


@contextmanager
def rows_unrounded(model: nn.Module) -> Iterator[None]:
    """Inside the block, int8 layers multiply their weights by rows as they are, slowly.

    Rounded, a sum in another order is now and then another integer, and after some layers all of them differ: two
    ways to compute the same can only be compared without.
    """
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    for layer in layers:
        layer.rounds_rows = False
    try:
        yield
    finally:
        for layer in layers:
            layer.rounds_rows = True


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.input_gradient(grad).to(ctx.dtype), None


def int_mm(rows: Tensor, matrix: Tensor) -> Tensor:
    """Exact int32 sums. CUDA's product wants at least 17 rows."""
    count = len(rows)
    if rows.is_cuda and count < 17:
        rows = nn.functional.pad(rows, (0, 0, 0, 17 - count))
    return torch._int_mm(rows, matrix)[:count]
