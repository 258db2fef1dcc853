"""AdamW, AdamW with 8-bit states, the schedule, and clipping."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from handspun.config import TrainConfig

BLOCK = 256
"""Values with an exponent in common."""
_ROWS = 2**9
"""Blocks that are updated together: bounds what exists of the states in float32."""
_DROPPED_MANTISSA_BITS = {torch.bfloat16: (16, 16), torch.uint8: (20, 19)}
"""Lower bits of a float32 that exp_avg and exp_avg_sq lose."""


class LowBitAdamW(torch.optim.Optimizer):
    """What torch.optim.AdamW computes (Loshchilov and Hutter 2017, arXiv:1711.05101), with short states."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        states: Literal["bfloat16", "8bit"],
        seed: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """params: groups, each with its weight_decay. seed: of the rounding."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._dtype = torch.bfloat16 if states == "bfloat16" else torch.uint8
        self._seed = seed
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self._zeros(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One update of all parameters that have a gradient."""
        noise: dict[torch.device, list[Tensor]] = {}  # the same for each piece: it is a value's mean that counts
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                if parameter.device not in noise:
                    noise[parameter.device] = self._noise(parameter.device, state["step"])
                _update(parameter, state, group, noise[parameter.device])

    def _zeros(self, parameter: Tensor) -> dict[str, Any]:
        rows = math.ceil(parameter.numel() / BLOCK)
        state: dict[str, Any] = {"step": 0}
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros(rows, BLOCK, dtype=self._dtype, device=parameter.device)
            if self._dtype == torch.uint8:
                state[f"{name}_lowest"] = torch.zeros(rows, 1, dtype=torch.int16, device=parameter.device)
        return state

    def _noise(self, device: torch.device, step: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(self._seed + step)
        return [
            torch.randint(2**bits, (_ROWS, BLOCK), dtype=torch.int32, device=device, generator=generator)
            for bits in _DROPPED_MANTISSA_BITS[self._dtype]
        ]


def _update(parameter: Tensor, state: dict[str, Any], group: dict[str, Any], noise: list[Tensor]) -> None:
    assert parameter.grad is not None
    (beta1, beta2), lr, step = group["betas"], group["lr"], state["step"]
    values, gradients = parameter.view(-1), parameter.grad.reshape(-1)
    for start in range(0, len(state["exp_avg"]), _ROWS):
        rows = slice(start, start + _ROWS)
        value, gradient = (whole[start * BLOCK : (start + _ROWS) * BLOCK] for whole in (values, gradients))
        read = [_read(state, name, rows) for name in ("exp_avg", "exp_avg_sq")]  # (rows, block)
        exp_avg, exp_avg_sq = (whole.view(-1)[: len(value)] for whole in read)
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        value.mul_(1 - lr * group["weight_decay"])
        denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        value.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
        for name, whole, some in zip(("exp_avg", "exp_avg_sq"), read, noise, strict=True):
            _write(state, name, rows, whole, some)


def _read(state: dict[str, Any], name: str, rows: slice) -> Tensor:
    if state[name].dtype == torch.bfloat16:
        return state[name][rows].float()  # type: ignore[no-any-return]
    return decode(state[name][rows], state[f"{name}_lowest"][rows], signed=name == "exp_avg")


def _write(state: dict[str, Any], name: str, rows: slice, values: Tensor, noise: Tensor) -> None:
    noise = noise[: len(values)]
    if state[name].dtype == torch.bfloat16:
        bits = values.view(torch.int32).add_(noise).bitwise_and_(-(2**16))
        state[name][rows] = bits.view(torch.float32)
        return
    state[name][rows], state[f"{name}_lowest"][rows] = encode(values, noise, signed=name == "exp_avg")


def encode(values: Tensor, noise: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """values: (rows, block), float32, written over; not negative unless `signed`. noise: integers of the bits that
    are dropped, at random. Returns codes, uint8, and the upper bits that code 0 stands for, int16, (rows, 1).

    Values below 2**-16 of the block's largest become code 0.
    """
    bits = values.view(torch.int32)
    sign = (bits >> 24).bitwise_and_(128) if signed else None
    dropped, codes = (20, 128) if signed else (19, 256)
    upper = bits.bitwise_and_(2**31 - 1).add_(noise).bitwise_right_shift_(dropped)
    lowest = (upper.amax(1, keepdim=True) - (codes - 1)).clamp_(min=0)
    code = upper.sub_(lowest).clamp_(min=0)
    if sign is not None:
        code.bitwise_or_(sign)
    return code.to(torch.uint8), lowest.to(torch.int16)


def decode(codes: Tensor, lowest: Tensor, *, signed: bool) -> Tensor:
    """float32, (rows, block), of codes. The unsigned code 0 is the lowest value: a denominator must not be too
    small. The signed one is zero."""
    code = codes.to(torch.int32)
    if not signed:
        return code.add_(lowest).bitwise_left_shift_(19).view(torch.float32)
    magnitude = code & 127
    bits = (magnitude + lowest).mul_(magnitude.clamp_(max=1)).bitwise_left_shift_(20)
    return bits.bitwise_or_(code.bitwise_and_(128).bitwise_left_shift_(24)).view(torch.float32)


def lr_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (0 to total_steps - 1).

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
        return LowBitAdamW(groups, lr=lr, states=config.optimizer_states, seed=config.seed)
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
