"""Native kernels for int8 layers (`kernels.c`), built once by the C compiler that is there.

Where there is none, or the CPU lacks AVX-512, everything runs in plain PyTorch (`products.py`, `lean_engine.py`).
"""

import ctypes
import os
import platform
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handspun.models.cpu import cpu_flags
from handspun.models.native_library import LibraryError, load_library

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared")
_NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
_HEAD_SIZES = {32, 64, 96, 128}

_INT, _FLOAT, _ARRAY, _THREADS = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int
_SIGNATURES = {
    "hadamard": (_ARRAY, _INT, _INT, _ARRAY, _THREADS),
    "quantize": (_ARRAY, _INT, _INT, _ARRAY, _ARRAY, _ARRAY, _THREADS),
    "norm_quantize": (_ARRAY, _ARRAY, _FLOAT, _INT, _INT, _ARRAY, _ARRAY, _ARRAY, _THREADS),
    "gate_quantize": (_ARRAY, _INT, _INT, _ARRAY, _ARRAY, _ARRAY, _THREADS),
    "scale_quantize": (_ARRAY, _ARRAY, _INT, _INT, _ARRAY, _ARRAY, _ARRAY, _THREADS),
    "product": (*(_ARRAY, _ARRAY, _INT, _INT, _ARRAY, _ARRAY, _ARRAY, _ARRAY, _INT, _ARRAY), _THREADS),
    "transposed_product": (*(_ARRAY, _ARRAY, _INT, _INT, _ARRAY, _ARRAY, _INT, _ARRAY, _ARRAY), _THREADS),
    "rotate": (
        *(_ARRAY, _INT, _INT, _INT, _INT, _ARRAY, _ARRAY, _FLOAT),
        *(_ARRAY, _ARRAY, _ARRAY, _ARRAY, _INT),
    ),
    "attend": (
        *(_ARRAY, _INT, _ARRAY, _INT, _INT, _INT, _INT, _INT, _ARRAY, _ARRAY, _ARRAY),
        *(_FLOAT, _ARRAY, _INT, _ARRAY, _THREADS),
    ),
}


def kernels() -> Any | None:
    """The library, built if it is not there yet; None where it cannot be had, or HANDSPUN_NATIVE=0 is set."""
    return _kernels_or_reason()[0]


def reason_for_none() -> str | None:
    """Return why there are no kernels; None if there are, or if the user has switched them off."""
    return _kernels_or_reason()[1]


def slower_without(device: torch.device) -> str | None:
    """Return a line for users of int8 on a CPU that has no kernels; None if none is due."""
    reason = reason_for_none() if device.type == "cpu" else None
    return None if reason is None else f"int8 works without its native kernels, slower: {reason}"


@cache
def _kernels_or_reason() -> tuple[Any | None, str | None]:
    if os.environ.get("HANDSPUN_NATIVE") == "0":
        return None, None
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None, "they are for Linux on x86-64"
    if not cpu_flags() >= _NEEDED:
        return None, "this CPU has no AVX-512 with VNNI"
    try:
        library = load_library(_SOURCE, _FLAGS)
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
    except (LibraryError, AttributeError) as error:
        return None, str(error)
    return library, None


def forget_kernels() -> None:
    """Look for the kernels again at the next call of `kernels`."""
    _kernels_or_reason.cache_clear()


def hadamard(library: Any, x: Tensor) -> Tensor:
    """(rows, width), float32, transformed as in hadamard.py."""
    x = x.contiguous()
    out = torch.empty_like(x)
    library.hadamard(x.data_ptr(), *x.shape, out.data_ptr(), torch.get_num_threads())
    return out


def quantize(library: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, width), float32, to bytes, each value of hadamard(x) / scale + 128, and the scales, (rows, 1)."""
    x, work = x.contiguous(), torch.empty_like(x)
    out, scale = _empty(x)
    arrays = (work.data_ptr(), out.data_ptr(), scale.data_ptr())
    library.quantize(x.data_ptr(), *x.shape, *arrays, torch.get_num_threads())
    return out, scale


def scale_quantize(library: Any, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x * scale to bytes, not transformed. x: (rows, width). scale: (width,)."""
    x, work = x.contiguous(), torch.empty_like(x)
    out, row_scale = _empty(x)
    arrays = (work.data_ptr(), out.data_ptr(), row_scale.data_ptr())
    library.scale_quantize(x.data_ptr(), scale.data_ptr(), *x.shape, *arrays, torch.get_num_threads())
    return out, row_scale


