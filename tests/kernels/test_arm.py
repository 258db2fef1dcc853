"""The kernels of 64-bit ARM, in an emulator: the same bits as the reference has here, and of training
nearly the same numbers. Nothing is timed."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import plain_tiles
from handspun.kernels import native
from handspun.kernels.between_matmuls import Normed, RMSNorm
from handspun.kernels.packed_attention import PackedHeads
from handspun.kernels.reference import AttendedSpan, HeadNorms, ReferenceKernels, Rotation, extremes

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
FLAGS = {"neon": "-march=armv8-a", "dotprod": "-march=armv8.2-a+dotprod", "i8mm": "-march=armv8.2-a+dotprod+i8mm"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"needs {COMPILER} and {EMULATOR} (Debian: gcc-aarch64-linux-gnu and qemu-user)",
    ),
]
PLAIN = ReferenceKernels(attends=True)


class Calls:
    """Calls to the driver, and what is expected of each."""

    def __init__(self) -> None:
        self.request = b""
        self.expected: list[Tensor] = []
        self.exact = 0
        """How many of them, the first ones, are expected to the bit."""

    def add(self, function: int, sizes: list[int], arrays: list[Tensor | None], *expected: Tensor) -> None:
        numbers = torch.tensor([function, *sizes, *[0] * (11 - len(sizes)), len(arrays)])
        self.request += numbers.numpy().tobytes()
        for array in arrays:
            content = b"" if array is None else bytes_of(array)
            self.request += len(content).to_bytes(8, "little") + content
        self.expected += expected


def bytes_of(array: Tensor) -> bytes:
    return array.contiguous().view(torch.uint8).numpy().tobytes()


def padded(values: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, -values.shape[1] % multiple))


def add_quantizing(calls: Calls, sizes: Any) -> None:
    for rows, width in [(1, 1), (5, 33), (7, 64), (3, 576)]:
        x, gate_up, weight = torch.randn(rows, width) * 3, torch.randn(rows, 2 * width) * 9, torch.randn(width)
        if rows == 5:
            x[0], x[1, 0], x[2, 1], x[3] = 0, torch.nan, torch.inf, 1e-40
        whole = [rows, width, width + -width % sizes.pad]
        calls.add(1, whole, [x], PLAIN.hadamard(x))
        for function, arrays, (values, scale) in [
            (2, [x], PLAIN.quantize(x)),
            (3, [x, weight], PLAIN.scale_quantize(x, weight)),
            (4, [x, weight], PLAIN.norm_quantize(x, weight, 1e-6)),
            (5, [gate_up], PLAIN.gate_quantize(gate_up)),
        ]:
            calls.add(function, whole, list(arrays), padded(values, sizes.pad), scale)


def add_matmuls(calls: Calls, sizes: Any) -> None:
    for rows, width, channels in [(1, 64, 32), (2, 33, 70), (7, 576, 40), (13, 8, 1)]:
        for x, weight in (extremes(rows, width, channels), random_bytes(rows, width, channels)):
            row_scale, scale, bias = torch.rand(rows, 1), torch.rand(channels), torch.randn(channels)
            plain = PLAIN.int8_weight(weight)
            tiles, base, column_base = plain_tiles(weight, sizes.tile, sizes.group, sizes.pad)
            depth, filled = tiles.shape[1] * sizes.group, tiles.shape[0] * sizes.tile
            calls.add(
                6,
                [rows, width, depth, channels],
                [padded(x, sizes.pad), row_scale, tiles, base, scale, bias],
                plain.matmul(x, row_scale, scale, bias),
            )
            calls.add(10, [rows, width, depth, channels, filled], [weight], tiles, base, column_base)
            gradient = torch.randint(-127, 128, (rows, channels), dtype=torch.int8)
            calls.add(
                7,
                [rows, width, depth, filled],
                [padded(gradient, filled), row_scale, tiles, column_base],
                plain.transposed_matmul(gradient, row_scale),
            )


def add_attention(calls: Calls) -> None:
    for group, kv_heads, size in [(3, 1, 64), (1, 2, 32), (7, 2, 64), (2, 1, 128)]:
        heads, slots, spans = group * kv_heads, 120, [(0, 20, 3, 20), (20, 1, 30, 77), (21, 4, 10, 90)]
        is_half = kv_heads == 2
        qkv, pool = torch.randn(25, heads + 2 * kv_heads, size), torch.randn(2 * kv_heads, slots, size)
        pool = pool.half() if is_half else pool
        (cosines, sines), norm = torch.randn(2, 25, size), torch.randn(size)
        slot = torch.randperm(slots)[:25]
        turned, cache = qkv.clone(), pool.clone()
        PLAIN.rotate(turned, HeadNorms(norm, norm, 1e-6), Rotation(cosines, sines, slot), cache)
        arrays = [qkv, norm, norm, cosines, sines, slot, pool]
        calls.add(
            8, [25, 0, 0, heads, kv_heads, size, slots, is_half], list(arrays), turned[:, :heads].clone(), cache
        )
        queries = torch.randn(25, heads, size)
        numbers = torch.tensor([[*span, 0] for span in spans])
        calls.add(
            9,
            [25, 0, 0, group, kv_heads, size, slots, is_half, len(spans), 90],
            [queries, pool, numbers, torch.tensor([size**-0.5])],
            PLAIN.attend(queries, pool, [AttendedSpan(*span, None) for span in spans]),
        )


def add_training(calls: Calls) -> None:
    """The reference adds up in orders of PyTorch's own."""
    calls.exact, (rows, width, heads) = len(calls.expected), (37, 40, 3)
    for dtype in (torch.float32, torch.bfloat16):
        shape, (x, of_total, cosines, sines) = [rows, width, dtype == torch.bfloat16], torch.randn(4, rows, width)
        change, gate, up, first, second = torch.randn(5, rows, width).to(dtype)
        norm = RMSNorm(torch.randn(width).requires_grad_(), 1e-6)
        normed = Normed(*(some.detach() for some in PLAIN.add_norm(x, change, norm, dtype)))
        weight = norm.weight.detach()
        calls.add(11, shape, [x, change, weight], *normed)
        arrays = [normed.total, normed.factors, weight, first, second, of_total]
        found = PLAIN.add_norm_backward(normed, norm, [first, second], of_total, dtype)
        calls.add(12, shape, list(arrays), found.x, found.change, found.weight)
        some, back = torch.randn(rows, heads, width).to(dtype), torch.randn(rows, heads, width)
        calls.add(13, [*shape, heads, 0], [some, cosines, sines], PLAIN.rotate_heads(some, cosines, sines))
        turned = PLAIN.rotate_heads_backward(back, cosines, sines, dtype)
        calls.add(13, [*shape, heads, 1], [back, cosines, sines], turned)
        calls.add(14, shape, [gate, up], PLAIN.swiglu(gate, up))
        calls.add(15, shape, [gate, up, first], *PLAIN.swiglu_backward(gate, up, first))
    for edges, group, kv_heads, size in [([9, 50, 150], 3, 2, 32), ([0, 70], 1, 1, 64)]:
        tokens = edges[-1]
        queries, gradient = torch.randn(2, tokens, group * kv_heads, size)
        keys, values = torch.randn(2, tokens, kv_heads, size)
        pack = PackedHeads(queries, keys, values, edges, size**-0.5)
        output, sums = PLAIN.attend_pack(pack)
        calls.add(
            16,
            [tokens, size, 0, kv_heads, group, len(edges) - 1],
            [queries, keys, values, torch.tensor(edges), torch.tensor([pack.scaling]), gradient],
            *(output, *PLAIN.attend_pack_backward(pack, output, sums, gradient)),
        )


