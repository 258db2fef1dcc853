"""What a decoder layer does between its matmuls, for training: norms, rotations, and gates, with their gradients.

Each is an autograd function, and its plain form in PyTorch, for any float type. The native kernels
(between_matmuls.h) compute the same in one pass over the rows, in float32. They read and write bfloat16 where the
matmuls are in bfloat16, and round once. transformers' layers make about thirty passes, and keep more for the
backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class RMSNorm:
    """The norm's weights, (width,), and epsilon."""

    weight: Tensor
    eps: float


class Normed(NamedTuple):
    """What `add_norm` computed. total: (rows, width). factors: (rows,), 1 / sqrt(mean(total^2) + eps)."""

    total: Tensor
    output: Tensor
    factors: Tensor


class NormGradients(NamedTuple):
    """Gradients of `add_norm`: of x, of the change in its own type, and of the weights."""

    x: Tensor
    change: Tensor
    weight: Tensor | None


class LayerKernels(Protocol):
    """What computes a layer between its matmuls: ReferenceKernels or NativeKernels."""

    def add_norm(self, x: Tensor, change: Tensor | None, norm: RMSNorm, dtype: torch.dtype) -> Normed:
        """Add and normalize."""

    def add_norm_backward(
        self,
        normed: Normed,
        norm: RMSNorm,
        gradients: Sequence[Tensor],
        of_total: Tensor | None,
        change_dtype: torch.dtype,
    ) -> NormGradients:
        """Return gradients."""

    def rotate_heads(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotate heads."""

    def rotate_heads_backward(
        self, gradient: Tensor, cosines: Tensor, sines: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Rotate gradients back."""

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Apply SwiGLU."""

    def swiglu_backward(self, gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradients of gate and up."""


def add_norm(
    kernels: LayerKernels, x: Tensor, change: Tensor | None, norm: RMSNorm, *, dtype: torch.dtype, consumers: int
) -> tuple[Tensor, ...]:
    """Return x + change and, once for each consumer, its RMSNorm.

    Consumers that share one array would have their gradients added up by autograd: in bfloat16, and in passes of
    their own. So each gets an array of its own, with the same memory.

    Args:
        kernels: what computes it.
        x: (rows, width), float32.
        change: (rows, width), or None for zeros.
        norm: the norm.
        dtype: type of the norm's output.
        consumers: number of its consumers, 3 at most.
    """
    apply: Any = _AddNorm.apply
    outputs: tuple[Tensor, ...] = apply(x, change, norm.weight, norm.eps, dtype, consumers, kernels)
    return outputs


class _AddNorm(torch.autograd.Function):
    """Keeps the sum, and a number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Tensor | None, weight: Tensor, *fixed: Any) -> tuple[Tensor, ...]:
        ctx.eps, dtype, consumers, ctx.kernels = fixed
        normed = ctx.kernels.add_norm(x, change, RMSNorm(weight, ctx.eps), dtype)
        ctx.save_for_backward(normed.total, normed.factors, weight)
        ctx.change_dtype = x.dtype if change is None else change.dtype
        ctx.has_change = change is not None
        ctx.set_materialize_grads(False)
        return normed.total, *(normed.output.detach() for _ in range(consumers))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor | None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        total, factors, weight = ctx.saved_tensors
        used = [gradient for gradient in gradients if gradient is not None]
        if not used:
            return of_total, of_total if ctx.has_change else None, None, None, None, None, None
        found = ctx.kernels.add_norm_backward(
            Normed(total, total, factors), RMSNorm(weight, ctx.eps), used, of_total, ctx.change_dtype
        )
        return found.x, found.change if ctx.has_change else None, found.weight, None, None, None, None


def rotate_heads(kernels: LayerKernels, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return the heads at their positions, (tokens, heads, size), float32. cosines, sines: (tokens, size)."""
    apply: Any = _RotateHeads.apply
    rotated: Tensor = apply(x, cosines, sines, kernels)
    return rotated


class _RotateHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor, kernels: LayerKernels) -> Tensor:
        ctx.kernels, ctx.dtype = kernels, x.dtype
        ctx.save_for_backward(cosines, sines)
        return kernels.rotate_heads(x, cosines, sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.kernels.rotate_heads_backward(gradient, *ctx.saved_tensors, ctx.dtype), None, None, None


def swiglu(kernels: LayerKernels, gate: Tensor, up: Tensor) -> Tensor:
    """Return gate / (1 + e^-gate) * up. All: (rows, width), of one type."""
    apply: Any = _SwiGLU.apply
    output: Tensor = apply(gate, up, kernels)
    return output


class _SwiGLU(torch.autograd.Function):
    """Keeps its inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kernels: LayerKernels) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(gate, up)
        return kernels.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.kernels.swiglu_backward(*ctx.saved_tensors, gradient), None


class PlainLayerKernels:
    """The plain forms, on any device."""

    def add_norm(self, x: Tensor, change: Tensor | None, norm: RMSNorm, dtype: torch.dtype) -> Normed:
        """Return x + change and its RMSNorm, (rows, width)."""
        total = x if change is None else x + change
        factors = torch.rsqrt(total.square().mean(-1) + norm.eps)
        return Normed(total, (total * factors[:, None] * norm.weight).to(dtype), factors)

    def add_norm_backward(
        self,
        normed: Normed,
        norm: RMSNorm,
        gradients: Sequence[Tensor],
        of_total: Tensor | None,
        change_dtype: torch.dtype,
    ) -> NormGradients:
        """Return gradients.

        Args:
            normed: total and factors of `add_norm`.
            norm: the norm. If its weights require no gradient, none is computed.
            gradients: those of the output's consumers, to be added.
            of_total: gradient of the total, or None.
            change_dtype: type of the change.
        """
        x = normed.total * normed.factors[:, None]
        gradient = sum((some.to(x.dtype) for some in gradients), torch.zeros_like(x))
        of_weight = (gradient * x).sum(0) if norm.weight.requires_grad else None
        gradient = gradient * norm.weight.detach()
        of_x = (gradient - x * (gradient * x).mean(-1, keepdim=True)) * normed.factors[:, None]
        of_x = of_x if of_total is None else of_x + of_total
        return NormGradients(of_x, of_x.to(change_dtype), of_weight)

    def rotate_heads(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Return x * cosines + rotate_half(x) * sines, as transformers has it."""
        low, high = x.chunk(2, -1)
        return x * cosines[:, None] + torch.cat([-high, low], -1) * sines[:, None]

    def rotate_heads_backward(
        self, gradient: Tensor, cosines: Tensor, sines: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return the gradient of `rotate_heads`, in the type of its x."""
        low, high = (gradient * sines[:, None]).chunk(2, -1)
        return (gradient * cosines[:, None] + torch.cat([high, -low], -1)).to(dtype)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return gate / (1 + e^-gate) * up, computed in float32 at least."""
        x, y = _at_least_float32(gate), _at_least_float32(up)
        return (x * x.sigmoid() * y).to(gate.dtype)

    def swiglu_backward(self, gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradients of gate and up."""
        x, y, of_output = (_at_least_float32(some) for some in (gate, up, gradient))
        share = x.sigmoid()
        silu = x * share
        of_gate = of_output * y * (share + silu * (1 - share))
        return of_gate.to(gate.dtype), (of_output * silu).to(gate.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
