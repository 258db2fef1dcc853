"""Matmuls through oneDNN, and settings of oneDNN and of PyTorch's attention."""

import os
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from handspun.kernels.cpu import cpu_flags, is_amd


def without_cudnn() -> AbstractContextManager[None]:
    """Exclude cuDNN's attention within the block."""
    # PyTorch picks it for bfloat16 with a mask on a GPU, but it is planned again for every shape, which takes 25
    # ms forward and 25 ms backward on an H100.
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def limit_primitive_cache() -> None:
    """Limit the caches of compiled oneDNN kernels. Call it before the first matmul."""
    # oneDNN keeps 1,024 kernels, and PyTorch as many again, but each packed batch needs a dozen new ones.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _uses_onednn(weight: Tensor) -> bool:
    """Return whether oneDNN is used for this matrix: float32 on a CPU."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and _has_onednn()


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias, without gradients, through oneDNN if possible, else F.linear.

    With oneDNN, from two rows on, a row's sums do not depend on the number of rows.

    x: (tokens, in). weight: (out, in). bias: (out,).
    """
    if not _uses_onednn(weight) or not x.numel():  # oneDNN refuses empty arrays
        return F.linear(x, weight, bias)
    # F.linear would use MKL, which is slower: on a Zen 4, all matrices of a 0.5B model take 76 ms instead of 136
    # for one row, 117 instead of 241 for 8, and 222 instead of 387 for 32. Weights laid out for oneDNN in advance
    # would take 80 ms for 8 rows, but twice the memory.
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def beats_mkl(device: torch.device) -> bool:
    """Return whether float32 matmuls of training are faster through oneDNN than PyTorch's default."""
    # That is MKL, which does not use AVX-512 on AMD's CPUs: a core of a Zen 5 makes 102 GFLOP/s, and 228 by
    # oneDNN. On a Zen 4, whose AVX-512 is as fast as its AVX2, steps are 1.0 to 1.1 times as fast.
    return device.type == "cpu" and _has_onednn() and is_amd() and "avx512f" in cpu_flags()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `matmul`, with gradients, which go through oneDNN too. All are float32."""
    apply: Any = _Linear.apply
    y: Tensor = apply(x, weight, bias)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # As backward's second factor, rows with gaps between them would take 2,000 times as long.
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        return matmul(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            matmul(gradient, weight.t()) if of_x else None,
            matmul(gradient.t(), x.t()) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


def linear_padded_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the same as `matmul`, computed with a rounded-up number of rows."""
    count = len(x)
    # oneDNN compiles a kernel, in milliseconds, for each number of rows, and decoding has many.
    if _uses_onednn(weight) and (more := rounded_up(count) - count):
        x = F.pad(x, (0, 0, 0, more))
    return matmul(x, weight, bias)[:count]


def rounded_up(count: int) -> int:
    """Return `count`, rounded up to a multiple of 16 above 32 rows, and of 64 above 128."""
    step = 1 if count <= 32 else 16 if count <= 128 else 64
    return -(-count // step) * step
