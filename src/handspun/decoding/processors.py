"""Filters of next-token logits: pure functions of (rows, vocab) that give (rows, vocab).

Semantics and order are transformers' (`generation/logits_process.py`, `_get_logits_processor`), but for
padding: here an explicit mask says what it is, and it takes part in nothing.
"""

import math

import torch
from torch import Tensor

from handspun.decoding.options import ResolvedOptions


def process(
    logits: Tensor, *, input_ids: Tensor, attention_mask: Tensor, generated: int, options: ResolvedOptions
) -> Tensor:
    """All processors that the options ask for, in transformers' order.

    input_ids, attention_mask: (rows, length), prompt and output so far; generated: how much of it is output.
    """
    if options.repetition_penalty != 1.0:
        logits = repetition_penalty(logits, input_ids, attention_mask, options.repetition_penalty)
    if options.no_repeat_ngram_size > 0:
        logits = no_repeat_ngram(logits, input_ids, attention_mask, options.no_repeat_ngram_size)
    if generated < options.min_new_tokens:
        logits = without_eos(logits, options.eos_token_ids)
    return warp(logits, options) if options.do_sample else logits


def warp(logits: Tensor, options: ResolvedOptions) -> Tensor:
    """The filters that only sampling has."""
    if options.temperature != 1.0:
        logits = temperature(logits, options.temperature)
    if options.top_k > 0:
        logits = top_k(logits, options.top_k)
    if options.top_p < 1.0:
        logits = top_p(logits, options.top_p)
    if options.min_p > 0.0:
        logits = min_p(logits, options.min_p)
    return logits


def repetition_penalty(logits: Tensor, input_ids: Tensor, attention_mask: Tensor, penalty: float) -> Tensor:
    """Divides the logits of tokens seen in prompt and output by the penalty, or multiplies negative ones
    (CTRL, https://arxiv.org/abs/1909.05858)."""
    seen = _mark(logits, input_ids, attention_mask.bool())
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def no_repeat_ngram(logits: Tensor, input_ids: Tensor, attention_mask: Tensor, size: int) -> Tensor:
    """Forbids every token that would complete a run of `size` tokens that prompt and output hold already."""
    length = input_ids.shape[-1]
    if length < size:
        return logits
    windows = input_ids.unfold(-1, size, 1)  # (rows, windows, size)
    real = attention_mask.bool().unfold(-1, size, 1).all(-1)
    start = input_ids[:, None, length - size + 1 :]  # (rows, 1, size - 1): what the next token would complete
    repeats = (windows[..., :-1] == start).all(-1) & real
    return logits.masked_fill(_mark(logits, windows[..., -1], repeats), -math.inf)


def without_eos(logits: Tensor, eos_token_ids: tuple[int, ...]) -> Tensor:
    """Forbids the end of the answer."""
    return logits.index_fill(-1, torch.tensor(eos_token_ids, dtype=torch.long, device=logits.device), -math.inf)


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


def _mark(logits: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
    """(rows, vocab): True for each row's tokens at the places where `where` is true. Both: (rows, places)."""
    vocab = logits.shape[-1]
    marked = torch.zeros(logits.shape[0], vocab + 1, dtype=torch.bool, device=logits.device)
    # one spare column takes what is not to be marked, and ids that the head cannot give
    return marked.scatter(-1, torch.where(where, tokens.clamp(max=vocab), vocab), True)[:, :vocab]


__all__ = [
    "min_p",
    "no_repeat_ngram",
    "process",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
    "warp",
    "without_eos",
]
