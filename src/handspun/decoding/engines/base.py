"""The engine interface: a model that keeps rows of tokens with their keys and values.

`FusedEngine` is the fast one, for Llama-like models. `TransformersEngine` serves every other architecture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class ModelInput:
    """Tokens to append to a row.

    positions: position ids of the tokens; None continues the row. mask: (tokens, row length + tokens), bool, what
    each token attends to; None is causal. all_logits: return logits of every token, not only the last.
    """

    row: int
    token_ids: Sequence[int]
    positions: Sequence[int] | None = None
    mask: Tensor | None = None
    all_logits: bool = False


class Engine(Protocol):
    """A model with a KV cache of rows."""

    def add(self, tokens: int = 0) -> int:
        """Add an empty row and return its id. tokens: reserve room for this many, if rows have a room."""

    def fork(self, row: int, tokens: int = 0) -> int:
        """Add a row that continues from this one's tokens and return its id. tokens: as for `add`."""

    def truncate(self, row: int, length: int) -> None:
        """Drop all but the row's first `length` tokens. See `truncation_unsupported_reason`."""

    def free(self, row: int) -> None:
        """Delete the row."""

    def forward(self, feeds: Sequence[ModelInput]) -> Tensor:
        """Append tokens to rows, each row at most once. Return logits in that order: (tokens, vocab), float32."""