def random_bytes(rows: int, width: int, channels: int) -> tuple[Tensor, Tensor]:
    x, weight = (torch.randint(-127, 128, (some, width), dtype=torch.int8) for some in (rows, channels))
    return x, weight


@pytest.mark.parametrize("name", FLAGS)
def test_arm_kernels_equal_the_reference(name: str, tmp_path: Path) -> None:
    source, program = Path(native.__file__).with_name("kernels.c"), tmp_path / "driver"
    driver = Path(__file__).parents[1] / "helpers" / "arm_driver.c"
    flags = ["-O3", "-ffp-contract=off", "-fopenmp", "-static", "-w", FLAGS[name]]
    subprocess.run([COMPILER, *flags, str(driver), str(source), "-o", str(program), "-lm"], check=True)

    def answer(request: bytes) -> bytes:
        command = [EMULATOR, "-cpu", "max", str(program)]
        return subprocess.run(command, input=request, capture_output=True, check=True, timeout=300).stdout

    asked = Calls()
    asked.add(0, [], [])
    tile, group, pad = torch.frombuffer(bytearray(answer(asked.request)), dtype=torch.int64).tolist()
    sizes = SimpleNamespace(tile=tile, group=group, pad=pad)
    torch.manual_seed(0)
    calls = Calls()
    add_quantizing(calls, sizes)
    add_matmuls(calls, sizes)
    add_attention(calls)
    add_training(calls)
    found = bytearray(answer(calls.request))
    assert len(found) == sum(expected.nbytes for expected in calls.expected)
    for number, expected in enumerate(calls.expected):
        values = torch.frombuffer(found, dtype=expected.dtype, count=expected.numel()).view(expected.shape)
        found = found[expected.nbytes :]
        if expected.is_floating_point():
            values, expected = values.nan_to_num(nan=0.123), expected.nan_to_num(nan=0.123)
        if number < calls.exact:
            assert torch.equal(values, expected), f"call {number}"
        else:
            tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-2
            torch.testing.assert_close(values, expected, rtol=tolerance, atol=tolerance)
