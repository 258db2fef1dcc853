"""Filters of next-token logits: pure functions from (rows, vocab) to (rows, vocab).

Semantics are those of transformers (`generation/logits_process.py`). Histories are one list of token ids per row,
each of its own length.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from handspun.decoding.top import top_values

Bias = tuple[tuple[int, ...], float]
"""A sequence of token ids, and what is added to its last token's logit after the other tokens."""

_MAX_UNSORTED = 1024
"""Number of best tokens that top_p considers before it falls back to sorting the vocabulary."""
_ROUNDING_MARGIN = 1e-5
"""Upper bound on the float32 rounding difference between two sums of a vocabulary's probabilities."""


def repetition_penalty(logits: Tensor, seen: Sequence[Iterable[int]], penalty: float) -> Tensor:
    """Divide positive logits of each row's seen tokens by the penalty, and multiply negative ones.

    From CTRL, https://arxiv.org/abs/1909.05858.
    """
    places = _token_indices(logits, [set(tokens) for tokens in seen])
    values = logits[places]
    return logits.index_put(places, torch.where(values < 0, values * penalty, values / penalty))


def presence_penalty(logits: Tensor, generated: Sequence[Iterable[int]], penalty: float) -> Tensor:
    """Subtract the penalty from the logits of tokens that each row has generated (as OpenAI's API and vLLM)."""
    places = _token_indices(logits, [set(tokens) for tokens in generated])
    return logits.index_put(places, logits[places] - penalty)


def frequency_penalty(logits: Tensor, generated: Sequence[Iterable[int]], penalty: float) -> Tensor:
    """Subtract the penalty from a token's logit per occurrence in the row's output (as OpenAI's API and vLLM)."""
    counts = [Counter(tokens) for tokens in generated]
    places = _token_indices(logits, counts)
    times = [n for row in counts for token, n in row.items() if token < logits.shape[-1]]
    return logits.index_put(places, logits[places] - penalty * logits.new_tensor(times))


def sequence_bias(logits: Tensor, histories: Sequence[list[int]], biases: Iterable[Bias]) -> Tensor:
    """Add a bias to a sequence's last token if the row's history ends with the tokens before it.

    A sequence of one token always gets its bias. Biases on the same token add up.
    """
    added: list[dict[int, float]] = []
    for history in histories:
        row: dict[int, float] = {}
        for (*before, last), bias in biases:
            if not before or history[-len(before) :] == before:
                row[last] = row.get(last, 0.0) + bias
        added.append(row)
    places = _token_indices(logits, added)
    values = [bias for row in added for token, bias in row.items() if token < logits.shape[-1]]
    return logits.index_put(places, logits[places] + logits.new_tensor(values))


def no_repeat_ngram(logits: Tensor, histories: Sequence[list[int]], size: int) -> Tensor:
    """Exclude every token that would repeat an n-gram of `size` tokens from its row's history."""
    return _exclude(logits, [_completions(history, size) for history in histories])


def mask_tokens(logits: Tensor, token_ids: Collection[int], where: Sequence[bool]) -> Tensor:
    """Exclude these tokens in the rows for which `where` is true."""
    return _exclude(logits, [token_ids if here else () for here in where]) if any(where) else logits


def temperature(logits: Tensor, value: float) -> Tensor:
    """Flatten the distribution (above 1) or sharpen it (below 1)."""
    return logits / value


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k most probable tokens, and those that tie with the last of them."""
    last = top_values(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return logits.masked_fill(logits < last, -math.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most probable tokens whose probabilities sum to p (https://arxiv.org/abs/1904.09751).

    At least one token is kept. The result equals `top_p_by_sorting`. The whole vocabulary is sorted only if the
    kept tokens may not be among the best few, or if rounding could decide.
    """
    if logits.shape[-1] <= _MAX_UNSORTED:
        return top_p_by_sorting(logits, p)
    best, index = logits.topk(_MAX_UNSORTED)  # (rows, few), the best first
    mass = logits.softmax(-1).gather(-1, index).double()
    rest = 1 - mass.cumsum(-1) + mass  # probability of each of them and everything after it
    kept = (rest > 1 - p).sum(-1, keepdim=True).clamp(min=1)
    last, next_one = best.gather(-1, kept - 1), best.gather(-1, kept.clamp(max=_MAX_UNSORTED - 1))
    # If all of the best few are kept, next_one is last, and more tokens might have to be kept.
    unclear = (last == next_one) | ((rest - (1 - p)).abs() < _ROUNDING_MARGIN).any(-1, keepdim=True)
    filtered = logits.masked_fill(logits < last, -math.inf)
    again = unclear[:, 0].nonzero()[:, 0]
    return filtered.index_copy(0, again, top_p_by_sorting(logits[again], p)) if len(again) else filtered


def top_p_by_sorting(logits: Tensor, p: float) -> Tensor:
    """Reference for `top_p`: sum from the least probable token up, as transformers does."""
    ascending, order = logits.sort(-1)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[..., -1] = False
    return logits.masked_fill(removed.scatter(-1, order, removed), -math.inf)


def min_p(logits: Tensor, share: float) -> Tensor:
    """Keep tokens at least `share` times as probable as the best (https://arxiv.org/abs/2407.01082)."""
    probabilities = logits.softmax(-1)
    best = probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(probabilities < share * best, -math.inf)


def typical_p(logits: Tensor, mass: float) -> Tensor:
    """Keep the tokens whose surprisal is nearest to the entropy, until their probability reaches mass.

    Ties are kept. From https://arxiv.org/abs/2202.00666.
    """
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs * logprobs.exp()).nansum(-1, keepdim=True)
    distance, order = (-logprobs - entropy).abs().sort(-1)
    reached = (logits.gather(-1, order).softmax(-1).cumsum(-1) < mass).sum(-1, keepdim=True)
    farthest = distance.gather(-1, reached.clamp(max=logits.shape[-1] - 1))
    removed = distance > farthest
    removed[..., 0] = False
    return logits.masked_fill(removed.scatter(-1, order, removed), -math.inf)


def _completions(history: list[int], size: int) -> set[int]:
    """Return the tokens that followed earlier occurrences of the last size - 1 tokens."""
    start = history[len(history) - size + 1 :]
    places = range(len(history) - size + 1)
    return {history[i + size - 1] for i in places if history[i : i + size - 1] == start}


def _exclude(logits: Tensor, tokens: Sequence[Collection[int]]) -> Tensor:
    return logits.index_put(_token_indices(logits, tokens), logits.new_tensor(-math.inf))


def _token_indices(logits: Tensor, tokens: Sequence[Collection[int]]) -> tuple[Tensor, Tensor]:
    """Return (row, token) indices of each row's tokens, without ids outside the LM head."""
    vocab = logits.shape[-1]
    known = [[token for token in row if token < vocab] for row in tokens]
    counts = torch.tensor([len(row) for row in known], device=logits.device)
    columns = torch.tensor([token for row in known for token in row], dtype=torch.long)
    return torch.arange(len(known), device=logits.device).repeat_interleave(counts), columns.to(logits.device)
