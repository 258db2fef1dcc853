"""Padded execution: a micro-batch of examples to its loss, in the plainest way there is. The reference."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from handspun.data.batches import IGNORED, collate, micro_batches
from handspun.data.examples import Example
from handspun.models.attention import without_cudnn
from handspun.training.loss import cross_entropy_sum

Run = Callable[..., Any]
"""Makes a computation on a model: `run(compute, *arguments)` is `compute(*arguments)`. Sharded, it is a module."""


def directly(compute: Callable[..., Any], *arguments: Any) -> Any:
    """The computation, when the model is whole."""
    return compute(*arguments)


@dataclass(frozen=True)
class Padded:
    """Padded execution of a model."""

    model: PreTrainedModel
    dtype: torch.dtype
    pad_token_id: int
    run: Run = directly

    def cut(self, batch: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
        """The batch in micro-batches, padding included."""
        return micro_batches(batch, max_tokens)

    def computed_tokens(self, part: Sequence[Example]) -> int:
        """Tokens that go through the model, padding included."""
        return padded_tokens(part)

    def loss(self, part: Sequence[Example]) -> float:
        """The loss summed over the part's learned tokens, without a gradient, by products in float32."""
        with torch.no_grad():
            return float(self.run(self._loss, part, torch.float32))

    def row_losses(self, part: Sequence[Example]) -> list[float]:
        """The terms of `loss`: each example's, summed over its learned tokens."""
        with torch.no_grad():
            losses: list[float] = self.run(self._row_losses, part)
        return losses

    def backward(self, part: Sequence[Example], divisor: int) -> float:
        """Adds the gradient of the part's loss sum / `divisor`; returns the sum."""
        loss: torch.Tensor = self.run(self._loss, part, self.dtype)
        (loss / divisor).backward()
        return loss.item()

    def _loss(self, part: Sequence[Example], dtype: torch.dtype) -> torch.Tensor:
        return padded_loss(self.model, part, pad_token_id=self.pad_token_id, dtype=dtype)[0]

    def _row_losses(self, part: Sequence[Example]) -> list[float]:
        logits, targets = _logits(self.model, part, self.pad_token_id, torch.float32)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        rows: list[float] = losses.view(targets.shape).double().sum(dim=1).tolist()
        return rows


def padded_tokens(part: Sequence[Example]) -> int:
    """Tokens of the part once it is padded."""
    return len(part) * max(len(example) for example in part)


def padded_loss(
    model: PreTrainedModel, examples: Sequence[Example], *, pad_token_id: int, dtype: torch.dtype
) -> tuple[torch.Tensor, int]:
    """(loss summed over the learned tokens, their number) of the examples, padded on the right.

    dtype: of the matrix products; weights and loss stay float32.
    """
    return cross_entropy_sum(*_logits(model, examples, pad_token_id, dtype))


def _logits(
    model: PreTrainedModel, examples: Sequence[Example], pad_token_id: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, targets): (batch, positions, vocab) and (batch, positions), where some row learns."""
    batch = {
        name: tensor.to(model.device) for name, tensor in collate(examples, pad_token_id=pad_token_id).items()
    }
    # The logits at a position predict the next token: logits[:, :-1] go against labels[:, 1:]. They are asked
    # for only where some row learns, since the head is a large part of a small model.
    targets = batch.pop("labels")[:, 1:]  # (batch, length - 1)
    positions = (targets != IGNORED).any(dim=0).nonzero().flatten()
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(model.device.type, dtype)
    with autocast, without_cudnn():
        logits = model(**batch, use_cache=False, logits_to_keep=positions).logits
    return logits, targets[:, positions]
