"""AdamW, AdamW with low-bit states, the learning rate schedule, and clipping."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from handspun.config import TrainConfig

BLOCK = 256
"""Values per block of 8-bit states; a block shares one exponent."""
_ROWS = 2**9
"""Blocks per update: bounds the memory of states decoded to float32."""
_DROPPED_MANTISSA_BITS = {torch.bfloat16: (16, 16), torch.uint8: (20, 19)}
"""Low bits of a float32 that exp_avg and exp_avg_sq lose."""


class LowBitAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) with states in bfloat16 or 8 bits.

    An 8-bit code is a float32's upper bits minus those of its block's largest value, so coding is a shift.
    """

    # Not torchao's low-bit AdamW: it compiles a kernel per shape (19 s for the first matrix) and needs a C++
    # compiler. Not bitsandbytes': on a CPU it makes whole float32 copies (0.5 GB for a matrix of 33M values, whose
    # float32 states take 0.26 GB), and it brings 125 MB of GPU libraries.

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
        """Create zero states for all parameters.

        Args:
            params: parameter groups, each with its weight_decay.
            lr: learning rate; the loop sets it before each step.
            states: type of the states.
            seed: seed of the stochastic rounding.
            betas: AdamW's betas.
            eps: AdamW's epsilon.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._dtype = torch.bfloat16 if states == "bfloat16" else torch.uint8
        self._seed = seed
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self._zeros(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Update all parameters that have a gradient."""
        # States are rounded stochastically: a step changes the second moment by less than a step of the code,
        # which rounding to nearest would lose. All pieces share the noise: rounding only has to keep each value's
        # mean.
        noise: dict[torch.device, list[Tensor]] = {}
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
    """Return (codes, uint8, (rows, block); the upper bits that code 0 stands for, int16, (rows, 1)).

    Args:
        values: (rows, block), float32; overwritten.
        noise: random integers as wide as the dropped bits, for stochastic rounding.
        signed: whether values may be negative.
    """
    bits = values.view(torch.int32)
    sign = (bits >> 24).bitwise_and_(128) if signed else None
    dropped, codes = (20, 128) if signed else (19, 256)
    upper = bits.bitwise_and_(2**31 - 1).add_(noise).bitwise_right_shift_(dropped)
    # Seven or eight bits reach down from the block's largest value: what is below 2**-16 of it becomes code 0.
    lowest = (upper.amax(1, keepdim=True) - (codes - 1)).clamp_(min=0)
    code = upper.sub_(lowest).clamp_(min=0)
    if sign is not None:
        code.bitwise_or_(sign)
    return code.to(torch.uint8), lowest.to(torch.int16)


def decode(codes: Tensor, lowest: Tensor, *, signed: bool) -> Tensor:
    """Return the float32 values, (rows, block), of codes. Signed code 0 is zero."""
    code = codes.to(torch.int32)
    # Unsigned code 0 is the block's lowest value, not zero: a denominator must not be too small.
    if not signed:
        return code.add_(lowest).bitwise_left_shift_(19).view(torch.float32)
    magnitude = code & 127
    bits = (magnitude + lowest).mul_(magnitude.clamp_(max=1)).bitwise_left_shift_(20)
    return bits.bitwise_or_(code.bitwise_and_(128).bitwise_left_shift_(24)).view(torch.float32)


def lr_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of optimizer step `step` (0 to total_steps - 1)."""
    peak = config.peak_learning_rate
    warmup_steps = math.ceil(total_steps * config.warmup_ratio)
    # The first step is above zero, and the last one of the warm-up has the peak: no step is wasted.
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if config.lr_schedule == "constant":
        return peak
    # It would reach zero one step after the last.
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    if config.lr_schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) over the trainable weights."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Weight decay applies to matrices only, not to biases and norms, as in GPT-2's training and its successors.
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    lr = config.peak_learning_rate
    if config.optimizer_states != "float32":
        return LowBitAdamW(groups, lr=lr, states=config.optimizer_states, seed=config.seed)
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    # The initial states of AdamW, created now: created in the first step, they would lie between its gradients and
    # fragment the heap.
    for parameter in trainable:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """Return the norm of all gradients together."""
    if not gradients or gradients[0].device.type != "cpu":
        return get_total_norm(gradients)
    # On a CPU, PyTorch adds all squares one by one: 1.7e-3 off for an embedding of 49,152 x 576. Norms of rows
    # first are 1e-6 off, in half the time.
    norm: Callable[..., Tensor] = torch.linalg.vector_norm
    return norm(torch.stack([norm(norm(g, dim=-1)) if g.ndim > 1 else norm(g) for g in gradients]))


def clip_gradients(model: torch.nn.Module, max_norm: float) -> float:
    """Scale the gradients down to a total norm of `max_norm`. Return the norm before; works for sharded models."""
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = _total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # reduce the norms of the ranks' shards
    clip_grads_with_norm_(trained, max_norm, norm)
    return norm.item()
