"""How each token of an answer came to be, and what a beam search looked at."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from handspun.decoding.processors import Processor, Row


@dataclass(frozen=True, kw_only=True)
class TreeNode:
    """One token of one or several beams."""

    parent: int | None
    """Place of the node before it in the list of nodes; None for an answer's first token."""
    token_id: int
    text: str
    score: float
    """Accumulated log-probability, of the processed distribution."""
    ended: bool = False
    """Whether an answer is complete with it."""
    return_index: int | None = None
    """Which of the returned answers ends with it."""


class BeamTrace:
    """The nodes of one search as it goes on."""

    def __init__(self, beams: int, text_of: Callable[[int], str]) -> None:
        self.nodes: list[TreeNode] = []
        self._beams: list[int | None] = [None] * beams
        self._text_of = text_of

    def grow(
        self,
        parents: Sequence[int],
        tokens: Sequence[int],
        scores: Sequence[float],
        *,
        ended: Sequence[int],
        beams: Sequence[int | None],
    ) -> None:
        """One step. parents (indices of beams), tokens, scores: of continuations; ended: which of them became
        answers; beams: which became the search's beams, None for one that is none."""

        def add(i: int, *, has_ended: bool) -> int:
            node = TreeNode(
                parent=self._beams[parents[i]],
                token_id=tokens[i],
                text=self._text_of(tokens[i]),
                score=scores[i],
                ended=has_ended,
            )
            self.nodes.append(node)
            return len(self.nodes) - 1

        for i in ended:
            add(i, has_ended=True)
        self._beams = [None if i is None else add(i, has_ended=False) for i in beams]

    def with_answers(self, answers: Sequence[Sequence[int]]) -> list[TreeNode]:
        """The nodes, the last one of each returned answer (its token ids) marked."""
        places = {(node.parent, node.token_id): i for i, node in enumerate(self.nodes)}
        nodes = list(self.nodes)
        for number, answer in enumerate(answers):
            place: int | None = None
            for token in answer:
                place = places.get((place, token), -1)  # a cancelled search may give back what was no beam yet
            if place is not None and place >= 0:
                nodes[place] = replace(nodes[place], return_index=number)
        return nodes


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
