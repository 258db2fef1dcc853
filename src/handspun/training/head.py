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
    return F.cross_entropy(head(hidden.float()), targets, reduction="sum")


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
    logits = product(hidden, head.weight, head.bias)  # (chunk, vocab): one array, written over until the end
    targets = targets[:, None]
    at_target, highest = logits.gather(1, targets), logits.amax(1, keepdim=True)
    total = logits.sub_(highest).exp_().sum(1, keepdim=True)
    loss = (total.log() + highest - at_target).sum().item()
    gradient = logits.div_(total * divisor)
    gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, -1 / divisor))
    add_gradients(head, gradient, hidden)
    return loss, product(gradient, head.weight.t())


def add_gradients(layer: nn.Linear, grad: Tensor, x: Tensor) -> None:
    """Adds those of a layer's weight and bias to what they have. grad: (tokens, out), of the output. x: (tokens,
    in)."""
    weight, bias = layer.weight, layer.bias
    if weight.requires_grad:
        weight.grad = grad.t() @ x if weight.grad is None else weight.grad.addmm_(grad.t(), x)
    if bias is not None and bias.requires_grad:
        dense_gradient(bias).add_(grad.sum(0))


def dense_gradient(parameter: Tensor) -> Tensor:
    """The parameter's gradient so far; zeros where there was none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
