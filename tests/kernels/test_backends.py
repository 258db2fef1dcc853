"""The native kernels of each instruction set return the bits of the plain form, and so those of each other."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from backends import AVAILABLE, NATIVE, backend, chosen, needs_kernels, plain_tiles
from handspun.kernels.native import NativeKernels
from handspun.kernels.reference import AttendedSpan, HeadNorms, ReferenceKernels, Rotation, extremes
from handspun.models.fused import Int8Product
from handspun.models.int8 import int8_linear

pytestmark = pytest.mark.cpu
PLAIN = ReferenceKernels(attends=True)
WIDTHS = st.one_of(st.integers(1, 200), st.sampled_from([576, 896, 1536, 2112]))
SEEDS = st.integers(0, 2**32 - 1)
PROPERTY = settings(deadline=None, max_examples=20)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Bit for bit, where any NaN equals any other."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if found.is_floating_point():
        assert torch.equal(found.isnan(), expected.isnan())
        found, expected = found.nan_to_num(), expected.nan_to_num()
    assert torch.equal(found, expected)


def values(seed: int, *shape: int) -> Tensor:
    """Random rows; some hold zeros, values that are subnormal or huge, NaN, or infinity."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10 ** (4 * torch.rand(1, generator=generator) - 2)
    odd = [0.0, 1e-40, -1e-45, 3e38, torch.nan, torch.inf, -torch.inf]
    for row in range(1, len(x), 3):
        kind = odd[row // 3 % len(odd)]
        if kind == 0.0:
            x[row] = 0
        else:
            x[row, int(torch.randint(x.shape[1], (1,), generator=generator))] = kind
    return x


@pytest.mark.parametrize("name", NATIVE)
@PROPERTY
@given(rows=st.sampled_from([1, 2, 7, 22, 65]), width=WIDTHS, seed=SEEDS)
def test_quantizing_equals_the_reference(name: str, rows: int, width: int, seed: int) -> None:
    kernels, x, gate_up = backend(name), values(seed, rows, width), values(seed + 1, rows, 2 * width)
    weight = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    assert_same(kernels.hadamard(x), PLAIN.hadamard(x))
    for function, arguments in [
        ("quantize", (x,)),
        ("scale_quantize", (x, weight)),
        ("norm_quantize", (x, weight, 1e-6)),
        ("gate_quantize", (gate_up,)),
    ]:
        found, scale = getattr(kernels, function)(*arguments)
        expected, expected_scale = getattr(PLAIN, function)(*arguments)
        assert_same(scale, expected_scale)
        assert_same(found[:, :width], expected)
        assert not found[:, width:].any()


@pytest.mark.parametrize("name", NATIVE)
@PROPERTY
@given(rows=st.integers(1, 66), width=WIDTHS, channels=st.integers(1, 140), seed=SEEDS)
def test_matmuls_equal_the_reference(name: str, rows: int, width: int, channels: int, seed: int) -> None:
    """Sums are exact, scales come in one order, both ways, from one row to more than two rounds of them."""
    kernels, generator = backend(name), torch.Generator().manual_seed(seed)
    x, weight, gradient = (
        torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        for shape in ((rows, width), (channels, width), (rows, channels))
    )
    if seed % 3 == 0:
        x, weight = extremes(rows, width, channels)
    scale, row_scale = torch.rand(channels, generator=generator), torch.rand(rows, 1, generator=generator)
    bias = torch.randn(channels, generator=generator) if seed % 2 else None
    matrix, plain = kernels.int8_weight(weight), PLAIN.int8_weight(weight)
    assert_same(matrix.matmul(x, row_scale, scale, bias), plain.matmul(x, row_scale, scale, bias))
    assert_same(matrix.transposed_matmul(gradient, row_scale), plain.transposed_matmul(gradient, row_scale))
    some = torch.randint(channels, (5,), generator=generator)
    assert_same(matrix.rows(some), weight[some])
    tiles = plain_tiles(weight, kernels.tile, kernels.group, kernels.pad)
    for found, expected in zip(matrix.buffers(), tiles, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("name", NATIVE)
@PROPERTY
@given(
    rows=st.integers(1, 5),
    sixteens=st.integers(1, 9),
    channels=st.integers(1, 11),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=SEEDS,
)
def test_float_matmuls_equal_the_reference(
    name: str, rows: int, sixteens: int, channels: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 16 * sixteens, generator=generator)
    weight = torch.randn(channels, 16 * sixteens, generator=generator).to(dtype)
    bias = torch.randn(channels, generator=generator) if seed % 2 else None
    found = backend(name).float_matmul(x, weight, bias)
    assert_same(found, PLAIN.float_matmul(x, weight, bias))
    exact = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", NATIVE)
def test_the_largest_sums_are_exact(name: str) -> None:
    """Pairs of 255 * 127, or of 128 * 127 and more, do not fit into 16 bits, where some instructions add them."""
    width, channels = 8192, 68
    weight, one = torch.full((channels, width), 127, dtype=torch.int8), torch.ones(7, 1)
    matrix, turned = (backend(name).int8_weight(some) for some in (weight, weight.T.contiguous()))
    for value in (127, -127, -128):
        rows = torch.full((7, width), value, dtype=torch.int8)
        assert (matrix.matmul(rows, one, torch.ones(channels), None) == float(value * 127 * width)).all()
        assert (turned.transposed_matmul(rows, one) == float(value * 127 * width)).all()


@pytest.mark.parametrize("name", NATIVE)
@PROPERTY
@given(
    heads=st.sampled_from([(3, 1, 64), (2, 2, 32), (14, 2, 64), (4, 1, 128), (2, 1, 16), (1, 1, 80)]),
    lengths=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 90)), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=SEEDS,
)
def test_rotating_and_attending_equal_the_reference(
    name: str, heads: tuple[int, int, int], lengths: list[tuple[int, int]], dtype: torch.dtype, seed: int
) -> None:
    """Prompts, pieces of them, single tokens, and trees, each of a length of its own, in one call."""
    kernels, generator = backend(name), torch.Generator().manual_seed(seed)
    (queries, kv_heads, size), tokens = heads, sum(new for new, _ in lengths)
    slots = sum(new + before for new, before in lengths)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    qkv, pool = random(tokens, queries + 2 * kv_heads, size), random(2 * kv_heads, slots, size)
    norms = (random(size), random(size)) if seed % 2 else (None, None)
    cosines, sines, spans = random(tokens, size), random(tokens, size), []
    mapping: list[int] = []
    first = start = 0
    for new, before in lengths:
        mask = None
        if seed % 5 == 0:
            mask = torch.rand(new, new + before, generator=generator) < 0.5
            mask[:, 0] = True
        spans.append(AttendedSpan(first, new, start, new + before, mask))
        mapping += range(start + before, start + before + new)
        first, start = first + new, start + new + before
    found = []
    for one in (kernels, PLAIN):
        x, cache = qkv.clone(), pool.to(dtype, copy=True)
        one.rotate(x, HeadNorms(*norms, 1e-6), Rotation(cosines, sines, torch.tensor(mapping)), cache)
        found.append((x[:, :queries], cache, one.attend(x[:, :queries], cache, spans)))
    for native, plain in zip(*found, strict=True):
        assert_same(native, plain)


