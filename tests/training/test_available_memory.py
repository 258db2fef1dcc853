"""What memory there is, of the machine and of control groups of both versions, read from the kernel's files."""

from pathlib import Path

import pytest

from handspun.training.memory import room_here

GB = 10**9


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A machine with 20,000,000 kB available, where this process holds 1,000,000 kB."""
    folder = tmp_path / "proc"
    write(folder / "meminfo", "MemTotal:       24000000 kB\nMemAvailable:   20000000 kB\n")
    write(folder / "self" / "status", "Name:\tpython\nRssAnon:\t 1000000 kB\nRssFile:\t  300000 kB\n")
    return folder


def test_without_limits_it_is_what_is_free_and_what_is_held(proc: Path, tmp_path: Path) -> None:
    write(proc / "self" / "cgroup", "0::/user.slice\n")
    write(tmp_path / "cgroup" / "user.slice" / "memory.max", "max\n")
    write(tmp_path / "cgroup" / "user.slice" / "memory.current", "5\n")
    room = room_here(proc=proc, cgroups=tmp_path / "cgroup")
    assert room is not None
    assert room.available == 21_000_000 * 1024
    assert room.bound == "free memory of this machine"


def test_a_parents_limit_of_version_2_binds_and_files_in_memory_can_go(proc: Path, tmp_path: Path) -> None:
    """8 GB, of which 5 are used, 2 of these by files: 8 - 5 + 2, and what this process holds."""
    write(proc / "self" / "cgroup", "0::/pod/run\n")
    pod = tmp_path / "cgroup" / "pod"
    write(pod / "memory.max", f"{8 * GB}\n")
    write(pod / "memory.current", f"{5 * GB}\n")
    write(pod / "memory.stat", f"anon {3 * GB}\ninactive_file {GB}\nactive_file {GB}\n")
    write(pod / "run" / "memory.max", "max\n")
    write(pod / "run" / "memory.current", "0\n")
    room = room_here(proc=proc, cgroups=tmp_path / "cgroup")
    assert room is not None
    assert room.available == 5 * GB + 1_000_000 * 1024
    assert room.bound == f"8.0 GB limit of the control group {pod}"


def test_a_limit_of_version_1_counts_with_what_is_below_it(proc: Path, tmp_path: Path) -> None:
    write(proc / "self" / "cgroup", "5:cpu,cpuacct:/other\n4:memory:/job\n0::/\n")
    job = tmp_path / "cgroup" / "memory" / "job"
    write(job / "memory.limit_in_bytes", f"{4 * GB}\n")
    write(job / "memory.usage_in_bytes", f"{3 * GB}\n")
    write(job / "memory.stat", f"inactive_file 7\ntotal_inactive_file {GB}\ntotal_active_file 0\n")
    write(job.parent / "memory.limit_in_bytes", "9223372036854771712\n")
    write(job.parent / "memory.usage_in_bytes", f"{9 * GB}\n")
    write(tmp_path / "cgroup" / "other" / "memory.max", "1\n")  # of a controller that does not count memory
    room = room_here(proc=proc, cgroups=tmp_path / "cgroup")
    assert room is not None
    assert room.available == 2 * GB + 1_000_000 * 1024


def test_a_container_whose_group_is_named_as_outside_has_its_limit_at_the_top(proc: Path, tmp_path: Path) -> None:
    write(proc / "self" / "cgroup", "0::/docker/abc\n")
    write(tmp_path / "cgroup" / "memory.max", f"{2 * GB}\n")
    write(tmp_path / "cgroup" / "memory.current", f"{GB}\n")
    room = room_here(proc=proc, cgroups=tmp_path / "cgroup")
    assert room is not None
    assert room.available == GB + 1_000_000 * 1024


def test_a_system_that_does_not_say_it(tmp_path: Path) -> None:
    assert room_here(proc=tmp_path / "proc", cgroups=tmp_path / "cgroup") is None
