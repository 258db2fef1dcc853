"""int8 sums: exact on whatever CPU this is, and in processes that are held to older instructions."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from handspun.errors import ModelError
from handspun.kernels import int8_matmul
from handspun.kernels.int8_matmul import PackedInt8, exact_sums, extremes, int_mm, is_exact
from handspun.models.fused import Int8Product, check_exact_decoding, decoded_sums
from handspun.models.int8 import Int8Linear, bytes_of, check_exact, check_exact_matmuls, int8_linear, int8_of

pytestmark = pytest.mark.cpu

SHAPES = [
    (1, 896, 512),
    (4, 1, 3),
    (2, 64, 32),
    (3, 33, 7),
    (5, 9000, 40),
    (7, 3, 5),
    (33, 4864, 130),
    (130, 2048, 4),
]
"""(rows, in, out): of a model's layers, and odd ones."""


def random_case(count: int, width: int, channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    rows = torch.randint(256, (count, width), generator=generator, dtype=torch.uint8)
    return rows, torch.randint(-127, 128, (channels, width), generator=generator, dtype=torch.int8)


def in_halves(rows: Tensor, weight: Tensor) -> Tensor:
    """The way of CPUs without VNNI, which is exact on the others too."""
    packed = PackedInt8(weight, in_halves=True, at_once=False)
    return packed.matmul(rows, torch.ones(len(rows), 1), torch.ones(len(weight)), None)


def in_float(rows: Tensor, weight: Tensor) -> Tensor:
    """The way of CPUs on which `torch._int_mm` is a plain loop."""
    return int8_matmul._int_mm_in_float(int8_of(rows), weight.T)


def in_training(rows: Tensor, weight: Tensor) -> Tensor:
    return int_mm(int8_of(rows), weight.T)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "decoding": decoded_sums,
    "training": in_training,
    "in halves": in_halves,
    "in float32": in_float,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", [random_case, extremes])
def test_sums_are_exact(way: str, shape: tuple[int, int, int], make: Any) -> None:
    rows, weight = make(*shape)
    expected = exact_sums(rows.int() - 128, weight)
    assert torch.equal(WAYS[way](rows, weight).float(), expected.float())


def test_exact_sums_by_hand() -> None:
    rows, weight = torch.tensor([[1, -2, 127]]), torch.tensor([[3, 4, -127], [0, 1, 1]], dtype=torch.int8)
    assert exact_sums(rows, weight).tolist() == [[3 - 8 - 127 * 127, -2 + 127]]
    one = torch.ones(1, 100_000, dtype=torch.int8)
    assert exact_sums(128 * 127 * one.long(), one).tolist() == [[128 * 127 * 100_000]]  # beyond float32, and int16


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 200), st.integers(1, 70), st.randoms(use_true_random=False))
def test_sums_of_any_shape_are_exact(count: int, width: int, channels: int, random: Any) -> None:
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    rows = torch.randint(256, (count, width), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (channels, width), generator=generator, dtype=torch.int8)
    expected = exact_sums(rows.int() - 128, weight)
    for way in WAYS.values():
        assert torch.equal(way(rows, weight).long(), expected)


@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_scales_come_in_the_plain_order(count: int, has_bias: bool) -> None:
    """Sums, channels' scales, rows' scales, bias: each rounded. With AMX, 4,864 columns are split."""
    rows, weight = random_case(count, 4864, 36)
    weight.abs_()
    row_scale, scale = torch.rand(count, 1), torch.rand(36)
    bias = torch.randn(36) if has_bias else None
    expected = exact_sums(rows.int() - 128, weight).float() * scale * row_scale
    expected = expected if bias is None else expected + bias
    packed = int8_matmul.packed_int8(weight)
    assert torch.equal(packed.matmul(rows, row_scale, scale, bias), expected)
    halves = PackedInt8(weight, in_halves=True, at_once=False)
    assert torch.equal(halves.matmul(rows, row_scale, scale, bias), expected)
    layer = Int8Linear(weight, scale, bias)
    assert torch.equal(layer.matmul_of_bytes(rows, row_scale), expected)


