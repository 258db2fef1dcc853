"""Constrained decoding: answers that match a JSON schema, a regular expression, or one of several texts.

llguidance (https://github.com/guidance-ai/llguidance) computes which tokens may come next. Its state is a function
of the tokens generated so far. So states are cached by their tokens and rebuilt if missing, and a row that joins,
a beam that branches or a rejected draft needs no bookkeeping.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from handspun.config import option_name
from handspun.decoding.options import SamplingParams
from handspun.decoding.schema import read_schema
from handspun.display import printable
from handspun.errors import ConfigError, check_installed

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

_WHITESPACE = r"\n?[ ]{0,24}"
"""White space between the parts of a JSON answer. If it were unbounded, small models would emit it forever."""

_ESCAPES = 'nrbtf"\\'
"""Characters allowed after a backslash in JSON strings. Not u: JSON readers take "\\u0061" as the property "a",
but llguidance treats it as a different property and would not enforce the type of "a"."""

_JSON_OPTIONS = {"whitespace_pattern": _WHITESPACE, "json_allowed_escapes": _ESCAPES}


_MOST_CALLS = 16
"""Most tool calls of a constrained answer. Without a limit, small models would call forever."""


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

    def fresh(self) -> "Constraint":
        """Return the same constraint for another request, with a cache of its own."""
        other = copy.copy(self)
        other._states, other._most_rows = {}, 0
        return other

    def _state_after(self, tokens: tuple[int, ...]) -> _State:
        if not tokens:
            return self._start
        state = self._states.pop(tokens, None)
        if state is None:
            before = self._states.get(tokens[:-1])
            with panics_as_errors(option_name(self.name)):
                matcher = (before or self._start).matcher.deep_copy()
                is_possible = matcher.consume_tokens(list(tokens[-1:] if before else tokens))
                state = self._state(matcher) if is_possible else self._dead(matcher)
        self._states[tokens] = state  # the newest last
        return state

    def _state(self, matcher: "LLMatcher") -> _State:
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")).bool()
        allowed[self._eos] = matcher.is_accepting()
        if matcher.is_error():
            allowed[:] = False
            reason = matcher.get_error().partition("\n")[0]
            if not reason.startswith("NoExtension"):  # otherwise there is no next token, as `can_begin` tells
                raise ConfigError(f"{option_name(self.name)} is too complex: {reason}. Use a simpler one.")
        return _State(matcher, allowed)

    def _dead(self, matcher: "LLMatcher") -> _State:
        """Return the state of a row that violates the grammar (a dead beam), which cannot continue."""
        return _State(matcher, torch.zeros_like(self._start.allowed))

    def _evict(self, keep: int) -> None:
        for tokens in list(self._states)[:-keep]:
            del self._states[tokens]


class Grammar(NamedTuple):
    """What answers must match."""

    name: str
    """The option that asks for it."""
    shown: str
    """What was given, for messages."""
    text: str
    """The same in llguidance's form."""


def make_constraint(options: SamplingParams, tokenizer: "PreTrainedTokenizerBase") -> Constraint | None:
    """Return the constraint that the options ask for, or None.

    Raises ConfigError if it is malformed, if no answer can match it, or if it cannot be enforced.
    """
    grammar = grammar_of(options)
    return None if grammar is None else compile_grammar(grammar, tokenizer, options.eos_token_ids)


def grammar_of(options: SamplingParams) -> Grammar | None:
    """Return the grammar that the options ask for, or None. Raises ConfigError."""
    if options.json_schema is not None:
        name, given = "json_schema", options.json_schema
    elif options.regex is not None:
        name, given = "regex", options.regex
    elif options.choice:
        name, given = "choice", ", ".join(options.choice)
    else:
        return None
    check_installed("llguidance", "constraints", option_name(name))
    shown = printable(given, most=200)
    with _as_config_error(name, shown):
        return Grammar(name, shown, _grammar_text(options))


