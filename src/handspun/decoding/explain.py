"""Explanations: how each token of an answer was chosen, and the tree that a beam search explored."""

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
    """Index of the previous node in the list of nodes; None for an answer's first token."""
    token_id: int
    text: str
    score: float
    """Accumulated log-probability in the processed distribution."""
    ended: bool = False
    """True if an answer is complete at this node."""
    return_index: int | None = None
    """Index of the returned answer that ends at this node."""


class BeamTrace:
    """The tree of one beam search, recorded step by step."""

    def __init__(self, beams: int, text_of: Callable[[int], str]) -> None:
        self.nodes: list[TreeNode] = []
        self._told = 0
        """Number of nodes that `new_nodes` has returned."""
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
        """Record one step.

        Args:
            parents: Index of the beam that each continuation extends.
            tokens: The new token of each continuation.
            scores: Accumulated log-probability of each continuation.
            ended: Indices of the continuations that became answers.
            beams: Indices of the continuations that became beams; None for a dead beam.
        """

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

    def new_nodes(self) -> list[TreeNode]:
        """Return the nodes that were recorded since the last call."""
        new = self.nodes[self._told :]
        self._told = len(self.nodes)
        return new

    def with_answers(self, answers: Sequence[Sequence[int]]) -> list[TreeNode]:
        """Return the nodes, with the last node of each returned answer marked. answers: their token ids."""
        places = {(node.parent, node.token_id): i for i, node in enumerate(self.nodes)}
        nodes = list(self.nodes)
        for number, answer in enumerate(answers):
            place: int | None = None
            for token in answer:
                place = places.get(
                    (place, token), -1
                )  # a cancelled search may return an answer that is no beam yet
            if place is not None and place >= 0:
                nodes[place] = replace(nodes[place], return_index=number)
        return nodes


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The effect of one processor at one step."""

    processor: str
    removed: int
    """Number of tokens that it excluded."""
    removed_mass: float
    """Their total probability before it."""
    changed: int
    """Number of other tokens whose logit it changed."""
    probability: float
    """Probability of the chosen token after it."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A token that could be chosen."""

    token_id: int
    text: str
    probability: float
    """Probability after all processors."""
    noise: float | None
    """Gumbel noise that sampling added to its logit; None for greedy decoding."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """How one token was chosen."""

    chosen: Candidate
    rank: int
    """Rank in the model's own distribution; 1 is the most probable token."""
    probability: float
    """Probability in the model's own distribution."""
    effects: list[Effect]
    """Effects of the processors that changed anything, in order."""
    left: int
    """Number of tokens that could be chosen."""
    left_mass: float
    """Their total probability in the model's own distribution."""
    runner_up: Candidate | None
    """The second choice: the next most probable token, or when sampling the next in logit + noise. None if no
    other token could be chosen."""


def explain(
    logits: Tensor,
    rows: Sequence[Row],
    processors: Sequence[Processor],
    *,
    tokens: Tensor,
    noise: Tensor | None,
    text_of: Callable[[int], str],
) -> list[Explanation]:
    """Return one explanation per row. Runs the processors once more, one at a time.

    Args:
        logits: The model's own logits, (rows, vocab).
        rows: The answers.
        processors: The processors that were applied.
        tokens: The chosen tokens, (rows,).
        noise: Gumbel noise of the draw, (rows, vocab); None for greedy decoding.
        text_of: Maps a token id to its text.
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
    ranks = (logits > _gather_tokens(logits, tokens)[:, None]).sum(-1) + 1

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
    """Return a processor's effect on each row. before, after: (rows, vocab)."""
    gone = (before > -math.inf) & (after == -math.inf)
    removed, changed = gone.sum(-1), ((before != after) & ~gone).sum(-1)
    mass = before.softmax(-1).masked_fill(~gone, 0.0).sum(-1)
    probability = _gather_tokens(after.softmax(-1), tokens)
    columns = zip(*(column.tolist() for column in (removed, mass, changed, probability)), strict=True)
    return [
        Effect(processor=name, removed=int(r), removed_mass=m, changed=int(c), probability=p)
        for r, m, c, p in columns
    ]


def _gather_tokens(table: Tensor, tokens: Tensor) -> Tensor:
    return torch.gather(table, -1, tokens[:, None])[:, 0]
