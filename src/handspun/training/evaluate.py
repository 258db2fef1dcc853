"""Held-out loss: a mean over tokens, so it does not depend on how the rows are cut into batches."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from handspun.data.batches import micro_batches
from handspun.data.examples import Example
from handspun.training.forward import padded_loss


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    max_tokens: int,
    pad_token_id: int,
    dtype: torch.dtype,
) -> tuple[float, int]:
    """(mean loss a learned token, number of learned tokens), with dropout off. A NaN stays a NaN."""
    was_training = model.training
    model.eval()
    loss_sum, learned_tokens = 0.0, 0
    for part in micro_batches(examples, max_tokens):
        loss, count = padded_loss(model, part, pad_token_id=pad_token_id, dtype=dtype)
        loss_sum += loss.item()
        learned_tokens += count
    model.train(was_training)
    return loss_sum / learned_tokens, learned_tokens
