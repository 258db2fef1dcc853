"""The head's gradient in place is the one that autograd finds."""

import math

import pytest
import torch
from torch import nn

from handspun.training import objectives
from handspun.training.objectives import linear_cross_entropy, linear_cross_entropy_backward


@pytest.fixture(params=["MKL", "oneDNN"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run with either library, whichever this CPU would use."""
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch is without oneDNN")
    monkeypatch.setattr(objectives, "beats_mkl", lambda _: request.param == "oneDNN")
    monkeypatch.setattr(objectives, "_CHANNELS", 4)  # 11 channels are two times 4, and 3


def a_head(*, bias: bool = False, frozen: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 11, bias=bias).requires_grad_(not frozen)


class Wrapped(nn.Module):
    """A head that is not a plain linear layer: it goes through autograd."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.inner = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return y


def test_two_equal_logits_by_hand() -> None:
    """p = (1/2, 1/2), so the loss is log 2 and d loss / d logits = (-1/2, 1/2), divided by 4."""
    head = nn.Linear(1, 2, bias=False)
    head.weight = nn.Parameter(torch.tensor([[3.0], [3.0]]))
    loss, gradient = linear_cross_entropy_backward(head, torch.tensor([[2.0]]), torch.tensor([0]), 4)
    assert loss == pytest.approx(math.log(2))
    assert head.weight.grad is not None
    assert head.weight.grad.flatten().tolist() == pytest.approx([-0.25, 0.25])
    assert gradient.item() == pytest.approx(0.0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_autograd_finds_chunk_after_chunk(bias: bool, dtype: torch.dtype) -> None:
    head, plain = a_head(bias=bias), Wrapped(a_head(bias=bias))
    hidden, targets = torch.randn(7, 6).to(dtype) * 5, torch.tensor([0, 10, 3, 3, 5, 1, 2])
    for rows in (slice(0, 4), slice(4, 7)):
        loss, gradient = linear_cross_entropy_backward(head, hidden[rows], targets[rows], 9)
        wanted_loss, wanted = linear_cross_entropy_backward(plain, hidden[rows], targets[rows], 9)
        assert loss == pytest.approx(wanted_loss, rel=1e-6)
        assert loss == pytest.approx(linear_cross_entropy(head, hidden[rows], targets[rows]).item(), rel=1e-6)
        torch.testing.assert_close(gradient.to(dtype), wanted)
    for parameter, of_autograd in zip(head.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, of_autograd.grad)


def test_the_gradient_is_added_where_it_is() -> None:
    """No second array of the head's size, which a new gradient would be."""
    head, by_autograd = a_head(), list[torch.Tensor]()
    head.weight.register_hook(by_autograd.append)
    hidden, targets = torch.randn(3, 6), torch.tensor([1, 2, 3])
    linear_cross_entropy_backward(head, hidden, targets, 1)
    first = head.weight.grad
    assert first is not None
    once = first.clone()
    linear_cross_entropy_backward(head, hidden, targets, 1)
    assert head.weight.grad is first
    torch.testing.assert_close(first, 2 * once)
    assert not by_autograd


def test_a_frozen_head_hands_the_gradient_on_and_keeps_none() -> None:
    head, frozen = a_head(bias=True), a_head(bias=True, frozen=True)
    hidden, targets = torch.randn(3, 6), torch.tensor([1, 2, 3])
    assert torch.equal(
        linear_cross_entropy_backward(frozen, hidden, targets, 2)[1],
        linear_cross_entropy_backward(head, hidden, targets, 2)[1],
    )
    assert [parameter.grad for parameter in frozen.parameters()] == [None, None]


def test_rows_of_very_different_size_are_reduced_each_by_its_own_highest_logit() -> None:
    """Two equal logits of 1,000 in one row, of 0 in the other: log 2 each, and a gradient of a half."""
    head = nn.Linear(1, 2, bias=False)
    head.weight = nn.Parameter(torch.tensor([[1000.0], [1000.0]]))
    hidden, targets = torch.tensor([[1.0], [0.0]]), torch.tensor([0, 1])
    loss, gradient = linear_cross_entropy_backward(head, hidden, targets, 1)
    assert loss == pytest.approx(2 * math.log(2), rel=1e-4)  # float32 near 1,000
    assert gradient.flatten().tolist() == pytest.approx([0.0, 0.0])
    assert head.weight.grad is not None
    assert head.weight.grad.flatten().tolist() == pytest.approx([-0.5, 0.5])


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_of_another_kind_gives_its_loss_without_gradients_too(bias: bool) -> None:
    hidden, targets = torch.randn(7, 6), torch.tensor([0, 10, 3, 3, 5, 1, 2])
    expected = linear_cross_entropy(Wrapped(a_head(bias=bias)), hidden, targets).item()
    with torch.no_grad():
        losses = [
            linear_cross_entropy(head, hidden, targets) for head in (a_head(bias=bias), Wrapped(a_head(bias=bias)))
        ]
    assert [loss.item() for loss in losses] == pytest.approx([expected] * 2, rel=1e-6)


def test_large_logits_do_not_overflow() -> None:
    head = nn.Linear(1, 3, bias=False)
    head.weight = nn.Parameter(torch.tensor([[200.0], [0.0], [-200.0]]))
    loss, _ = linear_cross_entropy_backward(head, torch.tensor([[1.0], [1.0]]), torch.tensor([0, 2]), 1)
    assert loss == pytest.approx(400.0)
