"""Cross-entropy over learned tokens, as a sum and a count: sums add up over micro-batches, means do not."""

import torch
import torch.nn.functional as F

from handspun.data.batches import IGNORED


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(sum over learned tokens of -log p(token | what is before it), their number).

    logits: (batch, length, vocab); labels: (batch, length), -100 where nothing is learned. The logits at a
    position predict the next token, so the last ones and the first label have no partner.
    """
    predictions = logits[:, :-1]  # (batch, length - 1, vocab)
    targets = labels[:, 1:]  # (batch, length - 1)
    learned = targets != IGNORED
    loss = F.cross_entropy(predictions[learned].float(), targets[learned], reduction="sum")
    return loss, int(learned.sum())
