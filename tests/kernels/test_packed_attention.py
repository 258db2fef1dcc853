"""Attention of packs and its gradients: by hand, against PyTorch's in float64, and native against plain."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backends import NATIVE, backend
from handspun.kernels.packed_attention import PackedHeads, packed_attention
from handspun.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.cpu
PLAIN = ReferenceKernels(attends=True)


def random_heads(
    edges: list[int], *, group: int, kv_heads: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PackedHeads:
    """As a model gives them: heads of a token lie one after another."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys, values = (
        torch.randn(edges[-1], count, size, generator=generator, dtype=dtype).requires_grad_()
        for count in (group * kv_heads, kv_heads, kv_heads)
    )
    return PackedHeads(queries, keys, values, edges, size**-0.5)


def in_type(heads: PackedHeads, dtype: torch.dtype) -> PackedHeads:
    queries, keys, values = (
        x.detach().to(dtype).requires_grad_() for x in (heads.queries, heads.keys, heads.values)
    )
    return PackedHeads(queries, keys, values, heads.edges, heads.scaling)


def by_mask(heads: PackedHeads) -> Tensor:
    """PyTorch's attention of the whole pack, with a mask."""
    prefix, tokens = heads.edges[0], heads.edges[-1]
    lengths = [prefix, *(b - a for a, b in zip(heads.edges, heads.edges[1:], strict=False))]
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seen = ((sequence == 0) | (sequence == sequence[:, None])) & torch.ones(tokens, tokens).tril().bool()
    group = heads.queries.shape[1] // heads.keys.shape[1]
    queries, keys, values = (x.transpose(0, 1)[None] for x in (heads.queries, heads.keys, heads.values))
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=heads.scaling)
    return attended[0].transpose(0, 1)


