"""The training loop. It yields events and does nothing else with them: its caller logs, shows and saves."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.batches import batches, epoch_order
from handspun.data.examples import Example
from handspun.errors import TrainingError
from handspun.training.evaluate import evaluate
from handspun.training.execution import Execution
from handspun.training.optim import clip_gradients, lr_at, make_optimizer
from handspun.training.processes import Processes


@dataclass(frozen=True)
class Step:
    """One optimiser step: loss is the mean over the batch's learned tokens, before the update. Of its tokens, some
    are learned; those computed have padding in them, and a shared prefix once."""

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
    """Held-out loss, a mean over learned tokens; `best` if it is the lowest so far."""

    step: int
    epoch: int
    loss: float
    learned_tokens: int
    best: bool


@dataclass(frozen=True)
class EpochEnd:
    """All rows have been seen once more."""

    step: int
    epoch: int


Event = Step | Evaluation | EpochEnd


@dataclass
class TrainingState:
    """What changes while a model is trained."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    best_loss: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A run's fixed parts: examples, options, and how a micro-batch is computed."""

    config: TrainConfig
    examples: Sequence[Example]
    held_out: Sequence[Example] = ()
    execution: Execution
    processes: Processes = field(default_factory=Processes)
    clock: Callable[[], float] = field(default=time.perf_counter)

    @property
    def steps_per_epoch(self) -> int:
        """The last, shorter batch is one too."""
        return math.ceil(len(self.examples) / self.config.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps_per_epoch * self.config.num_epochs

    def evaluates_after(self, step: int) -> bool:
        """Whether held-out rows are due after this step."""
        every = self.config.eval_steps
        return bool(self.held_out) and (step % self.steps_per_epoch == 0 or bool(every and step % every == 0))

    def ends_step(self, event: Event) -> bool:
        """Whether nothing more comes of the event's step: the run can be resumed from here."""
        if event.step % self.steps_per_epoch == 0:
            return isinstance(event, EpochEnd)
        return isinstance(event, Evaluation) or not self.evaluates_after(event.step)


def start(model: PreTrainedModel, config: TrainConfig) -> TrainingState:
    """The state before the first step."""
    return TrainingState(model, make_optimizer(model, config))


def train(loop: Loop, state: TrainingState) -> Iterator[Event]:
    """All epochs, or what is left of them after the state's step.

    A Step after each optimiser step, an Evaluation at the start, every `eval_steps` and at the end of each epoch
    (with held-out rows), and an EpochEnd.

    Raises TrainingError before a step whose loss or gradient is not finite.
    """
    config = loop.config
    state.model.train()
    if state.step == 0 and loop.held_out:
        yield _evaluation(loop, state, epoch=0)
    epochs_done, steps_done = divmod(state.step, loop.steps_per_epoch)
    for epoch in range(epochs_done + 1, config.num_epochs + 1):
        order = epoch_order(len(loop.examples), seed=config.seed, epoch=epoch)
        for batch in batches(loop.examples, order[steps_done * config.batch_size :], config.batch_size):
            yield train_step(loop, state, batch, epoch)
            if loop.evaluates_after(state.step):
                yield _evaluation(loop, state, epoch)
        steps_done = 0
        yield EpochEnd(state.step, epoch)


def train_step(loop: Loop, state: TrainingState, batch: Sequence[Example], epoch: int) -> Step:
    """One optimiser step on a batch: forward and backward in micro-batches, clip, update.

    Losses are divided by the learned tokens of the whole batch, so how it is cut changes nothing.
    """
    began = loop.clock()
    _seed_dropout(loop.config, step=state.step, rank=loop.processes.rank)
    learned_tokens = sum(example.learned_tokens for example in batch)
    loss, computed_tokens = 0.0, 0
    for part in loop.processes.parts(batch, lambda rows: loop.execution.cut(rows, loop.config.max_tokens)):
        loss += loop.execution.backward(part, learned_tokens) / learned_tokens
        computed_tokens += loop.execution.computed_tokens(part)
    loss, computed_tokens = loop.processes.sum(loss), int(loop.processes.sum(computed_tokens))
    loop.processes.sum_gradients(state.model)
    grad_norm = clip_gradients(state.model, loop.config.max_grad_norm or math.inf)
    _refuse_not_finite(loss, grad_norm, batch, state.step + 1)
    learning_rate = lr_at(state.step, loop.total_steps, loop.config)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    tokens = sum(len(example) for example in batch)
    return Step(
        state.step, loop.total_steps, epoch, loss, learning_rate, grad_norm,
        len(batch), tokens, learned_tokens, computed_tokens, loop.clock() - began,
    )  # fmt: skip


def _evaluation(loop: Loop, state: TrainingState, epoch: int) -> Evaluation:
    loss, learned_tokens = evaluate(
        state.model,
        loop.execution,
        loop.held_out,
        max_tokens=loop.config.max_tokens,
        processes=loop.processes,
    )
    best = loss < state.best_loss
    if best:
        state.best_loss = loss
    return Evaluation(state.step, epoch, loss, learned_tokens, best)


def _seed_dropout(config: TrainConfig, *, step: int, rank: int) -> None:
    """A function of the step: a resumed run drops what it would have dropped, whatever drew numbers meanwhile."""
    torch.manual_seed(((config.seed * 1_000_003 + step) * 1_009 + rank) % 2**63)


def _refuse_not_finite(loss: float, grad_norm: float, batch: Sequence[Example], step: int) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    rows = "\n".join(f"  {example.file}, row {example.row}" for example in batch)
    raise TrainingError(
        f"step {step} was not made: its loss is {loss} and its gradient's norm {grad_norm}. The weights are as "
        f"they were before it. Its rows:\n{rows}\n"
        "Look at them with `handspun preview`; a lower --learning-rate, or --dtype float32, may help."
    )
