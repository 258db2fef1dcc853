"""The training loop. It only yields events; the caller logs, displays, and saves."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.examples import Example, learned_tokens_of
from handspun.training.batching import batches, epoch_order, steps_of_epoch, steps_of_run
from handspun.training.distributed import Distributed
from handspun.training.guards import (
    WINDOW,
    OutOfMemory,
    SkippedStep,
    Spike,
    free_memory,
    halved_max_tokens,
    is_fatal,
    is_finite,
    is_out_of_memory,
    raise_if_fatal,
    raise_if_unsplittable,
    row_ids,
    spike_in,
)
from handspun.training.optim import clip_gradients, lr_at, make_optimizer
from handspun.training.runner import BatchRunner


def evaluate(
    model: PreTrainedModel,
    runner: BatchRunner,
    examples: Sequence[Example],
    *,
    max_tokens: int,
    processes: Distributed = Distributed(),  # noqa: B008  (frozen)
) -> tuple[float, int]:
    """Return (mean loss per target token, number of target tokens), with dropout off. NaN stays NaN.

    Args:
        model: the model, on all ranks.
        runner: splits the examples into micro-batches and computes their losses.
        examples: the rows to evaluate.
        max_tokens: most tokens per micro-batch.
        processes: the ranks that share the work.
    """
    was_training = model.training
    model.eval()
    micro_batches = processes.local_micro_batches(examples, runner.batching, max_tokens)
    loss_sum = processes.sum(sum(runner.loss(micro_batch) for micro_batch in micro_batches))
    model.train(was_training)
    learned_tokens = learned_tokens_of(examples)
    return loss_sum / learned_tokens, learned_tokens


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    loss: mean over the batch's target tokens, before the update. tokens: all tokens of the rows. learned_tokens:
    the target tokens among them. computed_tokens: tokens that ran through the model, padding included, with a
    shared prefix counted once.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    rows: int
    tokens: int
    learned_tokens: int
    computed_tokens: int
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss, the mean over target tokens. `best` means the lowest so far."""

    step: int
    epoch: int
    loss: float
    learned_tokens: int
    best: bool


@dataclass(frozen=True)
class EpochEnd:
    """The end of an epoch."""

    step: int
    epoch: int


Event = Step | SkippedStep | Spike | OutOfMemory | Evaluation | EpochEnd