def output_and_gradients(output: Tensor, heads: PackedHeads, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(output.shape, generator=generator)
    inputs = (heads.queries, heads.keys, heads.values)
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient.to(output.dtype))]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Relative, in the root mean square; to 0.5 at least: a token that sees itself alone has a gradient of 0."""
    assert len(found) == len(expected) == 4
    for name, x, y in zip(("output", "queries", "keys", "values"), found, expected, strict=True):
        assert x.shape == y.shape
        error, size = ((z.double().square().mean().sqrt().item()) for z in (x.double() - y, y))
        assert error <= tolerance * max(size, 0.5), name


def test_two_rows_by_hand() -> None:
    """A prefix of one token, and sequences of two tokens and one; a head of size 1 whose scores are 0 or log 3."""
    queries = torch.tensor([0.0, 0, math.log(3), 0]).view(4, 1, 1)
    keys, values = torch.tensor([1.0, 0, 1, 0]).view(4, 1, 1), torch.tensor([1.0, 2, 4, 8]).view(4, 1, 1)
    output = packed_attention(PLAIN, PackedHeads(queries, keys, values, [1, 3, 4], 1.0))
    # Token 2 sees tokens 0, 1 and itself, with weights of 3/7, 1/7 and 3/7; token 3 sees tokens 0 and itself.
    torch.testing.assert_close(output.flatten(), torch.tensor([1, 1.5, 17 / 7, 4.5]))


@pytest.mark.parametrize("edges", [[0, 3], [2, 5, 6], [1, 1, 4], [3]])
def test_gradients_of_the_plain_form_are_those_of_differences(edges: list[int]) -> None:
    heads = random_heads(edges, group=2, kv_heads=2, size=3, dtype=torch.float64)

    def attended(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return packed_attention(PLAIN, PackedHeads(queries, keys, values, edges, 0.7))

    assert torch.autograd.gradcheck(attended, (heads.queries, heads.keys, heads.values))


def test_the_plain_form_is_pytorchs_attention_with_a_mask() -> None:
    heads = random_heads([5, 30, 31, 70], group=3, kv_heads=2, size=16, dtype=torch.float64)
    found = output_and_gradients(packed_attention(PLAIN, heads), heads)
    assert_near(found, output_and_gradients(by_mask(heads), heads), 1e-13)


LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 128, 257, 300]))


@pytest.mark.parametrize("name", NATIVE)
@settings(deadline=None, max_examples=15)
@given(
    prefix=st.one_of(st.just(0), LENGTHS),
    lengths=st.lists(LENGTHS, min_size=1, max_size=4),
    group=st.sampled_from([1, 2, 3, 5, 7]),
    kv_heads=st.integers(1, 2),
    size=st.sampled_from([16, 64, 80, 128]),
    seed=st.integers(0, 1000),
)
def test_native_output_and_gradients_are_those_of_float64(
    name: str, prefix: int, lengths: list[int], group: int, kv_heads: int, size: int, seed: int
) -> None:
    edges = torch.tensor([prefix, *lengths]).cumsum(0).tolist()
    heads = random_heads(edges, group=group, kv_heads=kv_heads, size=size, seed=seed)
    exact = in_type(heads, torch.float64)
    found = output_and_gradients(packed_attention(backend(name), heads), heads)
    assert_near(found, output_and_gradients(packed_attention(PLAIN, exact), exact), 1e-6)


@pytest.mark.parametrize("name", NATIVE)
def test_long_rows_are_those_of_float64(name: str) -> None:
    """More keys than go backward at a time, in the prefix too, and of a sequence that is cut into most blocks."""
    for edges, group in (([300, 350, 700], 3), ([0, 2300], 1)):
        heads = random_heads(edges, group=group, kv_heads=1, size=32)
        exact = in_type(heads, torch.float64)
        found = output_and_gradients(packed_attention(backend(name), heads), heads)
        assert_near(found, output_and_gradients(packed_attention(PLAIN, exact), exact), 1e-6)


@pytest.mark.parametrize("name", NATIVE)
def test_bits_do_not_depend_on_threads(name: str) -> None:
    heads, found = random_heads([40, 600, 660], group=3, kv_heads=2, size=32), []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(output_and_gradients(packed_attention(backend(name), heads), heads))
    torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], others, strict=True))


@pytest.mark.parametrize("name", NATIVE)
def test_any_strides_give_the_same_bits(name: str) -> None:
    heads = random_heads([9, 50, 110], group=2, kv_heads=2, size=32)
    expected = output_and_gradients(packed_attention(backend(name), heads), heads)
    queries, keys = (x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in (heads.queries, heads.keys))
    values = heads.values.detach().transpose(1, 2).contiguous().transpose(1, 2)  # sizes lie apart
    assert not any(x.is_contiguous() for x in (queries, keys, values))
    queries, keys, values = (x.requires_grad_() for x in (queries, keys, values))
    others = PackedHeads(queries, keys, values, heads.edges, heads.scaling)
    found = output_and_gradients(packed_attention(backend(name), others), others)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", NATIVE)
def test_large_scores_neither_overflow_nor_vanish(name: str) -> None:
    """Scores of up to some thousand, where each row's weight is nearly all on one key."""
    heads = random_heads([20, 90], group=2, kv_heads=1, size=64)
    with torch.no_grad():
        heads.queries.mul_(100)
    exact = in_type(heads, torch.float64)
    output = packed_attention(backend(name), heads)
    assert_near(
        output_and_gradients(output, heads),
        output_and_gradients(packed_attention(PLAIN, exact), exact),
        1e-3,  # float32 holds scores of a thousand to 1e-4
    )


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_is_not_finite_is_seen_in_the_output(name: str, odd: float) -> None:
    heads = random_heads([0, 70], group=1, kv_heads=1, size=16)
    with torch.no_grad():
        heads.keys[3, 0, 5] = odd
    output = packed_attention(backend(name), heads)
    assert output[:3].isfinite().all()
    assert not output[3:].isfinite().all()


@pytest.mark.parametrize("name", NATIVE)
def test_heads_whose_size_is_no_multiple_of_16_are_refused(name: str) -> None:
    assert backend(name).can_attend_packs(9, 3, 80)
    assert not backend(name).can_attend_packs(9, 3, 72)
    assert not backend(name).can_attend_packs(9, 2, 64)
