"""Weights that are no numbers: which, for the errors that name them."""

from collections.abc import Iterator

import torch
from torch import nn

_MOST_NAMED = 4


def nonfinite_weights(model: nn.Module) -> str:
    """Return the weights that hold NaN or infinity, as `norm.weight (1 of 32 values), head.weight (...)`; "" where
    there are none. Weights that are held elsewhere (meta tensors) are left out."""
    found = list(_nonfinite(model))
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return ", ".join(found[:_MOST_NAMED]) + more


@torch.no_grad()
def _nonfinite(model: nn.Module) -> Iterator[str]:
    for name, weight in model.named_parameters():
        # The sum is finite where all values are, and takes no memory: only then are they counted.
        if weight.is_meta or bool(torch.isfinite(weight.sum(dtype=torch.float32))):
            continue
        if count := int((~torch.isfinite(weight)).sum()):
            yield f"{name} ({count:,} of {weight.numel():,} values)"
