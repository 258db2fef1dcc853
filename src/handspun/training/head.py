"""The output layer on a chunk of hidden states: cross-entropy, plainly, and with its gradient in one go.

    p = softmax(h W.T + b)    loss = -sum log p[target]    d loss / d logits = p - onehot(target)

Autograd would keep the logits, their log-softmax and its gradient beside each other, and make a gradient of the
head's size for each chunk, only to add it to the one that is there: half a gigabyte for a vocabulary of 151,936.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handspun.models.onednn import product


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """The loss summed over the chunk. hidden: (chunk, hidden size). targets: (chunk,).

    In float32 whatever the type of the body's products: a logit of 20 is rounded to 1/8 in bfloat16.
    """
    return F.cross_entropy(head_logits(head, hidden), targets, reduction="sum")


def head_logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """hidden: (chunk, hidden size). Returns (chunk, vocab), float32.

    Where no gradient is recorded, through oneDNN: MKL lays so large a matrix out anew, in memory that it keeps.
    """
    if type(head) is nn.Linear and not torch.is_grad_enabled():
        return product(hidden.float(), head.weight, head.bias)
    logits: Tensor = head(hidden.float())
    return logits


def head_backward(head: nn.Module, hidden: Tensor, targets: Tensor, divisor: int) -> tuple[float, Tensor]:
    """(`head_loss`, the gradient of loss / `divisor` by hidden). The head's own is added to what it has."""
    if type(head) is nn.Linear:
        return _linear_backward(head, hidden.detach().float(), targets, divisor)
    cut_here = hidden.detach().requires_grad_()
    loss = head_loss(head, cut_here, targets)
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
