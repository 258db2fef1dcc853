"""Compare this machine's int8 kernels with exact sums and with the plain form, without tolerance."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from handspun.kernels import Kernels, kernels_for
from handspun.kernels.reference import AttendedSpan, HeadNorms, ReferenceKernels, Rotation, exact_sums, extremes
from handspun.models.fused import decoded_sums
from handspun.models.int8 import training_matmuls
from handspun.verification.reference import Finding

SHAPES = ((1, 64, 32), (1, 896, 132), (3, 33, 7), (7, 2048, 64), (40, 68, 20), (130, 4864, 64))
"""(rows, in, out)."""

Matmul = Callable[[Tensor, Tensor], Tensor]


def check_int8(device: torch.device) -> Iterator[Finding]:
    """Compare int8 matmuls with exact sums, for random and extreme values, and kernels with the plain form."""
    forward, backward = training_matmuls()
    yield compared_sums("decoding", decoded_sums, device)
    yield compared_sums("training, forward", forward, device)
    yield compared_sums("training, backward", backward, device)
    yield compared_kernels(kernels_for(device))


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


def compared_kernels(kernels: Kernels) -> Finding:
    """Compare what surrounds the matmuls with the plain form, bit for bit."""
    case = f"{kernels.name} kernels, compared with the plain form"
    if not kernels.can_attend(6, 2, 64):
        return Finding(check="int8", case=case, status="info", found="there are no others on this device")
    results = [_around_matmuls(some) for some in (kernels, ReferenceKernels(attends=True))]
    wrong = sum(int((ours != plain).sum()) for ours, plain in zip(*results, strict=True))
    total = sum(values.numel() for values in results[0])
    if wrong:
        return Finding(check="int8", case=case, status="fail", found=f"{wrong} of {total} values differ")
    return Finding(check="int8", case=case, status="pass", found=f"{total} values, all equal")


def _around_matmuls(kernels: Kernels) -> list[Tensor]:
    """Return quantized rows, rotated queries, the KV cache, and attention, of random inputs."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, weight, gate_up = random(9, 576), random(576), random(9, 2 * 576)
    found = [*kernels.quantize(x), *kernels.norm_quantize(x, weight, 1e-5), *kernels.gate_quantize(gate_up)]
    qkv, pool, (cosines, sines) = random(40, 6 + 2 * 2, 64), random(4, 120, 64), random(2, 40, 64)
    slots = torch.randperm(120, generator=generator)[:40]
    kernels.rotate(qkv, HeadNorms(None, None, 1e-5), Rotation(cosines, sines, slots), pool)
    queries = qkv[:, :6]
    spans = [AttendedSpan(0, 39, 3, 70, None), AttendedSpan(39, 1, 0, 120, None)]
    return [*found, queries, pool, kernels.attend(queries, pool, spans)]


def _random(count: int, width: int, channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    rows, weight = (
        torch.randint(-127, 128, (some, width), generator=generator, dtype=torch.int8)
        for some in (count, channels)
    )
    return rows, weight
