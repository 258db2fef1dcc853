"""Filters of next-token logits: pure functions of (rows, vocab) that give (rows, vocab).

Semantics are transformers' (`generation/logits_process.py`). Where the past counts, each row has a list of token
ids of its own length.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

Bias = tuple[tuple[int, ...], float]
"""A run of token ids, and what its last token's logit gets added where the others come before it."""

_FEW = 1024
"""Tokens that top_p looks at before it sorts them all."""
_ROUNDING = 1e-5
"""More than two ways of adding up the probabilities of a vocabulary can differ by in float32."""


def repetition_penalty(logits: Tensor, seen: Sequence[Iterable[int]], penalty: float) -> Tensor:
    """Divides the logits of each row's seen tokens by the penalty, or multiplies negative ones
    (CTRL, https://arxiv.org/abs/1909.05858)."""
    places = _places(logits, [set(tokens) for tokens in seen])
    values = logits[places]
    return logits.index_put(places, torch.where(values < 0, values * penalty, values / penalty))


def presence_penalty(logits: Tensor, generated: Sequence[Iterable[int]], penalty: float) -> Tensor:
    """Takes the penalty off the logits of tokens that each row has generated (OpenAI's API, vLLM)."""
    places = _places(logits, [set(tokens) for tokens in generated])
    return logits.index_put(places, logits[places] - penalty)


def frequency_penalty(logits: Tensor, generated: Sequence[Iterable[int]], penalty: float) -> Tensor:
    """Takes the penalty off a token's logit once for every time that its row has generated it (OpenAI's API,
    vLLM)."""
    counts = [Counter(tokens) for tokens in generated]
    places = _places(logits, counts)
    times = [n for row in counts for token, n in row.items() if token < logits.shape[-1]]
    return logits.index_put(places, logits[places] - penalty * logits.new_tensor(times))


def sequence_bias(logits: Tensor, histories: Sequence[list[int]], biases: Iterable[Bias]) -> Tensor:
    """Adds a bias to the last token of a sequence where a row's history ends with the tokens before it; for a
    sequence of one token, always. The biases of sequences that end alike add up."""
    added: list[dict[int, float]] = []
    for history in histories:
        row: dict[int, float] = {}
        for (*before, last), bias in biases:
            if not before or history[-len(before) :] == before:
                row[last] = row.get(last, 0.0) + bias
        added.append(row)
    places = _places(logits, added)
    values = [bias for row in added for token, bias in row.items() if token < logits.shape[-1]]
    return logits.index_put(places, logits[places] + logits.new_tensor(values))


def no_repeat_ngram(logits: Tensor, histories: Sequence[list[int]], size: int) -> Tensor:
    """Forbids every token that would complete a run of `size` tokens that its row's history holds already."""
    return _forbidden(logits, [_completions(history, size) for history in histories])


def mask_tokens(logits: Tensor, token_ids: Collection[int], where: Sequence[bool]) -> Tensor:
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
    (https://arxiv.org/abs/1904.09751).

    Gives what `top_p_by_sorting` gives, without sorting the whole vocabulary where the tokens that can be kept are
    among the best few and rounding cannot matter.
    """
    if logits.shape[-1] <= _FEW:
        return top_p_by_sorting(logits, p)
    best, index = logits.topk(_FEW)  # (rows, few), the best first
    mass = logits.softmax(-1).gather(-1, index).double()
    rest = 1 - mass.cumsum(-1) + mass  # what each of them and all behind it have
    kept = (rest > 1 - p).sum(-1, keepdim=True).clamp(min=1)
    last, next_one = best.gather(-1, kept - 1), best.gather(-1, kept.clamp(max=_FEW - 1))
    # Where all of the few are kept, the next one is the last: more might have to be.
    unclear = (last == next_one) | ((rest - (1 - p)).abs() < _ROUNDING).any(-1, keepdim=True)
    filtered = logits.masked_fill(logits < last, -math.inf)
    again = unclear[:, 0].nonzero()[:, 0]
    return filtered.index_copy(0, again, top_p_by_sorting(logits[again], p)) if len(again) else filtered


def top_p_by_sorting(logits: Tensor, p: float) -> Tensor:
    """`top_p` in its plain form, summed from the least probable on, as transformers does it."""
    ascending, order = logits.sort(-1)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[..., -1] = False
    return logits.masked_fill(removed.scatter(-1, order, removed), -math.inf)


def min_p(logits: Tensor, share: float) -> Tensor:
    """Keeps tokens at least this share as probable as the best (https://arxiv.org/abs/2407.01082)."""
    probabilities = logits.softmax(-1)
    best = probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(probabilities < share * best, -math.inf)


def typical_p(logits: Tensor, mass: float) -> Tensor:
    """Keeps the tokens whose surprise is nearest the entropy, until their probability reaches mass, ties kept
    (https://arxiv.org/abs/2202.00666)."""
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs * logprobs.exp()).nansum(-1, keepdim=True)
    distance, order = (-logprobs - entropy).abs().sort(-1)
    reached = (logits.gather(-1, order).softmax(-1).cumsum(-1) < mass).sum(-1, keepdim=True)
    farthest = distance.gather(-1, reached.clamp(max=logits.shape[-1] - 1))
    removed = distance > farthest
    removed[..., 0] = False
    return logits.masked_fill(removed.scatter(-1, order, removed), -math.inf)


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
    known = [[token for token in several if token < vocab] for several in tokens]
    counts = torch.tensor([len(several) for several in known], device=logits.device)
    columns = torch.tensor([token for several in known for token in several], dtype=torch.long)
    return torch.arange(len(known), device=logits.device).repeat_interleave(counts), columns.to(logits.device)
