"""Why this token: what the model thought, what each processor did, what was left, and how the draw went."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handspun.decoding.processors import Processor, Row


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one processor did at one step."""

    processor: str
    removed: int
    """Tokens that it excluded."""
    removed_mass: float
    """The probability that they had before it."""
    changed: int
    """Tokens that it left with another logit."""
    probability: float
    """Of the chosen token behind it."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A token that could be chosen."""

    token_id: int
    text: str
    probability: float
    """Behind all processors."""
    noise: float | None
    """What the draw added to its logit (Gumbel noise); None without a draw."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """How one token came to be."""

    chosen: Candidate
    rank: int
    """In the model's own distribution; 1 is the most probable token."""
    probability: float
    """In the model's own distribution."""
    effects: list[Effect]
    """Of the processors that did anything, in their order."""
    left: int
    """Tokens that could be chosen."""
    left_mass: float
    """The probability of these in the model's own distribution."""
    runner_up: Candidate | None
    """What would have been chosen otherwise: the next most probable token, or of a draw the next in logit + noise.
    None if nothing else could be."""


def explain(
    logits: Tensor,
    rows: Sequence[Row],
    processors: Sequence[Processor],
    *,
    tokens: Tensor,
    noise: Tensor | None,
    text_of: Callable[[int], str],
) -> list[Explanation]:
    """One explanation a row; the processors run once more for it, one at a time.

    logits: the model's own, (rows, vocab); tokens: the chosen ones, (rows,); noise: of the draw, (rows, vocab).
    """
    own = logits.softmax(-1)
    effects: list[list[Effect]] = [[] for _ in rows]
    before = logits
    for processor in processors:
        after = processor.apply(before, rows)
        for row, effect in zip(effects, _effects(processor.name, before, after, tokens), strict=True):
            if effect.removed or effect.changed:
                row.append(effect)
        before = after
    left, shares = before > -math.inf, before.softmax(-1)
    scores = before if noise is None else before + noise.to(before.device)
    others = scores.scatter(-1, tokens[:, None], -math.inf).max(-1)  # the best of the rest
    ranks = (logits > _of(logits, tokens)[:, None]).sum(-1) + 1

    def candidate(row: int, token: int) -> Candidate:
        drawn = None if noise is None else float(noise[row, token])
        return Candidate(token_id=token, text=text_of(token), probability=float(shares[row, token]), noise=drawn)

    return [
        Explanation(
            chosen=candidate(row, token),
            rank=int(ranks[row]),
            probability=float(own[row, token]),
            effects=effects[row],
            left=int(left[row].sum()),
            left_mass=float(own[row][left[row]].sum()),
            runner_up=candidate(row, int(others.indices[row])) if others.values[row] > -math.inf else None,
        )
        for row, token in enumerate(tokens.tolist())
    ]


def _effects(name: str, before: Tensor, after: Tensor, tokens: Tensor) -> list[Effect]:
    """What a processor did to each row: (rows, vocab) twice."""
    gone = (before > -math.inf) & (after == -math.inf)
    removed, changed = gone.sum(-1), ((before != after) & ~gone).sum(-1)
    mass = before.softmax(-1).masked_fill(~gone, 0.0).sum(-1)
    probability = _of(after.softmax(-1), tokens)
    columns = zip(*(column.tolist() for column in (removed, mass, changed, probability)), strict=True)
    return [
        Effect(processor=name, removed=int(r), removed_mass=m, changed=int(c), probability=p)
        for r, m, c, p in columns
    ]


def _of(table: Tensor, tokens: Tensor) -> Tensor:
    return torch.gather(table, -1, tokens[:, None])[:, 0]


__all__ = ["Candidate", "Effect", "Explanation", "explain"]
