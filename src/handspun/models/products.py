"""Linear layers as decoding uses them: of an input, of a normed one, and of a gated one.

product(x)                  x @ W.T + bias
product.normed(x, w, eps)   of RMSNorm(x) (Zhang and Sennrich 2019, arXiv:1910.07467)
product.gated(gate_up)      of silu(gate) * up (SwiGLU, Shazeer 2020, arXiv:2002.05202)
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from handspun.models import native
from handspun.models.hadamard import hadamard
from handspun.models.int8 import int_mm, quantize_channels, quantize_rows
from handspun.models.onednn import product_of_rounded_rows
from handspun.models.tiles import Tiles, can_tile


class Product(Protocol):
    """The weights of one layer, or of several that have the same input. All arrays are (tokens, ...), float32."""

    def __call__(self, x: Tensor) -> Tensor:
        """(tokens, in) to (tokens, out)."""

    def normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """(tokens, in) to (tokens, out). norm: (in,)."""

    def gated(self, gate_up: Tensor) -> Tensor:
        """(tokens, 2 * in) to (tokens, out)."""

    def rows_of_weight(self, rows: Tensor) -> Tensor:
        """(tokens,) to (tokens, in): the same matrix as an embedding."""


class FloatProduct:
    """In the weights' own type."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (out, in). bias: (out,)."""
        self.weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """(tokens, in) to (tokens, out)."""
        return product_of_rounded_rows(x.to(self.weight.dtype), self.weight, self._bias).float()

    def normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """(tokens, in) to (tokens, out)."""
        return self(F.rms_norm(x, norm.shape, norm, eps))

    def gated(self, gate_up: Tensor) -> Tensor:
        """(tokens, 2 * in) to (tokens, out)."""
        return self(_gated(gate_up))

    def rows_of_weight(self, rows: Tensor) -> Tensor:
        """(tokens,) to (tokens, in): as an embedding."""
        return F.embedding(rows, self.weight).float()


class Int8Product:
    """In int8, with a scale for each output channel and for each token.

    On a CPU the matrix is laid out once: for the native kernel, or where there is none, for oneDNN's product. Both
    take unsigned rows and give the same sums. Rows are transformed and rounded by native kernels too.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, is_embedding: bool = False) -> None:
        """weight: (out, in), float. bias: (out,). is_embedding: keep what `rows_of_weight` needs."""
        matrix, self._scale = quantize_channels(weight)
        self._bias = None if bias is None else bias.float()
        self._native = native.kernels() if weight.device.type == "cpu" else None
        self._tiles = Tiles(matrix) if can_tile(matrix) else None
        self._packed = _packed(matrix) if self._tiles is None and weight.device.type == "cpu" else None
        self._zero_points = torch.zeros(len(matrix), dtype=torch.int64)
        is_kept = self._tiles is None and (self._packed is None or is_embedding)
        self._weight = matrix if is_kept else matrix[:0].clone()

    def __call__(self, x: Tensor) -> Tensor:
        """(tokens, in) to (tokens, out)."""
        return self._product(*(native.quantize(self._native, x) if self._native else _unsigned(x)))

    def normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """(tokens, in) to (tokens, out)."""
        if self._native:
            return self._product(*native.norm_quantize(self._native, x, norm, eps))
        return self(F.rms_norm(x, norm.shape, norm, eps))

    def gated(self, gate_up: Tensor) -> Tensor:
        """(tokens, 2 * in) to (tokens, out)."""
        if self._native:
            return self._product(*native.gate_quantize(self._native, gate_up))
        return self(_gated(gate_up))

    def rows_of_weight(self, rows: Tensor) -> Tensor:
        """(tokens,) to (tokens, in): as an embedding."""
        weight = self._weight[rows] if self._tiles is None else self._tiles.rows(rows)
        return hadamard(weight.float().mul_(self._scale[rows, None]))

    def _product(self, rows: Tensor, row_scale: Tensor) -> Tensor:
        """rows: (tokens, in), unsigned, 128 in their middle. row_scale: (tokens, 1)."""
        if self._tiles is not None:
            return self._tiles.product(rows, row_scale, self._scale, self._bias)
        if self._packed is None:
            sums = int_mm(rows.view(torch.int8) ^ -128, self._weight.t()).float().mul_(self._scale)
        else:
            sums = torch.ops.onednn.qlinear_pointwise(
                *(rows, 1.0, 128, self._packed, self._scale, self._zero_points, None),
                *(1.0, 0, torch.float32, "none", [], ""),
            )
        return sums.mul_(row_scale) if self._bias is None else sums.mul_(row_scale).add_(self._bias)


def _unsigned(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, scale = quantize_rows(hadamard(x))
    return (rows ^ -128).view(torch.uint8), scale  # each value + 128


def _packed(weight: Tensor) -> Tensor | None:
    """The matrix in oneDNN's layout; None where this PyTorch has it not."""
    try:
        packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    return packed


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)
