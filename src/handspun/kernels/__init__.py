"""What a port to another CPU touches: quantizing rows, int8 matmuls, and the work between matmuls.

`kernels_for(device)` picks a backend: the native kernels of the CPU's fastest instruction set (native.py), or the
plain form in PyTorch (reference.py). All return the same bits.
"""

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from handspun.errors import ConfigError
from handspun.kernels.between_matmuls import LayerKernels
from handspun.kernels.native import (
    INSTRUCTION_SETS,
    DecoderShape,
    NativeDecoder,
    native_kernels,
    supported_sets,
)
from handspun.kernels.packed_attention import PackKernels
from handspun.kernels.reference import AttendedSpan, HeadNorms, ReferenceKernels, Rotation

SWITCH = "HANDSPUN_KERNELS"
"""Environment variable that forces a backend: "reference", or an instruction set."""


class Int8Weight(Protocol):
    """A frozen int8 matrix, (out, in), laid out for its backend (see `reference.PlainInt8Weight`)."""

    @property
    def weight(self) -> Tensor:
        """The matrix as it is laid out."""

    def rows(self, rows: Tensor) -> Tensor:
        """Return rows of the matrix."""

    def matmul(self, rows: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply quantized rows with the matrix."""

    def transposed_matmul(self, rows: Tensor, row_scale: Tensor) -> Tensor:
        """Multiply quantized rows with the transposed matrix."""


class Kernels(PackKernels, LayerKernels, Protocol):
    """A backend. reference.py says what each function returns."""

    name: str

    def hadamard(self, x: Tensor) -> Tensor:
        """Transform rows."""

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Transform and quantize rows."""

    def scale_quantize(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Scale the columns and quantize the rows."""

    def norm_quantize(self, x: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Normalize, transform, and quantize rows."""

    def gate_quantize(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """Apply SwiGLU, transform, and quantize rows."""

    def int8_weight(self, weight: Tensor) -> Int8Weight:
        """Lay out an int8 matrix."""

    def can_multiply_floats(self, width: int) -> bool:
        """Return whether `float_matmul` supports rows of this width, and is worth using."""

    def float_matmul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply float rows with a bfloat16 or float32 matrix."""

    def can_attend(self, heads: int, kv_heads: int, head_size: int) -> bool:
        """Return whether `rotate` and `attend` support such heads, and are worth using."""

    def rotate(self, qkv: Tensor, norms: HeadNorms, rotation: Rotation, pool: Tensor) -> None:
        """Normalize and rotate queries and keys, and write keys and values to the KV cache."""

    def attend(self, queries: Tensor, pool: Tensor, spans: Sequence[AttendedSpan]) -> Tensor:
        """Return the attention of tokens over their sequences' keys."""

    def decoder(self, layers: Sequence[Any], shape: DecoderShape) -> NativeDecoder | None:
        """Return what runs all int8 layers in one call, or None if the backend has no such thing."""

    def can_attend_packs(self, heads: int, kv_heads: int, head_size: int) -> bool:
        """Return whether `attend_pack` and `LayerKernels` support such heads, and are worth using."""


def kernels_for(device: torch.device) -> Kernels:
    """Return the backend for a device. Raises ConfigError if HANDSPUN_KERNELS names one that cannot be used."""
    return _choose()[0] if device.type == "cpu" else ReferenceKernels()


def slower_without(device: torch.device, what: str = "int8") -> str | None:
    """Return a message for the user if the device is a CPU without native kernels, else None.

    what: what is slower.
    """
    reason = _choose()[1] if device.type == "cpu" else None
    return reason and f"{what} runs without native kernels, which is slower: {reason}"


def _choose() -> tuple[Kernels, str | None]:
    """Return the backend for CPUs, and why it is not a native one (None if the user wants it so)."""
    forced = os.environ.get(SWITCH, "")
    if forced == "reference":
        return ReferenceKernels(attends=True), None
    supported = supported_sets()
    if forced and forced not in supported:
        kind = "unknown" if forced not in INSTRUCTION_SETS else "not supported by this CPU"
        raise ConfigError(
            f"{SWITCH}={forced}: {kind} (expected one of {', '.join([*supported, 'reference'])}). Set one of "
            "them, or unset it to use the fastest."
        )
    reason = "there are none for this kind of CPU"
    for name in [forced] if forced else supported:
        found = native_kernels(name)
        if not isinstance(found, str):
            return found, None
        reason = found
    if forced:
        raise ConfigError(f"{SWITCH}={forced}: {reason}. Unset it, or set it to reference.")
    return ReferenceKernels(), reason
