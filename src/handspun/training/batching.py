"""Batching without a model: row order, batches, micro-batches, packs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from handspun.data.examples import Example

IGNORED = -100
"""Label of a position without a target, as in PyTorch's cross-entropy."""


def epoch_order(rows: int, *, seed: int, epoch: int) -> list[int]:
    """Return the row indices in the order of one epoch. They depend on the arguments only."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(rows, generator=generator).tolist()


def batches(examples: Sequence[Example], order: Sequence[int], batch_size: int) -> Iterator[list[Example]]:
    """Yield `batch_size` examples per optimizer step; the last batch may be shorter."""
    for start in range(0, len(order), batch_size):
        yield [examples[i] for i in order[start : start + batch_size]]


def micro_batches(batch: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
    """Split the batch into micro-batches of at most `max_tokens` tokens, padding included.

    A longer row is a micro-batch by itself. Rows of similar length go together, which saves padding. The split
    does not change the result, because the loss is divided by the target tokens of the whole batch.
    """
    micro_batch: list[Example] = []
    for example in sorted(batch, key=len):
        if micro_batch and (len(micro_batch) + 1) * len(example) > max_tokens:  # the newest is the longest
            yield micro_batch
            micro_batch = []
        micro_batch.append(example)
    if micro_batch:
        yield micro_batch


def collate(examples: Sequence[Example], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask and labels, each (batch, length), padded on the right.

    Labels are `input_ids` at target tokens and -100 elsewhere. The loss shifts them by one.
    """
    input_ids = [torch.tensor(example.input_ids) for example in examples]
    labels = [
        torch.where(torch.tensor(example.loss_mask), ids, IGNORED)
        for example, ids in zip(examples, input_ids, strict=True)
    ]
    attention_mask = [torch.ones_like(ids) for ids in input_ids]
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence(attention_mask, batch_first=True, padding_value=0),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


GPU_TOKENS = 16
"""On a GPU, the rows of a mask must be aligned, so packs are filled up to a multiple of this many tokens."""


@dataclass(frozen=True)
class Pack:
    """A micro-batch as one sequence, its rows concatenated.

    input_ids, position_ids: (1, tokens). shared_prefix_length: number of leading tokens that all rows share.
    sequence_bounds: start and end of the rest of each row. target_positions: (targets,), the positions that
    predict a target token. targets: (targets,), those tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    shared_prefix_length: int
    sequence_bounds: list[tuple[int, int]]
    target_positions: Tensor
    targets: Tensor


def pack(examples: Sequence[Example], *, share_prefix: bool, device: torch.device, multiple: int = 1) -> Pack:
    """Concatenate examples, after one copy of their common prefix if `share_prefix`.

    Args:
        examples: the rows of one micro-batch.
        share_prefix: store the common prefix once.
        device: where to create the tensors.
        multiple: pad to a multiple of this many tokens, with a sequence without targets; its gradient is zero.
    """
    prefix = shared_prefix(examples) if share_prefix else 0
    ids, position_ids = examples[0].input_ids[:prefix], list(range(prefix))
    bounds, positions, targets = [], [], []
    for example in examples:
        start = len(ids)
        ids += example.input_ids[prefix:]
        position_ids += range(prefix, len(example))
        bounds.append((start, len(ids)))
        learned = [i for i, is_learned in enumerate(example.loss_mask) if is_learned]
        positions += [start + i - 1 - prefix for i in learned]  # each is predicted by the position before it
        targets += [example.input_ids[i] for i in learned]
    if missing := -len(ids) % multiple:
        position_ids += range(prefix, prefix + missing)
        bounds.append((len(ids), len(ids) + missing))
        ids += examples[0].input_ids[:1] * missing
    return Pack(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([position_ids], device=device),
        shared_prefix_length=prefix,
        sequence_bounds=bounds,
        target_positions=torch.tensor(positions, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
    )


def shared_prefix(examples: Sequence[Example]) -> int:
    """Return the length of the longest common prefix that ends before any position that predicts a target token.

    A position of the prefix exists once, so it could predict the target of only one row.
    """
    if len(examples) == 1:
        return 0
    first, last = (extreme(example.input_ids for example in examples) for extreme in (min, max))
    common = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return min(common, *(example.loss_mask.index(True) - 1 for example in examples))


def pad_to_multiple(device: torch.device) -> int:
    """Return the number that a pack's token count must be a multiple of on the device."""
    return GPU_TOKENS if device.type == "cuda" else 1


def packed_tokens(micro_batch: Sequence[Example], *, share_prefix: bool, multiple: int = 1) -> int:
    """Return the number of tokens in the packed micro-batch."""
    once = shared_prefix(micro_batch) if share_prefix else 0
    tokens = sum(len(example) for example in micro_batch) - (len(micro_batch) - 1) * once
    return tokens + -tokens % multiple


def packed_micro_batches(batch: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
    """Split the batch into micro-batches of at most `max_tokens` tokens; a longer row is one by itself."""
    micro_batch: list[Example] = []
    tokens = 0
    for example in batch:
        if micro_batch and tokens + len(example) > max_tokens:
            yield micro_batch
            micro_batch, tokens = [], 0
        micro_batch.append(example)
        tokens += len(example)
    if micro_batch:
        yield micro_batch
