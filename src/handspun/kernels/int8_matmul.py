"""Exact int8 matmuls on any CPU, and the Hadamard rotation that comes before rounding."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from handspun.kernels import native
from handspun.kernels.cpu import cpu_flags

_LARGEST_BLOCK = 64


def block_of(width: int) -> int:
    """Values that are mixed with each other: the largest power of two that divides a row's width, at most 64."""
    return min(width & -width, _LARGEST_BLOCK)


def hadamard(x: Tensor) -> Tensor:
    """Sums and differences, not normalized, of each block of a row. x: (rows, width), float32; so is the result.

    A block's values lie width / block apart. Each is computed by the same additions wherever its row stands, and
    whether natively or not.
    """
    library = native.kernels() if x.device.type == "cpu" else None
    return native.hadamard(library, x) if library else fwht_torch(x)


def fwht_torch(x: Tensor) -> Tensor:
    """`hadamard` in PyTorch: log2(block) passes of sums and differences (the fast Walsh-Hadamard transform)."""
    width = x.shape[1]
    distance = width // block_of(width)
    while distance < width:
        low, high = x.reshape(len(x), -1, 2, distance).unbind(2)
        x = torch.stack([low + high, low - high], dim=2).view(len(x), width)
        distance *= 2
    return x


_FLOAT32_HOLDS = 2**24
"""All integers up to here, of either sign."""
_COLUMNS = _FLOAT32_HOLDS // 128**2
_SIGNS = ((0, 127), (-128, 0))

TRIAL_SHAPES = ((1, 64, 32), (3, 33, 7), (1, 2048, 16), (32, 2048, 64), (100, 68, 20))
"""(rows, in, out) that a matmul is tried with: libraries take other kernels for few rows and for odd sizes."""


def exact_sums(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows @ weight.T as int64, computed in float64, which holds every sum.

    rows: (count, in), integers of any type. weight: (out, in), int8.
    """
    return (rows.double() @ weight.double().T).long()


def extremes(count: int, width: int, channels: int) -> tuple[Tensor, Tensor]:
    """Return bytes, (count, width), and int8 weights, (channels, width), with the largest sums that there are.

    Rows are all 255, all 0 or a mixture; weights are all 127, all -127 or a mixture.
    """
    generator = torch.Generator().manual_seed(width)
    rows = torch.randint(2, (count, width), generator=generator, dtype=torch.uint8) * 255
    weight = (torch.randint(2, (channels, width), generator=generator) * 254 - 127).to(torch.int8)
    rows[::3], rows[1::3] = 255, 0
    weight[::3], weight[1::3] = 127, -127
    return rows, weight


def is_exact(sums_of: Callable[[Tensor, Tensor], Tensor], device: torch.device | None = None) -> bool:
    """Return whether a matmul of bytes, (count, in), 128 in their middle, and int8 weights, (out, in), is exact.

    Args:
        sums_of: takes both and returns the sums of rows - 128, in int32 or float32.
        device: where to try it.
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
        """Raise RuntimeError, AttributeError or NotImplementedError where this PyTorch has no such layout.

        Args:
            weight: (out, in), int8.
            in_halves: split each row into two of 7 bits.
            at_once: sum all columns at once, whether float32 holds the sums or not.
        """
        self._in_halves = in_halves
        self._columns = weight.shape[1] if at_once else _exact_columns(weight, in_halves=in_halves)
        parts = weight.split(self._columns, dim=1)
        self._parts: list[Tensor] = [torch.ops.onednn.qlinear_prepack(part.contiguous(), None) for part in parts]
        self._ones = torch.ones(len(weight))
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)

    def matmul(self, rows: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Return row_scale * scale * ((rows - 128) @ weight.T) + bias: (count, out), float32.

        rows: (count, in), bytes. row_scale: (count, 1). scale, bias: (out,).
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
        exact = [  # summands that float32 holds
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
        """Return scale * ((rows - middle) @ weight.T) of some columns, float32."""
        middle = 64 if self._in_halves else 128
        matmuls: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(rows, 1.0, middle, packed, scale, self._zeros, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        return matmuls


def packed_int8(weight: Tensor) -> PackedInt8:
    """Return the matrix, (out, in), int8, laid out in the fastest way that is exact on this CPU.

    Raise RuntimeError, AttributeError or NotImplementedError where this PyTorch has no such layout.
    """
    at_once = _qlinear_is_exact(in_halves=False, at_once=True)
    whole = at_once or _qlinear_is_exact(in_halves=False, at_once=False)
    return PackedInt8(weight, in_halves=not whole, at_once=at_once)


def _exact_columns(weight: Tensor, *, in_halves: bool) -> int:
    """Return how many columns may be summed at once: float32 holds the sums, with the rows' middle and without."""
    largest_byte = 128 if in_halves else 256
    columns = weight.shape[1]
    while columns > _FLOAT32_HOLDS // (largest_byte * 128):
        parts = [part.int() for part in weight.split(columns, dim=1)]
        sums = [part.clamp(sign_low, sign_high).sum(1).abs() for part in parts for sign_low, sign_high in _SIGNS]
        if largest_byte * max(int(some.max()) for some in sums) <= _FLOAT32_HOLDS:
            break
        columns = -(-columns // 2)
    return columns


@cache
def _qlinear_is_exact(*, in_halves: bool, at_once: bool) -> bool:
    """Return whether oneDNN's sums are exact on this CPU, laid out in one of the ways of `PackedInt8`."""

    def sums_of(rows: Tensor, weight: Tensor) -> Tensor:
        packed = PackedInt8(weight, in_halves=in_halves, at_once=at_once)
        return packed.matmul(rows, torch.ones(len(rows), 1), torch.ones(len(weight)), None)

    return is_exact(sums_of)


def int_mm(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return rows @ matrix as exact int32 sums. rows: (count, in), int8. matrix: (in, out), int8.

    CUDA's matmul wants at least 17 rows.
    """
    count = len(rows)
    if rows.is_cuda and count < 17:
        rows = nn.functional.pad(rows, (0, 0, 0, 17 - count))
    if rows.device.type == "cpu" and (len(matrix) == 1 or not has_fast_int_mm()):  # of one column, oneDNN gives 0
        return _int_mm_in_float(rows, matrix)
    return torch._int_mm(rows, matrix)[:count]


@cache
def has_fast_int_mm() -> bool:
    """Return whether PyTorch's `_int_mm` is oneDNN's here, not a plain loop, and exact."""
    if "avx512_vnni" not in cpu_flags() or not hasattr(torch, "_int_mm"):
        return False
    return is_exact(lambda rows, weight: torch._int_mm(rows.view(torch.int8) ^ -128, weight.T))


def _int_mm_in_float(rows: Tensor, matrix: Tensor) -> Tensor:
    sums = torch.zeros(len(rows), matrix.shape[1], dtype=torch.int32)
    with torch.autocast("cpu", enabled=False):  # bfloat16 would hold integers up to 256
        for some, part in zip(rows.split(_COLUMNS, dim=1), matrix.split(_COLUMNS), strict=True):
            sums += (some.float() @ part.float()).int()
    return sums
