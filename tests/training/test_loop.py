"""The loop: every row, every token once, the same result however the work is cut, and it learns."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.decoding.generate import generate
from handspun.errors import TrainingError
from handspun.models.end_of_turn import make_end_of_turn_eos
from handspun.models.load import ChatModel
from handspun.training.batching import Batching
from handspun.training.guards import OutOfMemory, SkippedStep, Spike
from handspun.training.loop import EpochEnd, Evaluation, Event, Loop, Step, evaluate, start, train
from handspun.training.objectives import PaddedRunner
from handspun.training.runner import select_runner
from tiny import tiny_model

QUESTIONS = {
    "What is red?": "a color",
    "What is two and two?": "four",
    "Name a city.": "Shanghai",
    "Say it in capitals: hello": "HELLO",
    "Tell me a joke.": "No.",
    "List three numbers.": "1, 2, 3",
    "Who are you?": "I am tiny.",
    "What does é look like?": "é",
}


def random_examples(count: int, *, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for row in range(count):
        length = int(torch.randint(6, 30, (1,), generator=generator))
        ids = torch.randint(0, 300, (length,), generator=generator).tolist()
        examples.append(Example(ids, [i >= length // 2 for i in range(length)], "rows.csv", row + 1))
    return examples


def run(config: TrainConfig, examples: list[Example], held_out: list[Example] | None = None) -> list[Event]:
    model = tiny_model("qwen2", initializer_range=0.05)
    return list(events_of(model, config, examples, held_out or []))


def events_of(
    model: PreTrainedModel, config: TrainConfig, examples: list[Example], held_out: list[Example]
) -> Iterator[Event]:
    with select_runner(model, config, examples, dtype=torch.float32, pad_token_id=0) as runner:
        loop = Loop(config=config, examples=examples, held_out=held_out, runner=runner)
        yield from train(loop, start(model, config))


def steps(events: list[Event]) -> list[Step]:
    return [event for event in events if isinstance(event, Step)]


def test_every_row_is_trained_once_an_epoch_the_last_shorter_batch_too() -> None:
    examples = random_examples(7)
    made = steps(run(TrainConfig(num_epochs=2, batch_size=3), examples))
    assert [step.rows for step in made] == [3, 3, 1, 3, 3, 1]
    assert [step.step for step in made] == [1, 2, 3, 4, 5, 6]
    assert {step.total_steps for step in made} == {6}
    assert sum(step.tokens for step in made) == 2 * sum(len(e) for e in examples)
    assert sum(step.learned_tokens for step in made) == 2 * sum(e.learned_tokens for e in examples)


@pytest.mark.parametrize(
    ("max_steps", "rows", "epochs"),
    [
        (1, [3], [1]),
        (3, [3, 3, 1], [3]),
        (4, [3, 3, 1, 3], [3, 4]),
        (6, [3, 3, 1, 3, 3, 1], [3, 6]),
        (99, [3, 3, 1, 3, 3, 1], [3, 6]),
    ],
)
def test_max_steps_ends_the_run_in_the_middle_of_an_epoch(
    max_steps: int, rows: list[int], epochs: list[int]
) -> None:
    """The steps are the first ones of the whole run, and the cut epoch has its end and its evaluation."""
    config = TrainConfig(num_epochs=2, batch_size=3, lr_schedule="constant", warmup_ratio=0.0)
    examples, held_out = random_examples(7), random_examples(2, seed=9)
    events = run(replace(config, max_steps=max_steps), examples, held_out)
    made = steps(events)
    assert [step.rows for step in made] == rows
    assert {step.total_steps for step in made} == {len(rows)}
    assert [event.step for event in events if isinstance(event, EpochEnd)] == epochs
    assert [event.step for event in events if isinstance(event, Evaluation)] == [0, *epochs]
    assert [step.loss for step in made] == [step.loss for step in steps(run(config, examples))][: len(rows)]


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_how_a_batch_is_cut_does_not_change_losses_or_gradients(batching: Any) -> None:
    config = TrainConfig(num_epochs=2, batch_size=6, learning_rate=1e-3, batching=batching)
    whole = steps(run(config, random_examples(24)))
    for max_tokens in (1, 50):
        cut = steps(run(replace(config, max_tokens=max_tokens), random_examples(24)))
        assert [s.loss for s in cut] == pytest.approx([s.loss for s in whole], rel=1e-5)
        assert [s.grad_norm for s in cut] == pytest.approx([s.grad_norm for s in whole], rel=1e-4)


def test_the_same_seed_gives_the_same_run_and_another_seed_another_order() -> None:
    config = TrainConfig(num_epochs=1, batch_size=4)
    losses = [[s.loss for s in steps(run(replace(config, seed=seed), random_examples(12)))] for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


def test_held_out_loss_is_weighted_by_tokens_whatever_the_batch() -> None:
    model, held_out = tiny_model("llama"), random_examples(9, seed=5)
    losses = [
        evaluate(model, PaddedRunner(model, torch.float32, 0), held_out, max_tokens=max_tokens)[0]
        for max_tokens in (1, 60, 10_000)
    ]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


def test_events_come_in_order_and_the_best_is_marked() -> None:
    config = TrainConfig(num_epochs=2, batch_size=4, eval_steps=1, learning_rate=1e-3)
    events = run(config, random_examples(8), random_examples(4, seed=9))
    kinds = [type(event).__name__ for event in events]
    epoch = ["Step", "Evaluation", "Step", "Evaluation", "EpochEnd"]
    assert kinds == ["Evaluation", *epoch, *epoch]
    evaluations = [event for event in events if isinstance(event, Evaluation)]
    lowest = math.inf
    for evaluation in evaluations:
        assert evaluation.best == (evaluation.loss < lowest)
        lowest = min(lowest, evaluation.loss)
    assert [event.epoch for event in events if isinstance(event, EpochEnd)] == [1, 2]


@pytest.mark.parametrize(
    ("eval_steps", "steps"),
    [
        (None, [0, 3, 6]),
        (1, [0, 1, 2, 3, 4, 5, 6]),
        (2, [0, 2, 3, 4, 6]),
        (4, [0, 3, 4, 6]),
        (100, [0, 3, 6]),
    ],
)
def test_held_out_rows_are_due_at_the_start_every_so_many_steps_and_after_each_epoch(
    eval_steps: int | None, steps: list[int]
) -> None:
    config = TrainConfig(num_epochs=2, batch_size=4, eval_steps=eval_steps)
    events = run(config, random_examples(10), random_examples(3, seed=9))
    assert [event.step for event in events if isinstance(event, Evaluation)] == steps
    assert [event.epoch for event in events if isinstance(event, Evaluation)] == [-(-step // 3) for step in steps]


@pytest.mark.parametrize("eval_steps", [None, 1])
def test_without_held_out_rows_there_is_no_evaluation(eval_steps: int | None) -> None:
    events = run(TrainConfig(num_epochs=1, batch_size=4, eval_steps=eval_steps), random_examples(8))
    assert [type(event).__name__ for event in events] == ["Step", "Step", "EpochEnd"]


class Whole(Batching):
    """A batch is one micro-batch."""

    def split(self, batch: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
        assert max_tokens == 77  # that of the state, which memory may have made smaller than what was asked for
        yield list(batch)


class Scripted:
    """An runner whose held-out losses are written down, and whose steps learn nothing."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = iter(losses)
        self.batching = Whole("packed")

    def loss(self, part: Sequence[Example]) -> float:
        return next(self.losses) * sum(example.learned_tokens for example in part)

    def row_losses(self, part: Sequence[Example]) -> list[float]:
        raise AssertionError(f"of {len(part)} rows")

    def backward(self, part: Sequence[Example], divisor: int) -> float:
        assert part
        return 2.0 * divisor


