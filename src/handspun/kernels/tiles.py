"""An int8 matrix in tiles of 64 channels, which the native kernels (kernels.c) read sequentially.

The same tiles serve matmuls with the matrix and with its transpose, which gradients need. Sums are exact integers,
and scales are applied in the plain form's order, so results equal those of `torch._int_mm` and PyTorch to the bit.
"""

from typing import Any

import torch
from torch import Tensor, nn

from handspun.kernels import native

_TILE = 64
"""Channels per tile, and columns that the transposed matmul computes at a time: TILE in kernels.c."""

# Channels summed at a time, which bounds the memory of int32 copies: an embedding has 150,000.
_ROWS_AT_ONCE = 8192


def can_tile(weight: Tensor) -> bool:
    """Return whether native kernels support the int8 matrix, (out, in), and are the fastest."""
    is_int8 = weight.dtype == torch.int8 and weight.device.type == "cpu"
    return is_int8 and not any(size % 4 for size in weight.shape) and native.can_multiply()


class TiledInt8Weight(nn.Module):
    """A frozen int8 matrix, (out, in), in tiles."""

    def __init__(self, weight: Tensor) -> None:
        """Lay out the matrix. weight: (out, in), int8, both multiples of 4."""
        super().__init__()
        self.channels, self.width = weight.shape
        more = -self.channels % _TILE
        filled = nn.functional.pad(weight, (0, 0, 0, more)) if more else weight
        self.weight = nn.Buffer(filled.view(-1, _TILE, self.width // 4, 4).transpose(1, 2).contiguous())
        """(tiles, in / 4, 64, 4): the last tile is padded with zeros."""
        # Rows are bytes with zero point 128. The corrections subtract what it adds to a sum.
        parts = filled.split(_ROWS_AT_ONCE)
        self.zero_point_correction = nn.Buffer(
            torch.cat([part.sum(1, dtype=torch.int32) for part in parts]).mul_(-128)
        )
        columns = torch.stack([part.sum(0, dtype=torch.int32) for part in parts]).sum(0, dtype=torch.int32)
        self.column_correction = nn.Buffer(nn.functional.pad(columns.mul_(-128), (0, -self.width % _TILE)))

    def rows(self, rows: Tensor) -> Tensor:
        """Return rows of the matrix, (count, in). rows: (count,)."""
        found: Tensor = self.weight[rows // _TILE, :, rows % _TILE]
        return found.flatten(1)

    def matmul(self, rows: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Return row_scale * scale * ((rows - 128) @ weight.T) + bias: (count, out), float32.

        Args:
            rows: (count, in), bytes.
            row_scale: (count, 1).
            scale: (out,).
            bias: (out,), or None.
        """
        out = torch.empty(len(rows), self.channels)
        library: Any = native.kernels()
        library.matmul(
            *(
                rows.data_ptr(),
                row_scale.data_ptr(),
                *rows.shape,
                self.weight.data_ptr(),
                self.zero_point_correction.data_ptr(),
            ),
            *(scale.data_ptr(), None if bias is None else bias.data_ptr(), self.channels, out.data_ptr()),
            torch.get_num_threads(),
        )
        return out

    def transposed_matmul(self, rows: Tensor, row_scale: Tensor) -> Tensor:
        """Return row_scale * ((rows - 128) @ weight): (count, in), float32. rows: (count, out), bytes."""
        out, threads = torch.empty(len(rows), self.width), torch.get_num_threads()
        work = torch.empty(threads, self.channels + -self.channels % _TILE, _TILE, dtype=torch.int8)
        library: Any = native.kernels()
        library.transposed_matmul(
            *(rows.data_ptr(), row_scale.data_ptr(), *rows.shape, self.weight.data_ptr()),
            *(self.column_correction.data_ptr(), self.width, out.data_ptr(), work.data_ptr(), threads),
        )
        return out
