"""float32 products through oneDNN, which PyTorch brings along and takes for other types.

For float32 it takes MKL, where it was built with that; oneDNN is faster, twice so for few rows
(`benchmarks/products.py`).
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

    x: (tokens, in). weight: (out, in), or a view such as a transposed matrix. bias: (out,).
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and _is_there():
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)
