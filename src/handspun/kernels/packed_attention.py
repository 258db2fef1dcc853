"""Attention over the rows of a pack: one autograd function, and its plain form in PyTorch, for any float type.

A pack is a prefix and then sequences, end to end. Each token attends to the prefix and to its own sequence, up to
itself. The native kernel (packed_attention.h) computes the same in float32, tile by tile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class PackedHeads:
    """The inputs of a pack's attention.

    queries: (tokens, heads, size). keys, values: (tokens, kv_heads, size). edges: where the prefix ends (0 if
    there is none), and then where each sequence ends. scaling: factor of the scores.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    edges: Sequence[int]
    scaling: float


class PackKernels(Protocol):
    """What computes a pack's attention: ReferenceKernels or NativeKernels."""

    def attend_pack(self, heads: PackedHeads) -> tuple[Tensor, Tensor]:
        """Attend, forward."""

    def attend_pack_backward(
        self, heads: PackedHeads, output: Tensor, log_sums: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients."""


def packed_attention(kernels: PackKernels, heads: PackedHeads) -> Tensor:
    """Return the attention of a pack, (tokens, heads, size), with a gradient for queries, keys and values."""
    apply: Any = _PackedAttention.apply
    output: Tensor = apply(heads.queries, heads.keys, heads.values, heads.edges, heads.scaling, kernels)
    return output


class _PackedAttention(torch.autograd.Function):
    """Keeps inputs, output, and a number per query and head; the backward pass computes all weights again."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, *fixed: Any) -> Tensor:
        *ctx.layout, ctx.kernels = fixed
        output, log_sums = ctx.kernels.attend_pack(PackedHeads(queries, keys, values, *ctx.layout))
        ctx.save_for_backward(queries, keys, values, output, log_sums)
        return output  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, output, log_sums = ctx.saved_tensors
        heads = PackedHeads(queries, keys, values, *ctx.layout)
        return (*ctx.kernels.attend_pack_backward(heads, output, log_sums, gradient), None, None, None)


def attend_pack(heads: PackedHeads) -> tuple[Tensor, Tensor]:
    """Return the output, (tokens, heads, size), and the log of the sum of each row's weights, (tokens, heads)."""
    output, log_sums = torch.empty_like(heads.queries), heads.queries.new_empty(heads.queries.shape[:2])
    for rows, seen in _spans(heads):
        scores = _scores(heads, rows, seen)
        sums = scores.logsumexp(-1, keepdim=True)
        attended = torch.einsum("hgqk,khd->qhgd", (scores - sums).exp(), heads.values[seen])
        output[rows] = attended.flatten(1, 2)
        log_sums[rows] = sums[..., 0].permute(2, 0, 1).flatten(1)
    return output, log_sums


def attend_pack_backward(
    heads: PackedHeads, output: Tensor, log_sums: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values.

    Args:
        heads: the inputs of `attend_pack`.
        output: what it returned.
        log_sums: the other thing that it returned.
        gradient: the gradient of the output.
    """
    queries, keys, values = (torch.zeros_like(x) for x in (heads.queries, heads.keys, heads.values))
    # Of each output row and its gradient: what the softmax takes from the gradient of each of its weights.
    products = (output * gradient).sum(-1)
    by_key_head = (heads.keys.shape[1], -1)
    for rows, seen in _spans(heads):
        sums, taken = (x[rows].unflatten(1, by_key_head).permute(1, 2, 0)[..., None] for x in (log_sums, products))
        weights = (_scores(heads, rows, seen) - sums).exp()  # (kv_heads, group, queries, keys)
        of_output = gradient[rows].unflatten(1, by_key_head)
        values.index_add_(0, seen, torch.einsum("hgqk,qhgd->khd", weights, of_output))
        of_weights = torch.einsum("qhgd,khd->hgqk", of_output, heads.values[seen])
        of_scores = weights * (of_weights - taken) * heads.scaling
        some = heads.queries[rows].unflatten(1, by_key_head)
        keys.index_add_(0, seen, torch.einsum("hgqk,qhgd->khd", of_scores, some))
        queries[rows] = torch.einsum("hgqk,khd->qhgd", of_scores, heads.keys[seen]).flatten(1, 2)
    return queries, keys, values


def _spans(heads: PackedHeads) -> Iterator[tuple[slice, Tensor]]:
    """Yield the tokens of the prefix and of each sequence, and the tokens whose keys they see."""
    device, prefix = heads.keys.device, torch.arange(heads.edges[0], device=heads.keys.device)
    if len(prefix):
        yield slice(0, len(prefix)), prefix
    for start, stop in zip(heads.edges, heads.edges[1:], strict=False):
        yield slice(start, stop), torch.cat([prefix, torch.arange(start, stop, device=device)])


def _scores(heads: PackedHeads, rows: slice, seen: Tensor) -> Tensor:
    """Return the scores of some queries, (kv_heads, group, queries, keys): -inf where a key is not seen."""
    queries = heads.queries[rows].unflatten(1, (heads.keys.shape[1], -1))
    scores = torch.einsum("qhgd,khd->hgqk", queries, heads.keys[seen]) * heads.scaling
    tokens = torch.arange(rows.start, rows.stop, device=seen.device)
    return scores.masked_fill(seen > tokens[:, None], -torch.inf)
