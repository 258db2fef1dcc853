"""The number of threads, and the type of the matmuls, measured if the CPU supports both."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from handspun import files
from handspun.files import cache_folder
from handspun.kernels import onednn
from handspun.kernels.cpu import cpu_model, has_bfloat16


def use_threads(threads: int | None) -> None:
    """Set PyTorch's threads. By default, each rank under torchrun gets its share of the physical cores."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # torchrun sets OMP_NUM_THREADS to 1, which would leave cores idle. Otherwise PyTorch's default stays.
    if threads is None and ranks_here > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        threads = max(physical_cores() // ranks_here, 1)
    if threads is not None:
        torch.set_num_threads(threads)


def physical_cores() -> int:
    """Return the number of cores that this process may use. On Linux, hyper-threads of a core count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    siblings = [
        Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in os.sched_getaffinity(0)
    ]
    return len({path.read_text() if path.exists() else str(path) for path in siblings})


# Least speedup of matmuls that makes bfloat16's rounding worth it. On Zen 4 it is 2.3, and steps are 1.5 times as
# fast.
_MIN_SPEEDUP = 1.2
# A speedup below this decides at any size: without bfloat16 instructions it is 0.01. With AMX it is 0.3 at the
# smallest size, where most of the time is overhead, and 17 at the largest.
_CLEARLY_SLOWER = 0.1
_SIZES = ((8, 256), (64, 512), (256, 1024))
"""(tokens, width) of the timed matmuls, smallest first. The last decides: it is like a small model's."""
_SECONDS = 0.25
"""After this time no larger size is tried, and the last measurement decides."""


def choose_dtype(device: torch.device, clock: Callable[[], float] | None = None) -> tuple[torch.dtype, str]:
    """Return (float32 or bfloat16, reason) from the CPU's flags, an earlier measurement, or timed matmuls.

    This is the type of autocast. Weights, optimizer, head, and evaluation stay float32.
    """
    # Next to other programs, two threads mostly wait for each other: with AMX the gain was 0.0 to 75 by the clock
    # on the wall, and 4.2 to 5.2 by the processor time of one thread.
    clock = clock or (time.thread_time if device.type == "cpu" else time.perf_counter)
    reason = _reason_against_bfloat16(device)
    if reason is not None:
        return torch.float32, reason
    if device.type != "cpu":
        return _choose(_measure_gain(device, clock))
    file = _cache_file()
    gain = _cached_gain(file)
    if gain is None:
        gain = _measure_gain(device, clock)
        _cache_gain(file, gain)
    return _choose(gain)


def _reason_against_bfloat16(device: torch.device) -> str | None:
    """Return why bfloat16 cannot be faster on the device, or None if it may be."""
    if device.type == "cuda":
        return None if torch.cuda.is_bf16_supported() else "this GPU does not support bfloat16"
    if device.type == "cpu" and not (_onednn_has_bfloat16() and has_bfloat16()):
        return "this CPU has no bfloat16 instructions"
    return None


def _onednn_has_bfloat16() -> bool:
    """Return whether oneDNN supports bfloat16 here."""
    if not torch.backends.mkldnn.is_available():
        return False
    # A private name of PyTorch's. If a version lacks it, the CPU's flags and the clock decide.
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return True if ask is None else bool(ask())


def _choose(gain: float) -> tuple[torch.dtype, str]:
    if gain < _MIN_SPEEDUP:
        return torch.float32, f"bfloat16 matmuls are {gain:.1f} times as fast as float32 here"
    return torch.bfloat16, f"bfloat16 matmuls are {gain:.1f} times as fast as float32 here"


def _measure_gain(device: torch.device, clock: Callable[[], float]) -> float:
    """Return bfloat16's speedup over float32, from matmuls of growing size."""
    began, gain = clock(), 0.0
    for tokens, width in _SIZES:
        gain = _seconds(device, torch.float32, tokens, width, clock) / _seconds(
            device, torch.bfloat16, tokens, width, clock
        )
        if gain < _CLEARLY_SLOWER or clock() - began > _SECONDS:
            break
    return gain


def _seconds(
    device: torch.device, dtype: torch.dtype, tokens: int, width: int, clock: Callable[[], float]
) -> float:
    """Return the seconds that a matmul takes on one thread: the best of three, after a warm-up."""
    a, b = (torch.ones(count, width, device=device, dtype=dtype) for count in (tokens, width))
    best, threads = float("inf"), torch.get_num_threads()
    torch.set_num_threads(1)
    for turn in range(4):
        began = clock()
        y = onednn.matmul(a, b) if dtype == torch.float32 and onednn.beats_mkl(device) else a @ b
        y[0, 0].item()  # wait for a GPU to finish
        if turn:
            best = min(best, clock() - began)
    torch.set_num_threads(threads)
    return max(best, 1e-9)  # a coarse clock


def _cache_file() -> Path:
    """Return the cache file for this CPU, PyTorch version, and number of threads."""
    limits = [
        os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
    ]
    probe = (
        f"{_SIZES} {_CLEARLY_SLOWER} one thread, oneDNN or MKL"  # another probe does not trust this one's answers
    )
    about = "\0".join([cpu_model(), torch.__version__, str(torch.get_num_threads()), probe, *limits])
    return cache_folder() / f"dtype-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"


def _cached_gain(file: Path) -> float | None:
    """Return the cached speedup, or None if there is no valid one."""
    found = files.read_json_object(file) or {}
    gain = found.get("bfloat16_gain")
    if not isinstance(gain, float) or not 0 <= gain < 1000:
        return None
    return gain if found == _record(gain) else None


def _cache_gain(file: Path, gain: float) -> None:
    """Cache the speedup if the cache folder is writable."""
    # If it is not, the probe runs again: a fraction of a second.
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(file, _record(gain))


def _record(gain: float) -> dict[str, float | str]:
    digest = hashlib.sha256(json.dumps(gain).encode()).hexdigest()
    return {"bfloat16_gain": gain, "sha256": digest}
