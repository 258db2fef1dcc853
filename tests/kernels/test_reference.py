"""The kernels in PyTorch: worked out by hand, and against float64 and fractions."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from handspun.errors import ModelError
from handspun.kernels import reference
from handspun.kernels.reference import (
    block_of,
    exact_sums,
    exponential,
    extremes,
    fused_multiply_add,
    hadamard,
    int_mm,
    is_exact,
    lane_sum,
    quantize_rows,
    rms_norm,
    swiglu,
)
from handspun.models.fused import check_exact_decoding, decoded_sums
from handspun.models.int8 import check_exact, check_exact_matmuls, int8_linear

pytestmark = pytest.mark.cpu


def test_a_block_of_four_by_hand() -> None:
    assert hadamard(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[10.0, -2.0, -4.0, 0.0]]


def test_a_blocks_values_lie_apart() -> None:
    """Six is three blocks of two: values 0 and 3, 1 and 4, 2 and 5."""
    found = hadamard(torch.tensor([[1.0, 2.0, 3.0, 10.0, 20.0, 30.0]]))
    assert found.tolist() == [[11.0, 22.0, 33.0, -9.0, -18.0, -27.0]]


@pytest.mark.parametrize(("width", "block"), [(576, 64), (896, 64), (48, 16), (33, 1)])
def test_it_is_its_own_inverse(width: int, block: int) -> None:
    assert block_of(width) == block
    x = torch.randint(-100, 100, (3, width)).float()
    assert torch.equal(hadamard(hadamard(x)), block * x)


@pytest.mark.parametrize("width", [1, 33, 48, 576, 4864])
def test_it_is_sylvesters_matrix(width: int) -> None:
    """In integers, where nothing is rounded: H of 2n is ((H, H), (H, -H)), of values width / block apart."""
    x = torch.randint(-100, 100, (3, width))
    matrix = torch.ones(1, 1, dtype=torch.long)
    while len(matrix) < block_of(width):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    expected = torch.einsum("ij,njd->nid", matrix, x.view(3, len(matrix), -1)).reshape(3, width)
    assert torch.equal(hadamard(x.float()).long(), expected)


def test_a_value_a_hundred_times_the_others_does_not_drown_them() -> None:
    """127 steps up to 100 leave a value of 1 hardly any; spread over 64 values, 100 becomes 12.5."""
    torch.manual_seed(0)
    x, linear = torch.randn(20, 256), nn.Linear(256, 256, bias=False)
    x[:, 7] = 100
    exact = linear(x)
    rows, scale = quantize_rows(x)
    plain = nn.functional.linear(rows * scale, linear.weight)
    assert (int8_linear(linear)(x) - exact).norm() < (plain - exact).norm() / 4


@pytest.mark.parametrize("width", [16, 33, 200])
def test_rows_are_rounded_as_in_float64(width: int) -> None:
    """To one step where a value lies half way between two integers; scales to float32."""
    torch.manual_seed(0)
    kernels, x, norm = reference.ReferenceKernels(), torch.randn(5, 2 * width) * 3, torch.randn(width)
    x[3] = 0
    half, wide = x[:, :width].double(), x.double()
    exact = [half, F.rms_norm(half, (width,), norm.double(), 1e-6), F.silu(wide[:, :width]) * wide[:, width:]]
    rounded = [kernels.quantize(x[:, :width]), kernels.norm_quantize(x[:, :width], norm, 1e-6)]
    rounded.append(kernels.gate_quantize(x))
    for (found, scale), values in zip(rounded, exact, strict=True):
        transformed = hadamard(values)
        expected_scale = (transformed.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
        torch.testing.assert_close(scale.double(), expected_scale, rtol=1e-5, atol=0)
        difference = found.int() - (transformed / expected_scale).round().int()
        assert difference.abs().max() <= 1
        assert (difference != 0).float().mean() < 0.02


def test_a_row_that_is_not_finite_has_no_scale() -> None:
    """What it is multiplied with becomes NaN, which decoding reports; never a number that looks right."""
    rows, scale = quantize_rows(torch.tensor([[1.0, torch.nan], [torch.inf, 1.0], [254.0, -127.0]]))
    assert rows.tolist() == [[0, 0], [0, 0], [127, -64]]
    assert scale[:2].isnan().all()
    assert scale[2] == 2


def test_exponential_is_that_of_float64() -> None:
    x = torch.linspace(-87, 88, 100_001)
    expected = x.double().exp()
    assert ((exponential(x).double() - expected) / expected).abs().max() < 3e-7
    assert exponential(torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]
    assert (
        exponential(torch.tensor([-torch.inf, -1000.0])).tolist() == [exponential(torch.tensor(-87.3)).item()] * 2
    )
    assert exponential(torch.tensor(torch.nan)).isnan()


def test_lane_sum_by_hand() -> None:
    """2^24 swallows a 1 that is added to it alone, but not the 2 that two lanes have made of it."""
    x = torch.zeros(2, 17)
    x[0, [0, 16]] = torch.tensor([2.0**24, 1.0])  # one lane: 2^24 + 1
    x[1, [0, 4, 12]] = torch.tensor([2.0**24, 1.0, 1.0])  # lanes 4 and 12 are added before lane 0 joins
    assert lane_sum(x).tolist() == [2.0**24, 2.0**24 + 2]


def test_rms_norm_and_swiglu_by_hand() -> None:
    assert rms_norm(torch.tensor([[3.0, -3.0]]), torch.tensor([1.0, 2.0]), 0.0).tolist() == [[1.0, -2.0]]
    assert swiglu(torch.tensor([[0.0, 100.0, 5.0, 3.0]])).tolist() == [[0.0, 300.0]]


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=300)
@given(FLOATS, FLOATS, FLOATS)
def test_fused_multiply_add_rounds_once(a: float, b: float, c: float) -> None:
    """As the nearest float32 of the exact fraction; ties to even, as NumPy rounds an integer ratio."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    found = fused_multiply_add(*(torch.tensor(value) for value in (a, b, c))).item()
    assert found == nearest_float32(exact)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((1 + 2.0**-23) * 2.0**-12, (1 - 2.0**-23) * 2.0**-12, 1.0),
        ((1 + 2.0**-11) * 2.0**-12, 0.9995119571685791 * 2.0**-12, 1.0 + 2.0**-23),
    ],
    ids=["below", "above"],
)
def test_fused_multiply_add_beside_a_tie(a: float, b: float, expected: float) -> None:
    """1 + 2^-24 lies half way between two float32 values, and what float64 drops decides."""
    exact = Fraction(a) * Fraction(b) + 1
    assert float(exact) == 1 + 2.0**-24 != exact
    assert fused_multiply_add(torch.tensor(a), torch.tensor(b), torch.tensor(1.0)).item() == expected


