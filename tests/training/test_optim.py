"""The learning rate as a table, and what is decayed."""

import math
from typing import Any, Literal

import pytest
import torch

from handspun.config import TrainConfig
from handspun.training.optim import clip_gradients, lr_at, make_optimizer
from tiny import tiny_model


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # ten steps, two of warm-up: 0.5, 1, then the schedule over the eight that are left
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("cosine", [0.5, 1, 1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381]),
    ],
)
def test_learning_rate_by_step(schedule: Any, expected: list[float]) -> None:
    config = TrainConfig(learning_rate=1.0, lr_schedule=schedule, warmup_ratio=0.2)
    assert [lr_at(step, 10, config) for step in range(10)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.15, [0.5, 1, 1, 7 / 8]),  # 1.5 steps are two
        (0.11, [0.5, 1, 1, 7 / 8]),  # 1.1 steps too
        (0.1, [1, 1, 8 / 9, 7 / 9]),
        (0.01, [1, 1, 8 / 9, 7 / 9]),
        (0.0, [1, 9 / 10, 8 / 10, 7 / 10]),
        (0.3, [1 / 3, 2 / 3, 1, 1]),
    ],
)
def test_steps_of_warmup_are_rounded_up(ratio: float, expected: list[float]) -> None:
    config = TrainConfig(learning_rate=1.0, lr_schedule="linear", warmup_ratio=ratio)
    assert [lr_at(step, 10, config) for step in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit"])
def test_two_updates_by_hand(states: Literal["float32", "bfloat16", "8bit"]) -> None:
    """Step 1: both moments are the gradient's own, so the update is lr * g / (|g| + 1e-8): lr / 2 for a gradient
    of 1e-8, lr for 1. Step 2, without a gradient: exp_avg is 0.09 g / 0.19, exp_avg_sq 0.000999 g^2 / 0.001999."""
    config = TrainConfig(learning_rate=0.5, weight_decay=0.1, optimizer_states=states)
    model = torch.nn.Linear(2, 1)
    optimizer = make_optimizer(model, config)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(2.0)
    model.weight.grad, model.bias.grad = torch.tensor([[1.0, 1e-8]]), torch.tensor([1.0])
    optimizer.step()
    decayed = 2 - 0.5 * 0.1 * 2
    torch.testing.assert_close(model.weight.data, torch.tensor([[decayed - 0.5, decayed - 0.25]]))
    torch.testing.assert_close(model.bias.data, torch.tensor([1.5]))  # not decayed
    model.weight.grad, model.bias.grad = torch.zeros(1, 2), torch.zeros(1)
    optimizer.step()
    update = 0.5 * (0.09 / 0.19) / (0.000999 / 0.001999) ** 0.5
    near = {"float32": 1e-5, "bfloat16": 0.01, "8bit": 0.1}[states] * update
    torch.testing.assert_close(model.bias.data, torch.tensor([1.5 - update]), rtol=0, atol=near)
    once = decayed - 0.5
    torch.testing.assert_close(
        model.weight.data[0, 0], torch.tensor(once - 0.5 * 0.1 * once - update), rtol=0, atol=near
    )


def test_no_warmup_divides_by_nothing() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_ratio=0.0)
    assert lr_at(0, 1, config) == 1.0


def test_a_run_of_warmup_alone_ends_at_the_peak() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_ratio=1.0)
    assert [lr_at(step, 4, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_biases_and_norms_are_not_decayed() -> None:
    optimizer = make_optimizer(tiny_model("qwen2"), TrainConfig(weight_decay=0.1))
    decayed, spared = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert {p.ndim for p in decayed["params"]} == {2}
    assert spared["weight_decay"] == 0.0
    assert {p.ndim for p in spared["params"]} == {1}


def test_float32_states_are_updated_by_the_fused_kernel() -> None:
    """It reads and writes each value once; the loop over parameters does so a dozen times."""
    assert make_optimizer(tiny_model("qwen2"), TrainConfig()).defaults["fused"] is True


def test_frozen_parameters_are_not_given_to_the_optimizer() -> None:
    model = tiny_model("qwen2").requires_grad_(False)
    head = model.get_output_embeddings().weight.requires_grad_(True)
    groups = make_optimizer(model, TrainConfig()).param_groups
    assert [p is head for group in groups for p in group["params"]] == [True]
    assert isinstance(head, torch.Tensor)


@pytest.mark.parametrize("max_norm", [1.0, math.inf])
def test_clip_gradients_by_hand(max_norm: float) -> None:
    """A matrix of 3 and 4 in its two rows and a bias of 12: 13 together. Without gradients, nothing is clipped."""
    model = torch.nn.Linear(2, 2)
    assert clip_gradients(model, max_norm) == 0.0
    model.weight.grad = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    model.bias.grad = torch.tensor([0.0, 12.0])
    assert clip_gradients(model, max_norm) == pytest.approx(13.0)
    factor = 1.0 if max_norm == math.inf else 1 / 13
    torch.testing.assert_close(model.weight.grad, factor * torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
    torch.testing.assert_close(model.bias.grad, factor * torch.tensor([0.0, 12.0]))


@pytest.mark.parametrize("max_norm", [13.0, 14.0])
def test_gradients_at_or_below_the_norm_are_not_clipped(max_norm: float) -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    model.bias.grad = torch.tensor([0.0, 12.0])
    assert clip_gradients(model, max_norm) == pytest.approx(13.0)
    torch.testing.assert_close(model.bias.grad, torch.tensor([0.0, 12.0]))


def test_the_gradient_norm_of_a_large_matrix() -> None:
    """PyTorch's norm of the whole is off by more than 1e-4 here, on a CPU."""
    torch.manual_seed(0)
    model = torch.nn.Linear(256, 20_000)
    gradients = torch.randn(20_000, 256) * torch.rand(20_000, 1) ** 4, torch.randn(20_000)
    model.weight.grad, model.bias.grad = (gradient.clone() for gradient in gradients)
    expected = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
    assert clip_gradients(model, expected / 2) == pytest.approx(expected, rel=2e-6)
    torch.testing.assert_close(model.weight.grad, gradients[0] / 2, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(model.bias.grad, gradients[1] / 2, rtol=1e-5, atol=0.0)
