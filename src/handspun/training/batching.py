"""Batching without a model: row order, batches, micro-batches, packs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from handspun.config import TrainConfig
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


def steps_of_epoch(rows: int, config: TrainConfig) -> int:
    """Return the optimizer steps of an epoch over so many rows, the last, shorter batch included."""
    return math.ceil(rows / config.batch_size)


def steps_of_run(rows: int, config: TrainConfig) -> int:
    """Return the optimizer steps of a run: those of all epochs, at most `max_steps`."""
    steps = steps_of_epoch(rows, config) * config.num_epochs
    return min(steps, config.max_steps or steps)


def epochs_of_run(rows: int, config: TrainConfig) -> int:
    """Return the number of epochs that a run begins."""
    return math.ceil(steps_of_run(rows, config) / steps_of_epoch(rows, config))


@dataclass(frozen=True)
class Batching:
    """How a batch is split into micro-batches, and how many tokens of them run through the model.

    Attributes:
        kind: "packed" (rows end to end in one sequence) or "padded" (rows filled up to the longest).
        share_prefix: packs store a prefix that all their rows share once.
        multiple: packs are filled up to a multiple of this many tokens.
    """

    kind: Literal["packed", "padded"]
    share_prefix: bool = False
    multiple: int = 1

    def split(self, batch: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
        """Split the batch into micro-batches of at most `max_tokens` tokens, padding included.

        A longer row is a micro-batch by itself. The split does not change the result, because the loss is divided
        by the target tokens of the whole batch.
        """
        # Sorted, rows of similar length go together, which saves padding; a pack has none.
        rows = sorted(batch, key=len) if self.kind == "padded" else batch
        micro_batch: list[Example] = []
        tokens = 0
        for example in rows:
            # Padded, the newest row is the longest. A shared prefix is not deducted: packs are then split the same
            # way with and without it.
            longer = (len(micro_batch) + 1) * len(example) if self.kind == "padded" else tokens + len(example)
            if micro_batch and longer > max_tokens:
                yield micro_batch
                micro_batch, longer = [], len(example)
            micro_batch.append(example)
            tokens = longer
        if micro_batch:
            yield micro_batch

    def computed_tokens(self, micro_batch: Sequence[Example]) -> int:
        """Return the tokens that run through the model: padding counts, a shared prefix counts once."""
        if self.kind == "padded":
            return len(micro_batch) * max(map(len, micro_batch))
        tokens = sum(map(len, micro_batch)) - (len(micro_batch) - 1) * self._prefix(micro_batch)
        return tokens + -tokens % self.multiple

    def pack(self, micro_batch: Sequence[Example], device: torch.device) -> "Pack":
        """Concatenate the rows, after one copy of their common prefix if it is shared."""
        prefix = self._prefix(micro_batch)
        ids, position_ids = micro_batch[0].input_ids[:prefix], list(range(prefix))
        bounds, positions, targets = [], [], []
        for example in micro_batch:
            start = len(ids)
            ids += example.input_ids[prefix:]
            position_ids += range(prefix, len(example))
            bounds.append((start, len(ids)))
            learned = [i for i, is_learned in enumerate(example.loss_mask) if is_learned]
            positions += [start + i - 1 - prefix for i in learned]  # each is predicted by the position before it
            targets += [example.input_ids[i] for i in learned]
        if missing := -len(ids) % self.multiple:
            # Filled up with a sequence without targets: its gradient is zero.
            position_ids += range(prefix, prefix + missing)
            bounds.append((len(ids), len(ids) + missing))
            ids += micro_batch[0].input_ids[:1] * missing
        return Pack(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([position_ids], device=device),
            shared_prefix_length=prefix,
            sequence_bounds=bounds,
            target_positions=torch.tensor(positions, dtype=torch.long, device=device),
            targets=torch.tensor(targets, dtype=torch.long, device=device),
        )

    def _prefix(self, micro_batch: Sequence[Example]) -> int:
        return shared_prefix(micro_batch) if self.share_prefix else 0


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


def shared_prefix(examples: Sequence[Example]) -> int:
    """Return the length of the longest common prefix that ends before every position that predicts a target."""
    if len(examples) == 1:
        return 0
    first, last = (extreme(example.input_ids for example in examples) for extreme in (min, max))
    common = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    # A position of the prefix exists once, so it could predict the target of only one row.
    return min(common, *(example.loss_mask.index(True) - 1 for example in examples))


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
