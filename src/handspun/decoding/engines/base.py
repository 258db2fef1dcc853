"""The model as decoding sees it: rows of tokens that come, are fed, and go.

`FusedEngine` is the fast one, for models of Llama's kind; `TransformersEngine` serves every other architecture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class ModelInput:
    """Tokens that a row is fed.

    positions: of the tokens; the next ones of the row if None. mask: (tokens, row length + tokens), bool: what
    each of them attends to; all before it and itself if None. all_logits: of every token, not only of the last.
    """

    row: int
    token_ids: Sequence[int]
    positions: Sequence[int] | None = None
    mask: Tensor | None = None
    all_logits: bool = False


class Engine(Protocol):
    """Rows with their keys and values."""

    def add(self) -> int:
        """A new, empty row."""

    def fork(self, row: int) -> int:
        """A new row that goes on from where this one is."""

    def truncate(self, row: int, length: int) -> None:
        """Forgets all but the row's first tokens. Not of a model that `truncation_unsupported_reason`."""

    def free(self, row: int) -> None:
        """Forgets the row."""

    def forward(self, feeds: Sequence[ModelInput]) -> Tensor:
        """Feeds rows, each at most once. Returns logits in their order: (tokens asked for, vocab), float32."""
