"""Exact int8 matmuls on any CPU, and the Hadamard transform before quantization.

A few values of a row are many times as large as the others, and take most of int8's 127 steps. The transform
spreads them. It needs no calibration texts, changes no other layer, and consists of sums and differences only, so
a row does not depend on other rows. Weights transformed before quantization undo it.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from handspun.kernels import native
from handspun.kernels.cpu import cpu_flags

_LARGEST_BLOCK = 64


def block_of(width: int) -> int:
    """Return the size of a transform's block: the largest power of two that divides the width, at most 64."""
    return min(width & -width, _LARGEST_BLOCK)


def hadamard(x: Tensor) -> Tensor:
    """Return the Hadamard transform, not normalized, of each block of each row. x: (rows, width), float32.

    Results are bit-identical with and without native kernels, and in any position of a row in the batch.
    """
    library = native.kernels() if x.device.type == "cpu" else None
    return native.hadamard(library, x) if library else fwht_torch(x)


def fwht_torch(x: Tensor) -> Tensor:
    """Compute `hadamard` in PyTorch, by the fast Walsh-Hadamard transform: log2(block) passes of sums."""
    width = x.shape[1]
    # The values of a block are width / block apart: so each pass reads and writes whole stretches of memory.
    distance = width // block_of(width)
    while distance < width:
        low, high = x.reshape(len(x), -1, 2, distance).unbind(2)
        x = torch.stack([low + high, low - high], dim=2).view(len(x), width)
        distance *= 2
    return x


_MAX_EXACT_FLOAT32 = 2**24
"""float32 holds all integers of up to this magnitude."""
_COLUMNS = _MAX_EXACT_FLOAT32 // 128**2
_SIGNS = ((0, 127), (-128, 0))

TRIAL_SHAPES = ((1, 64, 32), (3, 33, 7), (1, 2048, 16), (32, 2048, 64), (100, 68, 20))
"""(rows, in, out) of trial matmuls: libraries use different kernels for few rows and for odd sizes."""


