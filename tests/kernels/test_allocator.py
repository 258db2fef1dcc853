"""Freed memory is kept where glibc can do it, and nothing is touched elsewhere."""

import os
import subprocess
import sys

import pytest
import torch

from handspun.kernels.allocator import disable_malloc_trim

# 64 MB: glibc maps what is larger than 32 MB anew each time, and smaller ones only sometimes.
FAULTS = """
import resource, sys
from handspun.kernels.allocator import disable_malloc_trim
if sys.argv[1] == "keep":
    assert disable_malloc_trim()
import torch
for _ in range(3):
    torch.ones(16_000_000)
faults = []
for _ in range(21):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16_000_000)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[10])
"""

KERNELS = """
import sys
from pathlib import Path
from handspun.kernels.onednn import limit_primitive_cache
if sys.argv[1] == "keep":
    limit_primitive_cache()
import torch
from torch.nn.functional import linear
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
def matmul(tokens):
    with torch.autocast("cpu", torch.bfloat16):
        linear(torch.ones(tokens, 128, requires_grad=True), weight).sum().backward()
weight = torch.randn(256, 128, requires_grad=True)
for tokens in range(240, 200, -1):
    matmul(tokens)
before = resident()
for tokens in range(100, 160):
    matmul(tokens)
print(resident() - before)
"""


def printed(program: str, how: str) -> int:
    ours = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # set by tests before
    untold = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-c", program, how]
    return int(subprocess.run(command, check=True, capture_output=True, env=untold).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_tensor_of_the_same_size_faults_no_new_pages_in() -> None:
    """The median of 21 tensors: the heap may still grow once, where memory is short and huge pages are rare.

    A tensor's 64 MB are 31 huge pages or 15,625 small ones.
    """
    assert printed(FAULTS, "keep") < 5 < 30 < printed(FAULTS, "leave")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_kernels_for_numbers_of_tokens_gone_by_are_not_kept() -> None:
    """Of bfloat16 matmuls, forward and backward, 60 numbers of tokens."""
    assert printed(KERNELS, "keep") < 4e6
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert printed(KERNELS, "leave") > 40e6


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert disable_malloc_trim() is False