@dataclass
class TrainingState:
    """The mutable state of a run.

    max_tokens: the config's value, reduced when a micro-batch runs out of memory. losses: losses of recent steps,
    for spike detection.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    max_tokens: int
    step: int = 0
    best_loss: float = math.inf
    skipped: int = 0
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The fixed parts of a run: examples, options, and the runner for micro-batches."""

    config: TrainConfig
    examples: Sequence[Example]
    held_out: Sequence[Example] = ()
    runner: BatchRunner
    processes: Distributed = field(default_factory=Distributed)
    clock: Callable[[], float] = field(default=time.perf_counter)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, the last, shorter batch included."""
        return steps_of_epoch(len(self.examples), self.config)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return steps_of_run(len(self.examples), self.config)

    def ends_epoch(self, step: int) -> bool:
        """Return whether an epoch ends with this step: it is the epoch's last, or the run's."""
        return step % self.steps_per_epoch == 0 or step == self.total_steps

    def evaluates_after(self, step: int) -> bool:
        """Return whether to evaluate the held-out rows after this step."""
        every = self.config.eval_steps
        return bool(self.held_out) and (self.ends_epoch(step) or bool(every and step % every == 0))

    def ends_step(self, event: Event) -> bool:
        """Return whether the event is the last of its step, so the run can stop and resume here."""
        # A step is complete only after its evaluation and the end of its epoch. Saving or stopping only then means
        # a position is just a step number.
        # Resuming after a fatal skipped step would silently pass over it.
        if isinstance(event, Spike | OutOfMemory) or (
            isinstance(event, SkippedStep) and is_fatal(event, self.config)
        ):
            return False
        if self.ends_epoch(event.step):
            return isinstance(event, EpochEnd)
        return isinstance(event, Evaluation) or not self.evaluates_after(event.step)


def start(model: PreTrainedModel, config: TrainConfig) -> TrainingState:
    """Return the state before the first step."""
    return TrainingState(model, make_optimizer(model, config), config.max_tokens)


def train(loop: Loop, state: TrainingState) -> Iterator[Event]:
    """Train from the state's step to the last one, yielding events.

    Yields the events of each step and an EpochEnd per epoch, also where `max_steps` ends the last one early. With
    held-out rows, also an Evaluation at the start, every `eval_steps` steps, and at the end of each epoch. Raises
    TrainingError where `train_step` does.
    """
    config = loop.config
    state.model.train()
    if state.step == 0 and loop.held_out:
        yield _evaluation(loop, state, epoch=0)
    while state.step < loop.total_steps:
        epochs_done, steps_done = divmod(state.step, loop.steps_per_epoch)
        epoch, steps = epochs_done + 1, min(loop.steps_per_epoch, loop.total_steps - state.step + steps_done)
        order = epoch_order(len(loop.examples), seed=config.seed, epoch=epoch)
        left = order[steps_done * config.batch_size : steps * config.batch_size]
        for batch in batches(loop.examples, left, config.batch_size):
            yield from train_step(loop, state, batch, epoch)
            if loop.evaluates_after(state.step):
                yield _evaluation(loop, state, epoch)
        yield EpochEnd(state.step, epoch)


def train_step(loop: Loop, state: TrainingState, batch: Sequence[Example], epoch: int) -> Iterator[Event]:
    """Take one optimizer step on a batch: forward and backward in micro-batches, clip, update.

    Each loss is divided by the target tokens of the whole batch, so the split into micro-batches changes only
    memory and speed. Yields a Step, preceded by a Spike if its loss is one. If the loss or gradient is not finite,
    yields a SkippedStep instead: nothing is updated, and the schedule advances as usual. Yields an OutOfMemory
    first for each micro-batch that did not fit. Raises TrainingError after a SkippedStep that ends the run, and if
    a single row does not fit in memory.

    Args:
        loop: the fixed parts of the run.
        state: the model, the optimizer, and counters; updated.
        batch: the rows of the step.
        epoch: number of the epoch, from 1, for the events.
    """
    began, learned_tokens = loop.clock(), learned_tokens_of(batch)
    loss, computed_tokens = 0.0, 0
    _seed_dropout(loop.config, step=state.step, rank=loop.processes.rank)
    for micro_batch in loop.processes.local_micro_batches(batch, loop.runner.batching, state.max_tokens):
        loss_sum = None
        try:
            loss_sum = loop.runner.backward(micro_batch, learned_tokens)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if loss_sum is None:  # the error is gone here, and with it what its frames held
            yield _shrink_micro_batches(loop, state, micro_batch, epoch)
            yield from train_step(loop, state, batch, epoch)
            return
        loss += loss_sum / learned_tokens
        computed_tokens += loop.runner.batching.computed_tokens(micro_batch)
    loss, computed_tokens = loop.processes.sum(loss), int(loop.processes.sum(computed_tokens))
    loop.processes.sum_gradients(state.model)
    grad_norm = clip_gradients(state.model, loop.config.max_grad_norm or math.inf)
    learning_rate = lr_at(state.step, loop.total_steps, loop.config)
    if is_finite(loss, grad_norm):
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    yield from _events(loop, state, batch, Step(
        state.step, loop.total_steps, epoch, loss, learning_rate, grad_norm, len(batch),
        sum(len(example) for example in batch), learned_tokens, computed_tokens, loop.clock() - began,
    ))  # fmt: skip


def _shrink_micro_batches(
    loop: Loop, state: TrainingState, micro_batch: Sequence[Example], epoch: int
) -> OutOfMemory:
    """Free memory and gradients, and halve `max_tokens`. Raise TrainingError if the rows cannot be split."""
    free_memory()
    state.optimizer.zero_grad(set_to_none=True)
    raise_if_unsplittable(micro_batch, state.step + 1, loop.config, processes=loop.processes.count)
    state.max_tokens = halved_max_tokens(micro_batch, state.max_tokens)
    return OutOfMemory(state.step + 1, epoch, loop.runner.batching.computed_tokens(micro_batch), state.max_tokens)


def _events(loop: Loop, state: TrainingState, batch: Sequence[Example], step: Step) -> Iterator[Event]:
    """Yield the step, after a Spike if its loss is one; or a SkippedStep, and raise if it ends the run."""
    rows = row_ids(batch)
    if not is_finite(step.loss, step.grad_norm):
        state.skipped += 1
        skipped = SkippedStep(
            step.step, step.total_steps, step.epoch, step.loss, step.grad_norm, rows, state.skipped
        )
        yield skipped
        raise_if_fatal(skipped, loop.config)
        return
    spike = spike_in(state.losses, step.loss, step=step.step, epoch=step.epoch, batch=rows)
    state.losses = [*state.losses, step.loss][-WINDOW:]
    if spike:
        yield spike
    yield step


def _evaluation(loop: Loop, state: TrainingState, epoch: int) -> Evaluation:
    loss, learned_tokens = evaluate(
        state.model,
        loop.runner,
        loop.held_out,
        max_tokens=state.max_tokens,
        processes=loop.processes,
    )
    best = loss < state.best_loss
    if best:
        state.best_loss = loss
    return Evaluation(state.step, epoch, loss, learned_tokens, best)


def _seed_dropout(config: TrainConfig, *, step: int, rank: int) -> None:
    """Seed dropout from the step."""
    # So a resumed run drops the same values without a saved random state.
    torch.manual_seed(((config.seed * 1_000_003 + step) * 1_009 + rank) % 2**63)
