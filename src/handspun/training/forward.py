"""Padded execution: a micro-batch of examples to its loss, in the plainest way there is."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from transformers import PreTrainedModel

from handspun.data.batches import collate
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
    labels = batch.pop("labels")
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(model.device.type, dtype)
    with autocast:
        logits = model(**batch, use_cache=False).logits  # (batch, length, vocab)
    return cross_entropy_sum(logits, labels)
