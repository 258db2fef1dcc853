"""The loss equals the model's own, adds up over micro-batches, and counts target tokens."""

import math
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from handspun.data.examples import Example
from handspun.training.batching import collate
from handspun.training.objectives import PaddedRunner, cross_entropy_sum, padded_loss
from tiny import tiny_model

FAMILIES = ["qwen2", "llama"]


def example(length: int, learned_from: int, seed: int = 0) -> Example:
    ids = torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(ids, [i >= learned_from for i in range(length)], "rows.csv", seed + 1)


BATCH = [example(9, 4, 1), example(17, 10, 2), example(5, 2, 3)]


def test_a_sum_and_a_count_by_hand() -> None:
    """-log 1/2 - log 1/4 over two target positions; the third is no target."""
    logits = torch.log(torch.tensor([[[0.25, 0.25, 0.5], [0.25, 0.5, 0.25], [0.9, 0.05, 0.05]]]))
    loss, count = cross_entropy_sum(logits, torch.tensor([[2, 0, -100]]))
    assert count == 2
    assert loss.item() == pytest.approx(math.log(8))


def test_the_first_learned_token_is_predicted_by_the_position_before_it() -> None:
    model = tiny_model("llama")
    one = Example([7, 8, 9], [False, False, True], "rows.csv", 1)
    loss, count = padded_loss(model, [one], pad_token_id=0, dtype=torch.float32)
    logits = model(torch.tensor([[7, 8]])).logits[0, -1]
    assert count == 1
    assert loss.item() == pytest.approx(-logits.log_softmax(-1)[9].item(), rel=1e-6)


def test_nothing_learned_gives_zero_and_a_graph() -> None:
    logits = torch.zeros(1, 3, 5, requires_grad=True)
    loss, count = cross_entropy_sum(logits, torch.full((1, 3), -100))
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_equals_the_models_own(family: Any) -> None:
    model = tiny_model(family)
    batch = collate(BATCH, pad_token_id=0)
    theirs = model(**batch).loss
    ours, count = padded_loss(model, BATCH, pad_token_id=0, dtype=torch.float32)
    assert count == sum(e.learned_tokens for e in BATCH)
    assert (ours / count).item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_models_own(family: Any) -> None:
    model = tiny_model(family)
    model(**collate(BATCH, pad_token_id=0)).loss.backward()
    theirs = gradients(model)
    ours, count = padded_loss(model, BATCH, pad_token_id=0, dtype=torch.float32)
    (ours / count).backward()
    assert_close(gradients(model), theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_at_a_time_gives_the_gradient_of_the_batch(family: Any) -> None:
    model = tiny_model(family)
    whole, count = padded_loss(model, BATCH, pad_token_id=0, dtype=torch.float32)
    (whole / count).backward()
    together = gradients(model)
    for row in BATCH:
        loss, _ = padded_loss(model, [row], pad_token_id=0, dtype=torch.float32)
        (loss / count).backward()
    assert_close(gradients(model), together)


def test_row_losses_are_those_of_each_row_alone_in_float32() -> None:
    """Although the runner trains in bfloat16, whose loss is another."""
    model = tiny_model("llama", initializer_range=0.05)
    alone = [padded_loss(model, [row], pad_token_id=0, dtype=torch.float32)[0].item() for row in BATCH]
    runner = PaddedRunner(model, torch.bfloat16, 0)
    assert runner.row_losses(BATCH) == pytest.approx(alone, rel=1e-6)
    assert runner.loss(BATCH) == pytest.approx(sum(alone), rel=1e-6)
    assert abs(runner.backward(BATCH, 1) - sum(alone)) > 1e-5 * sum(alone)


def test_padded_loss_keeps_no_keys_and_values() -> None:
    """They would take memory for a continuation that never comes."""
    model, outputs = tiny_model("llama"), list[Any]()
    model.register_forward_hook(lambda *seen: outputs.append(seen[-1]))
    padded_loss(model, BATCH, pad_token_id=0, dtype=torch.float32)
    assert [output.past_key_values for output in outputs] == [None]


def test_the_head_sees_only_positions_that_some_row_learns_from() -> None:
    """Of 9, 17 and 5 tokens, the rows learn from the 4th to 8th, 10th to 16th and 2nd to 4th positions."""
    model, outputs = tiny_model("llama"), list[Any]()
    model.register_forward_hook(lambda *seen: outputs.append(seen[-1]))
    padded_loss(model, BATCH, pad_token_id=0, dtype=torch.float32)
    assert [output.logits.shape[:2] for output in outputs] == [(3, 14)]


def test_the_pad_id_does_not_matter() -> None:
    model = tiny_model("qwen2")
    losses = [padded_loss(model, BATCH, pad_token_id=pad, dtype=torch.float32)[0].item() for pad in (0, 7, 299)]
    assert losses[0] == losses[1] == losses[2]


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())