@pytest.mark.parametrize("name", NATIVE)
def test_keys_are_kept_to_the_nearest_float16(name: str) -> None:
    """Between two, to the even one; subnormal ones too. What is too large becomes infinite, not the largest."""
    values = [
        1 + 2**-11,
        1 + 3 * 2**-11,
        65_504.0,
        65_519.0,
        65_520.0,
        -1e30,
        2**-24,
        2**-25,
        3 * 2**-26,
        -0.0,
        0.1,
    ]
    kept = [1.0, 1 + 2**-9, 65_504.0, 65_504.0, torch.inf, -torch.inf, 2**-24, 0.0, 2**-24, -0.0, 0.0999755859375]
    qkv, pool = torch.tensor([*values, *[0.0] * 5]).repeat(1, 3, 1), torch.zeros(2, 1, 16, dtype=torch.float16)
    ones, zeros, here = torch.ones(1, 16), torch.zeros(1, 16), torch.zeros(1, dtype=torch.long)
    backend(name).rotate(qkv, HeadNorms(None, None, 1e-6), Rotation(ones, zeros, here), pool)
    assert pool[1, 0, :11].tolist() == kept


@pytest.mark.parametrize("name", NATIVE)
def test_a_token_attends_the_same_however_the_prompt_is_cut(name: str) -> None:
    torch.manual_seed(0)
    kernels, queries, pool = backend(name), torch.randn(150, 6, 64), torch.randn(4, 160, 64).half()
    whole = kernels.attend(queries, pool, [AttendedSpan(0, 150, 7, 150, None)])
    for cuts in ([1, 150], [64, 65, 150], [17, 80, 149, 150], list(range(1, 151))):
        starts = [0, *cuts[:-1]]
        spans = [AttendedSpan(a, b - a, 7, b, None) for a, b in zip(starts, cuts, strict=True)]
        assert torch.equal(kernels.attend(queries, pool, spans), whole)


