"""Where the keys and values of a search's beams are kept.

As a tree, a prompt with n beams is one row of n query tokens. Every step appends n entries to the row, and a mask
says which entries are a beam's ancestors:

    prompt | a b | c d | e f        e comes from c, and c from b:    e sees  prompt . b  c .  e .

Nothing is copied or put in another order. Entries that no beam descends from any more are dead; when they are more
than half, the living ones move together. The plain form gives every beam a row of its own, a copy of its parent's.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from handspun.decoding.engine import Engine, Feed
from handspun.decoding.lean_engine import LeanEngine


class Beams(Protocol):
    """The beams of one search."""

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> list[Feed]:
        """Beam i goes on from beam parents[i] with tokens[i]: the feeds that give the beams' next logits."""

    def free(self) -> None:
        """Forgets the beams."""


class TreeBeams:
    """A row of the lean engine that holds a prompt and the tree of its beams. The first advance comes after the
    prompt has been fed."""

    def __init__(self, engine: LeanEngine, row: int, prompt_tokens: int, num_beams: int) -> None:
        self._engine, self._row = engine, row
        self._position = prompt_tokens
        self._ancestors = torch.ones(num_beams, prompt_tokens, dtype=torch.bool, device=engine.model.device)
        self._themselves = torch.eye(num_beams, dtype=torch.bool, device=engine.model.device)

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> list[Feed]:
        """One feed of num_beams tokens."""
        ancestors = self._ancestors[list(parents)]
        alive = ancestors.any(dim=0)
        if 2 * int(alive.sum()) < len(alive):
            places = alive.nonzero().flatten()
            self._engine.cache.keep(self._row, places)
            ancestors = ancestors[:, places]
        self._ancestors = torch.cat([ancestors, self._themselves], dim=1)  # (beams, entries)
        positions = [self._position] * len(tokens)
        self._position += 1
        return [Feed(self._row, tokens, positions, self._ancestors, all_logits=True)]

    def free(self) -> None:
        """Forgets the row."""
        self._engine.free(self._row)


class ForkedBeams:
    """A row for each beam, in any engine: the plain form."""

    def __init__(self, engine: Engine, row: int, prompt_tokens: int, num_beams: int) -> None:  # noqa: ARG002
        self._engine = engine
        self._rows = [row] * num_beams  # until the first advance

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> list[Feed]:
        """A feed for each beam, of one token."""
        rows = [self._engine.fork(self._rows[parent]) for parent in parents]
        self.free()
        self._rows = rows
        return [Feed(row, [token]) for row, token in zip(rows, tokens, strict=True)]

    def free(self) -> None:
        """Forgets the rows."""
        for row in set(self._rows):
            self._engine.free(row)


__all__ = ["Beams", "ForkedBeams", "TreeBeams"]
