"""The type of the products: bfloat16 if a clock says that it is clearly faster."""

from collections.abc import Callable, Iterator

import pytest
import torch

from handspun.training import dtype as dtype_module
from handspun.training.dtype import choose_dtype


def clock_of(bfloat16_seconds: float, float32_seconds: float) -> Callable[[], float]:
    """A clock by which each product of the probe takes as long as it is told; the first of four is not timed."""

    def times() -> Iterator[float]:
        now = 0.0
        for seconds in (bfloat16_seconds, float32_seconds):
            for turn in range(4):
                yield now
                now += seconds
                if turn:
                    yield now

    ticks = times()
    return lambda: next(ticks)


def test_a_cpu_takes_bfloat16_if_it_is_clearly_faster_and_says_so() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype(cpu, clock_of(0.5, 1.0)) == (
        torch.bfloat16,
        "its products are 2.0 times as fast as float32's here",
    )
    assert choose_dtype(cpu, clock_of(0.9, 1.0)) == (torch.float32, "bfloat16 products are 1.1 times as fast here")
    assert choose_dtype(cpu, clock_of(2.0, 1.0)) == (torch.float32, "bfloat16 products are 0.5 times as fast here")


@pytest.mark.parametrize(("seconds", "expected"), [(0.5, torch.bfloat16), (0.9, torch.float32)])
def test_a_gpu_takes_bfloat16_if_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, seconds: float, expected: torch.dtype
) -> None:
    rates = {torch.bfloat16: 1 / seconds, torch.float32: 1.0}
    monkeypatch.setattr(dtype_module, "_rate", lambda _device, dtype, _clock: rates[dtype])
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    assert choose_dtype(torch.device("cuda"))[0] == expected