def tool_call_grammar(
    tools: Sequence[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", *, several: bool
) -> Grammar:
    """Return the grammar of answers that are calls of some tools. Raises ConfigError.

    Args:
        tools: Their definitions, [{"function": {"name": str, "parameters": JSON schema}}].
        tokenizer: The model's tokenizer. Where <tool_call> is one of its tokens, the grammar asks for that token.
        several: Whether several calls may follow each other.
    """
    check_installed("llguidance", "constraints", "a tool call that is required")
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    opening, closing = (tag if tag in added else json.dumps(tag) for tag in ("<tool_call>", "</tool_call>"))
    block = rf'{opening} "\n" call "\n" {closing}'
    rules = [f'start: {block} ("\\n" {block}){{0,{_MOST_CALLS - 1}}}' if several else f"start: {block}"]
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        function = tool["function"]
        schema = {"type": "object", **(function.get("parameters") or {})}
        text = json.loads(read_schema(schema))
        head = json.dumps(f'{{"name": {json.dumps(function["name"])}, "arguments": ')
        rules.append(f'call_{number}: {head} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: %json " + json.dumps({**text, "x-guidance": _JSON_OPTIONS}))
    from llguidance import LLMatcher

    return Grammar("tools", "the tools", LLMatcher.grammar_from_lark("\n".join(rules)))


def compile_grammar(
    grammar: Grammar,
    tokenizer: "PreTrainedTokenizerBase",
    eos_token_ids: tuple[int, ...],
    limits: Mapping[str, Any] | None = None,
) -> Constraint:
    """Return the constraint of a grammar.

    Raises ConfigError if it is malformed, if no answer can match it, or if it cannot be enforced.

    Args:
        grammar: What answers must match.
        tokenizer: The model's tokenizer.
        eos_token_ids: Tokens that end an answer.
        limits: llguidance's limits on the size of grammar and states (`LLParserLimits`), if not its defaults.
    """
    from llguidance import LLMatcher, LLParserLimits  # here: decoding without constraints does not need it

    eos = tuple(token for token in eos_token_ids if token < len(tokenizer))
    _check(grammar.name, eos, tokenizer)
    bounds = LLParserLimits(**limits, verbose_errors=False) if limits else None
    with _as_config_error(grammar.name, grammar.shown):
        matcher = LLMatcher(token_table(tokenizer, eos), grammar.text, log_level=0, limits=bounds)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        constraint = Constraint(grammar.name, matcher, eos)
    if not constraint.can_begin():
        raise ConfigError(f"{option_name(grammar.name)} {grammar.shown} cannot be used: no answer can match it.")
    return constraint


@contextmanager
def _as_config_error(name: str, shown: str) -> Iterator[None]:
    """Raise what llguidance cannot do as a ConfigError."""
    what = f"{option_name(name)} {shown} cannot be used"
    try:
        with panics_as_errors(what):
            yield
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what}: {error}") from error


@contextmanager
def panics_as_errors(what: str) -> Iterator[None]:
    """Raise a panic of llguidance as a ConfigError. It is a BaseException, which would end the whole program."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3 does not export the class
            raise
        raise ConfigError(f"{what}: it made the constraint library fail. Use another constraint.") from error


def _grammar_text(options: SamplingParams) -> str:
    """Return the options' llguidance grammar. Raises ValueError for a schema that is nested too deeply."""
    from llguidance import LLMatcher

    if options.json_schema is not None:
        overrides: Any = _JSON_OPTIONS
        return LLMatcher.grammar_from_json_schema(options.json_schema, overrides=overrides)
    regex = options.regex if options.regex is not None else "|".join(map(re.escape, options.choice))
    return LLMatcher.grammar_from_regex(regex)


def _check(name: str, eos_token_ids: tuple[int, ...], tokenizer: "PreTrainedTokenizerBase") -> None:
    problems = []
    if not eos_token_ids:
        problems.append(
            f"{option_name(name)} needs an end-of-sequence token to end answers, but neither the model nor its "
            "tokenizer has one."
        )
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        problems.append(
            f"{option_name(name)} needs a fast tokenizer, but {type(tokenizer).__name__} is slow. Convert it "
            "once: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    if problems:
        raise ConfigError(problems)


_TOKEN_TABLES: "WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int, ...], LLTokenizer]]" = (
    WeakKeyDictionary()
)


def token_table(tokenizer: "PreTrainedTokenizerBase", eos_token_ids: tuple[int, ...]) -> "LLTokenizer":
    """Return llguidance's tokenizer. Qwen's takes seconds to build, so it is kept as long as the tokenizer is."""
    from llguidance import LLTokenizer

    tables = _TOKEN_TABLES.setdefault(tokenizer, {})
    if eos_token_ids not in tables:
        backend = copy.copy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        tables[eos_token_ids] = LLTokenizer(backend.to_str(), eos_token=list(eos_token_ids))
    return tables[eos_token_ids]
