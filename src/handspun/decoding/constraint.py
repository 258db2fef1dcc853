"""Answers of a given form: a JSON schema, a regular expression, or one of several texts.

llguidance (https://github.com/guidance-ai/llguidance) says which tokens may come next. What it says depends on the
tokens generated so far and on nothing else, so rows need no state of their own: the states of the last steps are
remembered by their tokens, and one that is not is made again.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from handspun.config import option_name
from handspun.decoding.options import SamplingParams
from handspun.display import printable
from handspun.errors import ConfigError

_WHITESPACE = r"\n?[ ]{0,24}"
"""Between the parts of a JSON answer. Unbounded, small models go on with it for ever."""

_ESCAPES = 'nrbtf"\\'
"""After a backslash in JSON texts. Not u: readers take "\\u0061" for the property "a", and llguidance for another,
so that it would not have its type."""


class _State(NamedTuple):
    """Where the grammar is after some tokens, and which may come next: (tokens of the tokenizer,), bool."""

    matcher: LLMatcher
    allowed: Tensor


class Constraint:
    """The form that answers must have, and the states of the rows of the last steps."""

    def __init__(self, name: str, start: LLMatcher, eos_token_ids: tuple[int, ...]) -> None:
        self.name = name
        self._eos = list(eos_token_ids)
        self._start = self._state(start)
        self._states: dict[tuple[int, ...], _State] = {}
        self._most_rows = 0

    def apply(self, logits: Tensor, generated: Sequence[list[int]]) -> Tensor:
        """Forbids what cannot come next in each row, and an eos where the answer is not complete:
        (rows, vocab) -> (rows, vocab)."""
        allowed = torch.stack([self._after(tuple(tokens)).allowed for tokens in generated]).to(logits.device)
        missing = logits.shape[-1] - allowed.shape[-1]  # a head may have more rows than there are tokens, or fewer
        if missing > 0:
            allowed = torch.nn.functional.pad(allowed, (0, missing))
        self._most_rows = max(self._most_rows, len(generated))  # some of a step's rows may be checked further
        self._forget(2 * self._most_rows)
        return logits.masked_fill(~allowed[:, : logits.shape[-1]], -torch.inf)

    def can_begin(self) -> bool:
        """Whether there is any answer of this form."""
        return bool(self._start.allowed.any())

    def _after(self, tokens: tuple[int, ...]) -> _State:
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

    def _state(self, matcher: LLMatcher) -> _State:
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")).bool()
        allowed[self._eos] = matcher.is_accepting()
        if matcher.is_error():  # a row that left the form (a beam without a chance) has no way on
            allowed[:] = False
        return _State(matcher, allowed)

    def _forget(self, keep: int) -> None:
        for tokens in list(self._states)[:-keep]:
            del self._states[tokens]


def make_constraint(options: SamplingParams, tokenizer: PreTrainedTokenizerBase) -> Constraint | None:
    """What the options ask for, or None.

    Raises ConfigError for a form that is malformed, that no answer can have, or that cannot be held to.
    """
    if options.json_schema is not None:
        name, given = "json_schema", options.json_schema
    elif options.regex is not None:
        name, given = "regex", options.regex
    elif options.choice:
        name, given = "choice", ", ".join(options.choice)
    else:
        return None
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
    """llguidance's form of what the options ask for. Raises ValueError for a schema that is nested too deeply."""
    if options.json_schema is not None:
        overrides: Any = {"whitespace_pattern": _WHITESPACE, "json_allowed_escapes": _ESCAPES}
        return LLMatcher.grammar_from_json_schema(options.json_schema, overrides=overrides)
    regex = options.regex if options.regex is not None else "|".join(map(re.escape, options.choice))
    return LLMatcher.grammar_from_regex(regex)


def _check(name: str, eos_token_ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> None:
    problems = []
    if not eos_token_ids:
        problems.append(
            f"{option_name(name)} needs an end-of-sequence token to end answers with, and neither the model nor "
            "its tokenizer names one."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        problems.append(
            f"{option_name(name)} needs a fast tokenizer, and {type(tokenizer).__name__} is none. Convert it "
            "once: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    if problems:
        raise ConfigError(problems)


@lru_cache(maxsize=1)
def _token_table(tokenizer: PreTrainedTokenizerFast, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    """llguidance's form of a vocabulary. Qwen's takes seconds to make, hence the cache."""
    return from_tokenizer(tokenizer, eos_token=list(eos_token_ids))
