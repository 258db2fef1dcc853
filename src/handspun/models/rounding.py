"""Rounding to bfloat16 that loses nothing in the mean."""

import torch
from torch import Tensor

_AT_ONCE = 2**22
"""Values that are rounded together: bounds the memory that it takes."""
_LARGEST = torch.finfo(torch.bfloat16).max


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 values as bfloat16, each rounded up or down at random, the nearer one with the greater probability.

    The mean of the result is the value (Gupta et al. 2015, arXiv:1502.02551), and what bfloat16 can hold stays as
    it is; a finite value stays finite. Rounded to the nearest instead, a weight returns to where it came from
    unless training moved it by a 256th of itself. generator: on the values' device.
    """
    rounded = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    for some, into in zip(values.flatten().split(_AT_ONCE), rounded.view(-1).split(_AT_ONCE), strict=True):
        # bfloat16 is float32's upper half: what noise in the lower half carries over is one unit of the upper.
        noise = torch.randint(2**16, some.shape, dtype=torch.int32, device=some.device, generator=generator)
        up_or_down = ((some.contiguous().view(torch.int32) + noise) & -(2**16)).view(torch.float32)
        up_or_down.clamp_(-_LARGEST, _LARGEST)
        into.copy_(torch.where(some.isfinite(), up_or_down, some))
    return rounded
