"""What oneDNN and PyTorch's CPU kernels are told to do."""

import os
from contextlib import AbstractContextManager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def without_cudnn() -> AbstractContextManager[None]:
    """Attention by any kernel but cuDNN's, PyTorch's choice for bfloat16 behind a mask on a GPU: that is planned
    anew for every shape, 25 ms forward and 25 backward on an H100."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def limit_primitive_cache() -> None:
    """oneDNN remembers 1,024 kernels, and PyTorch, above it, as many again; every packed batch needs new ones, a
    dozen. To be called before the first matmul."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")


@cache
def _is_there() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _takes(weight: Tensor) -> bool:
    """Whether matmuls with this matrix go through oneDNN: float32 on a CPU."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and _is_there()


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, without gradients; F.linear where oneDNN does not take the matrix.

    x: (tokens, in). weight: (out, in). bias: (out,).
    """
    if not _takes(weight):
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def linear_padded_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same, with few numbers of rows: decoding meets many, and a kernel is made in milliseconds."""
    count = len(x)
    if _takes(weight) and (more := rounded_up(count) - count):
        x = F.pad(x, (0, 0, 0, more))
    return matmul(x, weight, bias)[:count]


def rounded_up(count: int) -> int:
    """Rows that are computed for so many: all numbers up to 32, then every sixteenth, and from 128 every 64th."""
    step = 1 if count <= 32 else 16 if count <= 128 else 64
    return -(-count // step) * step