def scripted_events(losses: list[float], *, from_step: int = 0, best_loss: float = math.inf) -> list[Event]:
    config = TrainConfig(num_epochs=2, batch_size=2, eval_steps=1, max_tokens=123)
    state = start(tiny_model("qwen2"), config)
    state.step, state.best_loss, state.max_tokens = from_step, best_loss, 77
    loop = Loop(config=config, examples=random_examples(6), held_out=random_examples(3), runner=Scripted(losses))
    return list(train(loop, state))


def test_the_best_is_the_lowest_of_all_not_of_the_last_two() -> None:
    events = scripted_events([5.0, 4.0, 6.0, 4.5, 4.0, 3.5, math.nan])
    evaluations = [event for event in events if isinstance(event, Evaluation)]
    assert [evaluation.loss for evaluation in evaluations[:-1]] == pytest.approx([5.0, 4.0, 6.0, 4.5, 4.0, 3.5])
    assert [evaluation.best for evaluation in evaluations] == [True, True, False, False, False, True, False]


def test_a_run_that_goes_on_does_not_evaluate_before_its_first_step() -> None:
    """From the middle of the first epoch, and from the end of it."""
    events = scripted_events([4.0, 4.5, 3.5, 9.0], from_step=2, best_loss=4.2)
    assert [(type(event).__name__, event.step) for event in events][:4] == [
        ("Step", 3), ("Evaluation", 3), ("EpochEnd", 3), ("Step", 4),
    ]  # fmt: skip
    assert [event.best for event in events if isinstance(event, Evaluation)] == [True, False, True, False]
    events = scripted_events([4.0, 4.5, 3.5], from_step=3)
    assert [(type(event).__name__, event.step) for event in events][:2] == [("Step", 4), ("Evaluation", 4)]
    assert [step.epoch for step in steps(events)] == [2, 2, 2]


