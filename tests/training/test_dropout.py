"""Dropout is on in training, another at each step, and off for the held-out loss."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from peft.tuners.lora import Linear
from transformers import PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.models.lora import add_lora
from handspun.training.distributed import Distributed
from handspun.training.loop import Evaluation, Loop, Step, TrainingState, evaluate, start, train, train_step
from handspun.training.objectives import PaddedRunner
from handspun.training.runner import select_runner
from tiny import tiny_model

ROWS = [Example([5, 6, 7, 8, 9, 10, 11, 12], [False] * 3 + [True] * 5, "rows.csv", 1)]
KINDS = ["LoRA", "attention"]
Batching = Literal["packed", "padded"]


def a_model(kind: str) -> PreTrainedModel:
    """With dropout of 0.5, in eval mode, as it is loaded; an adapter's B is not zero, so that dropping counts."""
    if kind == "attention":
        return tiny_model("qwen2", attention_dropout=0.5)
    torch.manual_seed(0)
    model = add_lora(tiny_model("qwen2"), "tiny", rank=3, alpha=6, dropout=0.5)
    for module in model.modules():
        if isinstance(module, Linear):
            torch.nn.init.normal_(module.lora_B["default"].weight)
    return model.eval()


def losses_of(
    kind: str, batching: Batching, *, held_out: Sequence[Example] = (), first_step: int = 0, **options: Any
) -> tuple[list[float], list[float]]:
    """(losses of the steps, held-out losses), at a rate so low that no weight moves by much."""
    lora = kind == "LoRA"
    config = TrainConfig(
        num_epochs=3,
        batch_size=1,
        learning_rate=1e-30,
        batching=batching,
        lora=lora,
        lora_dropout=0.5 if lora else 0.0,
        **options,
    )
    model = a_model(kind)
    with select_runner(model, config, ROWS, dtype=torch.float32, pad_token_id=0) as runner:
        state: TrainingState = start(model, config)
        state.step = first_step
        loop = Loop(config=config, examples=ROWS, held_out=held_out, runner=runner)
        events = list(train(loop, state))
    steps = [event.loss for event in events if isinstance(event, Step)]
    return steps, [event.loss for event in events if isinstance(event, Evaluation)]


def loss_without_dropout(kind: str) -> float:
    return PaddedRunner(a_model(kind), torch.float32, 0).loss(ROWS) / 5


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_step_drops_and_drops_something_else(kind: str, batching: Batching) -> None:
    """On the same row, and with weights that stay, losses are all different."""
    steps, _ = losses_of(kind, batching)
    assert len({round(loss, 4) for loss in [*steps, loss_without_dropout(kind)]}) == 4


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_drops_what_its_number_and_the_seed_say(kind: str, batching: Batching) -> None:
    """Whatever was drawn before, and wherever the run begins again."""
    torch.manual_seed(1)
    first, _ = losses_of(kind, batching)
    torch.manual_seed(2)
    resumed, _ = losses_of(kind, batching, first_step=1)
    assert resumed == pytest.approx(first[1:], rel=1e-6)
    other_seed, _ = losses_of(kind, batching, seed=1)
    assert not set(map(repr, other_seed)) & set(map(repr, first))


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_held_out_loss_has_no_dropout_and_training_goes_on_with_it(kind: str, batching: Batching) -> None:
    without = loss_without_dropout(kind)
    steps, held_out = losses_of(kind, batching, held_out=ROWS, eval_steps=1)
    assert held_out == pytest.approx([without] * 4, rel=1e-5)
    undisturbed, _ = losses_of(kind, batching)
    assert steps == pytest.approx(undisturbed, rel=1e-6)


@pytest.mark.parametrize("rank", [0, 3])
def test_the_seed_of_a_step_is_the_same_in_every_version(rank: int) -> None:
    """So a run that another version began drops the same values: (seed * 1,000,003 + step) * 1,009 + rank."""
    model, config = a_model("LoRA"), TrainConfig(num_epochs=1, batch_size=1, seed=2, lora=True)
    runner, processes = PaddedRunner(model, torch.float32, 0), Distributed(rank=rank)
    state = start(model, config)
    state.step = 5
    list(train_step(Loop(config=config, examples=ROWS, runner=runner, processes=processes), state, ROWS, 1))
    assert torch.initial_seed() == (2 * 1_000_003 + 5) * 1_009 + rank


class Two(Distributed):
    """As if another process had the same rows: sums are twice as large."""

    def sum(self, value: float) -> float:
        return 2 * value


def test_held_out_losses_are_summed_over_the_processes() -> None:
    model, config = a_model("LoRA"), TrainConfig(num_epochs=1, batch_size=1, lora=True)
    runner = PaddedRunner(model, torch.float32, 0)
    loop = Loop(config=config, examples=ROWS, held_out=ROWS, runner=runner, processes=Two())
    evaluation = next(train(loop, start(model, config)))
    assert isinstance(evaluation, Evaluation)
    assert evaluation.loss == pytest.approx(2 * loss_without_dropout("LoRA"), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_leaves_the_model_in_the_mode_that_it_had(training: bool) -> None:
    model = a_model("LoRA").train(training)
    loss, tokens = evaluate(model, PaddedRunner(model, torch.float32, 0), ROWS, max_tokens=100)
    assert (loss, tokens) == (pytest.approx(loss_without_dropout("LoRA"), rel=1e-5), 5)
    assert math.isfinite(loss)
    assert model.training is training
