"""The loss: cross-entropy summed over target tokens, and the head's, in chunks, forward and backward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from handspun.data.examples import Example
from handspun.kernels.onednn import matmul, without_cudnn
from handspun.training.batching import IGNORED, collate, micro_batches


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(sum over learned tokens of -log p(token | what is before it), their number).

    logits: (batch, positions, vocab); targets: (batch, positions), the token that each position predicts, -100
    where nothing is learned. The shift by one is the caller's. The loss of a model in float64 is in float64, any
    other in float32.
    """
    learned = targets != IGNORED
    at_least_float32 = torch.promote_types(logits.dtype, torch.float32)
    loss = F.cross_entropy(logits[learned].to(at_least_float32), targets[learned], reduction="sum")
    return loss, int(learned.sum())


CallInForward = Callable[..., Any]
"""Makes a computation on a model: `run(compute, *arguments)` is `compute(*arguments)`. Sharded, it is a module."""


def call_directly(compute: Callable[..., Any], *arguments: Any) -> Any:
    """The computation, when the model is whole."""
    return compute(*arguments)


@dataclass(frozen=True)
class PaddedRunner:
    """Padded runner of a model."""

    model: PreTrainedModel
    dtype: torch.dtype
    pad_token_id: int
    run: CallInForward = call_directly

    def cut(self, batch: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
        """The batch in micro-batches, padding included."""
        return micro_batches(batch, max_tokens)

    def computed_tokens(self, micro_batch: Sequence[Example]) -> int:
        """Tokens that go through the model, padding included."""
        return padded_tokens(micro_batch)

    def loss(self, micro_batch: Sequence[Example]) -> float:
        """The loss summed over the micro-batch's learned tokens, without a gradient, by matmuls in float32."""
        with torch.no_grad():
            return float(self.run(self._loss, micro_batch, torch.float32))

    def row_losses(self, micro_batch: Sequence[Example]) -> list[float]:
        """The terms of `loss`: each example's, summed over its learned tokens."""
        with torch.no_grad():
            losses: list[float] = self.run(self._row_losses, micro_batch)
        return losses

    def backward(self, micro_batch: Sequence[Example], divisor: int) -> float:
        """Adds the gradient of the micro-batch's loss sum / `divisor`; returns the sum."""
        loss: torch.Tensor = self.run(self._loss, micro_batch, self.dtype)
        (loss / divisor).backward()
        return loss.item()

    def _loss(self, micro_batch: Sequence[Example], dtype: torch.dtype) -> torch.Tensor:
        return padded_loss(self.model, micro_batch, pad_token_id=self.pad_token_id, dtype=dtype)[0]

    def _row_losses(self, micro_batch: Sequence[Example]) -> list[float]:
        logits, targets = _logits(self.model, micro_batch, self.pad_token_id, torch.float32)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        rows: list[float] = losses.view(targets.shape).double().sum(dim=1).tolist()
        return rows


def padded_tokens(micro_batch: Sequence[Example]) -> int:
    """Tokens of the micro-batch once it is padded."""
    return len(micro_batch) * max(len(example) for example in micro_batch)


def padded_loss(
    model: PreTrainedModel, examples: Sequence[Example], *, pad_token_id: int, dtype: torch.dtype
) -> tuple[torch.Tensor, int]:
    """(loss summed over the learned tokens, their number) of the examples, padded on the right.

    dtype: of the matrix matmuls; weights and loss stay float32.
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


def linear_cross_entropy(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """The loss summed over the chunk. hidden: (chunk, hidden size). targets: (chunk,).

    In float32 whatever the type of the body's matmuls: a logit of 20 is rounded to 1/8 in bfloat16.
    """
    return F.cross_entropy(head_logits(head, hidden), targets, reduction="sum")


def head_logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """hidden: (chunk, hidden size). Returns (chunk, vocab), float32.

    Where no gradient is recorded, through oneDNN: MKL lays so large a matrix out anew, in memory that it keeps.
    """
    if type(head) is nn.Linear and not torch.is_grad_enabled():
        return matmul(hidden.float(), head.weight, head.bias)
    logits: Tensor = head(hidden.float())
    return logits


def linear_cross_entropy_backward(
    head: nn.Module, hidden: Tensor, targets: Tensor, divisor: int
) -> tuple[float, Tensor]:
    """Return (`linear_cross_entropy`, the gradient of loss / `divisor` with respect to hidden).

    The head's own gradient is added to its `grad`.
    """
    if type(head) is nn.Linear:
        return _linear_backward(head, hidden.detach().float(), targets, divisor)
    cut_here = hidden.detach().requires_grad_()
    loss = linear_cross_entropy(head, cut_here, targets)
    (loss / divisor).backward()
    assert cut_here.grad is not None
    return loss.item(), cut_here.grad


@torch.no_grad()
def _linear_backward(head: nn.Linear, hidden: Tensor, targets: Tensor, divisor: int) -> tuple[float, Tensor]:
    logits = head_logits(head, hidden)  # one array, written over until the end
    targets = targets[:, None]
    at_target, highest = logits.gather(1, targets), logits.amax(1, keepdim=True)
    total = logits.sub_(highest).exp_().sum(1, keepdim=True)
    loss = (total.log() + highest - at_target).sum().item()
    gradient = logits.div_(total * divisor)
    gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, -1 / divisor))
    if head.weight.requires_grad:
        dense_gradient(head.weight).addmm_(gradient.t(), hidden)
    if head.bias is not None and head.bias.requires_grad:
        dense_gradient(head.bias).add_(gradient.sum(0))
    return loss, gradient @ head.weight


def dense_gradient(parameter: Tensor) -> Tensor:
    """The parameter's gradient so far; zeros where there was none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
