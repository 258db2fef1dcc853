"""A step without a finite loss or gradient is not made; the run ends before it, or goes on as if it had been."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.errors import ConfigError, TrainingError
from handspun.training.guards import SkippedStep
from handspun.training.loop import Event, Loop, Step, TrainingState, start, train
from handspun.training.optim import lr_at
from handspun.training.runner import select_runner
from tiny import tiny_model

POISON = 329
"""A token whose embedding is no number: the rows that hold it have no finite loss."""

CONFIG = TrainConfig(num_epochs=1, batch_size=2, learning_rate=1e-3, on_nonfinite="skip")


def poisoned_model() -> PreTrainedModel:
    model = tiny_model("qwen2", initializer_range=0.05)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[POISON] = math.nan
    return model


def rows(poisoned: set[int], count: int = 12) -> list[Example]:
    return [
        Example(
            [row, POISON if row in poisoned else 100 + row, 3, 4, 5], [False, False, True, True, True], "a", row
        )
        for row in range(1, count + 1)
    ]


def run(config: TrainConfig, examples: list[Example]) -> Iterator[tuple[Event, TrainingState]]:
    model = poisoned_model()
    with select_runner(model, config, examples[:2], dtype=torch.float32, pad_token_id=0) as runner:
        state = start(model, config)
        for event in train(Loop(config=config, examples=examples, runner=runner), state):
            yield event, state


def values_of(state: TrainingState) -> list[Tensor]:
    states = [value for held in state.optimizer.state.values() for value in held.values()]
    return [tensor.detach().clone() for tensor in [*state.model.parameters(), *states]]


def test_a_skipped_step_changes_no_weight_and_no_state_and_the_schedule_goes_on() -> None:
    examples, before, events = rows({7}), list[Tensor](), []
    for event, state in run(CONFIG, examples):
        if isinstance(event, SkippedStep):
            assert all(map(torch.equal, *zip(*_without_poison(before, values_of(state)), strict=True)))
            assert all(parameter.grad is None for parameter in state.model.parameters())
        before = values_of(state)
        events.append(event)
    made = [event for event in events if isinstance(event, Step | SkippedStep)]
    assert [event.step for event in made] == [1, 2, 3, 4, 5, 6]
    (skipped,) = [event for event in made if isinstance(event, SkippedStep)]
    assert math.isnan(skipped.loss)
    assert ("a", 7) in skipped.batch
    assert len(skipped.batch) == 2
    assert skipped.skipped == 1
    steps = [event for event in made if isinstance(event, Step)]
    assert [step.learning_rate for step in steps] == [lr_at(step.step - 1, 6, CONFIG) for step in steps]


def _without_poison(before: list[Tensor], after: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs, with the NaN that was there from the start taken out: it equals nothing."""
    return ((a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))


def test_at_the_limit_the_run_goes_on_and_above_it_it_ends() -> None:
    poisoned = {1, 2, 3, 4, 5, 6, 7, 8}
    one_by_one = replace(CONFIG, batch_size=1, max_skipped_steps=8)
    events = [event for event, _ in run(one_by_one, rows(poisoned))]
    assert [event.skipped for event in events if isinstance(event, SkippedStep)] == [1, 2, 3, 4, 5, 6, 7, 8]
    seen: list[Event] = []
    with pytest.raises(TrainingError, match=r"7 steps were skipped before it, and --max-skipped-steps is 7"):
        seen.extend(event for event, _ in run(replace(one_by_one, max_skipped_steps=7), rows(poisoned)))
    assert isinstance(seen[-1], SkippedStep)
    assert seen[-1].skipped == 8


def test_a_run_that_is_to_stop_says_what_it_stopped_at_first() -> None:
    seen: list[Event] = []
    with pytest.raises(TrainingError, match=r"loss is nan[\s\S]*a, row 7[\s\S]*--on-nonfinite skip"):
        seen.extend(event for event, _ in run(replace(CONFIG, on_nonfinite="stop"), rows({7})))
    assert isinstance(seen[-1], SkippedStep)


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_finite_loss_with_an_infinite_gradient_is_left_out_too(batching: Literal["packed", "padded"]) -> None:
    """Hidden states of 1e25 and a head of 1e-25: logits are as ever, and the square of the head's gradient is
    beyond float32."""
    model, examples = tiny_model("qwen2", initializer_range=0.05), rows(set())
    with torch.no_grad():
        model.model.norm.weight.mul_(1e25)
        model.lm_head.weight.mul_(1e-25)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    config = replace(CONFIG, max_skipped_steps=100, batching=batching)
    with select_runner(model, config, examples, dtype=torch.float32, pad_token_id=0) as runner:
        events = list(train(Loop(config=config, examples=examples, runner=runner), start(model, config)))
    skipped = [event for event in events if isinstance(event, SkippedStep)]
    assert [event.skipped for event in skipped] == [1, 2, 3, 4, 5, 6]
    assert not [event for event in events if isinstance(event, Step)]
    assert all(math.isfinite(event.loss) and event.grad_norm == math.inf for event in skipped)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_a_limit_of_none_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_skipped_steps is 0: expected at least 1"):
        TrainConfig(max_skipped_steps=0)
