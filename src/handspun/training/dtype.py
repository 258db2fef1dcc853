"""The fastest type for this machine's matrix products, measured rather than guessed."""

import time
from collections.abc import Callable

import torch

_WORTH = 1.2
"""bfloat16 rounds, so it has to be faster by this much."""


def fastest_dtype(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> tuple[torch.dtype, str]:
    """(float32 or bfloat16, what was measured), from products of the size of a small model's layers.

    A fraction of a second. Weights and optimiser stay float32 either way: this is the type of autocast.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float32, "this GPU has no bfloat16"
    rates = {dtype: _rate(device, dtype, clock) for dtype in (torch.float32, torch.bfloat16)}
    full, half = rates[torch.float32], rates[torch.bfloat16]
    chosen = torch.bfloat16 if half > _WORTH * full else torch.float32
    return chosen, f"measured: float32 {full / 1e9:.0f}, bfloat16 {half / 1e9:.0f} GFLOP/s"


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
