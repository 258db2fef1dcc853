"""Padded execution: a micro-batch of examples to its loss, in the plainest way there is."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from transformers import PreTrainedModel

from handspun.data.batches import IGNORED, collate
from handspun.data.examples import Example
from handspun.training.loss import cross_entropy_sum


def padded_loss(
    model: PreTrainedModel, examples: Sequence[Example], *, pad_token_id: int, dtype: torch.dtype
) -> tuple[torch.Tensor, int]:
    """(loss summed over the learned tokens, their number) of the examples, padded on the right.

    dtype: of the matrix products; weights and loss stay float32.
    """
    batch = {
        name: tensor.to(model.device) for name, tensor in collate(examples, pad_token_id=pad_token_id).items()
    }
    # The logits at a position predict the next token: logits[:, :-1] go against labels[:, 1:]. They are asked
    # for only where some row learns, since the head is a large part of a small model.
    targets = batch.pop("labels")[:, 1:]  # (batch, length - 1)
    positions = (targets != IGNORED).any(dim=0).nonzero().flatten()
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(model.device.type, dtype)
    with autocast:
        logits = model(**batch, use_cache=False, logits_to_keep=positions).logits  # (batch, positions, vocab)
    return cross_entropy_sum(logits, targets[:, positions])
