"""Float matmuls of training through oneDNN: their gradients, and when they are used."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from handspun.kernels import cpu, onednn

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is without oneDNN"),
]

ZEN_5 = {"avx2", "avx_vnni", "avx512f", "avx512_vnni"}
LAPTOP = {"avx2"}


def test_linear_by_hand() -> None:
    """y = 1*3 + 2*4 + 5 = 16; dy/dx = (3, 4), dy/dw = (1, 2), dy/db = 1, times a gradient of 2."""
    x, weight, bias = (torch.tensor(values, requires_grad=True) for values in ([[1.0, 2.0]], [[3.0, 4.0]], [5.0]))
    y = onednn.linear(x, weight, bias)
    y.backward(torch.tensor([[2.0]]))
    assert y.tolist() == [[16.0]]
    assert [x.grad.tolist(), weight.grad.tolist(), bias.grad.tolist()] == [[[6.0, 8.0]], [[2.0, 4.0]], [2.0]]


@given(
    tokens=st.integers(0, 70),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    wanted=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    layout=st.sampled_from(["dense", "transposed", "columns of more", "expanded"]),
)
def test_linear_is_that_of_float64(
    tokens: int, inputs: int, outputs: int, wanted: tuple[bool, bool, bool], layout: str
) -> None:
    torch.manual_seed(0)
    x = arranged(tokens, inputs, layout).requires_grad_(wanted[0])
    weight, bias = (
        torch.randn(*shape, requires_grad=needs)
        for shape, needs in zip([(outputs, inputs), (outputs,)], wanted[1:], strict=True)
    )
    gradient = arranged(tokens, outputs, layout)
    y = onednn.linear(x, weight, bias)
    exact = x.detach().double() @ weight.detach().double().t() + bias.detach().double()
    near(y, exact)
    if not any(wanted):
        assert not y.requires_grad
        return
    y.backward(gradient)
    of_y, inputs_of = gradient.double(), (x, weight, bias)
    of_all = (of_y @ weight.double(), of_y.t() @ x.double(), of_y.sum(0))
    for tensor, needs, expected in zip(inputs_of, wanted, of_all, strict=True):
        assert (tensor.grad is not None) == needs
        if tensor.grad is not None:
            near(tensor.grad, expected)


def arranged(rows: int, columns: int, layout: str) -> Tensor:
    """Return random values, (rows, columns), in some order in memory."""
    if layout == "transposed":
        return torch.randn(columns, rows).t()
    if layout == "columns of more":
        return torch.randn(rows, 3 * columns)[:, columns : 2 * columns]
    if layout == "expanded":
        return torch.randn(1, columns).expand(rows, columns)
    return torch.randn(rows, columns)


def near(found: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(found.double(), exact.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("vendor", "flags", "limit", "expected"),
    [
        ("AuthenticAMD", ZEN_5, "", True),
        ("AuthenticAMD", ZEN_5, "AVX2", False),
        ("AuthenticAMD", LAPTOP, "", False),
        ("GenuineIntel", ZEN_5, "", False),
        ("", ZEN_5, "", False),
    ],
)
def test_beats_mkl_where_mkl_leaves_avx512_unused(
    vendor: str, flags: set[str], limit: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"vendor_id": vendor, "flags": " ".join(flags)}
    monkeypatch.setattr(cpu, "_field", lambda *names: next((values[n] for n in names if n in values), ""))
    monkeypatch.setattr(cpu, "_flags_of_the_cpu", cpu._flags_of_the_cpu.__wrapped__)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert onednn.beats_mkl(torch.device("cpu")) == expected
    assert not onednn.beats_mkl(torch.device("meta"))
