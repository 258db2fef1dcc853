"""The native kernels of every instruction set, as parameters of tests: those that this CPU lacks are skipped."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from handspun.kernels import native
from handspun.kernels.native import INSTRUCTION_SETS, NativeKernels, native_kernels, supported_sets


def why_not(name: str) -> str | None:
    """Return why the kernels of an instruction set cannot run here, or None if they can."""
    if name not in supported_sets():
        return f"this CPU does not have {name}"
    found = native_kernels(name)
    return found if isinstance(found, str) else None


def backend(name: str) -> NativeKernels:
    found = native_kernels(name)
    assert isinstance(found, NativeKernels), found
    return found


NATIVE = [
    pytest.param(name, marks=pytest.mark.skipif(bool(why_not(name)), reason=f"native kernels: {why_not(name)}"))
    for name in INSTRUCTION_SETS
]
AVAILABLE = [name for name in INSTRUCTION_SETS if why_not(name) is None]
"""The fastest first."""
needs_kernels = pytest.mark.skipif(not AVAILABLE, reason="native kernels: none can run here")
BACKENDS = [*NATIVE, pytest.param("reference"), pytest.param("none")]
"""As `chosen` takes them. "none": no library was compiled, so that PyTorch attends, in an order of its own."""


@contextmanager
def chosen(name: str) -> Iterator[None]:
    """Have new models use one of BACKENDS within the block."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "none":
            patch.setattr(native, "library_file", lambda name: Path("/nowhere") / name)
            patch.delenv("HANDSPUN_KERNELS", raising=False)
        else:
            patch.setenv("HANDSPUN_KERNELS", name)
        native_kernels.cache_clear()
        yield
    native_kernels.cache_clear()


def plain_tiles(weight: Tensor, tile: int, group: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return an int8 matrix in tiles, and -128 times the sums of its channels and columns, as in kernels.c."""
    filled = pad(weight, (0, -weight.shape[1] % multiple, 0, -len(weight) % tile))
    tiles = filled.view(-1, tile, filled.shape[1] // group, group).transpose(1, 2).contiguous()
    columns = filled.sum(0, dtype=torch.int32)
    return tiles, -128 * filled.sum(1, dtype=torch.int32), -128 * pad(columns, (0, -len(columns) % tile))
