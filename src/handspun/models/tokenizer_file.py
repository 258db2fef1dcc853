"""Loading a tokenizer exactly as the model's tokenizer.json describes it.

`AutoTokenizer` may rebuild a tokenizer as the architecture's class, with that class's normalizer and
pre-tokenizer. Token ids then differ from those that the model was trained with.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from handspun.display import logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers, peft, and tqdm within the block. Exceptions pass through."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # tqdm's bars go to stderr.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


PROBES = (
    "In 2023 there were 650841823 of them, 3.14 or 1,000.",
    "Don't stop: it's what's LEFT, I'd say.",
    "cafe\u0301 caf\u00e9 \u212b \ufb01ne \u2460 \uff21\uff22",
    "two  spaces   three\ttab \n\n\n lines\r\n end ",
    " leading",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4",
    "\u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7 \u0441\u044a\u0435\u0448\u044c \u00bfqu\u00e9?",
    "def f(x):\n    return x**2  # {'a': [1, 2]}",
    "snake_case camelCase HTTP/2 user@example.org https://example.org/a?b=c",
)
"""Texts that tokenizers of different classes encode differently."""

_MODEL_SETTINGS = (
    "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
    "ignore_merges",
)  # fmt: skip


def as_in_tokenizer_json(
    tokenizer: "PreTrainedTokenizerBase", name: str, location: str, *, warn: bool = False
) -> "PreTrainedTokenizerBase":
    """Return the tokenizer, or one loaded from tokenizer.json if it does not behave as that file says.

    Args:
        tokenizer: the tokenizer that AutoTokenizer loaded.
        name: the model's name, for the message.
        location: folder or hub id that it was loaded from.
        warn: log it if AutoTokenizer's ids differ for some text.
    """
    file = _tokenizer_json(location)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if file is None or not isinstance(backend, Tokenizer):
        return tokenizer
    of_file = Tokenizer.from_file(str(file))
    for made in (backend, of_file):
        _turn_off_dropout(made)
    other_ids = text_with_other_ids(backend, of_file)
    if other_ids is None and _same_settings(backend, of_file):
        return tokenizer
    of_file_only = _load_from_file(location, tokenizer, of_file)
    if other_ids is not None and warn:
        logger.warning(
            f"{name}: its tokenizer.json is used as is. transformers' AutoTokenizer rebuilds it as "
            f"{type(tokenizer).__name__}, which gives different token ids, for example for {other_ids!r}. "
            "Programs that load this model through AutoTokenizer tokenize such text differently"
        )
    return of_file_only


def text_with_other_ids(one: Tokenizer, other: Tokenizer) -> str | None:
    """Return the first probe text, or word of it, that the two encode differently; None if there is none."""
    for text in PROBES:
        for part in (*text.split(), text):
            if one.encode(part, add_special_tokens=False).ids != other.encode(part, add_special_tokens=False).ids:
                return part
    return None


def _tokenizer_json(location: str) -> Path | None:
    """Return the tokenizer.json of a folder, or of a hub id in the cache; None if there is none."""
    if Path(location).is_dir():
        file = Path(location) / "tokenizer.json"
        return file if file.is_file() else None
    from transformers.utils.hub import cached_file

    found = cached_file(
        location, "tokenizer.json", local_files_only=True, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return Path(found) if found else None


def _turn_off_dropout(backend: Tokenizer) -> None:
    """Turn off BPE dropout."""
    # It gives different ids each time: nothing could be cached, compared, or repeated.
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None


def _same_settings(one: Tokenizer, other: Tokenizer) -> bool:
    """Return whether all settings that ids depend on are the same."""
    # The vocabulary need not be compared: it is the file's either way.
    of_other = {id: token.content for id, token in other.get_added_tokens_decoder().items()}
    of_one = {id: token.content for id, token in one.get_added_tokens_decoder().items()}
    return _settings(one) == _settings(other) and of_other.items() <= of_one.items()


def _settings(backend: Tokenizer) -> list[object]:
    parts = (backend.normalizer, backend.pre_tokenizer)
    of_model = [getattr(backend.model, setting, None) for setting in _MODEL_SETTINGS]
    return [type(backend.model), *(part and part.__getstate__() for part in parts), *of_model]


def _load_from_file(
    location: str, rebuilt: "PreTrainedTokenizerBase", of_file: Tokenizer
) -> "PreTrainedTokenizerBase":
    """Return the file's tokenizer, plus the rebuilt one's special tokens that the file knows."""
    from transformers import PreTrainedTokenizerFast

    with quiet():
        found: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(location)
    _turn_off_dropout(found.backend_tokenizer)
    defaults: dict[str, Any] = {
        key: token
        for key, token in rebuilt.special_tokens_map.items()
        if isinstance(token, str) and of_file.token_to_id(token) is not None and getattr(found, key, None) is None
    }
    for key, token in defaults.items():
        setattr(found, key, token)
    return found
