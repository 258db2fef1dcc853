"""Norms, rotations, gates and their gradients: by hand, against transformers', and native against float64."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from backends import NATIVE, backend
from handspun.kernels.between_matmuls import LayerKernels, RMSNorm, add_norm, rotate_heads, swiglu
from handspun.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.cpu
PLAIN = ReferenceKernels()
EPS = 1e-5
HALVES = (torch.bfloat16, torch.float32)
Work = Callable[..., Sequence[Tensor]]
"""From the inputs that have gradients to outputs."""


def norm_work(kernels: LayerKernels, dtype: torch.dtype = torch.float32, consumers: int = 3) -> Work:
    def work(x: Tensor, change: Tensor, weight: Tensor) -> Sequence[Tensor]:
        wide = dtype if x.dtype == torch.float32 else x.dtype
        return add_norm(kernels, x, change, RMSNorm(weight, EPS), dtype=wide, consumers=consumers)

    return work


def rotation_work(kernels: LayerKernels, cosines: Tensor, sines: Tensor) -> Work:
    def work(x: Tensor) -> Sequence[Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        return [rotate_heads(kernels, x, cosines.to(wide), sines.to(wide))]

    return work


def gate_work(kernels: LayerKernels) -> Work:
    return lambda gate, up: [swiglu(kernels, gate, up)]


def norm_by_transformers(x: Tensor, change: Tensor, weight: Tensor, consumers: int = 3) -> Sequence[Tensor]:
    """In training, under autocast: each matmul rounds its input by itself."""
    total = x + change
    normed = LlamaRMSNorm.forward(_With(weight), total)  # type: ignore[arg-type]
    return [total, *(normed.to(change.dtype) for _ in range(consumers))]


class _With:
    """A norm, as far as its forward pass looks: its weight need not be a leaf."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.variance_epsilon = weight, EPS


