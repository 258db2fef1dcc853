"""Options of decoding. The text under each field is its help text."""

from collections.abc import Mapping
from typing import Any, Literal

from handspun.config.names import options
from handspun.config.ranges import MOST, Ranges, option_name, problem_with, read_value, type_hints, wrong_values
from handspun.config.typed import as_type
from handspun.errors import ConfigError

Weights = Literal["auto", "float32", "bfloat16", "float16", "int8"]


@options
class GenerationOptions:
    """How to decode.

    An option that is not given comes from the model's generation_config, or else has the default named here.
    Options taken from generation_config are printed.
    """

    max_new_tokens: int | None = None
    """Maximum number of tokens to generate (default 512)."""

    min_new_tokens: int | None = None
    """Minimum number of tokens before the end of sequence is allowed (default 0)."""

    do_sample: bool | None = None
    """Sample instead of taking the most probable token (default: if a sampling option such as --temperature is
    given)."""

    temperature: float | None = None
    """Sample with the logits divided by this (default 1.0). 0 takes the most probable token instead."""

    top_k: int | None = None
    """Sample from the k most probable tokens, including ties (default 0, off)."""

    top_p: float | None = None
    """Sample from the smallest set of tokens whose total probability reaches this (default 1.0, off)."""

    min_p: float | None = None
    """Sample from tokens with at least this fraction of the top token's probability (default 0, off)."""

    typical_p: float | None = None
    """Sample from the tokens whose surprisal is closest to the expected one, up to this total probability (default
    1.0, off)."""

    repetition_penalty: float | None = None
    """Divide the logits of tokens in prompt and output by this (multiply, if negative) (default 1.0, off)."""

    repetition_penalty_exempt: Literal["none", "template"] | None = None
    """"template" exempts the chat template's text and all added tokens, so that structure is not penalized
    (default "none", as in transformers)."""

    presence_penalty: float | None = None
    """Subtract this from the logits of tokens that are in the output (-2 to 2, default 0, off)."""

    frequency_penalty: float | None = None
    """Subtract this from a token's logit once per occurrence in the output (-2 to 2, default 0, off)."""

    no_repeat_ngram_size: int | None = None
    """Allow no sequence of N tokens twice in prompt and output (default 0, off)."""

    logit_bias: dict[str, float] | None = None
    """Add to the logits of token ids, as in --logit-bias.42=-100 or --logit-bias '{"42": -100}'."""

    sequence_bias: dict[str, float] | None = None
    """The same for a sequence of ids ("42 7"): applies to the last id after the others."""

    bad_words: tuple[str, ...] | None = None
    """Texts that are never generated, at the start of a word or after a space."""

    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    """The same as token ids. Several ids form one sequence."""

    suppress_tokens: tuple[int, ...] | None = None
    """Token ids that are never generated."""

    begin_suppress_tokens: tuple[int, ...] | None = None
    """Token ids that no answer begins with."""

    json_schema: str | dict[str, Any] | None = None
    """Constrain answers to JSON that matches this schema, given as JSON or as a file name."""

    regex: str | None = None
    """Constrain the whole answer to this regular expression (Rust's syntax, without look-around)."""

    choice: tuple[str, ...] | None = None
    """Constrain answers to one of these texts."""

    num_beams: int | None = None
    """Number of beams in beam search (default 1, off)."""

    length_penalty: float | None = None
    """Divide beam scores by (generated length) ** this (default 1.0)."""

    early_stopping: bool | Literal["never"] | None = None
    """When beam search ends: yes, once num_beams hypotheses are complete; no, when a better one is unlikely;
    "never", when a better one is impossible (default no)."""

    num_return_sequences: int | None = None
    """Number of answers per prompt (default 1)."""

    prompt_lookup_num_tokens: int | None = None
    """Number of draft tokens per step, copied from what followed the last tokens earlier in the text. Answers stay
    the same, and take fewer steps if they repeat their prompt (default 0, off)."""

    max_matching_ngram_size: int | None = None
    """Maximum number of last tokens to look up for drafting (default 2)."""

    stop_strings: tuple[str, ...] | None = None
    """Strings that end an answer and are cut from it (default for chats: the template's end of turn and
    "\\nUser:"; otherwise none). --no-stop-strings turns them off."""

    seed: int | tuple[int, ...] | None = None
    """Sampling seed: one, or one per prompt (default 0)."""

    def __post_init__(self) -> None:
        if problems := wrong_values(self, {}, read_option) or _exclusions(self):
            raise ConfigError(problems)


NEXT_USER = "\nUser:"
"""A stop string of chats: a model that does not end its turn continues with the user's."""

SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""Options that only affect sampling."""

CONSTRAINTS = ("json_schema", "regex", "choice")
"""Options that constrain the whole answer. They exclude each other."""

_GENERATION_RANGES: Ranges = {
    "max_new_tokens": (1, MOST, True, True),
    "min_new_tokens": (0, MOST, True, True),
    "temperature": (0, 1e6, True, True),
    "top_k": (0, MOST, True, True),
    "top_p": (0, 1, False, True),
    "min_p": (0, 1, True, True),
    "typical_p": (0, 1, False, True),
    "presence_penalty": (-2, 2, True, True),
    "frequency_penalty": (-2, 2, True, True),
    "repetition_penalty": (1e-6, 1e6, True, True),
    "no_repeat_ngram_size": (0, MOST, True, True),
    "logit_bias": (-1e9, 1e9, True, True),
    "sequence_bias": (-1e9, 1e9, True, True),
    "bad_words_ids": (0, MOST, True, True),
    "suppress_tokens": (0, MOST, True, True),
    "begin_suppress_tokens": (0, MOST, True, True),
    "num_beams": (1, 1000, True, True),
    "length_penalty": (-50, 50, True, True),
    "num_return_sequences": (1, 10_000, True, True),
    "prompt_lookup_num_tokens": (0, MOST, True, True),
    "max_matching_ngram_size": (1, MOST, True, True),
    "seed": (0, 2**64, True, False),
}
"""Within these ranges nothing overflows in float32, whatever the model's logits are."""
_COLDEST = 1e-6
"""Lowest temperature other than 0. Logits divided by less would overflow."""


def read_option(name: str, value: Any) -> Any:
    """Return an option's value in normal form: lists as tuples, ids as integers, biases as a mapping.

    Raises ValueError, which says what is wrong and what was expected.
    """
    spelled = _spelled_biases(value) if name in ("logit_bias", "sequence_bias") else value
    typed = read_value(name, spelled, type_hints(GenerationOptions)[name], _GENERATION_RANGES)
    if typed is not None and (wanted := _wrong_form(name, typed)):
        raise ValueError(problem_with(name, value, wanted))
    return typed


def _spelled_biases(value: Any) -> Any:
    """Return biases keyed by their ids as text ("42 7"), and any other value unchanged.

    Reads transformers' forms too: tuples as keys, or [ids, bias] pairs. Biases for the same ids add up.
    """
    pairs = value.items() if isinstance(value, Mapping) else value
    spelled: dict[str, float] = {}
    try:
        for ids, bias in pairs:
            typed = ids if isinstance(ids, str) else " ".join(map(str, as_type(ids, tuple[int, ...])))
            spelled[typed] = spelled.get(typed, 0.0) + as_type(bias, float)
    except (TypeError, ValueError):
        return value
    return spelled


def _wrong_form(name: str, value: Any) -> str | None:
    """Return what was expected instead of a value that has the right type; None if the value is fine."""
    if name in ("logit_bias", "sequence_bias"):
        most = 1 if name == "logit_bias" else MOST
        expected = "a token id before each bias" if most == 1 else "token ids before each bias"
        ids = [text.split() for text in value]
        return None if all(1 <= len(run) <= most and all(map(_is_id, run)) for run in ids) else expected
    if name == "temperature" and 0 < value < _COLDEST:
        return f"0, or at least {_COLDEST:g}"
    if name == "bad_words_ids" and not all(value):
        return "at least one id in each sequence"
    if name == "choice" and not value:
        return "at least one text"
    if name == "stop_strings" and "" in value:
        return "no empty text, which would end every answer at once"
    if name == "bad_words" and "" in value:
        return "no empty text, which is in every answer"
    return None


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text[:12]) <= MOST and len(text) <= 10


def _exclusions(given: GenerationOptions) -> list[str]:
    """Return the conflicts between the options that the user gave, each with a remedy."""
    problems = []
    beams, sample = given.num_beams or 1, given.do_sample
    sampling = [option_name(name) for name in SAMPLING_OPTIONS if getattr(given, name) is not None]
    if beams > 1 and sample:
        problems.append(
            f"--num-beams {beams} and --do-sample exclude each other: beam search takes the most probable beams "
            "and does not sample. Remove one of them."
        )
    elif sampling and given.temperature != 0 and (beams > 1 or sample is False):
        other = f"--num-beams {beams}" if beams > 1 else "--no-do-sample"
        verb = "affects" if len(sampling) == 1 else "affect"
        problems.append(
            f"{', '.join(sampling)} only {verb} sampling, and {other} does not sample. "
            f"Remove {'it' if len(sampling) == 1 else 'them'}, or use --do-sample without beams."
        )
    constraints = [option_name(name) for name in CONSTRAINTS if getattr(given, name) is not None]
    if len(constraints) > 1:
        problems.append(
            f"{' and '.join(constraints)} exclude each other: each constrains the whole answer. Use one of them."
        )
    for name in ("length_penalty", "early_stopping"):
        if getattr(given, name) is not None and beams == 1:
            problems.append(f"{option_name(name)} needs beam search. Add --num-beams 2 or more, or remove it.")
    returned = given.num_return_sequences or 1
    if beams > 1 and returned > beams:
        problems.append(
            f"--num-return-sequences {returned} is more than --num-beams {beams}: beam search returns at most as "
            "many answers as it has beams. Lower one or raise the other."
        )
    if returned > 1 and beams == 1 and (sample is False or given.temperature == 0):
        problems.append(
            f"--num-return-sequences {returned} with greedy decoding would give the same answer {returned} "
            "times. Use --do-sample or --num-beams."
        )
    fewest, most = given.min_new_tokens, given.max_new_tokens
    if fewest is not None and most is not None and fewest > most:
        problems.append(f"--min-new-tokens {fewest} is more than --max-new-tokens {most}.")
    return problems
