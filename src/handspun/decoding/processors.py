"""Logits processors: which filters apply to next-token logits, and in what order.

The order is that of transformers (`_get_logits_processor` in generation/utils.py, 5.23). The filters themselves
are pure functions (`filters.py`). Each row brings its own prompt and output, so the rows of a batch may be at
different steps, and no padded history is needed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from handspun.config import option_name
from handspun.decoding import filters
from handspun.decoding.constraint import Constraint
from handspun.decoding.options import SamplingParams
from handspun.errors import ConfigError

Function = Callable[[Tensor, list[int]], Tensor]
"""A custom processor: one row's logits, (vocab,), and the ids of its prompt and output -> new logits."""


class Row(Protocol):
    """One answer as processors see it; rows of a batch may be at different steps."""

    @property
    def prompt_token_ids(self) -> list[int]:
        """Token ids of the prompt."""

    @property
    def prompt_ids_for_penalty(self) -> list[int]:
        """Prompt tokens that the repetition penalty counts."""

    @property
    def token_ids(self) -> list[int]:
        """Token ids generated so far."""


@dataclass(frozen=True)
class History:
    """A row that is not a `Completion`: just its tokens."""

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)

    @property
    def prompt_ids_for_penalty(self) -> list[int]:
        """The whole prompt."""
        return self.prompt_token_ids


class Processor(NamedTuple):
    """A filter with its option values: logits, (rows, vocab), and the rows -> (rows, vocab)."""

    name: str
    """The option that enables it."""
    apply: Callable[[Tensor, Sequence[Row]], Tensor]


def process(logits: Tensor, rows: Sequence[Row], processors: Sequence[Processor]) -> Tensor:
    """Apply all processors to logits, (rows, vocab). Without any, return the same tensor object."""
    for processor in processors:
        logits = processor.apply(logits, rows)
    return logits


def check_some_left(filtered: Tensor, rows: Sequence[Row], processors: Sequence[Processor]) -> None:
    """Raise ConfigError if the processors exclude every token of a row."""
    if processors:
        left = (filtered > -math.inf).any(-1).tolist()
        if not all(left):
            raise nothing_left(rows[left.index(False)], processors)


def nothing_left(row: Row, processors: Sequence[Processor]) -> ConfigError:
    """Return the error for an answer that has no possible next token."""
    names = ", ".join(option_name(processor.name) for processor in processors)
    return ConfigError(
        f"after {len(row.token_ids)} tokens of an answer, {names} together exclude every next token. Remove or "
        "relax one of them."
    )


def make_processors(
    options: SamplingParams, functions: Sequence[Function] = (), constraint: Constraint | None = None
) -> tuple[Processor, ...]:
    """Return the processors that the options ask for, in transformers' order. They are reused at every step.

    functions: custom processors. They run after the penalties and exclusions, and before the constraint and the
    sampling filters.
    """
    found = [*_penalties(options), *_exclusions(options)]
    warpers = _for_sampling(options) if options.do_sample else []
    own = [Processor(_name_of(function), _row_by_row(function)) for function in functions]
    if constraint is not None:
        own.append(Processor(constraint.name, lambda logits, rows: constraint.apply(logits, _generated(rows))))
    return (*_enabled(found, options), *own, *_enabled(warpers, options))


def _enabled(processors: list[Processor], options: SamplingParams) -> list[Processor]:
    return [made for made in processors if getattr(options, made.name) != getattr(_DISABLED, made.name)]


def _penalties(options: SamplingParams) -> list[Processor]:
    o = options
    return [
        Processor(
            "logit_bias", lambda logits, rows: filters.sequence_bias(logits, _histories(rows), o.logit_bias)
        ),
        Processor(
            "sequence_bias", lambda logits, rows: filters.sequence_bias(logits, _histories(rows), o.sequence_bias)
        ),
        Processor(
            "repetition_penalty",
            lambda logits, rows: filters.repetition_penalty(logits, _penalized(rows, o), o.repetition_penalty),
        ),
        Processor(
            "presence_penalty",
            lambda logits, rows: filters.presence_penalty(logits, _generated(rows), o.presence_penalty),
        ),
        Processor(
            "frequency_penalty",
            lambda logits, rows: filters.frequency_penalty(logits, _generated(rows), o.frequency_penalty),
        ),
    ]


