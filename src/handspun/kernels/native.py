"""Compiling, loading, and calling the native kernels (kernels.c)."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handspun.files import atomic_file, cache_folder
from handspun.kernels.cpu import cpu_flags, cpu_model

_DIGEST_BYTES = hashlib.sha256().digest_size
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_SECONDS = 120
# Seconds before a failed compiler is tried again: each start would otherwise wait for it to fail.
_RETRY_AFTER = 24 * 3600


class LibraryError(Exception):
    """The reason why there is no library, in a few words."""


def load_library(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """Load the library of a C file. Build it first if it is not in the cache folder. Raises LibraryError."""
    compiler = _compiler()
    try:
        file = _library_file(source, flags, compiler)
        if not _is_whole_and_own(file):
            _build(source, flags, compiler, file)
    except OSError as error:
        raise LibraryError(f"{error.filename or cache_folder()}: {error.strerror or error}") from error
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:  # for example, the file system is mounted noexec
        raise LibraryError(
            f"{file} cannot be loaded ({error}). Set XDG_CACHE_HOME to another cache folder"
        ) from error


def _compiler() -> list[str]:
    """Return the compiler's command: $CC, which may be several words, or the first known one that exists."""
    try:
        words = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise LibraryError(f"CC cannot be split into words ({error})") from error
    if not words:
        words = [name for name in _COMPILERS if shutil.which(name)][:1]
        if not words:
            raise LibraryError("there is no C compiler. Install gcc or clang, or set CC")
    if not shutil.which(words[0]):
        raise LibraryError(f"the C compiler that CC names, {words[0]}, does not exist")
    return words


def _own_folder() -> Path:
    """Return the folder of libraries; create it if needed. Raises LibraryError if others can write to it."""
    # A library that another user could write would run as this one.
    folder = cache_folder().absolute() / "native"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise LibraryError(f"{folder} is a link or a file, not a folder. Remove it")
    if found.st_uid != os.geteuid():
        raise LibraryError(f"{folder} belongs to another user. Set XDG_CACHE_HOME to another cache folder")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise LibraryError(f"{folder} is writable by others. Remove it")
    folder.chmod(0o700)
    for above in folder.resolve().parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise LibraryError(f"{above} is writable by everyone. Set XDG_CACHE_HOME to another cache folder")
    return folder


def _library_file(source: Path, flags: Sequence[str], compiler: Sequence[str]) -> Path:
    """Return the library's path. Its name is a hash of the source, the compiler, the flags, and the CPU."""
    programs = [Path(path).resolve() for path in map(shutil.which, compiler) if path]
    files = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in programs]
    made_from = "\0".join([source.read_text(encoding="utf-8"), *compiler, *files, cpu_model(), *flags])
    return _own_folder() / f"{source.stem}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"


