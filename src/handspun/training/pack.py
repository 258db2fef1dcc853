"""A packed micro-batch: rows end to end, behind one copy of the prefix that they share.

    padded                      packed
    S S S u u a a . . .         S S S | u u a a | u a | u u u a a a
    S S S u a . . . . .
    S S S u u u a a a .         S: shared prefix (system prompt, template's head)

There is no padding, and the prefix is computed once. Each sequence attends to the prefix and to itself; positions
restart behind the prefix.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handspun.data.examples import Example

GPU_TOKENS = 16
"""On a GPU a mask's rows have to be aligned: numbers of tokens are rounded up to a multiple of this."""


@dataclass(frozen=True)
class Pack:
    """A micro-batch laid end to end.

    input_ids, position_ids: (1, tokens). prefix: its first tokens, which all sequences share. bounds: where the
    rest of each sequence begins and ends. positions, targets: (learned,), where a learned token is predicted, and
    which.
    """

    input_ids: Tensor
    position_ids: Tensor
    prefix: int
    bounds: list[tuple[int, int]]
    positions: Tensor
    targets: Tensor


def pack(examples: Sequence[Example], *, share_prefix: bool, device: torch.device, multiple: int = 1) -> Pack:
    """Lays examples end to end, behind their common prefix if it is to be shared. What is missing to a multiple of
    so many tokens is filled with a sequence of which nothing is learned: its gradient is zero."""
    prefix = shared_prefix(examples) if share_prefix else 0
    ids, position_ids = examples[0].input_ids[:prefix], list(range(prefix))
    bounds, positions, targets = [], [], []
    for example in examples:
        start = len(ids)
        ids += example.input_ids[prefix:]
        position_ids += range(prefix, len(example))
        bounds.append((start, len(ids)))
        learned = [i for i, is_learned in enumerate(example.learned) if is_learned]
        positions += [start + i - 1 - prefix for i in learned]  # each is predicted by the position before it
        targets += [example.input_ids[i] for i in learned]
    if missing := -len(ids) % multiple:
        position_ids += range(prefix, prefix + missing)
        bounds.append((len(ids), len(ids) + missing))
        ids += examples[0].input_ids[:1] * missing
    return Pack(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([position_ids], device=device),
        prefix=prefix,
        bounds=bounds,
        positions=torch.tensor(positions, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
    )


def shared_prefix(examples: Sequence[Example]) -> int:
    """Length of the longest common prefix that ends before any position that predicts a learned token.

    A position in the prefix exists once, so it could predict only one of the rows' tokens.
    """
    if len(examples) == 1:
        return 0
    first, last = (extreme(example.input_ids for example in examples) for extreme in (min, max))
    common = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return min(common, *(example.learned.index(True) - 1 for example in examples))


def multiple_of_tokens(device: torch.device) -> int:
    """Packed micro-batches have a multiple of so many tokens there."""
    return GPU_TOKENS if device.type == "cuda" else 1


def packed_tokens(part: Sequence[Example], *, share_prefix: bool, multiple: int = 1) -> int:
    """Tokens of the part once it is packed."""
    once = shared_prefix(part) if share_prefix else 0
    tokens = sum(len(example) for example in part) - (len(part) - 1) * once
    return tokens + -tokens % multiple


def packed_micro_batches(batch: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
    """The batch in parts of at most `max_tokens` tokens; a longer row is one of its own."""
    part: list[Example] = []
    tokens = 0
    for example in batch:
        if part and tokens + len(example) > max_tokens:
            yield part
            part, tokens = [], 0
        part.append(example)
        tokens += len(example)
    if part:
        yield part
