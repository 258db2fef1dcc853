"""Cross-entropy over learned tokens, as a sum and a count: sums add up over micro-batches, means do not."""

import torch
import torch.nn.functional as F

from handspun.data.batches import IGNORED


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(sum over learned tokens of -log p(token | what is before it), their number).

    logits: (batch, positions, vocab); targets: (batch, positions), the token that each position predicts, -100
    where nothing is learned. The shift by one is the caller's. The loss of a model in float64 is in float64, any
    other in float32.
    """
    learned = targets != IGNORED
    at_least_float32 = torch.promote_types(logits.dtype, torch.float32)
    loss = F.cross_entropy(logits[learned].to(at_least_float32), targets[learned], reduction="sum")
    return loss, int(learned.sum())