def rotation_by_transformers(cosines: Tensor, sines: Tensor) -> Work:
    def work(x: Tensor) -> Sequence[Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        heads = x.transpose(0, 1)[None]
        rotated, _ = apply_rotary_pos_emb(heads, heads, cosines.to(wide)[None], sines.to(wide)[None])
        return [rotated[0].transpose(0, 1)]

    return work


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_inputs(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """x, a change of the matmuls' type, and weights."""
    x, change, weight = (random(*shape, seed=seed + i) for i, shape in enumerate([(rows, width)] * 2 + [(width,)]))
    return [x * 3, change.to(dtype), weight]


def outputs_and_gradients(work: Work, inputs: Sequence[Tensor], seed: int = 9) -> list[Tensor]:
    """The gradients of outputs are random, and the same for each type."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = work(*inputs)
    of_outputs = [random(*y.shape, seed=seed + i).bfloat16().to(y.dtype) for i, y in enumerate(outputs)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, of_outputs)]


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Relative errors, in the root mean square; a quantity of a size below 0.1 counts as one of 0.1."""
    assert len(found) == len(exact) > 1
    of_each = []
    for x, y in zip(found, exact, strict=True):
        assert x.shape == y.shape
        error, size = (z.double().square().mean().sqrt().item() for z in (x.double() - y.double(), y))
        of_each.append(error / max(size, 0.1))
    return of_each


def in_float64(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.double() for x in inputs]


def positions(tokens: int, size: int) -> tuple[Tensor, Tensor]:
    """Both halves differ, as no model has it, so that no half is taken for the other."""
    return random(tokens, size, seed=4), random(tokens, size, seed=5)


def test_add_norm_by_hand() -> None:
    x, change = torch.tensor([[1.0, 5.0]]), torch.tensor([[2.0, -1.0]])
    total, normed = add_norm(
        PLAIN, x, change, RMSNorm(torch.tensor([1.0, 2.0]), 0.0), dtype=torch.float32, consumers=1
    )
    assert total.tolist() == [[3, 4]]
    size = math.sqrt((9 + 16) / 2)
    torch.testing.assert_close(normed, torch.tensor([[3 / size, 8 / size]]))


def test_rotate_heads_by_hand() -> None:
    """Two heads of size 2, turned by a right angle."""
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    rotated = rotate_heads(PLAIN, x, torch.zeros(1, 2), torch.ones(1, 2))
    assert rotated.tolist() == [[[-2, 1], [-4, 3]]]


def test_swiglu_by_hand() -> None:
    output = swiglu(PLAIN, torch.tensor([[0.0, math.log(3)]]), torch.tensor([[5.0, 4.0]]))
    torch.testing.assert_close(output, torch.tensor([[0, 3 * math.log(3)]]))


@pytest.mark.parametrize("consumers", [1, 3])
def test_gradients_of_the_plain_norm_are_those_of_differences(consumers: int) -> None:
    inputs = [x.double().requires_grad_() for x in norm_inputs(3, 5)]
    assert torch.autograd.gradcheck(norm_work(PLAIN, consumers=consumers), inputs)


def test_gradients_of_the_plain_rotation_and_gate_are_those_of_differences() -> None:
    heads = random(3, 2, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(rotation_work(PLAIN, *positions(3, 6)), [heads])
    gate, up = (random(3, 5, seed=seed).double().requires_grad_() for seed in (1, 2))
    assert torch.autograd.gradcheck(gate_work(PLAIN), [gate, up])


def test_plain_forms_are_those_of_transformers() -> None:
    inputs = norm_inputs(4, 24)
    found = outputs_and_gradients(norm_work(PLAIN), inputs)
    assert max(errors(found, outputs_and_gradients(norm_by_transformers, inputs))) < 1e-6
    heads = [random(4, 3, 16)]
    found = outputs_and_gradients(rotation_work(PLAIN, *positions(4, 16)), heads)
    expected = outputs_and_gradients(rotation_by_transformers(*positions(4, 16)), heads)
    assert max(errors(found, expected)) < 1e-6
    gates = [random(4, 24), random(4, 24, seed=1)]
    found = outputs_and_gradients(gate_work(PLAIN), gates)
    assert max(errors(found, outputs_and_gradients(lambda x, y: [F.silu(x) * y], gates))) < 1e-6


ROWS = st.one_of(st.integers(1, 40), st.just(70))
WIDTHS = st.one_of(st.integers(5, 40), st.sampled_from([64, 576, 900]))


@pytest.mark.parametrize("name", NATIVE)
@settings(deadline=None, max_examples=15)
@given(rows=ROWS, width=WIDTHS, consumers=st.integers(1, 3), seed=st.integers(0, 1000))
def test_native_norms_are_those_of_float64(name: str, rows: int, width: int, consumers: int, seed: int) -> None:
    inputs = norm_inputs(rows, width, seed=seed)
    found = outputs_and_gradients(norm_work(backend(name), consumers=consumers), inputs)
    exact = outputs_and_gradients(norm_work(PLAIN, consumers=consumers), in_float64(inputs))
    assert max(errors(found, exact)) < 1e-6


@pytest.mark.parametrize("name", NATIVE)
@settings(deadline=None, max_examples=15)
@given(tokens=ROWS, heads=st.integers(1, 5), size=st.sampled_from([2, 16, 48, 64, 80, 128]))
def test_native_rotations_are_those_of_float64(name: str, tokens: int, heads: int, size: int) -> None:
    inputs = [random(tokens, heads, size)]
    found = outputs_and_gradients(rotation_work(backend(name), *positions(tokens, size)), inputs)
    exact = outputs_and_gradients(rotation_work(PLAIN, *positions(tokens, size)), in_float64(inputs))
    assert max(errors(found, exact)) < 1e-6


@pytest.mark.parametrize("name", NATIVE)
@settings(deadline=None, max_examples=15)
@given(rows=ROWS, width=WIDTHS, factor=st.sampled_from([1.0, 10.0, 100.0]))
def test_native_gates_are_those_of_float64(name: str, rows: int, width: int, factor: float) -> None:
    inputs = [random(rows, width) * factor, random(rows, width, seed=1)]
    found = outputs_and_gradients(gate_work(backend(name)), inputs)
    assert max(errors(found, outputs_and_gradients(gate_work(PLAIN), in_float64(inputs)))) < 1e-6


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("width", [7, 64, 200])
def test_bfloat16_is_no_farther_from_float64_than_transformers_is(name: str, width: int) -> None:
    """Where the matmuls are in bfloat16: what comes from them, and what goes to them."""
    kernels = backend(name)
    gates = [random(50, width, seed=seed, dtype=torch.bfloat16) for seed in (1, 2)]
    heads = [random(50, 3, 2 * width, dtype=torch.bfloat16)]
    angles = positions(50, 2 * width)
    cases: list[tuple[Work, Work, Work, list[Tensor]]] = [
        (
            norm_work(kernels, torch.bfloat16),
            norm_by_transformers,
            norm_work(PLAIN),
            norm_inputs(50, width, torch.bfloat16),
        ),
        (gate_work(kernels), lambda x, y: [F.silu(x) * y], gate_work(PLAIN), gates),
        (
            rotation_work(kernels, *angles),
            rotation_by_transformers(*angles),
            rotation_work(PLAIN, *angles),
            heads,
        ),
    ]
    for native, transformers, exact, inputs in cases:
        wanted = outputs_and_gradients(exact, in_float64(inputs))
        found = outputs_and_gradients(native, inputs)
        others = outputs_and_gradients(transformers, inputs)
        assert [x.dtype for x in found] == [x.dtype for x in others]
        for error, theirs in zip(errors(found, wanted), errors(others, wanted), strict=True):
            assert error <= 1.001 * theirs + 1e-7
            assert error < 3e-3  # half of 2 ** -8, and less in the mean


@pytest.mark.parametrize("name", NATIVE)
def test_rounding_to_bfloat16_is_pytorchs(name: str) -> None:
    """Any bits of a float: ties, what overflows, what is denormal, and NaN, whatever its lower bits are."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator, dtype=torch.int64).to(torch.int32)
    bits[:1024] = bits[:1024] & -(2**16) | 2**15  # halfway between two
    bits[1024:1030] = torch.tensor([0x7F7FFFFF, 0x7F800001, 0x7FC00000, -(2**31) + 1, 0x00000001, -1])
    values, none, ones = bits.view(torch.float32).view(256, 1, 16), torch.zeros(256, 1, 16), torch.ones(256, 32)
    heads = torch.cat([values, none], -1)  # turned by an angle of 0
    rounded = backend(name).rotate_heads_backward(heads, ones, 0 * ones, torch.bfloat16)[..., :16]
    assert torch.equal(rounded.nan_to_num(nan=0.5), values.bfloat16().nan_to_num(nan=0.5))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", HALVES)
def test_bits_do_not_depend_on_threads(name: str, dtype: torch.dtype) -> None:
    kernels, found = backend(name), []
    gates = [random(70, 100, seed=seed, dtype=dtype) for seed in (1, 2)]
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(
            [
                *outputs_and_gradients(norm_work(kernels, dtype), norm_inputs(70, 100, dtype)),
                *outputs_and_gradients(gate_work(kernels), gates),
                *outputs_and_gradients(rotation_work(kernels, *positions(70, 32)), [random(70, 3, 32).to(dtype)]),
            ]
        )
    torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], others, strict=True))


@pytest.mark.parametrize("name", NATIVE)
def test_any_strides_give_the_same_bits(name: str) -> None:
    kernels, x, change = backend(name), random(9, 20), random(9, 20, seed=1)
    turned = [some.T.contiguous().T for some in (x, change)]
    for work, inputs in (
        (lambda a, b: norm_work(kernels)(a, b, torch.ones(20)), [x, change]),
        (gate_work(kernels), [x, change]),
    ):
        found, expected = (outputs_and_gradients(work, some) for some in (turned, inputs))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", [*NATIVE, "reference"])
def test_frozen_weights_and_unused_outputs_get_no_gradient(name: str) -> None:
    kernels = PLAIN if name == "reference" else backend(name)
    x, change, weight = norm_inputs(5, 20)
    x.requires_grad_()
    total, normed, unused = add_norm(kernels, x, change, RMSNorm(weight, EPS), dtype=torch.float32, consumers=2)
    del unused
    (of_both,) = torch.autograd.grad([total.sum() + normed.square().sum()], x, retain_graph=True)
    (of_total,) = torch.autograd.grad([total.sum()], x, retain_graph=True)
    (of_norm,) = torch.autograd.grad([normed.square().sum()], x)
    assert weight.grad is None
    assert torch.equal(of_total, torch.ones_like(x))
    torch.testing.assert_close(of_both, of_total + of_norm)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_is_not_finite_is_seen_in_the_output(name: str, odd: float) -> None:
    x, change, weight = norm_inputs(3, 20)
    x[1, 7] = odd
    for output in norm_work(backend(name), torch.bfloat16)(x, change, weight):
        assert output[[0, 2]].isfinite().all()
        assert not output[1].isfinite().all()
    for inputs in ([x, change], [change, x]):
        (output,) = gate_work(backend(name))(*inputs)
        assert output[[0, 2]].isfinite().all()
        assert not output[1, 7].isfinite()
