"""Filters of next-token logits: pure functions of (rows, vocab) that give (rows, vocab).

Semantics are transformers' (`generation/logits_process.py`). Where the past counts, each row has a list of token
ids of its own length.
"""

import math
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor


def repetition_penalty(logits: Tensor, seen: Sequence[Iterable[int]], penalty: float) -> Tensor:
    """Divides the logits of each row's seen tokens by the penalty, or multiplies negative ones
    (CTRL, https://arxiv.org/abs/1909.05858)."""
    places = _places(logits, [set(tokens) for tokens in seen])
    values = logits[places]
    return logits.index_put(places, torch.where(values < 0, values * penalty, values / penalty))


def no_repeat_ngram(logits: Tensor, histories: Sequence[list[int]], size: int) -> Tensor:
    """Forbids every token that would complete a run of `size` tokens that its row's history holds already."""
    return _forbidden(logits, [_completions(history, size) for history in histories])


def forbid(logits: Tensor, token_ids: Collection[int], where: Sequence[bool]) -> Tensor:
    """Forbids these tokens in the rows for which `where` is true."""
    return _forbidden(logits, [token_ids if here else () for here in where]) if any(where) else logits


def temperature(logits: Tensor, value: float) -> Tensor:
    """Flattens the distribution (above 1) or sharpens it (below 1)."""
    return logits / value


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keeps the k most probable tokens, and those that tie with the last of them."""
    last = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < last, -math.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the most probable tokens up to a probability of p in sum, and at least one
    (https://arxiv.org/abs/1904.09751). Summed from the least probable on, as transformers does."""
    ascending, order = logits.sort(-1)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[..., -1] = False
    return logits.masked_fill(removed.scatter(-1, order, removed), -math.inf)


def min_p(logits: Tensor, share: float) -> Tensor:
    """Keeps tokens at least this share as probable as the best (https://arxiv.org/abs/2407.01082)."""
    probabilities = logits.softmax(-1)
    best = probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(probabilities < share * best, -math.inf)


def _completions(history: list[int], size: int) -> set[int]:
    """What has followed the last size - 1 tokens before."""
    start = history[len(history) - size + 1 :]
    places = range(len(history) - size + 1)
    return {history[i + size - 1] for i in places if history[i : i + size - 1] == start}


def _forbidden(logits: Tensor, tokens: Sequence[Collection[int]]) -> Tensor:
    return logits.index_put(_places(logits, tokens), logits.new_tensor(-math.inf))


def _places(logits: Tensor, tokens: Sequence[Collection[int]]) -> tuple[Tensor, Tensor]:
    """Indices (rows, tokens) of each row's tokens, without those that the head cannot give."""
    vocab = logits.shape[-1]
    pairs = [(row, token) for row, several in enumerate(tokens) for token in several if token < vocab]
    rows, columns = torch.tensor(pairs, dtype=torch.long, device=logits.device).view(-1, 2).unbind(-1)
    return rows, columns


__all__ = ["forbid", "min_p", "no_repeat_ngram", "repetition_penalty", "temperature", "top_k", "top_p"]