def test_a_run_that_goes_on_takes_the_rows_that_are_left() -> None:
    """Steps of 2 rows of a seeded order: from step 2, the last two rows of the first epoch, then all six."""
    whole = [step.tokens for step in steps(scripted_events([1.0] * 7))]
    assert len(set(whole)) > 3
    assert [step.tokens for step in steps(scripted_events([1.0] * 7, from_step=2))] == whole[2:]


def a_step(step: int) -> Step:
    return Step(step, 6, 1, 1.0, 1.0, 1.0, 1, 1, 1, 1, 0.0)


def a_skipped(step: int, skipped: int) -> SkippedStep:
    return SkippedStep(step, 6, 1, math.nan, math.nan, [], skipped)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize(
    ("event", "with_held_out", "without"),
    [  # of 3 steps in an epoch, and an evaluation every 2
        (a_step(1), True, True),
        (a_step(2), False, True),  # an evaluation follows
        (Evaluation(2, 1, 1.0, 1, True), True, True),
        (a_step(3), False, False),  # the end of the epoch follows
        (Evaluation(3, 1, 1.0, 1, True), False, False),
        (EpochEnd(3, 1), True, True),
        (a_skipped(1, 2), True, True),
        (a_skipped(1, 3), False, False),  # it ends the run
        (a_skipped(2, 2), False, True),
        (a_skipped(3, 2), False, False),
        (Spike(1, 1, 9.0, 1.0, 1.5, []), False, False),  # its step follows
        (OutOfMemory(1, 1, 10, 5), False, False),
    ],
)
def test_a_run_can_be_resumed_behind_the_last_event_of_a_step(
    event: Event, with_held_out: bool, without: bool, held_out: bool
) -> None:
    config = TrainConfig(num_epochs=2, batch_size=2, eval_steps=2, on_nonfinite="skip", max_skipped_steps=2)
    rows = random_examples(3) if held_out else []
    loop = Loop(config=config, examples=random_examples(6), held_out=rows, runner=Scripted([]))
    assert loop.ends_step(event) is (with_held_out if held_out else without)


def test_the_same_held_out_loss_again_is_not_the_best_again() -> None:
    """At a rate that moves nothing, all evaluations are equal."""
    config = TrainConfig(num_epochs=2, batch_size=4, learning_rate=1e-30)
    events = run(config, random_examples(8), random_examples(3, seed=9))
    evaluations = [event for event in events if isinstance(event, Evaluation)]
    assert len({evaluation.loss for evaluation in evaluations}) == 1
    assert [evaluation.best for evaluation in evaluations] == [True, False, False]


def test_clipping_bounds_the_update_and_zero_turns_it_off() -> None:
    """With plain AdamW the first update does not depend on the gradient's scale, so the norm is looked at."""
    config = TrainConfig(num_epochs=1, batch_size=8, max_grad_norm=0.0)
    unclipped = steps(run(config, random_examples(8)))[0]
    clipped = steps(run(replace(config, max_grad_norm=1e-9), random_examples(8)))[0]
    assert unclipped.grad_norm == pytest.approx(clipped.grad_norm)  # the norm before clipping is what is told
    model = tiny_model("qwen2", initializer_range=0.05)
    before = model.lm_head.weight.detach().clone()
    tight = replace(config, max_grad_norm=1e-12, learning_rate=1e-3, warmup_ratio=0.0)
    list(events_of(model, tight, random_examples(8), []))
    # a gradient far below AdamW's epsilon of 1e-8 hardly moves anything
    assert (model.lm_head.weight - before).abs().max() < 1e-6


def test_a_loss_that_is_no_number_stops_before_the_step_and_names_its_rows() -> None:
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    config = TrainConfig(num_epochs=1, batch_size=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(TrainingError, match=r"step 1 was skipped: loss is nan") as caught:
        list(events_of(model, config, random_examples(2), []))
    assert "rows.csv, row 1" in str(caught.value)
    assert "rows.csv, row 2" in str(caught.value)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_nan_held_out_loss_is_reported_as_it_is() -> None:
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    loss, _ = evaluate(model, PaddedRunner(model, torch.float32, 0), random_examples(2), max_tokens=100)
    assert math.isnan(loss)


@pytest.mark.slow
def test_overfitting_eight_rows_reproduces_them_word_for_word(tiny_chat: ChatModel) -> None:
    make_end_of_turn_eos(tiny_chat)
    examples = []
    for row, (question, answer) in enumerate(QUESTIONS.items()):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        (encoded,) = tiny_chat.template.encode(messages)
        examples.append(Example(encoded.input_ids, encoded.loss_mask, "rows.csv", row + 1))
    config = TrainConfig(num_epochs=150, batch_size=8, learning_rate=1e-2)
    last = steps(list(events_of(tiny_chat.model, config, examples, [])))[-1]
    assert last.loss < 0.05
    tiny_chat.model.eval()
    answers = generate(tiny_chat, list(QUESTIONS), max_new_tokens=30)
    assert [answer.text for answer in answers] == list(QUESTIONS.values())
    assert {answer.finish_reason for answer in answers} == {"eos"}
