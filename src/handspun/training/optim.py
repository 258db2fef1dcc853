"""The optimiser, and the learning rate as a function of the step."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from handspun.config import TrainConfig
from handspun.training.short_states import ShortStatesAdamW


def lr_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of optimiser step `step` (0 to total_steps - 1).

    Warm-up rises linearly and reaches the peak at its last step; the schedule then falls and would reach zero
    one step after the last, so that no step is wasted on a rate of zero.
    """
    peak = config.peak_learning_rate
    warmup_steps = math.ceil(total_steps * config.warmup_ratio)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if config.lr_schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    if config.lr_schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) over what is trainable, with weight decay on
    matrices only: biases and norms are kept out of it, as GPT-2's training and its successors do.

    Its states are made here, before anything that is freed again: made in the first step, they would lie between
    its gradients, and leave holes of odd sizes."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    lr = config.peak_learning_rate
    if config.optimizer_states != "float32":
        return ShortStatesAdamW(groups, lr=lr, states=config.optimizer_states, seed=config.seed)
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    for parameter in trainable:
        optimizer.state[parameter] = {  # as AdamW begins them
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """Of all gradients together. On a CPU a matrix's rows come first: PyTorch adds the squares of all its
    values up one by one, and is off by a thousandth for an embedding of 28M."""
    if not gradients or gradients[0].device.type != "cpu":
        return get_total_norm(gradients)
    norm: Callable[..., Tensor] = torch.linalg.vector_norm
    return norm(torch.stack([norm(norm(g, dim=-1)) if g.ndim > 1 else norm(g) for g in gradients]))


def clip_gradients(model: torch.nn.Module, max_norm: float) -> float:
    """Scales the gradients down to `max_norm` together; returns their norm before. Sharded ones too."""
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = _total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # that of a rank's own share until then
    clip_grads_with_norm_(trained, max_norm, norm)
    return norm.item()
