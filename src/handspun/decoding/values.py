"""Values of options as they may be given, and as decoding holds them."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from handspun.config import option_name
from handspun.decoding.filters import Bias
from handspun.errors import ConfigError


def concrete(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The same options with every value in its one form: tuples for lists, ids for words, JSON for files.

    Raises ConfigError for a value of another form, listing them all.
    """
    made, problems = dict(values), []
    for name, read in _READERS.items():
        if name in made:
            try:
                made[name] = read(made[name])
            except (TypeError, ValueError, KeyError, IndexError) as error:
                problems.append(f"{option_name(name)} is {made[name]!r}: expected {_EXPECTED[name]} ({error}).")
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(problems)
    if "bad_words" in made:
        made["bad_words_ids"] = made.get("bad_words_ids", ()) + _words_ids(made.pop("bad_words"), tokenizer)
    return made


def _strings(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _ids(value: int | Iterable[int]) -> tuple[int, ...]:
    ids = (value,) if isinstance(value, int) else tuple(int(item) for item in value)
    if any(token < 0 for token in ids):
        raise ValueError("a token id is 0 or more")
    return ids


def _runs(value: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    runs = tuple(_ids(run) for run in value)
    if not all(runs):
        raise ValueError("a run has at least one id")
    return runs


def _biases(value: Mapping[Any, float] | Iterable[Any]) -> tuple[Bias, ...]:
    """Also transformers' forms: a dict with tuples as keys, and a list of [ids, bias]."""
    pairs = value.items() if isinstance(value, Mapping) else value
    read = [(_ids(map(int, ids.split()) if isinstance(ids, str) else ids), float(bias)) for ids, bias in pairs]
    _runs(ids for ids, _ in read)
    return tuple(read)


def _single_biases(value: Mapping[Any, float]) -> tuple[Bias, ...]:
    return _biases({(int(token),): bias for token, bias in value.items()})


def _schema(value: str | dict[str, Any]) -> str:
    """JSON text of a schema: of a dict, of text that begins as JSON does, or of a file."""
    if not isinstance(value, str):
        return json.dumps(value)
    text, where = value, "--json-schema"
    if not value.lstrip().startswith("{"):
        where = f"--json-schema {value}"
        try:
            text = Path(value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{where} cannot be read: {error}. Expected a JSON schema ({{...}}), or a file that holds one."
            ) from error
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}.") from error
    return text


def _words_ids(words: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    """Each word as it is tokenised alone and behind a space."""
    spelled = [prefix + word.lstrip(" ") for word in words for prefix in ("", " ")]
    runs = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in spelled]
    return tuple(dict.fromkeys(run for run in runs if run))


_READERS: dict[str, Callable[[Any], Any]] = {
    "stop_strings": _strings,
    "logit_bias": _single_biases,
    "sequence_bias": _biases,
    "bad_words": _strings,
    "bad_words_ids": _runs,
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
    "json_schema": _schema,
    "choice": _strings,
}
_EXPECTED = {
    "stop_strings": "strings",
    "logit_bias": 'a bias for each token id, as {"42": -100}',
    "sequence_bias": 'a bias for each run of token ids, as {"42 7": -5}',
    "bad_words": "strings",
    "bad_words_ids": "runs of token ids, as [[42, 7], [5]]",
    "suppress_tokens": "token ids",
    "begin_suppress_tokens": "token ids",
    "json_schema": "a JSON schema",
    "choice": "strings",
}

__all__ = ["concrete"]
