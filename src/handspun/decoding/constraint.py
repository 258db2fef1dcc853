"""Constrained decoding: answers that match a JSON schema, a regular expression, or one of several texts.

llguidance (https://github.com/guidance-ai/llguidance) computes which tokens may come next. Its state is a function
of the tokens generated so far. So states are cached by their tokens and rebuilt if missing, and a row that joins,
a beam that branches or a rejected draft needs no bookkeeping.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from handspun.config import option_name
from handspun.decoding.options import SamplingParams
from handspun.display import printable
from handspun.errors import ConfigError, check_installed

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_WHITESPACE = r"\n?[ ]{0,24}"
"""White space between the parts of a JSON answer. If it were unbounded, small models would emit it forever."""

_ESCAPES = 'nrbtf"\\'
"""Characters allowed after a backslash in JSON strings. Not u: JSON readers take "\\u0061" as the property "a",
but llguidance treats it as a different property and would not enforce the type of "a"."""


class _State(NamedTuple):
    """The grammar's state after some tokens, and the tokens allowed next: (tokenizer's vocabulary,), bool."""

    matcher: "LLMatcher"
    allowed: Tensor


class Constraint:
    """The grammar that answers must match, with a cache of the states of recent steps."""

    def __init__(self, name: str, start: "LLMatcher", eos_token_ids: tuple[int, ...]) -> None:
        self.name = name
        self._eos = list(eos_token_ids)
        self._start = self._state(start)
        self._states: dict[tuple[int, ...], _State] = {}
        self._most_rows = 0

    def apply(self, logits: Tensor, generated: Sequence[list[int]]) -> Tensor:
        """Exclude tokens that cannot come next in each row, and eos while an answer is incomplete.

        (rows, vocab) -> (rows, vocab).
        """
        allowed = torch.stack([self._state_after(tuple(tokens)).allowed for tokens in generated]).to(logits.device)
        missing = (
            logits.shape[-1] - allowed.shape[-1]
        )  # an LM head may have more rows than the tokenizer, or fewer
        if missing > 0:
            allowed = torch.nn.functional.pad(allowed, (0, missing))
        # Draft tokens bring further calls within a step with fewer rows, so the cache keeps the largest size seen.
        self._most_rows = max(self._most_rows, len(generated))
        self._evict(2 * self._most_rows)
        return logits.masked_fill(~allowed[:, : logits.shape[-1]], -torch.inf)

    def can_begin(self) -> bool:
        """Return whether any answer can match."""
        return bool(self._start.allowed.any())

    def _state_after(self, tokens: tuple[int, ...]) -> _State:
        if not tokens:
            return self._start
        state = self._states.pop(tokens, None)
        if state is None:
            before = self._states.get(tokens[:-1])
            matcher = (before or self._start).matcher.deep_copy()
            matcher.consume_tokens(list(tokens[-1:] if before else tokens))
            state = self._state(matcher)
        self._states[tokens] = state  # the newest last
        return state

    def _state(self, matcher: "LLMatcher") -> _State:
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")).bool()
        allowed[self._eos] = matcher.is_accepting()
        if matcher.is_error():  # a row that violates the grammar (a dead beam) cannot continue
            allowed[:] = False
        return _State(matcher, allowed)

    def _evict(self, keep: int) -> None:
        for tokens in list(self._states)[:-keep]:
            del self._states[tokens]


def make_constraint(options: SamplingParams, tokenizer: PreTrainedTokenizerBase) -> Constraint | None:
    """Return the constraint that the options ask for, or None.

    Raises ConfigError if it is malformed, if no answer can match it, or if it cannot be enforced.
    """
    if options.json_schema is not None:
        name, given = "json_schema", options.json_schema
    elif options.regex is not None:
        name, given = "regex", options.regex
    elif options.choice:
        name, given = "choice", ", ".join(options.choice)
    else:
        return None
    check_installed("llguidance", "constraints", option_name(name))
    from llguidance import LLMatcher  # here: decoding without constraints does not need it

    what = f"{option_name(name)} {printable(given, most=200)} cannot be used"
    try:
        grammar = _grammar(options)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what}: {error}.") from error
    eos = tuple(token for token in options.eos_token_ids if token < len(tokenizer))
    _check(name, eos, tokenizer)
    matcher = LLMatcher(_token_table(tokenizer, eos), grammar, log_level=0)
    if matcher.is_error():
        raise ConfigError(f"{what}: {matcher.get_error()}")
    constraint = Constraint(name, matcher, eos)
    if not constraint.can_begin():
        raise ConfigError(f"{what}: no answer can match it.")
    return constraint


def _grammar(options: SamplingParams) -> str:
    """Return the options' llguidance grammar. Raises ValueError for a schema that is nested too deeply."""
    from llguidance import LLMatcher

    if options.json_schema is not None:
        overrides: Any = {"whitespace_pattern": _WHITESPACE, "json_allowed_escapes": _ESCAPES}
        return LLMatcher.grammar_from_json_schema(options.json_schema, overrides=overrides)
    regex = options.regex if options.regex is not None else "|".join(map(re.escape, options.choice))
    return LLMatcher.grammar_from_regex(regex)


def _check(name: str, eos_token_ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> None:
    problems = []
    if not eos_token_ids:
        problems.append(
            f"{option_name(name)} needs an end-of-sequence token to end answers, but neither the model nor its "
            "tokenizer has one."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        problems.append(
            f"{option_name(name)} needs a fast tokenizer, but {type(tokenizer).__name__} is slow. Convert it "
            "once: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    if problems:
        raise ConfigError(problems)


@lru_cache(maxsize=1)
def _token_table(tokenizer: PreTrainedTokenizerFast, eos_token_ids: tuple[int, ...]) -> "LLTokenizer":
    """Return llguidance's tokenizer. Qwen's takes seconds to build, hence the cache."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, eos_token=list(eos_token_ids))