def test_autocast_does_not_round_integer_sums() -> None:
    """In bfloat16 they would be rounded to 8 bits."""
    rows, weight = random_case(4, 300, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(in_float(rows, weight).long(), exact_sums(rows.int() - 128, weight))


def saturating(rows: Tensor, weight: Tensor) -> Tensor:
    """Two matmuls added in 16 bits, as the instructions before VNNI do it: what a guard must notice."""
    matmuls = rows.int()[:, None] * weight.int()
    pairs = nn.functional.pad(matmuls, (0, matmuls.shape[2] % 2)).unflatten(2, (-1, 2)).sum(3)
    return pairs.clamp(-(2**15), 2**15 - 1).sum(2) - 128 * weight.int().sum(1)


def off_by_one(rows: Tensor, weight: Tensor) -> Tensor:
    sums = exact_sums(rows.int() - 128, weight)
    sums[-1, -1] += 1
    return sums


@pytest.mark.parametrize("matmul", [saturating, off_by_one])
def test_is_exact_notices_one_wrong_sum(matmul: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert is_exact(lambda rows, weight: exact_sums(rows.int() - 128, weight))
    assert not is_exact(matmul)
    with pytest.raises(ModelError, match=r"int8 matmuls are not exact on cpu .*Use --weights float32\."):
        check_exact([decoded_sums, matmul], torch.device("cpu"), remedy="--weights float32")


def test_products_that_are_missing_are_refused() -> None:
    def fails(rows: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError("_int_mm is not there\nand more")

    with pytest.raises(ModelError, match=r"not available on cpu: _int_mm is not there Use --weights float32\."):
        check_exact([fails], torch.device("cpu"), remedy="--weights float32")


def test_the_guards_pass_on_this_cpu() -> None:
    check_exact_decoding(torch.device("cpu"))
    check_exact_matmuls(torch.device("cpu"))


RESTRICTIONS = {
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "AVX2 with VNNI": {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "ATEN_CPU_CAPABILITY": "avx2"},
    "AVX-512 without VNNI": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX-512 with VNNI, without AMX": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}


def computed() -> dict[str, Any]:
    """What int8 layers compute, as texts that are the same only if every bit is; run in other processes too."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-100, 101, (96, 2112), generator=generator) / 64
    x = torch.randint(-900, 901, (9, 2112), generator=generator) / 128
    found = {"decoding": Int8Product(weight, None)(x)}
    linear = nn.Linear(2112, 96, bias=False)
    linear.weight.data.copy_(weight)
    layer, rows = int8_linear(linear), x.clone().requires_grad_()
    found["training"] = layer(rows)
    [found["gradient"]] = torch.autograd.grad(found["training"], rows, found["training"].detach())
    bits = {name: [value.hex() for value in values.flatten()[::37].tolist()] for name, values in found.items()}
    wrong = []
    for shape in ((1, 896, 64), (33, 200, 20), (40, 2112, 64)):
        for name, way in WAYS.items():
            rows_of, matrix = extremes(*shape)
            if not torch.equal(way(rows_of, matrix).float(), exact_sums(rows_of.int() - 128, matrix).float()):
                wrong.append(f"{name} {shape}")
    check_exact_decoding(torch.device("cpu"))
    check_exact_matmuls(torch.device("cpu"))
    whole = int8_matmul._qlinear_is_exact(in_halves=False, at_once=True)
    return {"bits": bits, "wrong": wrong, "whole bytes are exact": whole}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESTRICTIONS)
def test_older_cpus_have_the_same_bits(name: str) -> None:
    """The real matmuls in a process that is held to older instructions. Without VNNI, whole bytes saturate."""
    code = "import json, test_int8_matmul as t; print(json.dumps(t.computed()))"
    environment = (
        os.environ | RESTRICTIONS[name] | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["bits"] == computed()["bits"]
    if name in ("AVX2", "AVX-512 without VNNI"):
        assert not found["whole bytes are exact"]


def test_bytes_of_int8_values_and_back() -> None:
    values = torch.tensor([[-128, -127, -1, 0, 1, 127]], dtype=torch.int8)
    assert bytes_of(values).tolist() == [[0, 1, 127, 128, 129, 255]]
    assert torch.equal(int8_of(bytes_of(values)), values)
