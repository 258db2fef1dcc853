"""Attention of packed rows, through transformers' AttentionInterface: each sequence to the prefix and to itself.

On a CPU once for the prefix and once for each sequence, so that nothing is computed that a mask would hide. On a
GPU, where each of these calls costs more than its work, in one call with a mask, as long as that is not large.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from handspun.models.attention import without_cudnn
from handspun.training.pack import Pack

_ATTENTION = "handspun_packed"
AT_ONCE = 8192
"""On a GPU, packs of up to so many tokens get one mask of their square."""


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model with packed attention, through transformers' AttentionInterface, and afterwards as it was."""
    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)  # transformers makes no square mask
    with attention_of(model, _ATTENTION):
        yield


@contextmanager
def attention_of(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The model with another of transformers' attentions, and afterwards with the one that it had."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True)
class Masks:
    """What the sequences of a pack attend to, made once for all layers.

    whole: for all at once, (tokens, tokens), 0 where a position attends and -inf elsewhere; without it, each: for
    each sequence, (rest, prefix + rest), true where a position attends; None where that is plainly causal.
    """

    each: list[Tensor | None]
    whole: Tensor | None


def masks_of(packing: Pack, dtype: torch.dtype) -> Masks:
    """The masks of a pack. dtype: of the products."""
    tokens, device = packing.input_ids.shape[1], packing.input_ids.device
    if device.type == "cuda" and tokens <= AT_ONCE:
        return Masks([], whole_mask(packing, dtype))
    return Masks([_mask(end - start, packing.prefix, device) for start, end in packing.bounds], None)


def _mask(length: int, prefix: int, device: torch.device) -> Tensor | None:
    """(length, prefix + length): all of the prefix, and itself up to each position."""
    if not prefix:
        return None
    return torch.ones(length, prefix + length, dtype=torch.bool, device=device).tril(prefix)


def whole_mask(packing: Pack, dtype: torch.dtype) -> Tensor:
    """(tokens, tokens): the prefix is sequence 0, which all others see."""
    lengths = [packing.prefix, *(end - start for start, end in packing.bounds)]
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    sequence = sequence.to(packing.input_ids.device)
    attends = (sequence == 0) | (sequence[:, None] == sequence)
    return torch.zeros_like(attends, dtype=dtype).masked_fill_(~attends.tril(), -torch.inf)


def _attend(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    packing: Pack,
    masks: Masks,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """query: (1, heads, tokens, size); the result is (1, tokens, heads, size), as transformers wants it."""
    if masks.whole is not None:
        output = _attend_at_once(query, key, value, masks.whole, scaling, dropout)
    else:
        output = _attend_each(query, key, value, packing, masks.each, scaling, dropout)
    return output.transpose(1, 2), None


def _attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, dropout: float
) -> Tensor:
    """With a key and a value for each head: no kernel takes both a mask and fewer of them."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    with without_cudnn():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, dropout_p=dropout)


def _attend_each(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Pack,
    masks: list[Tensor | None],
    scaling: float | None,
    dropout: float,
) -> Tensor:
    end = packing.prefix
    prefix_key, prefix_value = key[:, :, :end], value[:, :, :end]
    outputs = []
    if end:
        outputs.append(_sdpa(query[:, :, :end], prefix_key, prefix_value, None, scaling, dropout))
    for (start, stop), mask in zip(packing.bounds, masks, strict=True):
        own_key, own_value = key[:, :, start:stop], value[:, :, start:stop]
        if end:
            own_key = torch.cat([prefix_key, own_key], dim=2)
            own_value = torch.cat([prefix_value, own_value], dim=2)
        outputs.append(_sdpa(query[:, :, start:stop], own_key, own_value, mask, scaling, dropout))
    return torch.cat(outputs, dim=2)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float
) -> Tensor:
    if query.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return _attention_of(query, key, value, mask, scaling, dropout)
    # On a CPU, attention in bfloat16 is slower than in float32, backward three times.
    with torch.autocast("cpu", enabled=False):
        output = _attention_of(query.float(), key.float(), value.float(), mask, scaling, dropout)
    return output.to(value.dtype)


def _attention_of(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float
) -> Tensor:
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )
