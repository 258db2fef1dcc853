"""Packed execution: the rows of a micro-batch end to end, behind one copy of the prefix that they share.

    padded                      packed
    S S S u u a a . . .         S S S | u u a a | u a | u u u a a a
    S S S u a . . . . .
    S S S u u u a a a .         S: shared prefix (system prompt, template's head)

There is no padding, and the prefix is computed once. Each sequence attends to the prefix and to itself; positions
restart behind the prefix. The head sees only positions that predict a learned token, a chunk at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from handspun.data.examples import Example
from handspun.training.forward import Run, directly
from handspun.training.head import dense_gradient, head_backward, head_loss

_ATTENTION = "handspun_packed"
CHUNK_BYTES = 128 * 2**20
"""Of the logits of one chunk, in float32."""


@dataclass(frozen=True)
class Pack:
    """A micro-batch laid end to end.

    input_ids, position_ids: (1, tokens). prefix: its first tokens, which all sequences share. bounds: where the
    rest of each sequence begins and ends. masks: for each, (rest, prefix + rest), what it attends to; None where
    that is plainly causal. positions, targets: (learned,), where a learned token is predicted, and which.
    """

    input_ids: Tensor
    position_ids: Tensor
    prefix: int
    bounds: list[tuple[int, int]]
    masks: list[Tensor | None]
    positions: Tensor
    targets: Tensor


def pack(examples: Sequence[Example], *, share_prefix: bool, device: torch.device) -> Pack:
    """Lays examples end to end, behind their common prefix if it is to be shared."""
    prefix = shared_prefix(examples) if share_prefix else 0
    ids, position_ids = examples[0].input_ids[:prefix], list(range(prefix))
    bounds, positions, targets = [], [], []
    for example in examples:
        start = len(ids)
        ids += example.input_ids[prefix:]
        position_ids += range(prefix, len(example))
        bounds.append((start, len(ids)))
        learned = [i for i, is_learned in enumerate(example.learned) if is_learned]
        positions += [start + i - 1 - prefix for i in learned]  # each is predicted by the position before it
        targets += [example.input_ids[i] for i in learned]
    return Pack(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([position_ids], device=device),
        prefix=prefix,
        bounds=bounds,
        masks=[_mask(end - start, prefix, device) for start, end in bounds],
        positions=torch.tensor(positions, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
    )


def shared_prefix(examples: Sequence[Example]) -> int:
    """Length of the longest common prefix that ends before any position that predicts a learned token.

    A position in the prefix exists once, so it could predict only one of the rows' tokens.
    """
    if len(examples) == 1:
        return 0
    first, last = (extreme(example.input_ids for example in examples) for extreme in (min, max))
    common = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return min(common, *(example.learned.index(True) - 1 for example in examples))


def packed_tokens(part: Sequence[Example], *, share_prefix: bool) -> int:
    """Tokens of the part once it is packed."""
    once = shared_prefix(part) if share_prefix else 0
    return sum(len(example) for example in part) - (len(part) - 1) * once


def packed_micro_batches(batch: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
    """The batch in parts of at most `max_tokens` tokens; a longer row is one of its own."""
    part: list[Example] = []
    tokens = 0
    for example in batch:
        if part and tokens + len(example) > max_tokens:
            yield part
            part, tokens = [], 0
        part.append(example)
        tokens += len(example)
    if part:
        yield part


@dataclass(frozen=True)
class Packed:
    """Packed execution of a model whose attention is `packed_attention`'s."""

    model: PreTrainedModel
    dtype: torch.dtype
    share_prefix: bool
    run: Run = directly

    def cut(self, batch: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
        """The batch in micro-batches."""
        return packed_micro_batches(batch, max_tokens)

    def computed_tokens(self, part: Sequence[Example]) -> int:
        """Tokens that go through the model, the shared prefix once."""
        return packed_tokens(part, share_prefix=self.share_prefix)

    def loss(self, part: Sequence[Example]) -> float:
        """The loss summed over the part's learned tokens, without a gradient, by products in float32."""
        with torch.no_grad():
            return float(self.run(self._loss, part))

    def row_losses(self, part: Sequence[Example]) -> list[float]:
        """The terms of `loss`: each example's, summed over its learned tokens."""
        with torch.no_grad():
            losses: list[float] = self.run(self._row_losses, part)
        return losses

    def backward(self, part: Sequence[Example], divisor: int) -> float:
        """Adds the gradient of the part's loss sum / `divisor`; returns the sum.

        In two stages, so that logits exist for one chunk at a time: from each chunk's loss back to the hidden
        states, and then from these through the body.
        """
        total: float
        hidden, gradient, total = self.run(self._through_the_head, part, divisor)
        hidden.backward(gradient)
        return total

    def _loss(self, part: Sequence[Example]) -> float:
        packed = pack(part, share_prefix=self.share_prefix, device=self.model.device)
        hidden = self._hidden_states(packed, torch.float32)
        chunks = _chunks(hidden, packed.targets, self._vocabulary)
        return sum(head_loss(self._head, some, targets).item() for some, targets in chunks)

    def _row_losses(self, part: Sequence[Example]) -> list[float]:
        packed = pack(part, share_prefix=self.share_prefix, device=self.model.device)
        hidden = self._hidden_states(packed, torch.float32)
        chunks = _chunks(hidden, packed.targets, self._vocabulary)
        losses = [F.cross_entropy(self._head(some.float()), targets, reduction="none") for some, targets in chunks]
        rows = torch.cat(losses).double().split([example.learned_tokens for example in part])
        return [row.sum().item() for row in rows]

    def _through_the_head(self, part: Sequence[Example], divisor: int) -> tuple[Tensor, Tensor, float]:
        """(hidden states at learned positions, the gradient there, loss sum): the first stage."""
        packed = pack(part, share_prefix=self.share_prefix, device=self.model.device)
        hidden = self._hidden_states(packed, self.dtype)
        chunks = _chunks(hidden, packed.targets, self._vocabulary)
        done = [head_backward(self._head, some, targets, divisor) for some, targets in chunks]
        gradient = torch.cat([gradient for _, gradient in done]).to(hidden.dtype)
        return hidden, gradient, sum(loss for loss, _ in done)

    def _hidden_states(self, packed: Pack, dtype: torch.dtype) -> Tensor:
        """(learned, hidden size): the body's output at the positions that predict a learned token."""
        body: Any = self._base.get_decoder()
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(self.model.device.type, dtype)
        with autocast:
            output = body(
                inputs_embeds=_embedded(body.get_input_embeddings(), packed.input_ids),
                position_ids=packed.position_ids,
                use_cache=False,
                packing=packed,
            )
        hidden: Tensor = output.last_hidden_state[0, packed.positions]
        return hidden

    @property
    def _head(self) -> nn.Module:
        head: nn.Module = self._base.get_output_embeddings()
        return head

    @property
    def _base(self) -> PreTrainedModel:
        """The model inside a peft wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model  # type: ignore

    @property
    def _vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)


def _embedded(embedding: nn.Module, input_ids: Tensor) -> Tensor:
    """What the embedding gives. Its gradient is sparse, and added in place to the dense one that is there: a row
    for each token, in place of a second table (with tied weights, beside the head's)."""
    if type(embedding) is not nn.Embedding or not embedding.weight.requires_grad or not torch.is_grad_enabled():
        embedded: Tensor = embedding(input_ids)
        return embedded
    dense_gradient(embedding.weight)
    return F.embedding(input_ids, embedding.weight, embedding.padding_idx, sparse=True)


def _chunks(hidden: Tensor, targets: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Where nothing is learned, there is one chunk of nothing: the head then gets a gradient of zeros."""
    size = max(CHUNK_BYTES // (4 * vocabulary), 16)
    for start in range(0, max(len(targets), 1), size):
        yield hidden[start : start + size], targets[start : start + size]


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model with packed attention, through transformers' AttentionInterface, and afterwards as it was."""
    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)  # no square mask is ever made
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


def _attend(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    packing: Pack,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention once for the prefix and once for each sequence. query: (1, heads, tokens, size); the result is
    (1, tokens, heads, size), as transformers wants it."""
    end = packing.prefix
    prefix_key, prefix_value = key[:, :, :end], value[:, :, :end]
    outputs = []
    if end:
        outputs.append(_sdpa(query[:, :, :end], prefix_key, prefix_value, None, scaling, dropout))
    for (start, stop), mask in zip(packing.bounds, packing.masks, strict=True):
        own_key, own_value = key[:, :, start:stop], value[:, :, start:stop]
        if end:
            own_key = torch.cat([prefix_key, own_key], dim=2)
            own_value = torch.cat([prefix_value, own_value], dim=2)
        outputs.append(_sdpa(query[:, :, start:stop], own_key, own_value, mask, scaling, dropout))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


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


def _mask(length: int, prefix: int, device: torch.device) -> Tensor | None:
    """(length, prefix + length): all of the prefix, and itself up to each position."""
    if not prefix:
        return None
    return torch.ones(length, prefix + length, dtype=torch.bool, device=device).tril(prefix)
