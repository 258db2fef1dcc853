"""glibc's allocator, told to keep what is freed: a training step asks for the same large tensors every time.

By default each large tensor is mapped and unmapped again, and its pages are faulted in and cleared anew.
"""

import ctypes
import gc
import os
import sys
from contextlib import suppress

_M_TRIM_THRESHOLD = -1  # glibc's malloc.h
_M_MMAP_MAX = -4


def disable_malloc_trim() -> bool:
    """Keeps freed memory in this process and asks for huge pages; whether that was possible.

    To be called before the first tensor is made. Only glibc can do it; elsewhere nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's: align large tensors for huge pages
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, -1))
    except (OSError, AttributeError):  # musl
        return False


def malloc_trim() -> None:
    """Returns what is freed by now to the system, once: after a large thing that will not be asked for again."""
    gc.collect()  # a model holds itself, in cycles
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # musl
            ctypes.CDLL("libc.so.6").malloc_trim(0)