@pytest.mark.parametrize("name", NATIVE)
def test_attention_is_that_of_pytorch(name: str) -> None:
    torch.manual_seed(0)
    queries, pool = torch.randn(40, 6, 64), torch.randn(4, 40, 64)
    found = backend(name).attend(queries, pool, [AttendedSpan(0, 40, 0, 40, None)])
    keys, kept = pool.double().split(2)
    expected = nn.functional.scaled_dot_product_attention(
        queries.transpose(0, 1).double(), keys, kept, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(found.double(), expected.transpose(0, 1).reshape(40, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_is_the_same_whatever_is_beside_it(name: str, threads: int) -> None:
    torch.manual_seed(0)
    kernels, x = backend(name), torch.randn(40, 68)
    matrix, ones = kernels.int8_weight(torch.randint(-127, 128, (200, 68), dtype=torch.int8)), torch.ones(200)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        whole = matrix.matmul(*kernels.quantize(x), ones, None)
        for count in (1, 2, 3, 7, 13, 39):
            assert torch.equal(matrix.matmul(*kernels.quantize(x[-count:]), ones, None), whole[-count:])
    finally:
        torch.set_num_threads(before)


def computed(name: str) -> dict[str, list[str]]:
    """What int8 layers compute with some kernels, as texts that are the same only if every bit is."""
    torch.manual_seed(0)
    weight, x = torch.randint(-100, 101, (96, 2112)) / 64, torch.randint(-900, 901, (9, 2112)) / 128
    linear = nn.Linear(2112, 96, bias=False)
    linear.weight.data.copy_(weight)
    with chosen(name):
        layer, rows, product = int8_linear(linear), x.clone().requires_grad_(), Int8Product(weight, None)
    trained = layer(rows)
    [gradient] = torch.autograd.grad(trained, rows, trained.detach())
    all_values = {"decoding": product(x), "training": trained.detach(), "gradient": gradient}
    all_values["float"] = layer.float_weight()
    return {key: [value.hex() for value in some.flatten()[::37].tolist()] for key, some in all_values.items()}


@pytest.mark.slow
@needs_kernels
def test_layers_have_the_same_bits_in_a_process_held_to_avx2() -> None:
    """The reference there, and all kernels here."""
    code = "import json, test_backends as t; print(json.dumps(t.computed('reference')))"
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | limits | paths, check=False
    )
    assert done.returncode == 0, done.stderr
    plain = json.loads(done.stdout.splitlines()[-1])
    for name in AVAILABLE:
        assert computed(name) == plain


@needs_kernels
def test_kernels_are_pickled_by_name() -> None:
    kernels = backend(AVAILABLE[0])
    layer: Any = nn.Linear(64, 32)
    copied = pickle.loads(pickle.dumps(int8_linear(layer)))
    assert pickle.loads(pickle.dumps(kernels)) is kernels
    assert isinstance(copied.kernels, NativeKernels)
    x = torch.randn(3, 64)
    assert torch.equal(copied(x), int8_linear(layer)(x))
