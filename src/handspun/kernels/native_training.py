"""Calls to the compiled kernels of training: attention of packs (packed_attention.h), and between_matmuls.h."""

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from handspun.kernels.between_matmuls import Normed, NormGradients, RMSNorm
from handspun.kernels.packed_attention import PackedHeads
from handspun.kernels.reference import LANES

_INT, _FLOAT, _ARRAY, _FLAG = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int
_THREADS = ctypes.c_int
TRAINING_SIGNATURES = {
    "attend_pack": (_ARRAY, _ARRAY, _ARRAY, _THREADS),
    "add_norm": (*(_ARRAY, _ARRAY, _FLAG, _ARRAY, _FLOAT, _INT, _INT), *(_ARRAY, _ARRAY, _FLAG, _ARRAY, _THREADS)),
    "add_norm_backward": (
        *(_ARRAY, _ARRAY, _ARRAY, _ARRAY, _INT, _FLAG),
        *(_ARRAY, _INT, _INT, _ARRAY, _ARRAY, _ARRAY, _THREADS),
    ),
    "rotate_heads": (_ARRAY, _INT, _INT, _INT, _ARRAY, _ARRAY, _FLAG, _FLAG, _ARRAY, _THREADS),
    "swiglu": (_ARRAY, _ARRAY, _FLAG, _INT, _INT, _ARRAY, _THREADS),
    "swiglu_backward": (_ARRAY, _ARRAY, _ARRAY, _FLAG, _INT, _INT, _ARRAY, _ARRAY, _THREADS),
    "attend_pack_backward": (_ARRAY, _ARRAY, _ARRAY, _ARRAY, _ARRAY, _ARRAY, _ARRAY, _THREADS),
}


class _HeadsOf(ctypes.Structure):
    """heads_of in packed_attention.h."""

    _fields_ = [("at", _ARRAY), ("token", _INT), ("head", _INT)]


class _Pack(ctypes.Structure):
    """pack in packed_attention.h."""

    _fields_ = [
        *((name, _HeadsOf) for name in ("queries", "keys", "values")),
        *((name, _INT) for name in ("kv_heads", "group", "size", "sequences")),
        ("edges", ctypes.POINTER(_INT)),
        ("scaling", _FLOAT),
    ]


