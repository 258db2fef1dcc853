"""The memory that a run may take: what is free in the machine, and under the limits of its control groups."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Room:
    """Bytes that this process can hold in all, with what it holds already, and what sets the bound."""

    available: int
    bound: str


def room_on(device: torch.device) -> Room | None:
    """The memory of the GPU that the device is, or of this machine."""
    if device.type != "cuda":
        return room_here() if device.type == "cpu" else None
    free, _ = torch.cuda.mem_get_info(device)
    return Room(free + torch.cuda.memory_reserved(device), f"what is free on {device}")


def room_here(*, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Room | None:
    """What is free in this machine and under the limits of this process's control groups (versions 1 and 2), its
    own and those above it, whichever is least; None where the system does not say it.

    What the process holds itself is in it, and so is what the system keeps of files and gives up when asked; swap
    is not.
    """
    meminfo = _numbers(proc / "meminfo")
    if "MemAvailable" not in meminfo:
        return None
    own = _numbers(proc / "self" / "status").get("RssAnon", 0) * 1024
    free = [Room(meminfo["MemAvailable"] * 1024 + own, "what is free in this machine")]
    for folder in _groups_of_this_process(proc, cgroups):
        if (left := _left_in(folder)) is not None:
            limit, unused = left
            free.append(Room(unused + own, f"the limit of {limit / 1e9:.1f} GB of the control group {folder}"))
    return min(free, key=lambda room: room.available)


def _groups_of_this_process(proc: Path, cgroups: Path) -> Iterator[Path]:
    """The folders of the groups that count its memory. In a container, the system may name a place that is only
    there outside of it; its own group is then at the top."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = cgroups / "memory" if controllers else cgroups
        folder = top / place.strip("/")
        yield from (group for group in (folder, *folder.parents) if group.is_relative_to(top))


def _left_in(group: Path) -> tuple[int, int] | None:
    """(limit, bytes below it that are unused or hold files that can be read again), of either version; None
    without a limit."""
    limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
    used = _number(group / "memory.current", group / "memory.usage_in_bytes")
    if limit is None or used is None or limit > 2**60:  # version 1 writes "no limit" as nearly 2**63
        return None
    held = _numbers(group / "memory.stat")
    files = [held.get(f"total_{kind}", held.get(kind, 0)) for kind in ("inactive_file", "active_file")]
    return limit, limit - used + sum(files)


def _number(*paths: Path) -> int | None:
    """What the first of the files that is there says, if that is a number ("max" is none)."""
    for path in paths:
        if path.exists():
            text = path.read_text(encoding="utf-8").strip()
            return int(text) if text.isdigit() else None
    return None


def _numbers(path: Path) -> dict[str, int]:
    """The lines `name: 12 kB` and `name 12` of one of the kernel's files."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    words = [line.replace(":", " ").split() for line in lines]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}