def norm_quantize(library: Any, x: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`quantize` of RMSNorm(x). norm: (width,)."""
    x, work = x.contiguous(), torch.empty_like(x)
    out, scale = _empty(x)
    arrays = (work.data_ptr(), out.data_ptr(), scale.data_ptr())
    library.norm_quantize(x.data_ptr(), norm.data_ptr(), eps, *x.shape, *arrays, torch.get_num_threads())
    return out, scale


def gate_quantize(library: Any, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize` of silu(gate) * up. gate_up: (rows, 2 * width)."""
    work = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    out, scale = _empty(work)
    arrays = (work.data_ptr(), out.data_ptr(), scale.data_ptr())
    library.gate_quantize(gate_up.data_ptr(), *work.shape, *arrays, torch.get_num_threads())
    return out, scale


def can_multiply() -> bool:
    """Whether the products are there, and the fastest that there are: with AMX, oneDNN's are."""
    return kernels() is not None and "amx_int8" not in cpu_flags()


def can_attend(head_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `rotate` and `attend` are there for such heads."""
    is_float = dtype == torch.float32 and device.type == "cpu"
    return is_float and head_size in _HEAD_SIZES and kernels() is not None


def rotate(
    qkv: Tensor,
    heads: int,
    norms: tuple[Tensor | None, Tensor | None],
    eps: float,
    cosines: Tensor,
    sines: Tensor,
    places: Tensor,
    pool: Tensor,
) -> None:
    """Norms queries and keys, rotates queries in place, and puts rotated keys, and values, into places, (tokens,),
    of the pool.

    qkv: (tokens, heads + 2 * kv_heads, head_size). norms: of queries and keys, (head_size,); None for no norm.
    cosines, sines: (tokens, head_size).
    """
    library: Any = kernels()
    assert qkv.is_contiguous() and pool.is_contiguous()  # noqa: PT018
    library.rotate(
        *(qkv.data_ptr(), len(qkv), heads, len(pool) // 2, qkv.shape[2]),
        *(None if norm is None else norm.data_ptr() for norm in norms),
        *(eps, cosines.data_ptr(), sines.data_ptr(), places.data_ptr(), pool.data_ptr(), pool.shape[1]),
    )


def attend(
    queries: Tensor, pool: Tensor, starts: Sequence[int], lengths: Sequence[int], masks: Sequence[Tensor | None]
) -> Tensor:
    """Attention of single queries over their rows' keys: (tokens, heads * head_size).

    queries: (tokens, heads, head_size), each token's contiguous. pool: (2 * kv_heads, places, head_size), keys and
        then values. starts, lengths: where each token's keys lie in it. masks: for each token, (length,), bool,
        which of them it sees; None for all.
    """
    library: Any = kernels()
    (tokens, heads, size), kv_heads, longest = queries.shape, len(pool) // 2, max(lengths)
    assert queries.stride()[1:] == (size, 1) and pool.is_contiguous()  # noqa: PT018
    out, work = queries.new_empty(tokens, heads * size), queries.new_empty(tokens * kv_heads, longest)
    whole = [None if mask is None else mask.contiguous() for mask in masks]
    addresses = (ctypes.c_void_p * tokens)(*(None if mask is None else mask.data_ptr() for mask in whole))
    shape = (kv_heads, heads // kv_heads, size, tokens)
    places = ((_INT * tokens)(*starts), (_INT * tokens)(*lengths), addresses)
    library.attend(
        *(queries.data_ptr(), queries.stride(0), pool.data_ptr(), pool.shape[1], *shape, *places),
        *(size**-0.5, work.data_ptr(), longest, out.data_ptr(), torch.get_num_threads()),
    )
    return out


def _empty(like: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(like.shape, dtype=torch.uint8), torch.empty(len(like), 1)