def nearest_float32(exact: Fraction) -> float:
    """By trying the neighbors of a float64 that is near."""
    if exact == 0:
        return 0.0
    if abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103:
        return math.copysign(math.inf, exact)
    with np.errstate(all="ignore"):
        near = np.float32(float(exact))
        some = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    finite = [value for value in some if np.isfinite(value)]
    return float(min(finite, key=lambda value: (abs(Fraction(float(value)) - exact), value.view(np.uint32) & 1)))


def test_exact_sums_by_hand() -> None:
    rows, weight = torch.tensor([[1, -2, 127]]), torch.tensor([[3, 4, -127], [0, 1, 1]], dtype=torch.int8)
    assert exact_sums(rows, weight).tolist() == [[3 - 8 - 127 * 127, -2 + 127]]
    one = torch.ones(1, 100_000, dtype=torch.int8)
    assert exact_sums(128 * 127 * one.long(), one).tolist() == [[128 * 127 * 100_000]]  # beyond float32, and int16


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
WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "decoding": decoded_sums,
    "PyTorch": lambda rows, weight: int_mm(rows, weight.T),
    "in float32": lambda rows, weight: reference._int_mm_in_float(rows, weight.T),
}


def random_case(count: int, width: int, channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return (
        torch.randint(-127, 128, (count, width), generator=generator, dtype=torch.int8),
        torch.randint(-127, 128, (channels, width), generator=generator, dtype=torch.int8),
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", [random_case, extremes])
def test_sums_are_exact(
    way: str, shape: tuple[int, int, int], make: Callable[[int, int, int], tuple[Tensor, Tensor]]
) -> None:
    rows, weight = make(*shape)
    assert torch.equal(WAYS[way](rows, weight).float(), exact_sums(rows, weight).float())


def test_autocast_does_not_round_integer_sums() -> None:
    """In bfloat16 they would be rounded to 8 bits."""
    rows, weight = random_case(4, 300, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(WAYS["in float32"](rows, weight).long(), exact_sums(rows, weight))


def saturating(rows: Tensor, weight: Tensor) -> Tensor:
    """Two matmuls added in 16 bits, as the instructions before VNNI do it: what a guard must notice."""
    matmuls = (rows.int()[:, None] + 128) * weight.int()
    pairs = F.pad(matmuls, (0, matmuls.shape[2] % 2)).unflatten(2, (-1, 2)).sum(3)
    return pairs.clamp(-(2**15), 2**15 - 1).sum(2) - 128 * weight.int().sum(1)


def off_by_one(rows: Tensor, weight: Tensor) -> Tensor:
    sums = exact_sums(rows, weight)
    sums[-1, -1] += 1
    return sums


@pytest.mark.parametrize("matmul", [saturating, off_by_one])
def test_is_exact_notices_one_wrong_sum(matmul: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert is_exact(exact_sums)
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
    assert is_exact(decoded_sums)
