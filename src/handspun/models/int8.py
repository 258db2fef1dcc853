"""int8 linear layers: weights with one scale per output channel, activations with one scale per row.

The symmetric scheme of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339). Instead of separate outlier columns, a
Hadamard transform spreads outliers over their neighbors (kernels/reference.py):

    hadamard(x) = row_scale * x_int8                hadamard(w) / block = channel_scale * w_int8
    y = row_scale * channel_scale * (x_int8 @ w_int8.T)

Sums of int8 matmuls are exact integers, so a row's result does not depend on the other rows. Backward uses the
same matrix: the channels' scales are folded into the gradient before it is quantized per row, and the input's
gradient is transformed back.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from handspun.errors import ModelError
from handspun.kernels import kernels_for, slower_without
from handspun.kernels.reference import block_of, has_fast_int_mm, is_exact

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Bounds the memory of float copies: an embedding has 150,000 channels.
_CHANNELS_AT_ONCE = 4096


def quantize_base(model: "PreTrainedModel") -> None:
    """Replace a model's frozen linear layers, with LoRA adapters (peft's) or without, one at a time."""
    from peft.tuners.lora import LoraLayer

    # Embedding and head stay float: a row of a softmax's gradient is one large value and thousands of small ones,
    # which one scale per row would lose.
    head: Any = model.get_output_embeddings()
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    bases = {layer.base_layer for layer in adapted}
    kept = {*head.modules(), *(part for layer in adapted for part in layer.modules() if part not in bases)}
    for module in [*model.modules()]:
        for name, layer in [*module.named_children()]:
            if isinstance(layer, nn.Linear) and layer not in kept:
                setattr(module, name, int8_linear(layer))


def int8_linear(linear: nn.Linear) -> "Int8Linear":
    """Return the layer in int8. It does not keep the float weights."""
    bias = None if linear.bias is None else linear.bias.detach().float()
    return Int8Linear(*quantize_channels(linear.weight), bias)


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (hadamard(weight) / block in int8, (out, in); scales, (out,)). weight: (out, in), float."""
    block, kernels = block_of(weight.shape[1]), kernels_for(weight.device)
    rows = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), 1, device=weight.device)
    for first in range(0, len(weight), _CHANNELS_AT_ONCE):
        some = slice(first, first + _CHANNELS_AT_ONCE)
        quantized, scales[some] = kernels.quantize(weight.detach()[some].float())
        rows[some] = quantized[:, : weight.shape[1]]  # kernels may have padded it
    # The block is a power of two, so dividing the scales by it gives the bits of dividing the values.
    return rows, scales.squeeze(1) / block


def check_exact_matmuls(device: torch.device) -> None:
    """Raise ModelError if the int8 matmuls of training are missing on the device, or not exact.

    Runs forward and backward matmuls of `Int8Linear` with the largest values.
    """
    check_exact(training_matmuls(), device, remedy="--base-weights float32")


def speed_notices(device: torch.device, *, is_int8: bool) -> list[str]:
    """Return messages for the user about the speed of training on the device. is_int8: the base is int8."""
    slower = slower_without(device, "training")
    if slower is None:
        return []
    if has_fast_int_mm() or not is_int8:
        return [slower]
    return [
        slower,
        "int8 layers are computed in float32: they take a quarter of the memory, but as much time as "
        "--base-weights float32",
    ]


def check_exact(
    matmuls: Sequence[Callable[[Tensor, Tensor], Tensor]], device: torch.device, *, remedy: str
) -> None:
    """Raise ModelError, with the remedy, if a matmul (see `is_exact`) fails or is not exact on the device."""
    try:
        exact = all(is_exact(matmul, device) for matmul in matmuls)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"int8 matmuls are not available on {device}: {reason} Use {remedy}.") from error
    if not exact:
        raise ModelError(
            f"int8 matmuls are not exact on {device} (expected exact sums, got different ones for the largest "
            f"values). Use {remedy}."
        )


def training_matmuls() -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """Return the int8 matmuls of training, forward and backward, as functions that `is_exact` takes."""
    return _sums_forward, _sums_backward


def _sums_forward(rows: Tensor, weight: Tensor) -> Tensor:
    ones = torch.ones(len(weight), device=rows.device)
    matrix = Int8Linear(weight, ones, None).matrix
    return matrix.matmul(rows, torch.ones(len(rows), 1, device=rows.device), ones, None)


def _sums_backward(rows: Tensor, weight: Tensor) -> Tensor:
    """Return the same sums from the gradient's matmul, with the transposed matrix (which it transposes again)."""
    layer = Int8Linear(weight.T.contiguous(), torch.ones(weight.shape[1], device=rows.device), None)
    return layer.matrix.transposed_matmul(rows, torch.ones(len(rows), 1, device=rows.device))


class Int8Linear(nn.Module):
    """A frozen linear layer in int8. Gradients flow to its input, not to its weight."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Lay out the weights. weight: (out, in), int8. scale: (out,). bias: (out,)."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kernels = kernels_for(weight.device)
        self.matrix = self.kernels.int8_weight(weight)
        self.scale = nn.Buffer(scale)
        self.bias = None if bias is None else nn.Buffer(bias)
        self.quantize_activations = True

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out), float32. x: (..., in)."""
        apply: Any = _Int8Product.apply
        y: Tensor = apply(x.flatten(0, -2), self)
        return y.view(*x.shape[:-1], self.out_features)

    def float_weight(self) -> Tensor:
        """Return the dequantized weights, (out, in), float32."""
        rows = self.matrix.rows(torch.arange(self.out_features, device=self.scale.device))
        return self.kernels.hadamard(rows.float().mul_(self.scale[:, None]))

    def matmul(self, x: Tensor) -> Tensor:
        """Return the layer's output, (tokens, out), float32. x: (tokens, in)."""
        if not self.quantize_activations:
            return nn.functional.linear(x.float(), self.float_weight(), self.bias)
        return self.matrix.matmul(*self.kernels.quantize(x.float()), self.scale, self.bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Return the gradient of the input, (tokens, in), float32. grad: (tokens, out)."""
        # The channels' scales go into the gradient before it is rounded: what is summed must have one scale.
        rows, row_scale = self.kernels.scale_quantize(grad.float(), self.scale)
        return self.kernels.hadamard(self.matrix.transposed_matmul(rows, row_scale))


@contextmanager
def float_activations(model: nn.Module) -> Iterator[None]:
    """Leave the inputs of int8 layers unquantized within the block, which is slow."""
    # Two ways to compute the same can only be compared like this: with rounded activations, another order of
    # summation now and then changes an integer, and after some layers all of them.
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    for layer in layers:
        layer.quantize_activations = False
    try:
        yield
    finally:
        for layer in layers:
            layer.quantize_activations = True


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer.matmul(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.input_gradient(grad).to(ctx.dtype), None
