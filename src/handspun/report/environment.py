"""The machine and the versions that a run was made with."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

_PACKAGES = ["handspun", "torch", "transformers", "tokenizers", "peft", "datasets", "safetensors"]


def environment() -> dict[str, object]:
    """Facts that a reader of the run's numbers needs."""
    return {
        "machine": ", ".join([cpu_name(), *gpu_names()]),
        "cores": os.cpu_count(),
        "memory_bytes": total_memory(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "command": sys.argv,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def cpu_name() -> str:
    """`AMD EPYC 7B13`, or what the system calls its processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Those that PyTorch can use."""
    import torch  # here: what only reads a run's record needs none of it

    return [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]


def total_memory() -> int | None:
    """Bytes of memory in the machine, where the system says it."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def current_memory() -> int | None:
    """Bytes that this process holds in memory, or on the GPU that it uses; None where the system does not say it
    in a file (Linux does)."""
    if (gpu := _gpu_in_use()) is not None:
        return int(gpu.memory_reserved())
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int | None:
    """Most bytes that this process has held in memory, or on the GPU that it uses, where the system says it."""
    if (gpu := _gpu_in_use()) is not None:
        return int(gpu.max_memory_reserved())
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _gpu_in_use() -> Any:
    """PyTorch's module for GPUs once it has begun to use one; else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
