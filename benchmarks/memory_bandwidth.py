"""How fast this machine reads memory: what bounds the decoding of one row, which reads all weights a token."""

import time

import torch

READ = 2**30
"""Bytes; far more than any cache holds."""


def read_bandwidth(threads: int, repetitions: int = 7) -> list[float]:
    """GB/s at which so many threads add up a float32 tensor of READ bytes; the first time is not counted."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    numbers = torch.ones(READ // 4)
    found = []
    for _ in range(1 + repetitions):
        began = time.perf_counter()
        numbers.sum()
        found.append(READ / (time.perf_counter() - began) / 1e9)
    torch.set_num_threads(before)
    return found[1:]
