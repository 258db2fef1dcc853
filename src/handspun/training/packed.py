"""Packed execution: rows end to end (`pack.py`), each attending to itself (`packed_attention.py`).

The head sees only positions that predict a learned token, a chunk at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from handspun.data.examples import Example
from handspun.training.forward import Run, directly
from handspun.training.head import dense_gradient, head_backward, head_logits, head_loss
from handspun.training.pack import Pack, multiple_of_tokens, pack, packed_micro_batches, packed_tokens
from handspun.training.packed_attention import masks_of

CHUNK_BYTES = 128 * 2**20
"""Of the logits of one chunk, in float32."""


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
        """Tokens that go through the model: the shared prefix once, and what a pack is filled up with."""
        multiple = multiple_of_tokens(self.model.device)
        return packed_tokens(part, share_prefix=self.share_prefix, multiple=multiple)

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
        packed = self._pack(part)
        hidden = self._hidden_states(packed, torch.float32)
        chunks = _chunks(hidden, packed.targets, self._vocabulary)
        return sum(head_loss(self._head, some, targets).item() for some, targets in chunks)

    def _row_losses(self, part: Sequence[Example]) -> list[float]:
        packed = self._pack(part)
        hidden = self._hidden_states(packed, torch.float32)
        chunks = _chunks(hidden, packed.targets, self._vocabulary)
        losses = [
            F.cross_entropy(head_logits(self._head, some), targets, reduction="none") for some, targets in chunks
        ]
        rows = torch.cat(losses).double().split([example.learned_tokens for example in part])
        return [row.sum().item() for row in rows]

    def _through_the_head(self, part: Sequence[Example], divisor: int) -> tuple[Tensor, Tensor, float]:
        """(hidden states at learned positions, the gradient there, loss sum): the first stage."""
        packed = self._pack(part)
        hidden = self._hidden_states(packed, self.dtype)
        chunks = _chunks(hidden, packed.targets, self._vocabulary)
        with short_head(self.dtype, self.model.device):
            done = [head_backward(self._head, some, targets, divisor) for some, targets in chunks]
        gradient = torch.cat([gradient for _, gradient in done]).to(hidden.dtype)
        return hidden, gradient, sum(loss for loss, _ in done)

    def _pack(self, part: Sequence[Example]) -> Pack:
        device = self.model.device
        return pack(part, share_prefix=self.share_prefix, device=device, multiple=multiple_of_tokens(device))

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
                masks=masks_of(packed, dtype),
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


@contextmanager
def short_head(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """On a GPU whose body computes in bfloat16, the head's products in TF32: mantissas of 10 bits, sums in
    float32. In float32 they would take longer than the body."""
    before = torch.get_float32_matmul_precision()
    if dtype != torch.float32 and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