def _exclusions(options: SamplingParams) -> list[Processor]:
    o = options
    bad_words = [(ids, -math.inf) for ids in o.bad_words_ids if ids not in [(eos,) for eos in o.eos_token_ids]]
    return [
        Processor(
            "no_repeat_ngram_size",
            lambda logits, rows: filters.no_repeat_ngram(logits, _histories(rows), o.no_repeat_ngram_size),
        ),
        Processor(
            "bad_words_ids", lambda logits, rows: filters.sequence_bias(logits, _histories(rows), bad_words)
        ),
        Processor(
            "min_new_tokens",
            lambda logits, rows: filters.mask_tokens(
                logits, o.eos_token_ids, [len(row.token_ids) < o.min_new_tokens for row in rows]
            ),
        ),
        Processor(
            "suppress_tokens",
            lambda logits, rows: filters.mask_tokens(logits, o.suppress_tokens, [True] * len(rows)),
        ),
        Processor(
            "begin_suppress_tokens",
            lambda logits, rows: filters.mask_tokens(
                logits, o.begin_suppress_tokens, [not row.token_ids for row in rows]
            ),
        ),
    ]


def _for_sampling(options: SamplingParams) -> list[Processor]:
    """Return the processors that only sampling uses."""
    o = options
    return [
        Processor("temperature", lambda logits, _: filters.temperature(logits, o.temperature)),
        Processor("top_k", lambda logits, _: filters.top_k(logits, o.top_k)),
        Processor("top_p", lambda logits, _: filters.top_p(logits, o.top_p)),
        Processor("min_p", lambda logits, _: filters.min_p(logits, o.min_p)),
        Processor("typical_p", lambda logits, _: filters.typical_p(logits, o.typical_p)),
    ]


def _histories(rows: Sequence[Row]) -> list[list[int]]:
    return [row.prompt_token_ids + row.token_ids for row in rows]


def _generated(rows: Sequence[Row]) -> list[list[int]]:
    return [row.token_ids for row in rows]


def _penalized(rows: Sequence[Row], options: SamplingParams) -> list[set[int]]:
    spared = options.unpenalized_ids
    return [{*row.prompt_ids_for_penalty, *row.token_ids} - spared for row in rows]


def _name_of(function: Function) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _row_by_row(function: Function) -> Callable[[Tensor, Sequence[Row]], Tensor]:
    def apply(logits: Tensor, rows: Sequence[Row]) -> Tensor:
        made = []
        for row, ids in zip(
            logits.clone(), _histories(rows), strict=True
        ):  # a clone, since a custom processor may write in place
            new = function(row, ids)
            if not isinstance(new, Tensor) or new.shape != row.shape:
                found = f"a tensor of shape {tuple(new.shape)}" if isinstance(new, Tensor) else repr(new)[:60]
                raise ConfigError(
                    f"the processor {_name_of(function)} returned {found} (expected the logits of one row, a "
                    f"tensor of shape {tuple(row.shape)})."
                )
            _check_custom(function, new, ids)
            made.append(new)
        return torch.stack(made).to(logits)

    return apply


def _check_custom(function: Function, logits: Tensor, token_ids: list[int]) -> None:
    """Raise ConfigError if a custom processor returned logits from which no token can be chosen."""
    highest = float(logits.max())  # NaN if any of them is
    if math.isnan(highest) or highest == math.inf:
        wrong = int((logits.isnan() | (logits == math.inf)).sum())
        raise ConfigError(
            f"the processor {_name_of(function)} returned {wrong:,} logits that are NaN or infinite, after "
            f"{len(token_ids)} tokens of prompt and answer. Return finite numbers, or -inf to exclude a token."
        )
    if highest == -math.inf:
        raise ConfigError(
            f"the processor {_name_of(function)} excluded every next token after {len(token_ids)} tokens of "
            "prompt and answer: all logits that it returned are -inf. Leave at least one finite."
        )


_DISABLED = SamplingParams()
"""Every option at the value that disables it."""
