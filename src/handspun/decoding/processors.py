"""What happens to next-token logits before a token is chosen: which filters, in what order.

The order is transformers' (`_get_logits_processor` of generation/utils.py, 5.23). The filters themselves are
pure functions (`filters.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from handspun.decoding import filters
from handspun.decoding.options import ResolvedOptions


class Row(Protocol):
    """One answer as processors see it; rows of a batch may be at different steps."""

    @property
    def prompt_token_ids(self) -> list[int]:
        """What the model has read."""

    @property
    def token_ids(self) -> list[int]:
        """What has been generated."""


@dataclass(frozen=True)
class History:
    """A row that is no answer."""

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)


class Processor(NamedTuple):
    """A filter with its values: (rows, vocab) logits and as many rows -> (rows, vocab)."""

    name: str
    """The option that asked for it."""
    apply: Callable[[Tensor, Sequence[Row]], Tensor]


def process(logits: Tensor, rows: Sequence[Row], processors: Sequence[Processor]) -> Tensor:
    """(rows, vocab) -> (rows, vocab), through all processors. Without any, the very same tensor."""
    for processor in processors:
        logits = processor.apply(logits, rows)
    return logits


def make_processors(options: ResolvedOptions) -> tuple[Processor, ...]:
    """The processors that the options ask for, in transformers' order: made once, used at every step."""
    found = [*_for_all(options), *(_for_sampling(options) if options.do_sample else [])]
    return tuple(made for made in found if getattr(options, made.name) != getattr(_OFF, made.name))


def _for_all(options: ResolvedOptions) -> list[Processor]:
    """What greedy decoding, sampling and beam search have in common."""
    penalty, size, wanted = options.repetition_penalty, options.no_repeat_ngram_size, options.min_new_tokens
    eos = options.eos_token_ids
    return [
        Processor(
            "repetition_penalty",
            lambda logits, rows: filters.repetition_penalty(logits, _histories(rows), penalty),
        ),
        Processor(
            "no_repeat_ngram_size", lambda logits, rows: filters.no_repeat_ngram(logits, _histories(rows), size)
        ),
        Processor(
            "min_new_tokens",
            lambda logits, rows: filters.forbid(logits, eos, [len(row.token_ids) < wanted for row in rows]),
        ),
    ]


def _for_sampling(options: ResolvedOptions) -> list[Processor]:
    """What changes draws only."""
    return [
        Processor("temperature", lambda logits, _: filters.temperature(logits, options.temperature)),
        Processor("top_k", lambda logits, _: filters.top_k(logits, options.top_k)),
        Processor("top_p", lambda logits, _: filters.top_p(logits, options.top_p)),
        Processor("min_p", lambda logits, _: filters.min_p(logits, options.min_p)),
    ]


def _histories(rows: Sequence[Row]) -> list[list[int]]:
    return [row.prompt_token_ids + row.token_ids for row in rows]


_OFF = ResolvedOptions()
"""Every option at the value at which it does nothing."""

__all__ = ["History", "Processor", "Row", "make_processors", "process"]