def _is_whole_and_own(file: Path) -> bool:
    """Return whether the file is a complete library that this user wrote."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:  # it does not exist, or is a link
        return False
    with open(descriptor, "rb") as opened:
        found = os.fstat(descriptor)
        is_own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1
        if not is_own or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return False
        content = opened.read()
    library, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return bool(library) and hashlib.sha256(library).digest() == digest


def _build(source: Path, flags: Sequence[str], compiler: Sequence[str], file: Path) -> None:
    """Build the library. If the compiler fails, store the reason for a day and raise LibraryError.

    Args:
        source: the C file.
        flags: compiler flags.
        compiler: the compiler's command.
        file: path of the library.
    """
    failure = file.with_suffix(".failed")
    if reason := _recent_failure(failure):
        raise LibraryError(reason)
    with tempfile.TemporaryDirectory(prefix="building.", dir=file.parent) as work:
        made = Path(work) / "library.so"
        command = [*compiler, *flags, str(source), "-o", str(made), "-lm"]
        reason = _run_compiler(command)
        if reason is None and not made.is_file():
            reason = "it wrote no library"
        if reason is not None:
            text = f"the C compiler failed: {shlex.join(compiler)}: {reason}"
            _write(text.encode(), failure)
            raise LibraryError(text)
        library = made.read_bytes()
        _write(library + hashlib.sha256(library).digest(), file)


def _run_compiler(command: Sequence[str]) -> str | None:
    """Run a compiler. Return its first error if it failed, else None."""
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_COMPILE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {_COMPILE_SECONDS} seconds"
    except OSError as error:
        return error.strerror or str(error)
    if done.returncode == 0:
        return None
    lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if "error" in line] or lines
    return errors[0][:200] if errors else f"exit code {done.returncode}"


def _recent_failure(file: Path) -> str | None:
    try:
        if time.time() - file.stat().st_mtime > _RETRY_AFTER:
            return None
        reason = file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return f"{reason} (to try again before a day has passed, remove {file})" if reason else None


def _write(content: bytes, file: Path) -> None:
    with atomic_file(file) as partial:
        partial.chmod(0o600)
        partial.write_bytes(content)


_SOURCE = Path(__file__).with_name("kernels.c")
# No contraction to fused multiply-adds: sums are rounded where PyTorch rounds them, and equal its own to the bit.
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
    "matmul": (*(_ARRAY, _ARRAY, _INT, _INT, _ARRAY, _ARRAY, _ARRAY, _ARRAY, _INT, _ARRAY), _THREADS),
    "transposed_matmul": (*(_ARRAY, _ARRAY, _INT, _INT, _ARRAY, _ARRAY, _INT, _ARRAY, _ARRAY), _THREADS),
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
    """Return the library, built if needed, or None if it is not available or HANDSPUN_NATIVE=0 is set."""
    return _kernels_or_reason()[0]


def reason_for_none() -> str | None:
    """Return why there are no kernels, or None if there are or the user turned them off."""
    return _kernels_or_reason()[1]


def slower_without(device: torch.device) -> str | None:
    """Return a message for int8 users if the device is a CPU without native kernels, else None."""
    reason = reason_for_none() if device.type == "cpu" else None
    return None if reason is None else f"int8 runs without its native kernels, which is slower: {reason}"


@cache
def _kernels_or_reason() -> tuple[Any | None, str | None]:
    if os.environ.get("HANDSPUN_NATIVE") == "0":
        return None, None
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None, "they need Linux on x86-64"
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
    """Make the next call of `kernels` look for the library again."""
    _kernels_or_reason.cache_clear()


def hadamard(library: Any, x: Tensor) -> Tensor:
    """Return x, (rows, width), float32, transformed as `int8_matmul.hadamard` does."""
    x = x.contiguous()
    out = torch.empty_like(x)
    library.hadamard(x.data_ptr(), *x.shape, out.data_ptr(), torch.get_num_threads())
    return out


def quantize(library: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (hadamard(x) / scale + 128 as bytes, (rows, width); scales, (rows, 1)). x: (rows, width), float32."""
    x, work = x.contiguous(), torch.empty_like(x)
    out, scale = _empty(x)
    arrays = (work.data_ptr(), out.data_ptr(), scale.data_ptr())
    library.quantize(x.data_ptr(), *x.shape, *arrays, torch.get_num_threads())
    return out, scale


def scale_quantize(library: Any, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return x * scale quantized as `quantize` does, but not transformed. x: (rows, width). scale: (width,)."""
    x, work = x.contiguous(), torch.empty_like(x)
    out, row_scale = _empty(x)
    arrays = (work.data_ptr(), out.data_ptr(), row_scale.data_ptr())
    library.scale_quantize(x.data_ptr(), scale.data_ptr(), *x.shape, *arrays, torch.get_num_threads())
    return out, row_scale


def norm_quantize(library: Any, x: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `quantize` of RMSNorm(x).

    Args:
        library: the kernels.
        x: (rows, width).
        norm: (width,), weights of the norm.
        eps: epsilon of the norm.
    """
    x, work = x.contiguous(), torch.empty_like(x)
    out, scale = _empty(x)
    arrays = (work.data_ptr(), out.data_ptr(), scale.data_ptr())
    library.norm_quantize(x.data_ptr(), norm.data_ptr(), eps, *x.shape, *arrays, torch.get_num_threads())
    return out, scale


def gate_quantize(library: Any, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Return `quantize` of silu(gate) * up. gate_up: (rows, 2 * width)."""
    work = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    out, scale = _empty(work)
    arrays = (work.data_ptr(), out.data_ptr(), scale.data_ptr())
    library.gate_quantize(gate_up.data_ptr(), *work.shape, *arrays, torch.get_num_threads())
    return out, scale


def can_multiply() -> bool:
    """Return whether the native matmuls are available and the fastest."""
    # With AMX, oneDNN's are faster.
    return kernels() is not None and "amx_int8" not in cpu_flags()


def can_attend(head_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether `rotate` and `attend` support such heads."""
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
    """Normalize queries and keys, rotate queries in place, and write rotated keys and values to the KV cache.

    Args:
        qkv: (tokens, heads + 2 * kv_heads, head_size); queries are overwritten.
        heads: number of query heads.
        norms: weights of the norms of queries and keys, (head_size,); None for no norm.
        eps: epsilon of the norms.
        cosines: (tokens, head_size).
        sines: (tokens, head_size).
        places: (tokens,), each token's slot in the pool.
        pool: the KV cache, (2 * kv_heads, slots, head_size).
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
    """Return the attention of single queries over their sequences' keys: (tokens, heads * head_size).

    Args:
        queries: (tokens, heads, head_size), contiguous per token.
        pool: the KV cache, (2 * kv_heads, slots, head_size): keys, then values.
        starts: first slot of each token's keys.
        lengths: number of each token's keys.
        masks: per token, (length,), bool, the keys that it attends to; None for all.
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
