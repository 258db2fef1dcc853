"""Attention of many rows in one call, for a GPU: there, a call for each row costs more than its work.

The keys of all rows are copied side by side, as far as the longest row goes. A CPU, on which that would be most of
the work, attends row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from handspun.models.attention import without_cudnn

_STEP = 64
"""The longest row is rounded up to a multiple of this: kernels want aligned masks."""


@dataclass(frozen=True)
class Seen:
    """What one token sees: the first `length` tokens of the row that begins at `start` in the pool, or those of
    them where the mask, (length,), is true."""

    start: int
    length: int
    mask: Tensor | None


@dataclass(frozen=True)
class Gathered:
    """What several tokens see, for all layers.

    places: (tokens, longest), in the pool. mask: (tokens, 1, 1, longest), 0 where a token sees and -inf elsewhere.
    """

    places: Tensor
    mask: Tensor


def gather(tokens: Sequence[Seen], pool: Tensor) -> Gathered:
    """pool: (2 * kv_heads, places, size), of any layer."""
    longest = max(token.length for token in tokens)
    longest += -longest % _STEP
    reach = torch.arange(longest, device=pool.device)
    numbers = torch.tensor([[token.start, token.length] for token in tokens], device=pool.device)
    starts, lengths = numbers.split(1, dim=1)
    sees = reach < lengths
    places = torch.where(sees, starts + reach, starts)  # behind the row may lie NaN, and 0 * NaN is NaN
    for row, token in zip(sees, tokens, strict=True):
        if token.mask is not None:
            row[: token.length] = token.mask
    mask = torch.zeros_like(sees, dtype=pool.dtype).masked_fill_(~sees, -torch.inf)
    return Gathered(places, mask[:, None, None])


def attend(queries: Tensor, pool: Tensor, gathered: Gathered) -> Tensor:
    """One layer's queries, (tokens, heads, size), to (tokens, heads * size), float32."""
    count, heads, size = queries.shape
    kv_heads = len(pool) // 2
    both = pool.index_select(1, gathered.places.flatten()).view(2, kv_heads, count, -1, size).transpose(1, 2)
    grouped = queries.to(pool.dtype).view(count, kv_heads, heads // kv_heads, size)
    with without_cudnn():  # the queries that share a head of keys are rows of one product
        output = F.scaled_dot_product_attention(grouped, both[0], both[1], attn_mask=gathered.mask)
    return output.reshape(count, heads * size).float()


__all__ = ["Gathered", "Seen", "attend", "gather"]