class NativeTrainingKernels:
    """The part of `NativeKernels` that trains."""

    _library: ctypes.CDLL

    def can_attend_packs(self, heads: int, kv_heads: int, head_size: int) -> bool:
        """Return whether `attend_pack` supports such heads."""
        return heads % kv_heads == 0 and head_size % LANES == 0

    def attend_pack(self, heads: PackedHeads) -> tuple[Tensor, Tensor]:
        """Attend as the reference does. All float32. The logs are to base 2."""
        (tokens, count, size), some = heads.queries.shape, _with_whole_rows(heads)
        output, log_sums = torch.empty(tokens, count, size), torch.empty(tokens, count)
        pack = _pack(some)
        self._library.attend_pack(
            ctypes.byref(pack), output.data_ptr(), log_sums.data_ptr(), torch.get_num_threads()
        )
        return output, log_sums

    def attend_pack_backward(
        self, heads: PackedHeads, output: Tensor, log_sums: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients as the reference does."""
        some, gradient = _with_whole_rows(heads), _whole_rows(gradient)
        found = [torch.empty(x.shape) for x in (heads.queries, heads.keys, heads.values)]
        pack, of_output = _pack(some), _heads_of(gradient)
        self._library.attend_pack_backward(
            *(ctypes.byref(pack), output.data_ptr(), ctypes.byref(of_output), log_sums.data_ptr()),
            *(x.data_ptr() for x in found),
            torch.get_num_threads(),
        )
        queries, keys, values = found
        return queries, keys, values

    def add_norm(self, x: Tensor, change: Tensor | None, norm: RMSNorm, dtype: torch.dtype) -> Normed:
        """Add and normalize as the reference does. x: float32. change, dtype: float32 or bfloat16."""
        x, change = x.contiguous(), None if change is None else change.contiguous()
        total = x if change is None else torch.empty_like(x)
        normed = Normed(total, torch.empty_like(x, dtype=dtype), torch.empty(len(x)))
        added = (None, 0) if change is None else (change.data_ptr(), _is_bfloat16(change))
        self._library.add_norm(
            *(_float32(x), *added, _float32(norm.weight), norm.eps, *x.shape, total.data_ptr()),
            *(normed.output.data_ptr(), _is_bfloat16(normed.output), normed.factors.data_ptr()),
            torch.get_num_threads(),
        )
        return normed

    def add_norm_backward(
        self,
        normed: Normed,
        norm: RMSNorm,
        gradients: Sequence[Tensor],
        of_total: Tensor | None,
        change_dtype: torch.dtype,
    ) -> NormGradients:
        """Return gradients as the reference does."""
        gradients = [gradient.contiguous() for gradient in gradients]
        of_total = None if of_total is None else of_total.contiguous()
        of_x = torch.empty_like(normed.total)
        of_change = of_x if change_dtype == torch.float32 else torch.empty_like(of_x, dtype=torch.bfloat16)
        of_weight = torch.empty_like(norm.weight) if norm.weight.requires_grad else None
        arrays = (_ARRAY * len(gradients))(*(gradient.data_ptr() for gradient in gradients))
        self._library.add_norm_backward(
            *(_float32(normed.total), normed.factors.data_ptr(), _float32(norm.weight)),
            *(arrays, len(gradients), _is_bfloat16(*gradients)),
            *(None if of_total is None else _float32(of_total), *of_x.shape, of_x.data_ptr()),
            *(
                None if of_change is of_x else of_change.data_ptr(),
                None if of_weight is None else of_weight.data_ptr(),
            ),
            torch.get_num_threads(),
        )
        return NormGradients(of_x, of_change, of_weight)

    def rotate_heads(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotate as the reference does. x: float32 or bfloat16."""
        return self._rotated(x, cosines, sines, torch.float32, backward=False)

    def rotate_heads_backward(
        self, gradient: Tensor, cosines: Tensor, sines: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return the gradient as the reference does."""
        return self._rotated(gradient, cosines, sines, dtype, backward=True)

    def _rotated(self, x: Tensor, cosines: Tensor, sines: Tensor, dtype: torch.dtype, *, backward: bool) -> Tensor:
        x, cosines, sines = x.contiguous(), cosines.contiguous(), sines.contiguous()
        out = torch.empty_like(x, dtype=dtype)
        self._library.rotate_heads(
            *(x.data_ptr(), *x.shape, _float32(cosines), _float32(sines)),
            *(_is_bfloat16(out if backward else x), backward, out.data_ptr(), torch.get_num_threads()),
        )
        return out

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Apply SwiGLU as the reference does. Both float32, or both bfloat16."""
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        self._library.swiglu(
            *(gate.data_ptr(), up.data_ptr(), _is_bfloat16(gate, up), *gate.shape, out.data_ptr()),
            torch.get_num_threads(),
        )
        return out

    def swiglu_backward(self, gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradients as the reference does."""
        gate, up, gradient = gate.contiguous(), up.contiguous(), gradient.contiguous()
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        self._library.swiglu_backward(
            *(gate.data_ptr(), up.data_ptr(), gradient.data_ptr(), _is_bfloat16(gate, up, gradient), *gate.shape),
            *(of_gate.data_ptr(), of_up.data_ptr(), torch.get_num_threads()),
        )
        return of_gate, of_up


def _whole_rows(x: Tensor) -> Tensor:
    """Return x with the values of each head one after another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _with_whole_rows(heads: PackedHeads) -> PackedHeads:
    queries, keys, values = (_whole_rows(x) for x in (heads.queries, heads.keys, heads.values))
    return replace(heads, queries=queries, keys=keys, values=values)


def _heads_of(x: Tensor) -> _HeadsOf:
    assert x.dtype == torch.float32
    return _HeadsOf(x.data_ptr(), x.stride(0), x.stride(1))


def _pack(heads: PackedHeads) -> _Pack:
    """Return the inputs as the library takes them. They must live as long as it."""
    kv_heads, size = heads.keys.shape[1:]
    edges = (_INT * len(heads.edges))(*heads.edges)
    shape = (kv_heads, heads.queries.shape[1] // kv_heads, size, len(edges) - 1)
    all_heads = (_heads_of(x) for x in (heads.queries, heads.keys, heads.values))
    return _Pack(*all_heads, *shape, edges, heads.scaling)


def _float32(x: Tensor) -> int:
    """Return the address of a float32 array."""
    assert x.dtype == torch.float32
    return x.data_ptr()


def _is_bfloat16(*arrays: Tensor) -> bool:
    """Return whether the arrays, all of one type, are bfloat16 and not float32."""
    (dtype,) = {x.dtype for x in arrays}
    assert dtype in (torch.float32, torch.bfloat16)
    return dtype == torch.bfloat16
