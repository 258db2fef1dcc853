"""How many threads a process computes with."""

import os
from pathlib import Path

import torch


def use_threads(threads: int | None) -> None:
    """Those asked for; else, under torchrun, this rank's share of the machine's physical cores (torchrun sets
    OMP_NUM_THREADS to 1, which leaves cores idle); else PyTorch's own choice."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if threads is None and ranks_here > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        threads = max(physical_cores() // ranks_here, 1)
    if threads is not None:
        torch.set_num_threads(threads)


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once where the system tells them (Linux)."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    siblings = [
        Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in os.sched_getaffinity(0)
    ]
    return len({path.read_text() if path.exists() else str(path) for path in siblings})
