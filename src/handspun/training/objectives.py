"""The loss: cross-entropy summed over target tokens, and the LM head's part of it, forward and backward."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from handspun.data.examples import Example
from handspun.kernels.onednn import beats_mkl, matmul, without_cudnn
from handspun.training.batching import IGNORED, Batching, collate


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return (sum over target tokens of -log p(token | prefix), number of target tokens).

    logits: (batch, positions, vocab). targets: (batch, positions), the token that each position predicts, or -100
    to ignore it; the caller shifts them by one. The loss is float64 for a float64 model, else float32.
    """
    learned = targets != IGNORED
    at_least_float32 = torch.promote_types(logits.dtype, torch.float32)
    loss = F.cross_entropy(logits[learned].to(at_least_float32), targets[learned], reduction="sum")
    return loss, int(learned.sum())


CallInForward = Callable[..., Any]
"""Calls `compute(*arguments)`. For a sharded model, the call happens in the forward of FSDP2's root module."""


def call_directly(compute: Callable[..., Any], *arguments: Any) -> Any:
    """Call the computation; for a model that is not sharded."""
    return compute(*arguments)


@dataclass(frozen=True)
class PaddedRunner:
    """The runner that pads the rows of a micro-batch: the reference for the packed one."""

    model: PreTrainedModel
    dtype: torch.dtype
    pad_token_id: int
    run: CallInForward = call_directly

    @property
    def batching(self) -> Batching:
        """How to split a batch for this runner."""
        return Batching("padded")

    def loss(self, micro_batch: Sequence[Example]) -> float:
        """Return the loss summed over the micro-batch's target tokens, without a gradient, in float32."""
        with torch.no_grad():
            return float(self.run(self._loss, micro_batch, torch.float32))

    def row_losses(self, micro_batch: Sequence[Example]) -> list[float]:
        """Return one loss per example, summed over its target tokens; their sum is `loss`."""
        with torch.no_grad():
            losses: list[float] = self.run(self._row_losses, micro_batch)
        return losses

    def backward(self, micro_batch: Sequence[Example], divisor: int) -> float:
        """Accumulate the gradient of loss sum / `divisor`. Return the loss sum."""
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


def padded_loss(
    model: PreTrainedModel, examples: Sequence[Example], *, pad_token_id: int, dtype: torch.dtype
) -> tuple[torch.Tensor, int]:
    """Return (loss summed over target tokens, number of target tokens) of the examples, padded on the right.

    Args:
        model: the model, called with its own attention.
        examples: the rows of one micro-batch.
        pad_token_id: id to pad with; its positions are masked.
        dtype: type of the matmuls; weights and loss stay float32.
    """
    return cross_entropy_sum(*_logits(model, examples, pad_token_id, dtype))


def _logits(
    model: PreTrainedModel, examples: Sequence[Example], pad_token_id: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (logits, targets): (batch, positions, vocab) and (batch, positions), where some row has a target."""
    batch = {
        name: tensor.to(model.device) for name, tensor in collate(examples, pad_token_id=pad_token_id).items()
    }
    # The logits at a position predict the next token: logits[:, :-1] go with labels[:, 1:]. They are computed only
    # where some row has a target, since the head is a large part of a small model.
    targets = batch.pop("labels")[:, 1:]  # (batch, length - 1)
    positions = (targets != IGNORED).any(dim=0).nonzero().flatten()
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(model.device.type, dtype)
    with autocast, without_cudnn():
        logits = model(**batch, use_cache=False, logits_to_keep=positions).logits
    return logits, targets[:, positions]


def linear_cross_entropy(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the loss summed over the chunk. hidden: (chunk, hidden size). targets: (chunk,)."""
    return F.cross_entropy(head_logits(head, hidden), targets, reduction="sum")


def head_logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """Return the logits, (chunk, vocab), float32. hidden: (chunk, hidden size)."""
    if type(head) is nn.Linear and not torch.is_grad_enabled():
        # oneDNN: for so large a matrix, MKL (F.linear) makes another layout, and keeps 134 to 249 MB for it.
        # oneDNN takes 112 ms instead of 154 for 400 rows of SmolLM2, and 282 instead of 411 for 220 of Qwen2.5.
        return matmul(hidden.float(), head.weight, head.bias)
    # Always float32, whatever the type of the body's matmuls: bfloat16 rounds a logit of 20 to a multiple of 1/8.
    logits: Tensor = head(hidden.float())
    return logits


def linear_cross_entropy_backward(
    head: nn.Module, hidden: Tensor, targets: Tensor, divisor: int
) -> tuple[float, Tensor]:
    """Return (loss sum, gradient of loss / `divisor` with respect to hidden). Accumulate the head's gradient.

    Args:
        head: the LM head.
        hidden: (chunk, hidden size).
        targets: (chunk,), token ids.
        divisor: target tokens of the whole batch.
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
    # The logits become their own gradient in place: autograd would allocate a new array of their size, and one of
    # the head's size per chunk (half a gigabyte for Qwen2.5).
    logits = head_logits(head, hidden)
    targets = targets[:, None]
    at_target, highest = logits.gather(1, targets), logits.amax(1, keepdim=True)
    total = logits.sub_(highest).exp_().sum(1, keepdim=True)
    loss = (total.log() + highest - at_target).sum().item()
    gradient = logits.div_(total * divisor)
    gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, -1 / divisor))
    with_onednn = beats_mkl(hidden.device)
    if head.weight.requires_grad:
        sums = dense_gradient(head.weight)
        if with_onednn:  # it has no matmul that adds to what is there
            for channels, some in zip(gradient.split(_CHANNELS, dim=1), sums.split(_CHANNELS), strict=True):
                some.add_(matmul(channels.t().contiguous(), hidden.t()))
        else:
            sums.addmm_(gradient.t(), hidden)
    if head.bias is not None and head.bias.requires_grad:
        dense_gradient(head.bias).add_(gradient.sum(0))
    return loss, matmul(gradient, head.weight.t()) if with_onednn else gradient @ head.weight


_CHANNELS = 4096
"""Of the head, whose gradients are computed at a time: a temporary array of 9 MB for SmolLM2."""


def dense_gradient(parameter: Tensor) -> Tensor:
    """Return the parameter's gradient, created as zeros if there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
