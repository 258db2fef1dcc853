"""float32 products through oneDNN, which PyTorch brings along and takes for other types.

For float32 it takes MKL, where it was built with that; oneDNN is faster, twice so for few rows
(`benchmarks/products.py`). It makes kernels for each number of rows and keeps them for good, half a megabyte each,
so numbers of rows are rounded up. Training, whose batches come in all sizes, stays with MKL.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def _is_there() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, without gradients; F.linear on other devices and in other types.

    x: (tokens, in). weight: (out, in). bias: (out,).
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not _is_there():
        return F.linear(x, weight, bias)
    count = len(x)
    if more := rounded_up(count) - count:
        x = F.pad(x, (0, 0, 0, more))
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y[:count]


def rounded_up(count: int) -> int:
    """Rows that are computed for so many: all numbers up to 32, then every sixteenth, and from 128 every 64th."""
    step = 1 if count <= 32 else 16 if count <= 128 else 64
    return -(-count // step) * step