def exact_sums(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows @ weight.T as int64, computed in float64, which holds every sum.

    rows: (count, in), integers of any type. weight: (out, in), int8.
    """
    return (rows.double() @ weight.double().T).long()


def extremes(count: int, width: int, channels: int) -> tuple[Tensor, Tensor]:
    """Return bytes, (count, width), and int8 weights, (channels, width), that give the largest sums.

    Rows are all 255, all 0, or a mixture. Weights are all 127, all -127, or a mixture.
    """
    generator = torch.Generator().manual_seed(width)
    rows = torch.randint(2, (count, width), generator=generator, dtype=torch.uint8) * 255
    weight = (torch.randint(2, (channels, width), generator=generator) * 254 - 127).to(torch.int8)
    rows[::3], rows[1::3] = 255, 0
    weight[::3], weight[1::3] = 127, -127
    return rows, weight


def is_exact(sums_of: Callable[[Tensor, Tensor], Tensor], device: torch.device | None = None) -> bool:
    """Return whether a matmul of bytes, (count, in), zero point 128, and int8 weights, (out, in), is exact.

    Args:
        sums_of: takes both and returns (rows - 128) @ weight.T in int32 or float32.
        device: where to run it.
    """
    for shape in TRIAL_SHAPES:
        rows, weight = extremes(*shape)
        found = sums_of(rows.to(device), weight.to(device)).cpu()
        if not torch.equal(found.float(), exact_sums(rows.int() - 128, weight).float()):
            return False
    return True


class PackedInt8:
    """A frozen int8 matrix, (out, in), in oneDNN's layout."""

    def __init__(self, weight: Tensor, *, in_halves: bool, at_once: bool) -> None:
        """Lay out the matrix.

        Raises RuntimeError, AttributeError, or NotImplementedError if this PyTorch does not support the layout.

        Args:
            weight: (out, in), int8.
            in_halves: split each row into two of 7 bits.
            at_once: sum all columns at once, even if float32 does not hold the sums.
        """
        self._in_halves = in_halves
        self._columns = weight.shape[1] if at_once else _exact_columns(weight, in_halves=in_halves)
        parts = weight.split(self._columns, dim=1)
        self._parts: list[Tensor] = [torch.ops.onednn.qlinear_prepack(part.contiguous(), None) for part in parts]
        self._ones = torch.ones(len(weight))
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)

    def matmul(self, rows: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Return row_scale * scale * ((rows - 128) @ weight.T) + bias: (count, out), float32.

        Args:
            rows: (count, in), bytes.
            row_scale: (count, 1).
            scale: (out,).
            bias: (out,), or None.
        """
        if not self._in_halves and len(self._parts) == 1:
            matmuls = self._qlinear(rows, self._parts[0], scale)
        else:
            matmuls = self._sums(rows).mul_(scale)
        matmuls = matmuls.mul_(row_scale)
        return matmuls if bias is None else matmuls.add_(bias)

    def _sums(self, rows: Tensor) -> Tensor:
        """Return (rows - 128) @ weight.T, rounded to float32 once, as exact int32 sums would be."""
        count, pieces = len(rows), 1
        if self._in_halves:
            low = rows >> 1
            rows, pieces = torch.cat([low, rows - low]), 2
        # Each summand fits in float32; their sum is rounded once.
        exact = [
            sums
            for part, columns in zip(self._parts, rows.split(self._columns, dim=1), strict=True)
            for sums in self._qlinear(columns.contiguous(), part, self._ones).view(pieces, count, -1)
        ]
        if len(exact) == 2:
            both: Tensor = exact[0] + exact[1]
            return both
        rounded: Tensor = torch.stack(exact).double().sum(0).float()
        return rounded

    def _qlinear(self, rows: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        """Return scale * ((rows - middle) @ weight.T) for some columns, float32."""
        middle = 64 if self._in_halves else 128
        matmuls: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(rows, 1.0, middle, packed, scale, self._zeros, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        return matmuls


def packed_int8(weight: Tensor) -> PackedInt8:
    """Return the matrix, (out, in), int8, in the fastest layout that is exact on this CPU.

    Raises RuntimeError, AttributeError, or NotImplementedError if this PyTorch supports none.
    """
    # Fastest first. Without VNNI, pairs of whole bytes saturate in 16 bits; with AMX, sums are rounded beyond
    # 2**24.
    at_once = _qlinear_is_exact(in_halves=False, at_once=True)
    whole = at_once or _qlinear_is_exact(in_halves=False, at_once=False)
    return PackedInt8(weight, in_halves=not whole, at_once=at_once)


def _exact_columns(weight: Tensor, *, in_halves: bool) -> int:
    """Return the number of columns whose sums fit in float32, with and without the zero point."""
    largest_byte = 128 if in_halves else 256
    columns = weight.shape[1]
    while columns > _MAX_EXACT_FLOAT32 // (largest_byte * 128):
        parts = [part.int() for part in weight.split(columns, dim=1)]
        sums = [part.clamp(sign_low, sign_high).sum(1).abs() for part in parts for sign_low, sign_high in _SIGNS]
        if largest_byte * max(int(some.max()) for some in sums) <= _MAX_EXACT_FLOAT32:
            break
        columns = -(-columns // 2)
    return columns


@cache
def _qlinear_is_exact(*, in_halves: bool, at_once: bool) -> bool:
    """Return whether oneDNN's sums are exact on this CPU with these options of `PackedInt8`."""

    def sums_of(rows: Tensor, weight: Tensor) -> Tensor:
        packed = PackedInt8(weight, in_halves=in_halves, at_once=at_once)
        return packed.matmul(rows, torch.ones(len(rows), 1), torch.ones(len(weight)), None)

    return is_exact(sums_of)


def int_mm(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return rows @ matrix as exact int32 sums. rows: (count, in), int8. matrix: (in, out), int8."""
    count = len(rows)
    # CUDA's matmul needs at least 17 rows.
    if rows.is_cuda and count < 17:
        rows = nn.functional.pad(rows, (0, 0, 0, 17 - count))
    # oneDNN returns 0 for a matrix with one row.
    if rows.device.type == "cpu" and (len(matrix) == 1 or not has_fast_int_mm()):
        return _int_mm_in_float(rows, matrix)
    return torch._int_mm(rows, matrix)[:count]


@cache
def has_fast_int_mm() -> bool:
    """Return whether PyTorch's `_int_mm` uses oneDNN here, not a plain loop, and is exact."""
    if "avx512_vnni" not in cpu_flags() or not hasattr(torch, "_int_mm"):
        return False
    return is_exact(lambda rows, weight: torch._int_mm(rows.view(torch.int8) ^ -128, weight.T))


def _int_mm_in_float(rows: Tensor, matrix: Tensor) -> Tensor:
    sums = torch.zeros(len(rows), matrix.shape[1], dtype=torch.int32)
    # Under autocast it would be bfloat16, which holds integers only up to 256.
    with torch.autocast("cpu", enabled=False):
        for some, part in zip(rows.split(_COLUMNS, dim=1), matrix.split(_COLUMNS), strict=True):
            sums += (some.float() @ part.float()).int()
    return sums
