"""The Hadamard transform of blocks of a row: it spreads a large value over its block before rows are rounded.

Rounded to int8, a row has 127 steps up to its largest value, and language models' activations have a few values
many times the others' size, for which few steps are left. The transform H is orthogonal up to a factor
and its own inverse, so a product stays the same where both of its sides are transformed (QuaRot, Ashkboos et al.
2024, arXiv:2404.00456):

    x @ W.T = hadamard(x) @ (hadamard(W) / block).T          hadamard(hadamard(x)) = block * x
"""

import torch
from torch import Tensor

from handspun.models import native

_LARGEST_BLOCK = 64


def block_of(width: int) -> int:
    """Values that are mixed with each other: the largest power of two that divides a row's width, at most 64."""
    return min(width & -width, _LARGEST_BLOCK)


def hadamard(x: Tensor) -> Tensor:
    """Sums and differences, not normalised, of each block of a row. x: (rows, width), float32; so is the result.

    A block's values lie width / block apart. Each is computed by the same additions wherever its row stands, and
    whether natively or not.
    """
    library = native.kernels() if x.device.type == "cpu" else None
    return native.hadamard(library, x) if library else butterflies(x)


def butterflies(x: Tensor) -> Tensor:
    """`hadamard` in PyTorch: log2(block) passes of sums and differences (the fast Walsh-Hadamard transform)."""
    width = x.shape[1]
    distance = width // block_of(width)
    while distance < width:
        low, high = x.reshape(len(x), -1, 2, distance).unbind(2)
        x = torch.stack([low + high, low - high], dim=2).view(len(x), width)
        distance *= 2
    return x
