"""Log-probabilities in OpenAI's two forms, and which tokens of an answer are shown.

A token is shown when the characters that it takes part in are. Those of a stop string are not, and neither is text
that is held back because it may become one. All values are of the model's own distribution.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from handspun.decoding.results import GenerationChunk, GenerationResult
from handspun.decoding.text import Detokenizer, Vocabulary

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""

Top = Sequence[tuple[int, float]]


class ScoredToken(NamedTuple):
    """One token, and where its text begins among the answer's characters."""

    token_id: int
    logprob: float | None
    top: Top
    start: int


@dataclass
class ShownTokens:
    """The tokens of one answer that its text shows so far. with_special: special tokens and the end count too."""

    vocabulary: Vocabulary
    with_special: bool = False
    _detokenizer: Detokenizer | None = None
    _pending: deque[ScoredToken] = field(default_factory=deque)
    _pushed: int = 0
    _characters: int = 0
    """Characters of the tokens so far."""
    _shown: int = 0
    """Characters that the client has."""

    def push(self, chunk: GenerationChunk) -> list[ScoredToken]:
        """Return the tokens that are shown once the chunk's text is."""
        if chunk.result is not None:  # it has all of them: a beam search knows its tokens only at the end
            new = _scores(chunk.result)[self._pushed :]
        else:
            new = list(
                zip(chunk.token_ids, chunk.logprobs, chunk.top_logprobs or _without_top(chunk), strict=False)
            )
        self._pushed += len(new)
        ends_here = chunk.finish_reason == "eos"
        for number, (token_id, logprob, top) in enumerate(new, start=1):
            self._add(token_id, logprob, top, is_end=ends_here and number == len(new))
        self._shown += len(chunk.text)
        is_whole = chunk.finish_reason is not None and chunk.finish_reason != "stop"
        taken = []
        while self._pending and (is_whole or self._pending[0].start < self._shown):
            taken.append(self._pending.popleft())
        return taken

    def _add(self, token_id: int, logprob: float, top: Top, *, is_end: bool) -> None:
        is_hidden = is_end or token_id in self.vocabulary.special
        if self.with_special or not is_hidden:
            self._pending.append(ScoredToken(token_id, logprob, top, self._characters))
        if not is_hidden:
            self._detokenizer = self._detokenizer or self.vocabulary.detokenizer()
            self._characters += len(self._detokenizer.push(token_id))


def shown_tokens(
    result: GenerationResult, vocabulary: Vocabulary, *, with_special: bool = False
) -> list[ScoredToken]:
    """Return the tokens of a whole answer that its text shows."""
    chunk = GenerationChunk(
        prompt_index=0,
        return_index=0,
        text=result.text,
        token_ids=[],
        finish_reason=result.finish_reason,
        result=result,
    )
    return ShownTokens(vocabulary, with_special=with_special).push(chunk)


def chat_logprobs(tokens: Sequence[ScoredToken], vocabulary: Vocabulary) -> dict[str, Any]:
    """Return `logprobs` of a choice of /v1/chat/completions."""
    return {"content": [_entry(token, vocabulary) for token in tokens], "refusal": None}


def _entry(token: ScoredToken, vocabulary: Vocabulary) -> dict[str, Any]:
    best = [_named(token_id, logprob, vocabulary) for token_id, logprob in token.top]
    assert token.logprob is not None
    return {**_named(token.token_id, token.logprob, vocabulary), "top_logprobs": best}


def _named(token_id: int, logprob: float, vocabulary: Vocabulary) -> dict[str, Any]:
    data = vocabulary.bytes_of(token_id)
    return {"token": data.decode("utf-8", "replace"), "logprob": number(logprob), "bytes": list(data)}


def completion_logprobs(
    tokens: Sequence[ScoredToken], vocabulary: Vocabulary, *, with_top: bool, offset: int = 0
) -> dict[str, Any]:
    """Return `logprobs` of a choice of /v1/completions. offset: characters in front of the tokens'."""
    return {
        "tokens": [token_name(token.token_id, vocabulary) for token in tokens],
        "token_logprobs": [None if token.logprob is None else number(token.logprob) for token in tokens],
        "top_logprobs": [_by_name(token, vocabulary) for token in tokens] if with_top else None,
        "text_offset": [offset + token.start for token in tokens],
    }


def _by_name(token: ScoredToken, vocabulary: Vocabulary) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    return {token_name(token_id, vocabulary): number(logprob) for token_id, logprob in token.top}


def token_name(token_id: int, vocabulary: Vocabulary) -> str:
    r"""Return a token's text; for a part of a character its bytes, as OpenAI writes them: bytes:\xe2\x80."""
    data = vocabulary.bytes_of(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def number(logprob: float) -> float:
    """Return a log-probability as JSON can write it."""
    return logprob if math.isfinite(logprob) else _LOWEST


def prompt_tokens(result: GenerationResult, text: str, vocabulary: Vocabulary) -> list[ScoredToken]:
    """Return the prompt's tokens with their places in its text. Each id has one entry."""
    detokenizer, position = vocabulary.detokenizer(), 0
    ids = result.prompt_token_ids
    logprobs = result.prompt_logprobs or [None] * len(ids)
    tops: Sequence[Top] = result.prompt_top_logprobs or [[]] * len(ids)
    tokens = []
    for token_id, logprob, top in zip(ids, logprobs, tops, strict=True):
        tokens.append(ScoredToken(token_id, logprob, top, position))
        name = vocabulary.special.get(token_id)
        if name is None:
            position += len(detokenizer.push(token_id))
        elif text.startswith(name, position):  # a beginning that the tokenizer adds is not in the text
            position += len(name)
    return tokens


def _scores(result: GenerationResult) -> list[tuple[int, float, Top]]:
    """Return the new tokens of an answer with their scores."""
    logprobs = result.logprobs or []
    tops: Sequence[Top] = result.top_logprobs or [[]] * len(logprobs)
    ids = result.token_ids[len(result.token_ids) - len(logprobs) :]
    return list(zip(ids, logprobs, tops, strict=True))


def _without_top(chunk: GenerationChunk) -> list[Top]:
    return [[]] * len(chunk.logprobs)
