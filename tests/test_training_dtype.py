"""The type of the products is the faster one, as a clock says; bfloat16 has to be clearly faster."""

from collections.abc import Callable, Iterator

import pytest
import torch

from handspun.training.dtype import fastest_dtype


def clock_of(float32_seconds: float, bfloat16_seconds: float) -> Callable[[], float]:
    """A clock by which each product of the probe takes as long as it is told."""

    def times() -> Iterator[float]:
        now = 0.0
        for seconds in (float32_seconds, bfloat16_seconds):
            for _ in range(4):
                yield now
                now += seconds
                if _:
                    yield now

    ticks = times()
    return lambda: next(ticks)


@pytest.mark.parametrize(
    ("float32_seconds", "bfloat16_seconds", "expected"),
    [(1.0, 0.5, torch.bfloat16), (1.0, 0.9, torch.float32), (1.0, 3.0, torch.float32)],
)
def test_the_faster_one_is_chosen(float32_seconds: float, bfloat16_seconds: float, expected: torch.dtype) -> None:
    dtype, measured = fastest_dtype(torch.device("cpu"), clock_of(float32_seconds, bfloat16_seconds))
    assert dtype == expected
    assert measured == f"measured: float32 {4.294967296 / float32_seconds:.0f}, bfloat16 " + (
        f"{4.294967296 / bfloat16_seconds:.0f} GFLOP/s"
    )
