"""Examples in a seeded order, cut into batches and micro-batches, padded into tensors."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from handspun.data.examples import Example

IGNORED = -100
"""Label of a position that is not learned, as in PyTorch's cross-entropy."""


def epoch_order(rows: int, *, seed: int, epoch: int) -> list[int]:
    """Indices of all rows in the order of one epoch: a function of its arguments and of nothing else."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(rows, generator=generator).tolist()


def batches(examples: Sequence[Example], order: Sequence[int], batch_size: int) -> Iterator[list[Example]]:
    """`batch_size` examples an optimiser step; the last, shorter batch is one too."""
    for start in range(0, len(order), batch_size):
        yield [examples[i] for i in order[start : start + batch_size]]


def micro_batches(batch: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
    """The batch in parts of at most `max_tokens` tokens, padding included; a longer row is one of its own.

    Rows of like length go together, which saves padding. The cut does not change the result, because the
    loss is divided by the learned tokens of the whole batch.
    """
    part: list[Example] = []
    for example in sorted(batch, key=len):
        if part and (len(part) + 1) * len(example) > max_tokens:  # the newest is the longest
            yield part
            part = []
        part.append(example)
    if part:
        yield part


def collate(examples: Sequence[Example], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Padded on the right: input_ids, attention_mask and labels, each (batch, length).

    Labels are `input_ids` where a token is learned and -100 elsewhere; the shift by one is the loss's.
    """
    input_ids = [torch.tensor(example.input_ids) for example in examples]
    labels = [
        torch.where(torch.tensor(example.learned), ids, IGNORED)
        for example, ids in zip(examples, input_ids, strict=True)
    ]
    attention_mask = [torch.ones_like(ids) for ids in input_ids]
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence(attention_mask, batch_first=True, padding_value=0),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
