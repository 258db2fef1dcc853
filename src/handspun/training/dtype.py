"""The type of the matrix products: bfloat16 where a probe says that it is clearly faster, else float32."""

import time
from collections.abc import Callable

import torch

_WORTH = 1.2
"""bfloat16 rounds, so it has to be faster by this much."""


def choose_dtype(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> tuple[torch.dtype, str]:
    """(float32 or bfloat16, why), by products of the size of a small model's layers: a fraction of a second.

    Weights, optimiser, head and evaluation stay float32 either way: this is the type of autocast.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float32, "this GPU has no bfloat16"
    gain = _rate(device, torch.bfloat16, clock) / _rate(device, torch.float32, clock)
    if gain < _WORTH:
        return torch.float32, f"bfloat16 products are {gain:.1f} times as fast here"
    return torch.bfloat16, f"its products are {gain:.1f} times as fast as float32's here"


def _rate(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Operations a second: the best of a few products, the first of which is not counted."""
    tokens, width, inner = 512, 1024, 4096
    a, b = (
        torch.ones(tokens, width, device=device, dtype=dtype),
        torch.ones(width, inner, device=device, dtype=dtype),
    )
    best = float("inf")
    for turn in range(4):
        began = clock()
        product = a @ b
        product[0, 0].item()  # waits for a GPU
        if turn:
            best = min(best, clock() - began)
    return 2 * tokens * width * inner / best
