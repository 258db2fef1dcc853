"""Compare this machine's int8 matmuls with exact sums: every sum, without tolerance."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from handspun.kernels.reference import exact_sums, extremes
from handspun.models.fused import decoded_sums
from handspun.models.int8 import training_matmuls
from handspun.verification.reference import Finding

SHAPES = ((1, 64, 32), (1, 896, 132), (3, 33, 7), (7, 2048, 64), (40, 68, 20), (130, 4864, 64))
"""(rows, in, out)."""

Matmul = Callable[[Tensor, Tensor], Tensor]


def check_int8(device: torch.device) -> Iterator[Finding]:
    """Compare the int8 matmuls of decoding and training with exact sums, for random and extreme values."""
    forward, backward = training_matmuls()
    yield compared_sums("decoding", decoded_sums, device)
    yield compared_sums("training, forward", forward, device)
    yield compared_sums("training, backward", backward, device)


def compared_sums(case: str, matmul: Matmul, device: torch.device) -> Finding:
    """Count the sums of a int8 matmul that differ from the exact ones."""
    wrong, total = 0, 0
    try:
        for shape in SHAPES:
            for rows, weight in (extremes(*shape), _random(*shape)):
                found = matmul(rows.to(device), weight.to(device)).cpu().float()
                wrong += int((found != exact_sums(rows, weight).float()).sum())
                total += found.numel()
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        return Finding(check="int8", case=case, status="info", found=f"not available on {device}: {reason}")
    if wrong:
        return Finding(check="int8", case=case, status="fail", found=f"{wrong} of {total} sums are not exact")
    return Finding(check="int8", case=case, status="pass", found=f"{total} sums, all exact")


def _random(count: int, width: int, channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    rows, weight = (
        torch.randint(-127, 128, (some, width), generator=generator, dtype=torch.int8)
        for some in (count, channels)
    )
    return rows, weight
