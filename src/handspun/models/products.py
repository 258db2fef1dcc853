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
from handspun.models.int8 import bytes_of, check_exact, int8_of, quantize_channels, quantize_rows
from handspun.models.int8_matmul import PackedInt8, int_mm, packed_int8
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
        self._matrix = Int8Matrix(matrix, keeps_rows=is_embedding)

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
        return hadamard(self._matrix.rows(rows).float().mul_(self._scale[rows, None]))

    def _product(self, rows: Tensor, row_scale: Tensor) -> Tensor:
        """rows: (tokens, in), unsigned, 128 in their middle. row_scale: (tokens, 1)."""
        return self._matrix.product(rows, row_scale, self._scale, self._bias)


class Int8Matrix:
    """A frozen int8 matrix, (out, in), laid out for the fastest matmul that is exact on its device."""

    def __init__(self, weight: Tensor, *, keeps_rows: bool) -> None:
        """weight: (out, in), int8. keeps_rows: keep what `rows` needs."""
        self._tiles = Tiles(weight) if can_tile(weight) else None
        self._packed = _packed(weight) if self._tiles is None and weight.device.type == "cpu" else None
        is_kept = self._tiles is None and (self._packed is None or keeps_rows)
        self._weight = weight if is_kept else weight[:0].clone()

    def rows(self, rows: Tensor) -> Tensor:
        """(count,) to (count, in): rows of the matrix."""
        return self._weight[rows] if self._tiles is None else self._tiles.rows(rows)

    def product(self, rows: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Return row_scale * scale * ((rows - 128) @ weight.T) + bias: (count, out), float32.

        rows: (count, in), bytes. row_scale: (count, 1). scale, bias: (out,).
        """
        laid_out = self._tiles or self._packed
        if laid_out is not None:
            return laid_out.product(rows, row_scale, scale, bias)
        products = int_mm(int8_of(rows), self._weight.t()).float().mul_(scale).mul_(row_scale)
        return products if bias is None else products.add_(bias)


def refuse_inexact_decoding(device: torch.device) -> None:
    """Raise ModelError if the int8 products of decoding are not exact on the device, or missing.

    Tries the very products, with the largest values.
    """
    check_exact([decoded_sums], device, remedy="--weights float32")


def decoded_sums(rows: Tensor, weight: Tensor) -> Tensor:
    """Return the sums of rows - 128, bytes, and int8 weights as decoding computes them: (count, out), float32."""
    ones = torch.ones(len(weight), device=rows.device)
    row_scale = torch.ones(len(rows), 1, device=rows.device)
    return Int8Matrix(weight, keeps_rows=False).product(rows, row_scale, ones, None)


def _unsigned(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, scale = quantize_rows(hadamard(x))
    return bytes_of(rows), scale


def _packed(weight: Tensor) -> PackedInt8 | None:
    """The matrix in oneDNN's layout; None where this PyTorch has it not."""
    try:
        return packed_int8(weight)
    except (AttributeError, RuntimeError, NotImplementedError):
        return None


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)
