"""A linear layer with a LoRA adapter as one operation, whose sums are made in place.

    y = x @ W.T + bias + scaling * (x @ A.T) @ B.T

peft's own layer makes three arrays of y's size for it (the adapter's product, the same scaled, the sum), and its
backward pass as many; on a CPU they take as long as the adapter itself.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn


class FrozenLayer(Protocol):
    """The layer under an adapter: both products make a new array, to which the adapter's are added."""

    def product(self, x: Tensor) -> Tensor:
        """(tokens, in) to (tokens, out)."""

    def input_gradient(self, grad: Tensor) -> Tensor:
        """(tokens, out) to (tokens, in)."""


class LoraLinear(Linear):  # type: ignore[misc]  # peft has no types
    """peft's layer; one active adapter without dropout is computed as one operation, anything else as peft
    does."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        adapter = self._only_adapter()
        if adapter is None or args or kwargs:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base: FrozenLayer
        base, dtype = self.base_layer, torch.float32
        if isinstance(base, nn.Linear):
            dtype = _product_dtype(x)
            bias = None if base.bias is None else base.bias.to(dtype)
            base = _Frozen(base.weight.detach().to(dtype), bias)
        flat, weight_a, weight_b = (
            tensor.to(dtype)
            for tensor in (x.flatten(0, -2), self.lora_A[adapter].weight, self.lora_B[adapter].weight)
        )
        with torch.autocast(x.device.type, enabled=False):
            apply: Any = _LoraProduct.apply
            y: Tensor = apply(flat, weight_a, weight_b, self.scaling[adapter], base)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _only_adapter(self) -> str | None:
        """The one active adapter, if it is plain: no dropout, no variant, not merged."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] in self.lora_variant:
            return None
        dropout = self.lora_dropout[names[0]]
        plain = isinstance(dropout, nn.Identity) or not self.training
        return names[0] if plain and self.lora_B[names[0]].bias is None else None


@dataclass(frozen=True)
class _Frozen:
    """A float layer's weight, (out, in), and bias."""

    weight: Tensor
    bias: Tensor | None

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        return grad @ self.weight


class _LoraProduct(torch.autograd.Function):
    """x: (tokens, in). a: (rank, in). b: (out, rank)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float, base: FrozenLayer) -> Tensor:
        reduced = x @ a.t()  # (tokens, rank)
        ctx.save_for_backward(x, reduced, a, b)
        ctx.scaling, ctx.base = scaling, base
        return base.product(x).addmm_(reduced, b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, reduced, a, b = ctx.saved_tensors
        grad_reduced = (grad @ b).mul_(ctx.scaling)  # (tokens, rank)
        grad_b = (grad.t() @ reduced).mul_(ctx.scaling)
        # What comes before the first adapter is frozen and wants no gradient.
        wanted = ctx.needs_input_grad[0]
        grad_x = ctx.base.input_gradient(grad).addmm_(grad_reduced, a) if wanted else None
        return grad_x, grad_reduced.t() @ x, grad_b, None, None


def _product_dtype(x: Tensor) -> torch.dtype:
    """That of autocast where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
